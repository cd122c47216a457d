"""A build with many engines: Ray Data gives shards to workers, which score and commit them.

The process that the user starts is the driver. It holds the lock, the plan and the progress bar,
and begins and finishes the cache. A worker is a Ray actor with its own engine
(``logitcask.pipeline.builder.ray_worker``). The content of a shard depends only on the plan, not on
the worker or on the number of attempts.

Failures. If a worker dies, Ray replaces it, and its shard is tried again. If the driver dies, Ray
ends its workers after some time. Until then they commit finished shards, unless the next driver
stops them (``logitcask.cache_format.writer``).
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import queue
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any

from logitcask.cache_format import CacheWriter, LogitcaskError, UserError
from logitcask.cache_format.errors import first_line
from logitcask.cache_format.manifest import Header
from logitcask.cache_format.runtime.interruption import at_safe_points, safe_point
from logitcask.cache_format.shards.prior import TailPrior
from logitcask.pipeline.builder.plan import Plan
from logitcask.pipeline.builder.progress import Progress
from logitcask.pipeline.builder.ray_worker import Coordinator, Done, ShardWorker, Situation, Task
from logitcask.pipeline.config import BuildConfig, ScaleConfig
from logitcask.pipeline.identity import check_teacher

log = logging.getLogger(__name__)

_POLL_SECONDS = 0.25
_STARTS = 4
_END_SECONDS = 60.0
# Environment variables of this program and of the engine are copied to other nodes.
_PASSED_ON = ("LOGITCASK_", "VLLM_", "OMP_NUM_THREADS")


def score_shards_on_ray(
    writer: CacheWriter, plan: Plan, config: BuildConfig, scale: ScaleConfig, shards: list[int]
) -> tuple[Header, float, int]:
    """Scores and commits ``shards`` of the plan, which ``writer`` has not committed yet, by workers
    in a Ray cluster.

    Begins the cache if that has not been done. Returns its header, seconds, and the tokens of the
    scored sequences. Raises UserError if Ray or one of its requirements is missing, and the errors
    of workers.
    """
    ray = _import_ray()
    scale = scale.model_copy(update={"workers": min(scale.workers, len(shards))})
    with _cluster(ray, scale):
        cpus, gpus = _resources(ray, scale, config)
        node = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        )
        coordinator = ray.remote(Coordinator).options(num_cpus=0, scheduling_strategy=node).remote()
        task = Task(
            config=config.model_dump_json(),
            path=str(writer.path.absolute()),
            run=writer.run,
            folder=os.getcwd(),
        )
        results = (
            ray.data.from_items(
                [{"shard": shard} for shard in shards], override_num_blocks=len(shards)
            )
            .map_batches(
                ShardWorker,
                fn_constructor_args=(task, coordinator),
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(
                    size=scale.workers, max_tasks_in_flight_per_actor=1
                ),
                num_cpus=cpus,
                num_gpus=gpus or None,
            )
            .iter_rows()
        )
        total = sum(plan.shards[shard].tokens for shard in shards)
        # Ray sometimes swallows a KeyboardInterrupt. A flag that is checked between two polls is
        # never lost.
        with (
            Progress(total, len(shards), bar=True, file=config.log_file()) as progress,
            at_safe_points(),
            _as_they_come(results) as rows,
        ):
            if writer.begun:
                progress.started(config.output, writer.header(), len(writer.committed))
            for row in rows:
                situation: Situation = ray.get(coordinator.situation.remote())
                if situation.offer is not None and not writer.begun:
                    _begin(writer, *situation.offer)
                    progress.started(config.output, writer.header(), len(writer.committed))
                for level, message in situation.messages:
                    log.log(level, "%s", message)
                if writer.begun:
                    _count(situation.done, progress, scale.workers)
                for shard in situation.committed:
                    # Some shards are reported twice: by an attempt considered dead, and by the
                    # next.
                    if shard not in writer.committed:
                        _take_up(writer, shard, progress)
                if row is not None and row["error"]:
                    raise _error(row["error"], row["message"])
                safe_point()
        return writer.header(), progress.seconds, progress.counts.scored_tokens


def _error(kind: str, message: str) -> LogitcaskError:
    """The error of a worker, by the name of its class; an unknown class becomes a UserError."""

    def kinds(base: type[LogitcaskError]) -> Iterator[type[LogitcaskError]]:
        yield base
        for each in base.__subclasses__():
            yield from kinds(each)

    # All loaded classes, not only those of one module: MisalignedScoresError is defined elsewhere.
    return next((each for each in kinds(LogitcaskError) if each.__name__ == kind), UserError)(
        message
    )


def _count(done: Done, progress: Progress, workers: int) -> None:
    """Updates the bar and the log; subtracts the progress of a shard whose engine has died."""
    counts = progress.counts
    waited = done.engine_seconds / workers - counts.engine_seconds
    progress.answered(done.scored_tokens - counts.scored_tokens, scored=True, engine_seconds=waited)
    progress.answered(done.tokens - counts.tokens, scored=False, engine_seconds=0.0)


def _begin(writer: CacheWriter, text: str, prior: bytes) -> None:
    """Begins the build with the offer of the first worker."""
    header = Header.model_validate_json(text)
    if header.data.generation is not None:
        check_teacher(writer.build_dir, header.teacher)
    writer.begin(
        header, TailPrior.from_bytes(prior, header.store.vocab_size, "the prior of a worker")
    )


def _take_up(writer: CacheWriter, shard: int, progress: Progress) -> None:
    if not writer.adopt(shard):
        raise UserError(
            f"a worker has committed shard {shard}, but {writer.path} does not show it; run the same command again"
        )
    entry = writer.committed[shard]
    progress.counts.written_tokens += entry.tokens
    progress.counts.written_bytes += entry.bytes
    progress.committed(shard, entry)


@contextlib.contextmanager
def _as_they_come(rows: Iterator[dict[str, Any]]) -> Iterator[Iterator[dict[str, Any] | None]]:
    """A context with ``rows`` as they arrive, and None at intervals, so that the caller can do
    other work. After the context no thread asks Ray for rows.
    """
    arrived: queue.SimpleQueue[dict[str, Any] | BaseException | None] = queue.SimpleQueue()

    def drain() -> None:
        try:
            for row in rows:
                arrived.put(row)
            arrived.put(None)
        except BaseException as error:  # of any kind: the waiting thread raises it
            arrived.put(error)

    def each() -> Iterator[dict[str, Any] | None]:
        while True:
            try:
                row = arrived.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                yield None
                continue
            if row is None:
                return
            if isinstance(row, BaseException):
                raise row
            yield row

    reader = threading.Thread(target=drain, name="results", daemon=True)
    reader.start()
    try:
        yield each()
    finally:
        # If a thread uses Ray after its shutdown, Ray ends the process with code 1.
        until = time.monotonic() + _END_SECONDS
        while reader.is_alive() and time.monotonic() < until:
            _end_executions()
            reader.join(_POLL_SECONDS)


def _end_executions() -> None:
    """Ends the executions of Ray Data in this process, and waits for their threads."""
    from ray.data._internal.execution.streaming_executor import StreamingExecutor

    for thread in threading.enumerate():
        if isinstance(thread, StreamingExecutor):
            thread.shutdown(force=True)
            thread.join(_END_SECONDS)


def _import_ray() -> Any:
    """Ray with Ray Data, quiet unless debugging. Raises UserError if it is not installed."""
    # Ray reads these at import or start. By default it sends usage statistics to its makers.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray used after its shutdown is an error, not the start of another cluster.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    if not _debugging():
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
        import ray.data
        import ray.util.scheduling_strategies
    except ModuleNotFoundError as error:
        raise UserError(
            "scale needs Ray, which is not installed; pip install 'logitcask[scale]'"
        ) from error
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    if not _debugging():
        of_data = logging.getLogger("ray.data")
        for handler in list(of_data.handlers):
            if handler in logging.getLogger().handlers:
                of_data.removeHandler(handler)  # the program's own, which must stay loud
            elif isinstance(handler, logging.StreamHandler):
                handler.setLevel(logging.CRITICAL + 1)
    return ray


@contextlib.contextmanager
def _cluster(ray: Any, scale: ScaleConfig) -> Iterator[None]:
    """Connects to the cluster of ``scale`` or RAY_ADDRESS, or starts one on this machine for the
    duration of the context.

    Ray's messages about dead workers are hidden: users do not need them, and stdout must not have
    them.
    """
    address = scale.address or os.environ.get("RAY_ADDRESS") or "local"
    options: dict[str, Any] = {}
    if address == "local":
        # Logical cores only: the requested number of workers starts on any machine.
        options = {
            "include_dashboard": False,
            "num_cpus": max(os.cpu_count() or 1, scale.workers * (scale.cpus_per_worker or 1)),
        }
    else:
        passed_on = {
            name: value for name, value in os.environ.items() if name.startswith(_PASSED_ON)
        }
        options = {"runtime_env": {"env_vars": passed_on}} if passed_on else {}
    quiet = contextlib.nullcontext() if _debugging() else contextlib.redirect_stdout(_Nowhere())
    with quiet, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        on_sigterm = signal.getsignal(signal.SIGTERM)
        _start(ray, address, options)
        if threading.current_thread() is threading.main_thread():
            # Otherwise Ray would end the process with its own exit code.
            signal.signal(signal.SIGTERM, on_sigterm)
        log.info(
            "%d workers, in a Ray cluster %s",
            scale.workers,
            "on this machine" if address == "local" else f"at {address}",
        )
        try:
            yield
        finally:
            ray.shutdown()


def _start(ray: Any, address: str, options: dict[str, Any]) -> None:
    """Connects to the cluster at ``address``, or starts one; a start that takes too long is
    repeated.

    Ray waits 30 s for its own processes, which a busy machine can exceed. Raises UserError.
    """
    for attempt in range(1, _STARTS + 1):
        try:
            with contextlib.nullcontext() if _debugging() else _stderr_closed():
                ray.init(
                    address=address,
                    log_to_driver=_debugging(),
                    logging_level=logging.INFO if _debugging() else logging.CRITICAL,
                    **options,
                )
            return
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UserError(f"there is no Ray cluster at {address}: {first_line(error)}") from error
        except Exception as error:  # Ray has no class for a start that takes too long
            ray.shutdown()
            if attempt == _STARTS:
                raise UserError(
                    f"Ray did not start in {_STARTS} attempts: {first_line(error)}; end other programs, or build without scale"
                ) from error
            log.warning("Ray did not start, trying again: %s", first_line(error))


def _resources(ray: Any, scale: ScaleConfig, config: BuildConfig) -> tuple[float, float]:
    """Cores and GPUs of each worker. Raises UserError if this machine has too few GPUs."""
    there = ray.cluster_resources()
    gpus_there = there.get("GPU", 0)
    gpus = scale.gpus_per_worker
    if gpus is None:
        gpus = config.teacher.gpus_per_engine if gpus_there else 0
    if gpus * scale.workers > gpus_there:
        found = f"scale asks for {scale.workers} workers with {gpus:g} GPUs each, and the Ray cluster has {gpus_there:g} GPUs"
        if scale.address is None and "RAY_ADDRESS" not in os.environ:
            raise UserError(
                f"{found}; set fewer scale.workers, or scale.address to a larger cluster"
            )
        log.warning("%s: fewer work until it grows", found)
    cpus = scale.cpus_per_worker or (
        1 if gpus else max(1, int(there.get("CPU", 1)) // scale.workers)
    )
    return cpus, gpus


@contextlib.contextmanager
def _stderr_closed() -> Iterator[None]:
    """A context that hides the output of Ray's C++ code on stderr during its start."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


class _Nowhere(io.TextIOBase):
    """A stream that discards its input."""

    def write(self, text: str) -> int:
        return len(text)


def _debugging() -> bool:
    return log.isEnabledFor(logging.DEBUG)
