"""The data of the token view: sequences packed in chunks that a browser opens one at a time.

A chunk has two elements. ``text-N`` has the tokens and the teacher's loss of each, which search and
the list of the most surprising tokens need; ``teacher-N`` has the distributions, and ``student-N``
what a student predicts at the same places, if there is one. Only the chunk of the sequence on the
screen is unpacked whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from logitcask.cache_format import CachedSequence
from logitcask.cache_format.pages.packed import pack_arrays, pack_json
from logitcask.cache_format.pages.page import data_element
from logitcask.cache_format.readings import Reading, Readings
from logitcask.pipeline.report.figures import sequence_figures

CHUNK_TOKENS = 8192
"""Tokens of a chunk at least, but for the last one: some hundred kilobytes."""

Shown = str | list[int]
"""The text of a token, or its bytes if they are only part of a character."""


class TokenView:
    """Packs the sequences that it gets into ``spool``, chunk by chunk.

    spool:      an open text file.
    vocab_size: ids that the page may name.
    readings:   of the student that is shown beside the teacher.

    ``unread``: sequences with kept positions that the student has not read.
    """

    def __init__(self, spool: IO[str], vocab_size: int, readings: Readings | None = None) -> None:
        self._spool, self._readings = spool, readings
        self._kl: list[float | None] = []
        self._kl_sum = 0.0
        self._kl_count = 0
        self.unread = 0
        self._named = np.zeros(vocab_size, np.bool_)
        self._sequences: list[list[Any]] = []
        self._held: list[CachedSequence] = []
        self._held_readings: list[Reading | None] = []
        self._held_tokens = self._chunks = 0
        self.tokens = 0
        self.indices: set[int] = set()

    def __len__(self) -> int:
        """Sequences in the view."""
        return len(self._sequences)

    @property
    def mean_kl(self) -> float | None:
        """Mean KL of the student over the positions of the view, nats, four decimals; None without
        one. The stored probabilities are rounded, so one of nearly nothing may be below 0.
        """
        return round(self._kl_sum / self._kl_count, 4) + 0.0 if self._kl_count else None

    def add(self, index: int, sequence: CachedSequence) -> None:
        """Adds a sequence; ``index`` is its place in the cache. Raises UserError if the student read
        another one.
        """
        figures = sequence_figures(index, sequence)
        loss = None if math.isnan(figures.loss) else round(figures.loss, 4)
        most = None if loss is None else round(-float(sequence.target_logprob.min()), 4)
        self._sequences.append(
            [
                figures.index,
                figures.sequence_id,
                figures.tokens,
                figures.positions,
                loss,
                most,
                self._chunks,
                self._held_tokens,
            ]
        )
        self.indices.add(figures.index)
        self.tokens += figures.tokens
        self._held.append(sequence)
        if self._readings is not None:
            reading = self._readings.reading(index, sequence)
            self._held_readings.append(reading)
            self.unread += reading is None and figures.positions > 0
            known = (
                [] if reading is None else reading.kl[np.isfinite(reading.kl)].astype(np.float64)
            )
            self._kl.append(round(float(np.mean(known)), 4) if len(known) else None)
            self._kl_sum += float(np.sum(known))
            self._kl_count += len(known)
        self._held_tokens += len(sequence)
        if self._held_tokens >= CHUNK_TOKENS:
            self._write_chunk()

    def elements(self, shown: Callable[[int], Shown] | None, **facts: Any) -> Iterator[str]:
        """The data of the page, in parts: ``view``, the index of all, with the sequences, the texts
        of all ids that occur, and ``facts``; then the chunks.

        shown: from an id to its text; None without a tokenizer.
        """
        if self._held:
            self._write_chunk()
        ids = np.flatnonzero(self._named).tolist()
        view = {
            "sequences": self._sequences,
            "chunks": self._chunks,
            "ids": ids,
            "texts": [str(each) if shown is None else shown(each) for each in ids],
            "named": shown is not None,
            "student_kl": None if self._readings is None else self._kl,
            **facts,
        }
        yield data_element("view", pack_json(view))
        self._spool.seek(0)
        while part := self._spool.read(1 << 20):
            yield part

    def _write_chunk(self) -> None:
        number, self._chunks = self._chunks, self._chunks + 1
        held, self._held, self._held_tokens = self._held, [], 0
        text = {
            "token": np.concatenate([each.input_ids for each in held]),
            "loss": np.concatenate(
                [_by_token(each, -each.target_logprob, np.nan) for each in held]
            ),
        }
        teacher = {
            "rank": np.concatenate([_by_token(each, each.target_rank, -1) for each in held]),
            "tail": np.concatenate([_by_token(each, each.tail_logprob, np.nan) for each in held]),
            **_lists("head", held, [each.ids for each in held], [each.logprobs for each in held]),
        }
        if all(each.entropy is not None for each in held):
            teacher["entropy"] = np.concatenate(
                [_by_token(each, each.entropy, np.nan) for each in held]
            )
        if all(each.samples is not None for each in held):
            teacher |= _draws(held)
        for name in ("token", "head_ids", "draw_ids"):
            ids = text.get(name, teacher.get(name))
            if ids is not None:
                self._named[ids] = True
        self._spool.write(data_element(f"text-{number}", pack_arrays(text)))
        self._spool.write(data_element(f"teacher-{number}", pack_arrays(teacher)))
        if self._readings is not None:
            readings, self._held_readings = self._held_readings, []
            student = _student(held, readings)
            self._spool.write(data_element(f"student-{number}", pack_arrays(student)))


def _by_token(sequence: CachedSequence, values: Any, otherwise: float) -> NDArray[Any]:
    """[n]: the value of the position that predicts each token; ``otherwise`` if none does."""
    column = np.full(len(sequence), otherwise, values.dtype)
    column[sequence.positions + 1] = values
    return column


def _lists(
    name: str,
    held: list[CachedSequence],
    ids: list[NDArray[np.int32]],
    logprobs: list[NDArray[np.float32]] | None,
) -> dict[str, NDArray[Any]]:
    """Columns of lists by token from padded [P, K] arrays: their sizes, and all entries after each
    other.
    """
    present = [each >= 0 for each in ids]
    sizes = [
        _by_token(sequence, inside.sum(axis=1), 0)
        for sequence, inside in zip(held, present, strict=True)
    ]
    columns = {
        f"{name}_size": np.concatenate(sizes),
        f"{name}_ids": np.concatenate(
            [each[inside] for each, inside in zip(ids, present, strict=True)]
        ),
    }
    if logprobs is not None:
        columns[f"{name}_logprobs"] = np.concatenate(
            [each[inside] for each, inside in zip(logprobs, present, strict=True)]
        )
    return columns


def _draws(held: list[CachedSequence]) -> dict[str, NDArray[Any]]:
    """The draws of all sets of a position after each other, as ``_lists`` gives them."""
    samples = [each.samples for each in held if each.samples is not None]
    ids = [each.ids.reshape(len(each.ids), math.prod(each.ids.shape[1:])) for each in samples]
    logprobs = [
        each.logprobs.reshape(len(each.ids), math.prod(each.ids.shape[1:]))
        for each in samples
        if each.logprobs is not None
    ]
    return _lists("draw", held, ids, logprobs if len(logprobs) == len(held) else None)


def _student(
    held: list[CachedSequence], readings: list[Reading | None]
) -> dict[str, NDArray[np.float32]]:
    """By token: the student's loss, its mass outside the head, and the KL; by entry of ``head_ids``
    its logprobs. nan for a sequence that it has not read.
    """
    columns: dict[str, list[NDArray[Any]]] = {"loss": [], "tail": [], "kl": [], "head_logprobs": []}
    for sequence, reading in zip(held, readings, strict=True):
        if reading is None:
            nothing = np.full(len(sequence.positions), np.nan, np.float32)
            entries = np.full(int((sequence.ids >= 0).sum()), np.nan, np.float32)
            reading = Reading(entries, nothing, nothing, nothing)
        columns["loss"].append(_by_token(sequence, -reading.log_target, np.nan))
        columns["tail"].append(_by_token(sequence, reading.log_tail, np.nan))
        columns["kl"].append(_by_token(sequence, reading.kl, np.nan))
        columns["head_logprobs"].append(reading.log_head)
    return {name: np.concatenate(parts) for name, parts in columns.items()}
