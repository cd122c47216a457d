"""The stages of a run of rounds, in order. Each is on disk before the next one starts, so a run can
be killed at any moment and started again.

    text                the cache of given text, if the student config says how it is built
    start               the untrained student, or one warmed up on given text
    augment-2, ...      with ``rounds.augment``: the teacher writes prompts like the hard ones of the
                        round before
    prompts-1, ...      with ``rounds.augment``: the prompts of the round, new ones and the data's
    answer-1, ...       with ``rounds.teacher_text``: the teacher writes answers of its own
    write-1, write-2    the newest student writes, the teacher scores: a cache for each round
    splice-1-2, ...     with ``rounds.skd``: further passes over its answers
    train-1, train-2    the training goes on, on the new cache, earlier ones, and given text
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock

from logitcask.cache_format import CacheReader
from logitcask.cache_format.cli.config_file import load_config
from logitcask.cache_format.durable import load_state, write_durably
from logitcask.cache_format.errors import ConfigError, UserError
from logitcask.pipeline.config import BuildConfig
from logitcask.rounds import augment, mixture, skd, teacher_text
from logitcask.rounds.commands import overrides, plain, read
from logitcask.rounds.config import RoundsConfig
from logitcask.rounds.figures import figures_of_cache, figures_of_training
from logitcask.rounds.places import Places
from logitcask.rounds.report import summary_of, write_report
from logitcask.rounds.schedule import horizon, is_over
from logitcask.rounds.stage import Ended, run_stage
from logitcask.rounds.state import (
    STATE,
    Done,
    State,
    check_cache,
    check_checkpoint,
    check_file,
    check_student,
    checkpoint_sha256,
    file_sha256,
    load,
    weights_sha256,
)

log = logging.getLogger(__name__)

REPLAY = 0.25
_MISLED = ("reverse_kl", "skew_reverse_kl", "policy_gradient")
"""Losses that text of earlier students misleads (arXiv 2606.24143)."""


class Rounds(Places):
    """A run of rounds in ``config.output``. ``options`` are given to every command.

    Raises UserError for configs that do not go together.
    """

    def __init__(self, config: RoundsConfig, options: list[str]) -> None:
        super().__init__(config.output, config.rounds)
        self.config, self.options = config, options
        self.teacher = read(config.teacher_config)
        self.student = read(config.student_config)
        data = self.teacher.get("data")
        if not isinstance(data, dict) or not isinstance(data.get("generate"), dict):
            raise ConfigError(
                f"{config.teacher_config} has no data.generate, so there is nothing for the student to write; name the prompts "
                "there: prompt_field, messages_field or text_field, with generate"
            )
        # With a name in the place of the writer, which a round sets.
        build = load_config(
            BuildConfig, config.teacher_config, overrides({"data.generate.writer": "synthetic:0"})
        )
        generate, store = build.data.generate, build.store
        assert generate is not None
        self.generate = generate
        if generate.splice is not None:
            raise ConfigError(
                f"{config.teacher_config}: data.generate.splice is of a single build; in rounds, set rounds.skd instead"
            )
        if not isinstance(self.student.get("cache"), str):
            raise ConfigError(
                f"{config.student_config}: cache is {self.student.get('cache')!r}; expected the path of one cache of given text, "
                "on which the student is evaluated"
            )
        self.text: str = self.student["cache"]
        for name in ("training", "evaluation"):
            self._check(name, dict, "fields and their values")
        self._check("losses", list, "a list of losses, each with a name")
        self.losses: list[tuple[str, dict[str, Any]]] = []
        for each in self.student.get("losses") or []:
            if not isinstance(each, dict) or not isinstance(each.get("name"), str):
                raise ConfigError(
                    f"{config.student_config}: losses has {each!r}; expected a loss as {{name: NAME}}"
                )
            self.losses.append((each["name"], each))
        if self.rounds.skd is not None:
            skd.check(
                [name for name, _ in self.losses],
                max_tokens=build.data.max_tokens,
                writer_top_k=generate.writer_top_k,
                shortest_head=min(store.top_k, store.min_k if store.ragged else store.top_k),
                teacher_config=config.teacher_config,
            )
        hard_labels = self.student.get("ce_weight") not in (None, 0)
        teacher_text.check(self.rounds, self.losses, hard_labels=hard_labels)
        self.kind, self.max_length = build.data.kind, build.data.max_length
        if self.rounds.teacher_text:
            load_config(BuildConfig, config.teacher_config, overrides(teacher_text.WRITES))
        if self.rounds.augment is not None:
            augment.check(
                self.rounds,
                max_tokens=build.data.max_tokens,
                max_length=self.max_length,
                teacher_config=config.teacher_config,
            )
            load_config(BuildConfig, config.teacher_config, overrides(self._augmentor(1)))
        self.pairs = any(name == teacher_text.PAIRS for name, _ in self.losses)
        self.replay = self._replay()
        self._ended: float | None = None

    def _check(self, name: str, kind: type, expected: str) -> None:
        """Raises ConfigError if a field of the student config, as far as it is read here, is of
        another kind. The command checks the rest.
        """
        found = self.student.get(name)
        if found is not None and not isinstance(found, kind):
            raise ConfigError(
                f"{self.config.student_config}: {name} is {found!r}; expected {expected}"
            )

    def _replay(self) -> float:
        misled = [
            name
            for name, each in self.losses
            if _is_misled(name, each)
            and self.rounds.on_policy_fraction
            and teacher_text.applies(name, each, teacher_text.student(1))
        ]
        if self.rounds.replay is None:
            return 0.0 if misled else REPLAY
        if self.rounds.replay and misled:
            log.warning(
                "rounds.replay is %g, and %s is misled by text that earlier students have written; forward KL stands it "
                "(arXiv 2606.24143): set rounds.replay to 0",
                self.rounds.replay,
                " and ".join(misled),
            )
        return self.rounds.replay

    # --- the run

    def settings(self) -> dict[str, Any]:
        """Everything that may not change while rounds go on. Their number may."""
        apart: dict[str, Any] = {"count": True, "stop": True, "augment": {"max_length"}}
        if not self.rounds.teacher_text:
            apart["teacher_text"] = True  # as before there was such text
        return {
            "rounds": self.rounds.model_dump(mode="json", exclude=apart),
            "teacher_config": plain(self.teacher, without=("output", "log", "scale")),
            "student_config": plain(self.student, without=("cache_config",)),
        }

    def run(self) -> State:
        """Runs everything that is not done yet. Raises UserError, StageFailed and Stopped."""
        state = load(self.folder, self.settings())
        for number in range(1, state.begun + 1):
            self.passes[number] = max(1, len(skd.passes_of(state, number)))
        self._check_what_is_done(state)
        for number in range(self.rounds.count + 1):
            if number > 0 and is_over(self.rounds.stop, state):
                break
            if str(number) not in state.horizons:
                given = (self.student.get("training") or {}).get("max_steps")
                steps = self.last_step(self.rounds.count)
                state.horizons[str(number)] = horizon(
                    given, steps, state, self.config.student_config
                )
                state.save(self.folder)
            if number == 0:
                self._text(state)
                self._train(state, 0, "start")
                continue
            if self.rounds.augment is not None:
                self._augment(state, number)
                self._prompts(state, number)
            if self.rounds.teacher_text:
                self._answer(state, number)
            self._write(state, number)
            self._splice(state, number)
            self._train(state, number, f"train-{number}")
            write_report(self.folder, state, self.config)
        write_report(self.folder, state, self.config)
        return state

    def _check_what_is_done(self, state: State) -> None:
        """Raises UserError if finished rounds are more than the config has, or not as they were."""
        if state.begun > self.rounds.count:
            raise UserError(
                f"rounds.count is {self.rounds.count}, but {state.begun} rounds have begun in {self.folder} ({state.rounds} are "
                f"finished); set it to at least {state.begun}, or begin afresh with --restart"
            )
        if state.rounds and self.rounds.count > state.rounds:
            log.info("%d of %d rounds are done already", state.rounds, self.rounds.count)
        for done in state.done:
            kind, _, number = done.stage.partition("-")
            if kind == "text":
                check_cache(done, self.text, self.folder)
            elif kind == "write":
                # Of several passes, the newest cache. Earlier ones may be gone.
                newest = skd.passes_of(state, int(number))[-1]
                check_cache(newest, self.cache(int(number)), self.folder)
            elif kind == "answer":
                check_cache(done, self.answers(int(number)), self.folder)
            elif kind == "augment":
                check_cache(done, self.augmented(int(number)), self.folder)
            elif kind == "prompts":
                check_file(done, self.prompts(int(number)), self.folder)
        last = next((each for each in reversed(state.done) if each.is_training), None)
        if last is not None and last.fingerprint:
            number = last.stage.partition("-")[2]
            check_checkpoint(last, self.checkpoint(int(number or 0)), self.folder)

    # --- stages

    def _text(self, state: State) -> None:
        """The cache of given text, built or only looked at."""
        config = self.student.get("cache_config")
        if state.of("text") is not None:
            return
        if config is None:
            self._began, state.starts["text"] = time.monotonic(), 0
            nothing = Ended({"seconds": 0.0, "writing_seconds": 0.0}, 0.0, 0)
            self._record_cache(state, "text", nothing, self.text)
            return
        ended = self._stage(
            state, "text", ["teacher-cache", "build", str(Path(config).expanduser())]
        )
        if Path(ended.document["cache"]).resolve() != Path(self.text).expanduser().resolve():
            raise ConfigError(
                f"{config} builds {ended.document['cache']}, but the cache in {self.config.student_config} is {self.text}; make "
                "them one"
            )
        self._record_cache(state, "text", ended, self.text)

    def _augmentor(self, number: int) -> dict[str, Any]:
        """Changes of the teacher config with which the teacher writes new prompts for a round."""
        settings = self.rounds.augment
        assert settings is not None
        return (
            teacher_text.WRITES
            | augment.data_of(self.hard(number), self.kind)
            | augment.writing_of(settings, self.max_length, self.generate.seed + number)
        )

    def _augment(self, state: State, number: int) -> None:
        """The teacher's prompts like those that were hard in the round before."""
        settings, name = self.rounds.augment, f"augment-{number}"
        assert settings is not None
        if number == 1 or state.of(name) is not None:
            return
        hard = augment.flag(augment.assess(self.cache(number - 1)), settings.hard_fraction)
        before = augment.rows_in(self.prompts(number - 1))
        requests = augment.requests(hard, before, settings, number)
        self.of_round(number).mkdir(exist_ok=True)
        _write_once(self.hard(number), augment.as_lines(requests))
        if not requests:
            log.warning(
                "round %d has no new prompts: none of the %d hard ones ends with a text of the user",
                number,
                len(hard),
            )
            return
        self._build(state, number, name, self.augmented(number), self._augmentor(number))

    def _prompts(self, state: State, number: int) -> None:
        """All prompts of a round as a file: those of the data, and behind them the new ones."""
        settings, name = self.rounds.augment, f"prompts-{number}"
        assert settings is not None
        if state.of(name) is not None:
            return
        self.of_round(number).mkdir(exist_ok=True)
        drawn, written = self.drawn(number), self.augmented(number).with_suffix(".jsonl")
        config = [str(self.config.teacher_config), *overrides(self._slice(number))]
        ended = self._stage(state, name, ["teacher-cache", "prompts", *config, "--out", str(drawn)])
        rows = list(augment.rows_in(drawn))
        figures: dict[str, Any] = {"data_prompts": len(rows), "new_prompts": 0}
        if (asked := state.of(f"augment-{number}")) is not None:
            export = ["teacher-cache", "generations", str(self.augmented(number))]
            ended = ended.and_then(run_stage([*export, "--out", str(written)], self.options))
            files = [drawn, *map(self.prompts, range(1, number))]
            new, of_new = augment.new_prompts(
                list(augment.rows_in(self.hard(number))),
                augment.rows_in(written),
                augment.rows_in(self.prompts(number - 1)),
                {augment.key(row) for file in files for row in augment.rows_in(file)},
                settings,
                answered=asked.figures["prompts"],
            )
            figures |= of_new
            log.info("round %d: %s", number, augment.in_words(figures))
            rows += new
        _write_once(self.prompts(number), augment.as_lines(rows))
        self._record(state, name, ended, file_sha256(self.prompts(number)), None, figures)

    def _slice(self, number: int) -> dict[str, Any]:
        """Changes of the teacher config that choose the data's prompts of a round."""
        return {
            "data.generate.skip_prompts": self.generate.skip_prompts
            + (number - 1) * self.rounds.prompts,
            "data.generate.max_prompts": self.rounds.prompts,
        }

    def _answer(self, state: State, number: int) -> None:
        """The teacher's own answers to the prompts of a round."""
        self._build(state, number, f"answer-{number}", self.answers(number), teacher_text.WRITES)

    def _write(self, state: State, number: int) -> None:
        """What the newest student answers."""
        output = self.cache_of_pass(number, 1)
        self._build(state, number, f"write-{number}", output, self._by_student(number))

    def _splice(self, state: State, number: int) -> None:
        """The further passes of a round, if it has some. Each is recorded before the next one."""
        settings = self.rounds.skd
        if settings is None:
            return
        while (pass_number := skd.next_pass(settings, state, number)) is not None:
            log.info(
                "round %d, pass %d of at most %d: the teacher's tokens take the places of %d",
                number,
                pass_number,
                settings.passes,
                skd.passes_of(state, number)[-1].figures["rejected"],
            )
            splice = {"data.generate.splice": skd.splice_of(settings, self.cache(number))}
            self._build(
                state,
                number,
                f"splice-{number}-{pass_number}",
                self.cache_of_pass(number, pass_number),
                self._by_student(number) | splice,
            )
            self.passes[number] = pass_number
        if left := skd.passes_of(state, number)[-1].figures["rejected"]:
            log.info(
                "round %d: after the last pass %d answers have a token to reject (rounds.skd.passes)",
                number,
                left,
            )
        earlier = range(1, len(skd.passes_of(state, number)))
        skd.remove([self.cache_of_pass(number, each) for each in earlier])

    def _by_student(self, number: int) -> dict[str, Any]:
        return {"data.generate.writer": str(self.model(number - 1))}

    def _build(
        self, state: State, number: int, name: str, output: Path, changes: dict[str, Any]
    ) -> None:
        """A cache of answers to the prompts of a round, by the writer that ``changes`` names."""
        if state.of(name) is not None:
            return
        kind = name.partition("-")[0]
        if kind in ("write", "splice"):
            trained = state.of(f"train-{number - 1}" if number > 1 else "start")
            assert trained is not None
            check_student(trained, self.model(number - 1), self.folder)
        chosen = self._slice(number)
        if self.rounds.augment is not None:
            chosen = augment.data_of(self.prompts(number), self.kind)
        changes = {
            **chosen,
            "data.generate.seed": self.generate.seed
            + number
            + (teacher_text.SEED if kind == "answer" else 0),
            "output": str(output),
            **changes,
        }
        if name != "write-1" and "audit" not in self.teacher:
            changes["audit.sequences"] = 0  # that of the first student's text says it all
        self.of_round(number).mkdir(exist_ok=True)
        if kind != "splice":
            log.info(
                "round %d of %d: the %s writes%s, the teacher scores",
                number,
                self.rounds.count,
                "student" if kind == "write" else "teacher",
                " new prompts" if kind == "augment" else "",
            )
        command = ["teacher-cache", "build", str(self.config.teacher_config), *overrides(changes)]
        ended = self._stage(state, name, command)
        self._record_cache(state, name, ended, output)

    def _train(self, state: State, number: int, name: str) -> None:
        if state.of(name) is not None:
            return
        until = self.last_step(number)
        changes: dict[str, Any] = {
            "cache": self.mixture(number),
            "cache_config": None,
            "part.until": until,
            "training.max_steps": state.horizons[str(number)],
            "training.output_dir": str(self.model(number)),
        }
        if number == 0 and (losses := teacher_text.of_warm_up(self.losses)) is not None:
            changes["losses"] = losses
        if number > 0 and self.last_step(number - 1) > 0:
            changes["part.start"] = str(self.checkpoint(number - 1))
        self.of_round(number).mkdir(exist_ok=True)
        command = ["train-student", "train", str(self.config.student_config), *overrides(changes)]
        log.info(
            "%s",
            f"round {number} of {self.rounds.count}: the training goes on to step {until}"
            if number
            else "the student at the start",
        )
        ended = self._stage(state, name, command)
        known = "" if until == 0 else checkpoint_sha256(self.checkpoint(number))
        figures = figures_of_training(
            self.model(number),
            self.model(number - 1) if number else None,
            self._caches(number),
            number,
        )
        weights = weights_sha256(self.model(number))
        self._record(state, name, ended, known, None, figures, weights)
        for earlier in range(number):  # nothing goes on from there any more
            for each in self.model(earlier).glob("checkpoint-*"):
                shutil.rmtree(each, ignore_errors=True)

    def mixture(self, number: int) -> list[dict[str, Any]]:
        """The caches that a round learns from, with their shares of the positions."""
        return mixture.of_round(
            number,
            self.rounds,
            text=self.text,
            students=self.cache,
            teachers=self.answers,
            replay=self.replay,
            pairs=self.pairs,
            evaluates_on_text=(self.student.get("evaluation") or {}).get("cache") is None,
        )

    def _caches(self, number: int) -> dict[str, str]:
        """The names of a round's caches, by fingerprint."""
        return {
            CacheReader(each["cache"]).manifest.fingerprint: each["name"]
            for each in self.mixture(number)
        }

    def _stage(self, state: State, name: str, command: list[str]) -> Ended:
        state.starts[name] = state.starts.get(name, 0) + 1
        state.save(self.folder)
        self._began = time.monotonic()
        return run_stage(command, self.options)

    def _record_cache(self, state: State, name: str, ended: Ended, path: str | Path) -> None:
        manifest = CacheReader(path).manifest
        figures = figures_of_cache(path) | {
            "scoring_seconds": ended.document["seconds"],
            "writing_seconds": ended.document["writing_seconds"],
        }
        if self.rounds.skd is not None and name != "text":
            figures |= skd.figures_of_ranks(path, self.rounds.skd.top_k)
            figures["splices_cut"] = manifest.data.counters.get("splices_cut", 0)
        if self.rounds.augment is not None and name.startswith("write-"):
            assessed = augment.assess(path)
            figures["assessed"] = augment.figures_of(assessed, self.rounds.augment.hard_fraction)
        self._record(state, name, ended, manifest.fingerprint, manifest.content_sha256, figures)

    def _record(
        self,
        state: State,
        name: str,
        ended: Ended,
        fingerprint: str,
        content_sha256: str | None,
        figures: dict[str, Any],
        weights: str | None = None,
    ) -> None:
        """Puts a finished stage on disk. From here on it is never run again."""
        handover = 0.0 if self._ended is None else self._began - self._ended
        self._ended = self._began + ended.seconds
        state.done.append(
            Done(
                stage=name,
                fingerprint=fingerprint,
                content_sha256=content_sha256,
                seconds=ended.seconds,
                handover=handover,
                starts=state.starts.pop(name),
                peak_bytes=ended.peak_bytes,
                figures=figures,
                weights_sha256=weights,
            )
        )
        state.save(self.folder)


def run_rounds(
    config: RoundsConfig, options: list[str], *, restart: bool = False
) -> tuple[dict[str, Any], str]:
    """Runs the rounds of ``config``. Returns the document and the table of the report."""
    rounds = Rounds(config, options)
    with _exclusive(config.output):
        if restart:
            _remove(config.output)
        state = rounds.run()
    return summary_of(config.output, state, config)


def report_again(config: RoundsConfig) -> tuple[dict[str, Any], str]:
    """Writes the report of the rounds that are done, and runs none. Raises UserError if there are
    none.
    """
    folder = config.output
    first = "run them first, without --report"
    if not (folder / STATE).is_file():
        raise UserError(f"{folder} holds no rounds (no {STATE}); {first}")
    with _exclusive(folder):
        state = load_state(State, folder / STATE)
        if state.of("start") is None:
            raise UserError(f"{folder} holds no rounds yet (its student is not made); {first}")
        write_report(folder, state, config)
    return summary_of(folder, state, config)


@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder / ".lock", timeout=0):
            yield
    except filelock.Timeout:
        raise UserError(
            f"another process runs rounds in {folder}; wait for it, or choose another output"
        ) from None


def _remove(folder: Path) -> None:
    """Removes the rounds of an earlier run, its state last."""
    if not (folder / "state.json").exists():
        return
    for each in folder.glob("round-*"):
        shutil.rmtree(each)
    for name in ("rounds.html", "rounds.json", "state.json"):
        (folder / name).unlink(missing_ok=True)


def _write_once(file: Path, content: str) -> None:
    """A file that is there with this content is left alone: a build may have read it, and would see
    that it is newer.
    """
    if not file.is_file() or file.read_bytes() != content.encode():
        write_durably(file, content)


def _is_misled(name: str, options: dict[str, Any]) -> bool:
    """Whether text of earlier students misleads a loss."""
    beta = options.get("beta")
    above = isinstance(beta, int | float) and beta > 0.5  # if it is no number, the command says so
    return name in _MISLED or (name == "jsd" and above)
