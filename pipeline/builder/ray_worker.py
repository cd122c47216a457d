"""The processes of a Ray cluster: workers, each with its own engine, and one coordinator.

Workers and driver share the cache's folder, or the work folder of a build into a store. They
communicate through the coordinator, which only passes messages on. Nothing here imports Ray: ``logitcask.pipeline.builder.ray_driver`` makes actors
of these classes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections import Counter
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

from logitcask.cache_format.errors import LogitcaskError, UserError
from logitcask.cache_format.writer import CacheWorker
from logitcask.pipeline.builder.known import Known
from logitcask.pipeline.builder.plan import Plan
from logitcask.pipeline.builder.progress import Progress
from logitcask.pipeline.builder.score import estimate_prior, score_shard, score_shards
from logitcask.pipeline.config import BuildConfig
from logitcask.pipeline.teachers.base import Teacher
from logitcask.pipeline.teachers.open import open_teacher

# After so many dead workers a shard is not tried again, because the next one would die, too.
MAX_ATTEMPTS = 5

_REPORT_SECONDS = 1.0


@dataclass(frozen=True)
class Task:
    """A worker's task: config as JSON, absolute path of the cache, its run, the driver's folder."""

    config: str
    path: str
    run: str
    folder: str


@dataclass(frozen=True)
class Done:
    """Progress of engines: tokens of all and of scored sequences, seconds of waiting."""

    tokens: int = 0
    scored_tokens: int = 0
    engine_seconds: float = 0.0

    @classmethod
    def of(cls, progress: Progress) -> Done:
        counts = progress.counts
        return cls(counts.tokens, counts.scored_tokens, counts.engine_seconds)


@dataclass
class Situation:
    """Reports of workers to the coordinator: ``done`` since the start, shards and messages since
    the driver's last call.
    """

    done: Done = Done()
    committed: list[int] = field(default_factory=list)
    # The first worker's header (JSON) and prior (its file), while the build has not begun.
    offer: tuple[str, bytes] | None = None
    messages: list[tuple[int, str]] = field(default_factory=list)


class Coordinator:
    """Collects the reports of all workers for the driver, on the driver's node."""

    def __init__(self) -> None:
        self._attempts: Counter[int] = Counter()
        self._done: dict[int, Done] = {}
        self._situation = Situation()
        self._seen: set[str] = set()

    def attempt(self, shard: int) -> int:
        """Number of the attempt at ``shard`` that begins now, from 1."""
        self._attempts[shard] += 1
        if self._attempts[shard] > 1:
            self.note(logging.WARNING, f"a worker died at shard {shard}; another one takes it over")
        return self._attempts[shard]

    def report(self, shard: int, done: Done) -> None:
        """Reports the progress of this attempt at ``shard``."""
        self._done[shard] = done

    def committed(self, shard: int) -> None:
        """Reports that ``shard`` is committed."""
        self._situation.committed.append(shard)

    def offer(self, header: str, prior: bytes) -> None:
        """Offers a header and a prior to begin the build with. The first offer counts."""
        self._situation.offer = self._situation.offer or (header, prior)

    def note(self, level: int, message: str) -> None:
        """Passes a message to the user, once for all workers that send it."""
        if message not in self._seen:
            self._seen.add(message)
            self._situation.messages.append((level, message))

    def situation(self) -> Situation:
        """The reports since the last call; an offer is kept."""
        now, self._situation = self._situation, Situation(offer=self._situation.offer)
        now.done = Done(*map(sum, zip(*map(astuple, [Done(), *self._done.values()]), strict=True)))
        return now


class ShardWorker:
    """Scores and commits shards, one per call, with an engine that the first call starts.

    A user's mistake is returned in the row instead of raised, so that it arrives without Ray's
    traceback.
    """

    def __init__(self, task: Task, coordinator: Any) -> None:
        self._task = task
        self._config = BuildConfig.model_validate_json(task.config)
        self._coordinator = coordinator
        self._teacher: Teacher | None = None
        self._worker = CacheWorker(
            task.path,
            task.run,
            compression_level=self._config.store.compression_level,
            sent_away=isinstance(self._config.output, str),
        )
        with contextlib.suppress(OSError):
            # Relative paths of the config are relative to this folder, also on this node.
            os.chdir(task.folder)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        shard, kind, message = int(batch["shard"][0]), "", ""
        try:
            self._write(shard)
        except LogitcaskError as error:
            kind, message = type(error).__name__, str(error)
        return {"shard": [shard], "error": [kind], "message": [message]}

    def __del__(self) -> None:
        if self._teacher is not None:
            self._teacher.close()

    def _write(self, shard: int) -> None:
        import ray

        if ray.get(self._coordinator.attempt.remote(shard)) > MAX_ATTEMPTS:
            raise UserError(
                f"{MAX_ATTEMPTS} workers have died at shard {shard}, without a word (out of memory?); "
                "finished shards are kept; set a smaller teacher.batch_tokens or fewer workers, and see Ray's logs"
            )
        if self._teacher is None:
            self._start()
        if not self._worker.adopt(shard):  # committed by an attempt that was considered dead
            self._score(shard)
        # Reported before the row returns.
        ray.get(self._coordinator.committed.remote(shard))

    def _score(self, shard: int) -> None:
        assert self._teacher is not None
        progress, last = Progress(), time.monotonic()

        def at_every_answer() -> None:
            nonlocal last
            if time.monotonic() - last >= _REPORT_SECONDS:
                last = time.monotonic()
                self._worker.check()
                self._coordinator.report.remote(shard, Done.of(progress))

        pairs = score_shard(self._teacher, self._worker.build_dir, shard, progress, at_every_answer)
        score_shards(
            self._teacher,
            self._worker,
            self._plan,
            [shard],
            progress=progress,
            begun={shard: pairs},
        )
        self._coordinator.report.remote(shard, Done.of(progress))

    def _start(self) -> None:
        """Starts the engine and joins the build. If no worker has begun it, offers to begin it."""
        config, worker = self._config, self._worker
        logging.getLogger("logitcask.pipeline").addHandler(_ToDriver(self._coordinator))
        self._check_shared()
        plan = Plan.load(worker.build_dir)
        assert plan is not None
        self._plan = plan
        self._teacher = open_teacher(
            config.teacher, max_length=config.data.max_length, capture=config.capture()
        )
        header = plan.header(
            self._teacher.identity(), config.store_settings(self._teacher.vocab_size)
        )
        known = Known.load(worker.build_dir)
        if known is not None:
            known.check_teacher(header.teacher)
        if not worker.begun:
            # A worker that starts this early would wait for the first one, so it does the same
            # work.
            prior = known.prior() if known is not None else None
            if prior is None:
                prior, _ = estimate_prior(
                    score_shard(self._teacher, worker.build_dir, 0), header.store
                )
            self._coordinator.offer.remote(header.model_dump_json(), prior.to_bytes())
            while not worker.begun:
                worker.check()
                time.sleep(0.05)
        worker.join(header)

    def _check_shared(self) -> None:
        if not (self._worker.build_dir / "plan.json").exists():
            setting = "output" if isinstance(self._config.output, Path) else "LOGITCASK_CACHE"
            raise UserError(
                f"{socket.gethostname()} does not see what the build has written to {self._task.path}; "
                f"{setting} has to be on a file system that all nodes of the cluster share, under the same path"
            )
        self._worker.check()


class _ToDriver(logging.Handler):
    """Sends the log messages of a worker to the driver."""

    def __init__(self, coordinator: Any) -> None:
        super().__init__(logging.INFO)
        self._coordinator = coordinator

    def emit(self, record: logging.LogRecord) -> None:
        self._coordinator.note.remote(record.levelno, record.getMessage())
