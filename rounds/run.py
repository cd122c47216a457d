"""The stages of a run of rounds, in order. Each is on disk before the next one starts, so a run can
be killed at any moment and started again.

    text                the cache of given text, if the student config says how it is built
    start               the untrained student, or one warmed up on given text
    answer-1, ...       with ``rounds.teacher_text``: the teacher writes answers of its own
    write-1, write-2    the newest student writes, the teacher scores: a cache for each round
    splice-1-2, ...     with ``rounds.skd``: further passes over its answers
    train-1, train-2    the training goes on, on the new cache, earlier ones, and given text
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
from omegaconf import OmegaConf

from logitcask.cache_format import CacheReader
from logitcask.cache_format.cli.config_file import load_config
from logitcask.cache_format.durable import load_state
from logitcask.cache_format.errors import ConfigError, UserError, first_line
from logitcask.pipeline.config import BuildConfig
from logitcask.rounds import skd, teacher_text
from logitcask.rounds.config import RoundsConfig
from logitcask.rounds.figures import figures_of_cache, figures_of_training
from logitcask.rounds.report import summary_of, write_report
from logitcask.rounds.stage import Ended, run_stage
from logitcask.rounds.state import (
    STATE,
    Done,
    State,
    check_cache,
    check_checkpoint,
    checkpoint_sha256,
    load,
)

log = logging.getLogger(__name__)

REPLAY = 0.25
_MISLED = ("reverse_kl", "skew_reverse_kl", "policy_gradient")
"""Losses that text of earlier students misleads (arXiv 2606.24143)."""


class Rounds:
    """A run of rounds in ``config.output``. ``options`` are given to every command.

    Raises UserError for configs that do not go together.
    """

    def __init__(self, config: RoundsConfig, options: list[str]) -> None:
        self.config, self.options = config, options
        self.folder, self.rounds = config.output, config.rounds
        self.teacher = _read(config.teacher_config)
        self.student = _read(config.student_config)
        data = self.teacher.get("data")
        if not isinstance(data, dict) or not isinstance(data.get("generate"), dict):
            raise ConfigError(
                f"{config.teacher_config} has no data.generate, so there is nothing for the student to write; name the prompts "
                "there: prompt_field, messages_field or text_field, with generate"
            )
        # With a name in the place of the writer, which a round sets.
        build = load_config(
            BuildConfig, config.teacher_config, _overrides({"data.generate.writer": "synthetic:0"})
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
                shortest_head=min(store.top_k, store.min_k if store.ragged else store.top_k),
                teacher_config=config.teacher_config,
            )
        hard_labels = self.student.get("ce_weight") not in (None, 0)
        teacher_text.check(self.rounds, self.losses, hard_labels=hard_labels)
        if self.rounds.teacher_text:
            load_config(BuildConfig, config.teacher_config, _overrides(teacher_text.WRITES))
        self.pairs = any(name == teacher_text.PAIRS for name, _ in self.losses)
        self.replay = self._replay()
        self._passes: dict[int, int] = {}
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
            if _is_misled(name, each) and teacher_text.applies(name, each, teacher_text.student(1))
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

    # --- places

    def of_round(self, number: int) -> Path:
        return self.folder / f"round-{number:03d}"

    def cache(self, number: int) -> Path:
        """The cache of a round; of its newest pass, if it has several."""
        return self._cache_of_pass(number, self._passes.get(number, 1))

    def _cache_of_pass(self, number: int, pass_number: int) -> Path:
        return self.of_round(number) / skd.cache_name(pass_number)

    def answers(self, number: int) -> Path:
        """The cache of the teacher's own answers."""
        return self.of_round(number) / "teacher"

    def model(self, number: int) -> Path:
        """The student after a round; after round 0, the one that the first round begins with."""
        return self.of_round(number) / "student"

    def last_step(self, number: int) -> int:
        """Steps of the whole training at the end of a round."""
        return self.rounds.warmup_steps + number * self.rounds.steps_per_round

    def checkpoint(self, number: int) -> Path:
        return self.model(number) / f"checkpoint-{self.last_step(number)}"

    # --- the run

    def settings(self) -> dict[str, Any]:
        """Everything that may not change while rounds go on. Their number may."""
        apart = {"count", "stop"}
        if not self.rounds.teacher_text:
            apart.add("teacher_text")  # as before there was such text
        return {
            "rounds": self.rounds.model_dump(mode="json", exclude=apart),
            "teacher_config": _plain(self.teacher, without=("output", "log", "scale")),
            "student_config": _plain(self.student, without=("cache_config",)),
        }

    def run(self) -> State:
        """Runs everything that is not done yet. Raises UserError, StageFailed and Stopped."""
        state = load(self.folder, self.settings())
        for number in range(1, state.begun + 1):
            self._passes[number] = max(1, len(skd.passes_of(state, number)))
        self._check_what_is_done(state)
        for number in range(self.rounds.count + 1):
            if number > 0 and self._stop(state):
                break
            if str(number) not in state.horizons:
                state.horizons[str(number)] = self._horizon(state)
                state.save(self.folder)
            if number == 0:
                self._text(state)
                self._train(state, 0, "start")
                continue
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
        last = next((each for each in reversed(state.done) if each.content_sha256 is None), None)
        if last is not None and last.fingerprint:
            number = last.stage.partition("-")[2]
            check_checkpoint(last, self.checkpoint(int(number or 0)), self.folder)

    def _horizon(self, state: State) -> int:
        """The steps of the learning rate's schedule, for a round that begins now."""
        given = (self.student.get("training") or {}).get("max_steps")
        if given is not None:
            if not isinstance(given, int) or given < self.last_step(self.rounds.count):
                raise ConfigError(
                    f"training.max_steps in {self.config.student_config} is {given}, but the rounds make "
                    f"{self.last_step(self.rounds.count)} steps; raise it, or remove it"
                )
            return given
        steps = self.last_step(self.rounds.count)
        before = set(state.horizons.values()) - {steps}
        if before:
            log.warning(
                "the learning rate's schedule is now %d steps long; of earlier rounds it was %d (set training.max_steps in the "
                "student config for one length)",
                steps,
                max(before),
            )
        return steps

    def _stop(self, state: State) -> bool:
        """Whether the KL on held-out text has not improved for too long."""
        stop, found = self.rounds.stop, _held_out_kl(state)
        if stop is None or len(found) <= stop.patience:
            return False
        best = found[0]
        waited = 0
        for kl in found[1:]:
            waited = 0 if kl < best - stop.min_improvement else waited + 1
            best = min(best, kl)
            if waited >= stop.patience:
                break
        if waited >= stop.patience:
            log.info(
                "no more rounds: the held-out KL has not improved on %.4f for %d rounds (rounds.stop)",
                best,
                waited,
            )
        return waited >= stop.patience

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

    def _answer(self, state: State, number: int) -> None:
        """The teacher's own answers to the prompts of a round."""
        self._build(state, number, f"answer-{number}", self.answers(number), teacher_text.WRITES)

    def _write(self, state: State, number: int) -> None:
        """What the newest student answers."""
        output = self._cache_of_pass(number, 1)
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
                self._cache_of_pass(number, pass_number),
                self._by_student(number) | splice,
            )
            self._passes[number] = pass_number
        if left := skd.passes_of(state, number)[-1].figures["rejected"]:
            log.info(
                "round %d: after the last pass %d answers have a token to reject (rounds.skd.passes)",
                number,
                left,
            )
        earlier = range(1, len(skd.passes_of(state, number)))
        skd.remove([self._cache_of_pass(number, each) for each in earlier])

    def _by_student(self, number: int) -> dict[str, Any]:
        return {"data.generate.writer": str(self.model(number - 1))}

    def _build(
        self, state: State, number: int, name: str, output: Path, changes: dict[str, Any]
    ) -> None:
        """A cache of answers to the prompts of a round, by the writer that ``changes`` names."""
        if state.of(name) is not None:
            return
        kind = name.partition("-")[0]
        changes = {
            "data.generate.skip_prompts": self.generate.skip_prompts
            + (number - 1) * self.rounds.prompts,
            "data.generate.max_prompts": self.rounds.prompts,
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
                "round %d of %d: the %s writes, the teacher scores",
                number,
                self.rounds.count,
                "teacher" if kind == "answer" else "student",
            )
        command = ["teacher-cache", "build", str(self.config.teacher_config), *_overrides(changes)]
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
        command = ["train-student", "train", str(self.config.student_config), *_overrides(changes)]
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
        self._record(state, name, ended, known, None, figures)
        for earlier in range(number):  # nothing goes on from there any more
            for each in self.model(earlier).glob("checkpoint-*"):
                shutil.rmtree(each, ignore_errors=True)

    def mixture(self, number: int) -> list[dict[str, Any]]:
        """The caches that a round learns from, with their shares of the positions."""
        text = {"cache": self.text, "name": "text"}
        if number == 0:
            return [{**text, "weight": 1.0}]
        given, students = 1 - self.rounds.on_policy_fraction, self.rounds.on_policy_fraction
        replay = self.replay if number > 1 else 0.0
        shares = {number: students * (1 - replay)}
        if replay:
            shares |= dict.fromkeys(range(1, number), students * replay / (number - 1))
        found: list[dict[str, Any]] = []
        for each in sorted(shares):
            name, of_teacher = teacher_text.student(each), teacher_text.teacher(each)
            entry = {"cache": str(self.cache(each)), "name": name, "weight": shares[each]}
            if self.rounds.teacher_text:
                # Beside every text of students, and as much of it as the fraction says.
                weight = shares[each] / students * given
                own = {"cache": str(self.answers(each)), "name": of_teacher, "weight": weight}
                found.append({**own, "held_out": 0.0})
            if self.pairs:
                entry["preferred"] = of_teacher
            found.append({**entry, "held_out": 0.0})
        if self.rounds.teacher_text:
            given = 0.0
        if given or (self.student.get("evaluation") or {}).get("cache") is None:
            found.insert(0, {**text, "weight": given})
        return found

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
        self._record(state, name, ended, manifest.fingerprint, manifest.content_sha256, figures)

    def _record(
        self,
        state: State,
        name: str,
        ended: Ended,
        fingerprint: str,
        content_sha256: str | None,
        figures: dict[str, Any],
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


def _read(path: Path) -> dict[str, Any]:
    """A config of a command, as far as it is needed here. The command checks it."""
    try:
        found = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except Exception as error:  # of the file system, of YAML, of OmegaConf
        raise ConfigError(f"{path} cannot be read as a config: {first_line(error)}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} is not a config: expected keys and values at the top level")
    return {str(name): value for name, value in found.items()}


def _plain(config: dict[str, Any], without: tuple[str, ...]) -> dict[str, Any]:
    """A config in JSON's terms, and the content of a template file as its hash."""
    plain: dict[str, Any] = json.loads(json.dumps(config, default=str))
    for name in without:
        plain.pop(name, None)
    template = (plain.get("data") or {}).get("chat_template")
    if template and Path(template).expanduser().is_file():
        content = Path(template).expanduser().read_bytes()
        plain["data"]["chat_template"] = hashlib.sha256(content).hexdigest()
    return plain


def _overrides(changes: dict[str, Any]) -> list[str]:
    """KEY=VALUE of a command; JSON is YAML of one line."""
    # YAML reads no escapes of two halves, as JSON has them for emoji.
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in changes.items()]


def _is_misled(name: str, options: dict[str, Any]) -> bool:
    """Whether text of earlier students misleads a loss."""
    beta = options.get("beta")
    above = isinstance(beta, int | float) and beta > 0.5  # if it is no number, the command says so
    return name in _MISLED or (name == "jsd" and above)


def _held_out_kl(state: State) -> list[float]:
    """The held-out KL at the start and after each round."""
    return [
        each.figures["held_out"]["kl"]
        for each in state.done
        if each.stage == "start" or each.stage.startswith("train-")
    ]
