"""``data.generate``: answers of the teacher, or of another model, committed to disk before they are
used.

Rows become prompts, prompts become answers, and a prompt with its answer is a sequence like any
other: planned, scored by prefill, stored. The sampled tokens are learnt. Text is never tokenised
again. Of another writer than the teacher, the logprobs of its tokens are kept, too, unless some of
the tokens are the teacher's (``logitcask.pipeline.generate.splice``).

All files are in ``.build/generations/``. The prompts are streamed there first, in units of a few
hundred answers. A unit is committed when the file with its answers exists (``write_durably``), and
is never written again. A build that was killed resumes at the first unit without answers, and the
cache is made from the committed answers. This holds even if the engine would now sample other
tokens, because engines round differently in other batches.
"""

from __future__ import annotations

import hashlib
import math
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from logitcask.cache_format import CacheReader
from logitcask.cache_format.differences import describe_difference
from logitcask.cache_format.durable import load_state, sync, write_durably, writing_to
from logitcask.cache_format.errors import UserError
from logitcask.cache_format.manifest import (
    DataHash,
    GenerationIdentity,
    SpliceIdentity,
    TeacherIdentity,
    TokenizerIdentity,
)
from logitcask.cache_format.runtime.interruption import at_safe_points, safe_point
from logitcask.cache_format.runtime.progress import ProgressBar
from logitcask.pipeline.config import BuildConfig
from logitcask.pipeline.generate import writer as other_writer
from logitcask.pipeline.generate.prompts import CountedOnce, PromptRow, Prompts
from logitcask.pipeline.generate.splice import Begun, Splicer
from logitcask.pipeline.identity import (
    check_teacher,
    check_unchanged,
    tokenizer_changes,
    tokenizer_of,
)
from logitcask.pipeline.teachers.base import Prompt, SampledAnswer, Sampling, Writer
from logitcask.pipeline.text.rejects import Rejects
from logitcask.pipeline.text.sources import RowSource
from logitcask.pipeline.types import Sequence

_PROMPTS = pa.schema([("row_id", pa.string()), ("input_ids", pa.list_(pa.int32()))])
_BEGUN = [
    # For each sample.
    pa.field("begun", pa.list_(pa.list_(pa.int32()))),
    pa.field("open", pa.list_(pa.bool_())),
]
_ANSWERS = pa.schema(
    [
        ("answer", pa.list_(pa.int32())),
        ("finish", pa.string()),
        ("logprobs", pa.list_(pa.float32())),
        ("top_ids", pa.list_(pa.int32())),  # token by token
    ]
)
_UNIT_ANSWERS = 256
_NO_LOGPROBS = np.empty(0, np.float32)

Finish = Literal["stop", "length", "empty"]


class GenerationState(BaseModel):
    """``.build/generations/prompts.json``: from here on a resumed build answers these prompts."""

    model_config = ConfigDict(frozen=True)

    request: dict[str, Any]
    units: int
    answers: int
    counters: dict[str, int]
    stamp: str
    prompts_sha256: str
    # None if an earlier version wrote this file.
    tokenizer: TokenizerIdentity | None = None
    splice: SpliceIdentity | None = None


@dataclass(frozen=True, slots=True, eq=False)
class WrittenAnswer:
    """The writer's text, int32[m], with its end token, if any, and the reason of its end.

    ``stop``: an end token or a stop string; ``length``: the length limit; ``empty``: no content.
    ``logprobs``, float32[m], are those of another writer than the teacher, and ``top_ids``,
    int32[m, C], its most probable ids at each token, without those that the teacher lacks, padded at
    the end with -1.
    """

    input_ids: NDArray[np.int32]
    finish: Finish
    logprobs: NDArray[np.float32] | None = None
    top_ids: NDArray[np.int32] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _Asked:
    """An answer to be written.

    prompt: int32[n], of the data. begun: int32[m], the tokens of the answer that exist.
    longest: of all its tokens. to_write: what the writer goes on from; None if it is complete.
    """

    sequence_id: str
    prompt: NDArray[np.int32]
    begun: NDArray[np.int32]
    longest: int
    to_write: Prompt | None


class Generations:
    """Answers to the prompts of one source, as sequences; ``complete`` before ``sequences``.

    ``counters`` are those of ``Prompts``, and of the latest ``sequences()``: ``generations``;
    ``generated_tokens``; ``finished_stop``, ``finished_length``, ``finished_empty`` (the teacher
    says nothing; sequences all the same where its end token is left to be learnt); ``sequences``;
    ``tokens``; ``kept_positions``; ``stopped_at_max_tokens``. ``seconds``: spent writing.

    earlier: opens the cache whose answers are gone on with, if ``data.generate.splice`` is set. It
             is read when the prompts are written. The counters of ``Splicer`` are in ``counters``
             then.
    """

    def __init__(
        self,
        prompts: Prompts,
        config: BuildConfig,
        sampling: Sampling,
        build_dir: Path,
        request: dict[str, Any],
        earlier: Callable[[], CacheReader] | None = None,
    ) -> None:
        assert config.data.generate is not None
        self._earlier = earlier
        self.tokenizer = prompts.tokenizer
        self.template = prompts.template
        self.sampling = sampling
        self._prompts = prompts
        self._tokenizer = tokenizer_of(prompts, config)
        self._config = config
        self._settings = config.data.generate
        self._request = request
        self._folder = build_dir / "generations"
        self._counters: Counter[str] = Counter()
        self.seconds = 0.0

    @property
    def counters(self) -> dict[str, int]:
        return {**self._state().counters, **self._counters}

    @property
    def stamp(self) -> str:
        """Stamp of the source at the time when the prompts were read."""
        return self._state().stamp

    @staticmethod
    def request_in(build_dir: Path) -> dict[str, Any]:
        """The request of the prompts in ``build_dir``; empty if there are none."""
        file = build_dir / "generations" / "prompts.json"
        return load_state(GenerationState, file).request if file.exists() else {}

    def check_source(self) -> None:
        """Does nothing: the source was checked when the prompts were read, perhaps days ago."""

    def identity(self) -> GenerationIdentity:
        return GenerationIdentity(
            prompts_sha256=self._state().prompts_sha256,
            end_tokens=self.sampling.end_tokens,
            max_new_tokens=self._settings.max_new_tokens,
            splice=self._state().splice,
            writer=None
            if self._config.writer is None
            else other_writer.identity(
                load_state(TeacherIdentity, self._folder / "writer.json"), self._settings
            ),
        )

    def complete(self, source: RowSource, start: Callable[[Sampling], Any]) -> None:
        """Writes prompts and missing answers to disk; ``start`` starts the engine if needed.

        Raises UserError for existing answers of other settings, another tokenizer or another
        teacher, and if the data changes while it is read.
        """
        with writing_to(self._config.folder):
            state = self._state() if self._state_file.exists() else self._write_prompts(source)
            if state.request != self._request:
                raise UserError(
                    f"{self._config.output} holds an unfinished build with other settings: "
                    f"{describe_difference(state.request, self._request)}; go back to them, start afresh with --restart, "
                    "or choose another output"
                )
            if state.tokenizer is not None and (
                changes := tokenizer_changes(state.tokenizer, self._tokenizer)
            ):
                raise UserError(
                    f"{self._config.output} holds prompts of another tokenizer: {self._config.teacher.model} has changed "
                    f"since they were written ({changes}); put it back, start afresh with --restart, or choose another output"
                )
            missing = [unit for unit in range(state.units) if not self._answers_file(unit).exists()]
            written = self._tokens(range(missing[0])) if missing else 0
            if missing and written <= self._limit:
                teacher = start(self.sampling)
                who = "teacher" if self._config.writer is None else "writer"
                check_teacher(self._folder.parent, teacher.identity(), who=who)
                self._answer(teacher, missing, state.answers, written)

    def sequences(self, rows: Iterable[Any] = ()) -> Iterator[Sequence]:
        """Streams prompts with their answers, as ``row/sample``, up to ``max_tokens``."""
        self._counters = Counter(
            generations=0, generated_tokens=0, stopped_at_max_tokens=0, sequences=0, tokens=0
        )
        limit, count = self._limit, self._counters
        for unit in range(self._state().units):
            for sequence_id, prompt, answer in self._written(unit):
                tokens = len(prompt) + len(answer.input_ids)
                if count["tokens"] + tokens > limit:
                    if count["sequences"] == 0:
                        raise UserError(
                            f"data.max_tokens is {limit}, but the first sequence ({sequence_id}) alone has {tokens} tokens; "
                            "raise max_tokens or lower data.generate.max_new_tokens"
                        )
                    count["stopped_at_max_tokens"] = 1
                    return
                count["generations"] += 1
                count[f"finished_{answer.finish}"] += 1
                if not len(answer.input_ids):
                    continue
                count["generated_tokens"] += len(answer.input_ids)
                count["sequences"] += 1
                count["tokens"] += tokens
                count["kept_positions"] += len(answer.input_ids)
                input_ids = np.concatenate([prompt, answer.input_ids])
                learnt = np.arange(tokens) >= len(prompt)
                yield Sequence(sequence_id, input_ids, learnt, answer.logprobs, answer.top_ids)
        if self._config.writer is not None and count["finished_empty"] == count["generations"] > 0:
            raise UserError(
                f"the writer {self._config.writer} wrote nothing: all of its {count['generations']:,} answers are empty; train it "
                "on given text first, or look at data.generate.stop and the chat template"
            )

    # --- prompts

    def _write_prompts(self, source: RowSource) -> GenerationState:
        """Streams the prompts to ``prompts.arrow``, a record batch for each unit; with them, what
        exists of their answers.
        """
        self._folder.mkdir(exist_ok=True)
        digest, units, waiting = DataHash(), 0, list[tuple[PromptRow, list[Begun]]]()
        splicer = self._splicer()
        schema = _PROMPTS if splicer is None else pa.schema([*_PROMPTS, *_BEGUN])
        per_unit = max(1, _UNIT_ANSWERS // self._settings.samples)
        file = self._folder / "prompts.arrow"
        stamp = source.stamp()

        def flush() -> None:
            nonlocal units
            columns: list[list[Any]] = [
                [row.row_id for row, _ in waiting],
                [row.input_ids for row, _ in waiting],
                [[each.input_ids for each in begun] for _, begun in waiting],
                [[each.open for each in begun] for _, begun in waiting],
            ]
            out.write_batch(
                pa.record_batch(
                    [
                        pa.array(column, field.type)
                        for column, field in zip(columns, schema, strict=False)
                    ],
                    schema=schema,
                )
            )
            units += 1
            waiting.clear()

        with (
            Rejects(self._config.rejects_file()) as rejects,
            pa.ipc.new_file(str(file), schema) as out,
        ):
            self._prompts.report = rejects.add
            rows = CountedOnce(source, rejects.add)
            for row in self._prompts.prompts(rows):
                digest.update(row.row_id, row.input_ids, np.zeros(0, np.bool_))
                begun: list[Begun] = []
                if splicer is not None:
                    longest = self._longest(row.input_ids)
                    begun = splicer.begun(row, self._settings.samples, longest)
                waiting.append((row, begun))
                if len(waiting) == per_unit:
                    flush()
            if waiting:
                flush()
            if splicer is not None:
                splicer.end()
        sync(file)
        check_unchanged(source, stamp, self._config)
        counters = {**rows.counters, **self._prompts.counters}
        if splicer is not None:
            counters |= splicer.counters
        state = GenerationState(
            request=self._request,
            units=units,
            answers=counters["prompts"] * self._settings.samples,
            counters=counters,
            stamp=stamp,
            prompts_sha256=digest.hexdigest(),
            tokenizer=self._tokenizer,
            splice=None if splicer is None else splicer.identity,
        )
        write_durably(self._state_file, state.model_dump_json(indent=2))
        return state

    def _splicer(self) -> Splicer | None:
        """What exists of the answers; None if nothing does."""
        if self._earlier is None:
            return None
        assert self._settings.splice is not None
        return Splicer(
            self._earlier(),
            self._settings.splice,
            end_tokens=self.sampling.end_tokens,
            seed=self._settings.seed,
        )

    def _rows(self, unit: int) -> list[tuple[PromptRow, list[Begun]]]:
        with pa.ipc.open_file(pa.memory_map(str(self._folder / "prompts.arrow"))) as file:
            batch = file.get_batch(unit)
            row_ids, prompts, *begun = batch.columns
            rows = [
                PromptRow(row_id.as_py(), ids.values.to_numpy().copy())
                for row_id, ids in zip(row_ids, prompts, strict=True)
            ]
            if not begun:
                nothing = Begun(np.empty(0, np.int32), True)
                return [(row, [nothing] * self._settings.samples) for row in rows]
            return [
                (
                    row,
                    [
                        Begun(np.array(each, np.int32), is_open)
                        for each, is_open in zip(ids.as_py(), opens.as_py(), strict=True)
                    ],
                )
                for row, ids, opens in zip(rows, *begun, strict=True)
            ]

    def _longest(self, prompt: NDArray[np.int32]) -> int:
        """Tokens of the longest answer to a prompt."""
        room = self._config.data.max_length - len(prompt)
        return min(room, self._settings.max_new_tokens or room)

    def _asked(self, unit: int) -> Iterator[_Asked]:
        """Each answer of a unit, in order."""
        splice = self._state().splice
        number = 1 if splice is None else splice.number
        for row, begun in self._rows(unit):
            longest = self._longest(row.input_ids)
            for sample, each in enumerate(begun):
                to_write = None
                if each.open:
                    seed = answer_seed(self._settings.seed, row.row_id, sample, number)
                    so_far = np.concatenate([row.input_ids, each.input_ids])
                    to_write = Prompt(so_far, longest - len(each.input_ids), seed)
                yield _Asked(
                    f"{row.row_id}/{sample}", row.input_ids, each.input_ids, longest, to_write
                )

    # --- answers

    def _answer(self, generator: Any, missing: list[int], total: int, written: int) -> None:
        """Writes the answers of the missing units, in order, until there is enough text;
        ``written``: tokens that exist already.
        """
        started, sampled = time.monotonic(), 0
        prompts = (
            asked.to_write
            for unit in missing
            for asked in self._asked(unit)
            if asked.to_write is not None
        )
        answers = (
            _sampled(generator, prompts)
            if self._config.writer_logprobs
            else (SampledAnswer(ids, _NO_LOGPROBS) for ids in generator.generate(prompts))
        )
        done = total - sum(1 for unit in missing for _ in self._asked(unit))
        try:
            with (
                at_safe_points(),
                ProgressBar(
                    total=total, initial=done, unit="answer", desc="generate", dynamic_ncols=True
                ) as bar,
            ):
                for unit in missing:
                    unit_answers: list[WrittenAnswer] = []
                    for asked in self._asked(unit):
                        safe_point()
                        sample = None if asked.to_write is None else next(answers)
                        sampled += 0 if sample is None else len(sample.input_ids)
                        bar.set_postfix_str(
                            f"{sampled / (time.monotonic() - started):,.0f} tok/s", refresh=False
                        )
                        bar.update()
                        unit_answers.append(self._whole(asked, sample))
                    self._commit(unit, unit_answers)
                    written += self._tokens([unit])
                    if written > self._limit:
                        return
        finally:
            self.seconds = time.monotonic() - started
            answers.close()

    def _whole(self, asked: _Asked, sample: SampledAnswer | None) -> WrittenAnswer:
        """An answer from what existed of it and what the writer has added, if it was asked."""
        ids = asked.begun
        if sample is not None:
            ids = np.concatenate([ids, sample.input_ids])
        answer = cut(ids, self.sampling, self._decode, include_stop=self._settings.include_stop)
        if sample is None:
            # It ended earlier at a stop string, which is not a part of it.
            if answer.finish == "length" and len(answer.input_ids) < asked.longest:
                answer = replace(answer, finish="stop")
            return answer
        if self._config.writer is not None:
            self._check_ids(answer.input_ids)
        if self._config.writer_logprobs:
            answer = replace(answer, logprobs=sample.logprobs[: len(answer.input_ids)])
        if self._config.chosen_ids:
            assert sample.top_ids is not None
            top_ids = sample.top_ids[: len(answer.input_ids)]
            answer = replace(answer, top_ids=_below(top_ids, self._prompts.vocab_size))
        return answer

    def _check_ids(self, ids: NDArray[np.int32]) -> None:
        """Raises UserError for a token that the teacher does not have."""
        if len(ids) and int(ids.max()) >= self._prompts.vocab_size:
            raise UserError(
                f"the writer {self._config.writer} sampled id {int(ids.max())}, but the teacher {self._config.teacher.model} "
                f"predicts {self._prompts.vocab_size} ids; use a writer whose lm_head has no further rows (resize_token_embeddings "
                "of transformers)"
            )

    def _commit(self, unit: int, answers: list[WrittenAnswer]) -> None:
        sink = pa.BufferOutputStream()
        columns = [
            [answer.input_ids for answer in answers],
            [answer.finish for answer in answers],
            [answer.logprobs for answer in answers],
            [None if a.top_ids is None else a.top_ids.reshape(-1) for a in answers],
        ]
        with pa.ipc.new_file(sink, _ANSWERS) as out:
            out.write_batch(
                pa.record_batch(
                    [pa.array(c, f.type) for c, f in zip(columns, _ANSWERS, strict=True)],
                    schema=_ANSWERS,
                )
            )
        write_durably(self._answers_file(unit), sink.getvalue().to_pybytes())

    def _written(self, unit: int) -> Iterator[tuple[str, NDArray[np.int32], WrittenAnswer]]:
        """Each answer of a unit with its id and its prompt's tokens; none if the unit has no
        answers, because ``max_tokens`` was reached before.
        """
        if not self._answers_file(unit).exists():
            return
        with pa.ipc.open_file(pa.memory_map(str(self._answers_file(unit)))) as file:
            # Files of earlier versions have two or three columns.
            found = file.get_batch(0).columns
            found += [pa.nulls(len(found[0]), field.type) for field in list(_ANSWERS)[len(found) :]]
            for asked, answer, why, each, top in zip(self._asked(unit), *found, strict=True):
                tokens = len(answer.values)
                yield (
                    asked.sequence_id,
                    asked.prompt,
                    WrittenAnswer(
                        answer.values.to_numpy().copy(),
                        why.as_py(),
                        each.values.to_numpy().copy() if each.is_valid else None,
                        top.values.to_numpy().reshape(tokens, -1).copy()
                        if top.is_valid and tokens
                        else None,
                    ),
                )

    def _tokens(self, units: Iterable[int]) -> int:
        """Number of tokens of the prompts and answers of these units."""
        each = (written for unit in units for written in self._written(unit))
        return sum(len(prompt) + len(answer.input_ids) for _, prompt, answer in each)

    @property
    def _limit(self) -> float:
        return self._config.data.max_tokens or math.inf

    def _decode(self, ids: NDArray[np.int32]) -> str:
        text: str = self.tokenizer.decode(
            ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    @property
    def _state_file(self) -> Path:
        return self._folder / "prompts.json"

    def _state(self) -> GenerationState:
        return load_state(GenerationState, self._state_file)

    def _answers_file(self, unit: int) -> Path:
        return self._folder / f"answers-{unit:06d}.arrow"


def cut(
    input_ids: NDArray[np.int32],
    sampling: Sampling,
    decode: Callable[[NDArray[np.int32]], str],
    *,
    include_stop: bool,
) -> WrittenAnswer:
    """The end of an answer: its first end token or its first stop string, whichever comes first.

    Without ``include_stop``, tokens that hold only text of the stop string or text behind it are
    removed. A token in which the answer ends and the stop string begins is kept whole. With
    ``include_stop``, the answer ends behind the token that completes the stop string.
    """
    ended = np.flatnonzero(np.isin(input_ids, sampling.end_tokens))
    ids = input_ids[: ended[0] + 1] if len(ended) else input_ids
    content = ids[:-1] if len(ended) else ids
    finish: Finish = "stop" if len(ended) else "length"
    text = decode(ids) if sampling.stop else ""
    if any(stop in text for stop in sampling.stop):
        counts = range(len(ids) + 1)
        through = bisect_left(
            counts, True, key=lambda n: any(stop in decode(ids[:n]) for stop in sampling.stop)
        )
        text = decode(ids[:through])
        at = min(position for stop in sampling.stop if (position := text.find(stop)) >= 0)
        before = bisect_left(counts, True, key=lambda n: decode(ids[:n])[:at] == text[:at])
        ids, content, finish = ids[: through if include_stop else before], ids[:before], "stop"
    return WrittenAnswer(ids, finish if len(content) else "empty")


def _sampled(writer: Writer, prompts: Iterable[Prompt]) -> Generator[SampledAnswer, None, None]:
    """The writer's answers, checked. Raises UserError for a logprob that is none."""
    for answer in writer.sample(prompts):
        logprobs = answer.logprobs
        if logprobs.shape != answer.input_ids.shape or not np.isfinite(logprobs).all():
            raise UserError(
                "the writer's logprobs are NaN or infinite: its arithmetic overflows (set teacher.dtype to bfloat16 or float32), "
                "or its weights are damaged"
            )
        yield answer


def _below(ids: NDArray[np.int32], vocab_size: int) -> NDArray[np.int32]:
    """int32[m, C]: ``ids`` without those from ``vocab_size`` up; the others move up, followed by
    -1.
    """
    kept = ids < vocab_size
    order = np.argsort(~kept, axis=1, kind="stable")
    return np.take_along_axis(np.where(kept, ids, -1), order, axis=1).astype(np.int32)


def answer_seed(seed: int, row_id: str, sample: int, number: int = 1) -> int:
    """63 bits for one answer in pass ``number``, the same in every place and at every time of
    sampling.
    """
    name = f"{seed}\0{row_id}\0{sample}" + (f"\0{number}" if number > 1 else "")
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def prompts_sha256(prompts: Iterable[PromptRow]) -> str:
    """sha256 of the current prompts of a source, to compare with that in a manifest."""
    digest = DataHash()
    for row in prompts:
        digest.update(row.row_id, row.input_ids, np.zeros(0, np.bool_))
    return digest.hexdigest()
