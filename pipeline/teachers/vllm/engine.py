"""The vLLM teacher (vLLM 0.30 - 0.33): text goes in as a prompt, and its prompt logprobs come out as arrays.

How they come out, and how fast, is a matter of routes: see ``logitcask.pipeline.teachers.vllm.routes``. The fastest stands on a
private method, so it is compared with a public one every time an engine starts, and not used where they differ.

Draws from the tail are made in the engine by ``logitcask.pipeline.teachers.vllm.plugin``, and come in columns beside the most probable ids.
They too are checked at every start, against whole distributions, which vLLM gives of its own; there is no other way to
get them, so where the check fails the teacher does not start.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import math
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from logitcask.cache_format.errors import UserError, one_line
from logitcask.cache_format.manifest import TeacherIdentity
from logitcask.pipeline.config import TeacherConfig
from logitcask.pipeline.distribution.capture import Capture
from logitcask.pipeline.distribution.draws import first_difference
from logitcask.pipeline.distribution.keep import check_numbers, not_a_number
from logitcask.pipeline.interruption import safe_point
from logitcask.pipeline.memory import map_large_blocks
from logitcask.pipeline.teachers.base import Prompt, Sampling
from logitcask.pipeline.teachers.model import (
    ResolvedModel,
    check_context,
    check_rope_in_vllm,
    context_limit,
    for_text,
    is_quantised,
    is_soft_capped,
    kv_bytes_per_token,
    read_weights,
    vocab_size,
)
from logitcask.pipeline.teachers.vllm.arguments import CHUNK_ROWS, check_engine_args, logits_bytes, memory_utilization
from logitcask.pipeline.teachers.vllm.plugin import Request, drawing
from logitcask.pipeline.teachers.vllm.routes import (
    ENTRY_BYTES,
    Route,
    Rows,
    capturing,
    convert,
    drawn,
    sampling,
    scored_rows,
)
from logitcask.pipeline.teachers.vllm.writing import engine_arguments, write
from logitcask.pipeline.types import Answer, Scored, Sequence

logger = logging.getLogger(__name__)

# How much text an engine is given beyond the step it is at, in steps.
_STEPS_AHEAD = {"cpu": 3, "gpu": 8}
_AT_START = "for a first prompt"
# Nats by which two runs of an engine may differ, whatever they do; and how often draws are asked for that seem wrong.
_TOLERANCE = 1e-3
_ATTEMPTS = 3
# Steps' worth of prompts that are scored at the start: one at least is a full step, whichever prompts come first.
_STEPS_AT_START = 3
_OUT_OF_MEMORY = re.compile(r"out ?of ?memory|MemoryError|can(?:not|'t) allocate", re.IGNORECASE)


def check_location(model: ResolvedModel) -> None:
    """Raises UserError for a folder whose name vLLM takes for a pattern: the weights of another folder would be read."""
    if re.search(r"[*?\[]", model.location):
        raise UserError(
            f"vLLM takes the '*', '?' or '[' in {model.location} for a pattern and reads the weights of other folders by "
            "it; rename the folder, or name a link to it that has none of them"
        )


class VllmTeacher:
    """A model inside a vLLM engine: in this process on a CPU, in processes of its own on GPUs.

    Raises UserError, in one line with the cause, where the engine cannot start, or where ``route`` is ``raw`` or draws
    are asked for and this vLLM does not allow it.
    """

    def __init__(
        self,
        config: TeacherConfig,
        model: ResolvedModel,
        *,
        max_length: int,
        capture: Capture,
        sampling: Sampling | None = None,
    ) -> None:
        check_engine_args(config)
        check_location(model)
        check_context(model, max_length)
        check_rope_in_vllm(model, _max_model_len(max_length))
        read_weights(model)
        self._config = config
        self._model = model
        self._sampling = sampling
        self._request = Request.of(capture, vocab_size(model))
        self._requests = itertools.count()
        self._starting = True
        # Prompt logprobs that have come, by request, until the stream that asked for them takes them.
        self._finished: dict[str, Any] = {}
        # What the engine prints goes here for as long as it lives; it is read only to find the cause of a failure.
        self._engine_log = tempfile.TemporaryFile()  # noqa: SIM115
        # Bytes of it that were printed before a request that has been answered since: no cause of a failure is among them.
        self._harmless = 0
        try:
            with self._quiet():
                self._vllm = _import_vllm()
                self._on_cpu = self._vllm.platforms.current_platform.is_cpu()
                # Model runner V2 is what GPUs have, unless a user or vLLM says otherwise.
                self._runner_v2 = not self._on_cpu and self._vllm.envs.VLLM_USE_V2_MODEL_RUNNER is not False
                self._step_tokens = config.step_tokens(on_cpu=self._on_cpu)
                if not (self._on_cpu or self._runner_v2 or config.batch_tokens):
                    self._step_tokens = CHUNK_ROWS  # V1 makes the logits of a whole step
                if sampling is not None and self._on_cpu:  # which reads prompts whole then
                    self._step_tokens = max(self._step_tokens, max_length + 1)
                with drawing(self._request):
                    self._llm = self._start(max_length)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"vLLM cannot start with {model.name}: {self._cause(error)}") from error
        model_config = self._llm.llm_engine.model_config
        self.vocab_size: int = model_config.get_vocab_size()
        self._dtype = str(model_config.dtype).removeprefix("torch.")
        self._head_dtype = str(model_config.head_dtype).removeprefix("torch.")
        try:
            # An engine that fails in the middle of its work prints all that it holds.
            self._check_runner()
            with self._quiet():
                self.check_engine(max_length)
                self.check_draws(max_length)
            self.route: Route = self.choose_route(max_length)
            if not self._on_cpu:
                with self._quiet():
                    self.check_memory(max_length)
        except BaseException:
            self.close()
            raise
        self._starting = False

    def identity(self) -> TeacherIdentity:
        return TeacherIdentity(
            model=self._model.name,
            revision=self._model.revision,
            weights_sha256=self._model.weights_sha256(),
            backend="vllm",
            engine=f"vllm {self._vllm.__version__}",
            dtype=self._dtype,
            head_dtype=None if self._head_dtype == self._dtype else self._head_dtype,
            route=self.route,
            vocab_size=self.vocab_size,
        )

    def score(self, sequences: Iterable[Sequence]) -> Iterator[Scored]:
        return (answer.scored() for answer in self._answers(sequences, self.route, all_rows=True))

    def answers(self, sequences: Iterable[Sequence]) -> Iterator[Answer]:
        return self._answers(sequences, self.route, all_rows=False)

    def generate(self, prompts: Iterable[Prompt]) -> Iterator[NDArray[np.int32]]:
        assert self._sampling is not None
        engine = self._llm.llm_engine
        self._harmless = self._printed()

        def step() -> Iterable[Any]:
            safe_point()
            with self._eager(), self._explained("writing"):
                return [output for output in engine.step() if output.finished]

        return write(engine, self._vllm.SamplingParams, prompts, self._sampling, step)

    def close(self) -> None:
        """Shuts the engine down and frees its memory."""
        from vllm.distributed import cleanup_dist_env_and_memory

        with self._quiet():
            self._llm.llm_engine.engine_core.shutdown()
            del self._llm
            cleanup_dist_env_and_memory()
        self._engine_log.close()

    def check_engine(self, max_length: int) -> None:
        """Scores a short prompt, with nothing of ours in it: some kernels refuse a model only when they first run.

        Raises UserError with the kernel's message.
        """
        prompt = _prompt(min(9, max(2, max_length)), self.vocab_size)
        try:
            list(self._stream([prompt], 1, "stock"))
        except UserError:
            raise
        except Exception as error:
            raise self._does_not_run(error) from error

    def check_memory(self, max_length: int) -> None:
        """Scores prompts that fill whole steps, so that memory runs out now if it ever does.

        vLLM's profiler does not count prompt logprobs. Raises UserError, which names what to change.
        """
        length = min(self._step_tokens, max(2, max_length))
        prompt = _prompt(length, self.vocab_size)
        prompts = itertools.repeat(prompt, math.ceil(_STEPS_AT_START * self._step_tokens / length))
        for _ in self._stream(prompts, self._request.columns, self.route):
            pass

    def _check_runner(self) -> None:
        """Raises UserError where vLLM has chosen model runner V1 on a GPU, for steps larger than room was left for."""
        runner_v2 = self._llm.llm_engine.vllm_config.use_v2_model_runner
        if self._runner_v2 and not runner_v2 and self._step_tokens > CHUNK_ROWS:
            raise UserError(
                f"vLLM {self._vllm.__version__} runs {self._model.name} by its model runner V1, which makes the logits of all "
                f"{self._step_tokens} tokens of a step at a time; set VLLM_USE_V2_MODEL_RUNNER=0 in the environment, so that "
                f"there is room for them, or teacher.batch_tokens to {CHUNK_ROWS} or less"
            )
        self._runner_v2 = runner_v2 and not self._on_cpu

    def check_draws(self, max_length: int) -> None:
        """Compares the draws of a short prompt with the whole distributions, where draws are asked for.

        Engines differ from run to run, some by much more than rounding (mixtures of experts, weights of 4 bits). So whole
        distributions are asked for twice, and twice what they differ by is no fault of the draws. A fault of them is found
        every time; where there seems to be one, all is asked for again.

        Raises UserError where they are not what ``logitcask.pipeline.distribution.draws`` gives.
        """
        if not self._request.capture.samples:
            return
        prompt = _prompt(min(9, max(2, max_length)), self.vocab_size)
        reason: str | None = None
        try:
            dense, spread = self._dense(prompt), 0.0
            for _ in range(_ATTEMPTS):
                spread = max(spread, _spread(self._dense(prompt), dense))
                (rows,) = self._ask([prompt], self._request.columns, "flat")
                reason = _wrong_draws(rows, dense, self._request, max(_TOLERANCE, 2 * spread))
                if reason is None:
                    return
        except UserError:
            raise
        except Exception as error:
            reason = one_line(error)
        raise UserError(
            f"draws from the tail do not work with vLLM {self._vllm.__version__}: {reason}; "
            "set store.tail_samples=0 or teacher.backend=transformers"
        )

    def _dense(self, prompt: list[int]) -> NDArray[np.float32]:
        """float32[n-1, V]: the whole distributions of a prompt. Raises UserError where they are NaN."""
        ((ids, logprobs, _),) = self._ask([prompt], self.vocab_size, "flat")
        dense = np.empty((len(ids), self.vocab_size), np.float32)
        np.put_along_axis(dense, ids[:, 1:].astype(np.int64), logprobs[:, 1:], axis=1)
        if np.isnan(dense).any():
            raise not_a_number(_AT_START)
        return dense

    def choose_route(self, max_length: int) -> Route:
        """The configured route, checked: scores two short prompts, and compares every entry of what ``raw`` and a public
        route make of the same answer.

        This is also the engine's warm-up: its first call compiles kernels, which would spoil any figure of progress.
        Raises UserError where the route that is asked for does not work.
        """
        asked = self._config.route
        public: Route = "stock" if asked == "stock" else "flat"
        reason = self._fails(public, max_length)
        if reason is not None and asked == "auto" and not self._request.capture.samples:
            logger.warning("%s; using the stock route in its place", self._does_not_work(public, reason))
            public = "stock"
            reason = self._fails(public, max_length)
        if reason is not None:
            raise UserError(f"{self._does_not_work(public, reason)}; set teacher.backend=transformers")
        if asked in ("flat", "stock"):
            return public
        reason = self._fails("raw", max_length, beside=public)
        if reason is None:
            return "raw"
        if asked == "raw":
            raise UserError(f"{self._does_not_work('raw', reason)}; set teacher.route=auto, flat or stock")
        logger.warning(
            "%s; using the %s route, which gives the same numbers more slowly",
            self._does_not_work("raw", reason),
            public,
        )
        return public

    def _fails(self, route: Route, max_length: int, beside: Route | None = None) -> str | None:
        """Why ``route`` does not work; None where it does.

        beside: another route, which is to make the same of each answer.
        """
        columns, request = self._request.columns, self._request
        prompts = [_prompt(length, self.vocab_size) for length in sorted({2, min(16, max(2, max_length))})]
        try:
            for _, answer in self._stream(prompts, columns, route, beside):
                scored = scored_rows(convert(route, answer, columns), request)
                check_numbers(scored, _AT_START)
                if beside is None:
                    continue
                differs = _difference(scored, scored_rows(convert(beside, answer.public, columns), request))
                if differs is not None:
                    return f"{differs} differ from the {beside} route's"
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            return one_line(error)
        return None

    def _does_not_run(self, error: Exception) -> UserError:
        """For an engine that has started, and fails at its first prompts."""
        cause = self._cause(error)
        another = "another kernel may (teacher.engine_args.attention_backend), or set teacher.backend=transformers"
        return UserError(
            f"vLLM {self._vllm.__version__} cannot run {self._model.name} here: {cause}; "
            f"{self._less_memory() if _OUT_OF_MEMORY.search(cause) else another}"
        )

    def _cause(self, error: Exception) -> str:
        return _explain(error, self._engine_log, self._harmless)

    def _less_memory(self) -> str:
        """What to change where memory runs out."""
        if self._on_cpu or not self._runner_v2:
            return f"lower teacher.batch_tokens ({self._step_tokens})"
        if "kv_cache_memory_bytes" in self._config.engine_args:
            return (
                f"lower teacher.engine_args.kv_cache_memory_bytes ({self._config.engine_args['kv_cache_memory_bytes']})"
            )
        return (
            f"lower teacher.engine_args.gpu_memory_utilization ({self._utilization:g}), or end what else runs on the GPU; "
            f"teacher.batch_tokens helps below {CHUNK_ROWS}"
        )

    def _does_not_work(self, route: Route, reason: str) -> str:
        return f"the {route} route does not work with vLLM {self._vllm.__version__}: {reason}"

    def _start(self, max_length: int) -> Any:
        config, model, request = self._config, self._model, self._request
        max_model_len = _max_model_len(max_length)
        overrides: dict[str, Any] = {}
        if max_length == context_limit(model):
            # The sampled token is never read, so a prompt may fill the model's context; this field says that it may.
            overrides |= for_text(model, {"model_max_length": max_model_len})
        if not self._on_cpu and config.dtype != "float32" and not is_quantised(model):
            # 16-bit logits fall on a grid of 1/8 nat near 16; a float32 head keeps the tail, at next to no cost on a GPU.
            overrides["head_dtype"] = "float32"
        arguments: dict[str, Any] = {
            "model": model.location,
            "revision": model.revision,
            "skip_tokenizer_init": True,
            "dtype": "float32" if self._on_cpu and config.dtype == "auto" else config.dtype,
            "tensor_parallel_size": config.tensor_parallel_size,
            "max_model_len": max_model_len,
            "max_num_batched_tokens": self._step_tokens,
            "max_num_seqs": min(256, self._step_tokens),
            # Draws are checked against whole distributions.
            "max_logprobs": max(request.columns, vocab_size(model)) if request.capture.samples else request.columns,
            "logprobs_mode": "raw_logprobs",
            # A prompt read from the prefix cache comes back with rows missing or stale (vllm-project/vllm#42019).
            "enable_prefix_caching": False,
            "use_tqdm_on_load": False,
            # Images and the like are never put in, so a multimodal model needs no processor of them, nor their encoders.
            "language_model_only": True,
        }
        if self._on_cpu:
            map_large_blocks()
            arguments["enforce_eager"] = True
            room = 2 * (max_model_len + self._step_tokens)
            arguments["kv_cache_memory_bytes"] = max(1 << 30, room * kv_bytes_per_token(model, value_bytes=4))
        elif not {"gpu_memory_utilization", "kv_cache_memory_bytes"} & config.engine_args.keys():
            arguments["gpu_memory_utilization"] = self._leave_room()
        arguments |= engine_arguments(self._sampling, on_cpu=self._on_cpu, step_tokens=self._step_tokens)
        arguments |= config.engine_args
        for name, asked in (arguments.get("hf_overrides") or {}).items():
            ours = overrides.get(name)
            overrides[name] = ours | asked if isinstance(ours, dict) and isinstance(asked, dict) else asked
        arguments["hf_overrides"] = overrides
        self._utilization = arguments.get("gpu_memory_utilization", self._vllm.EngineArgs.gpu_memory_utilization)
        with _torch_threads_kept():
            return self._vllm.LLM(**arguments)

    def _leave_room(self) -> float:
        """``gpu_memory_utilization`` that leaves room for the logits of prompts."""
        usual: float = self._vllm.EngineArgs.gpu_memory_utilization
        try:
            card = self._vllm.platforms.current_platform.get_device_total_memory()
        except Exception:  # a driver's own: it does not know the memory that some GPUs share with the CPU (GB10)
            return usual
        needed = logits_bytes(
            vocab_size(self._model),
            min(CHUNK_ROWS, self._step_tokens) if self._runner_v2 else self._step_tokens,
            chunked=self._runner_v2,
            soft_capped=is_soft_capped(self._model),
            draws=bool(self._request.capture.samples),
            tensor_parallel_size=self._config.tensor_parallel_size,
        )
        return memory_utilization(card, needed, usual)

    def _answers(self, sequences: Iterable[Sequence], route: Route, *, all_rows: bool) -> Iterator[Answer]:
        columns, request = self._request.columns, self._request
        # Of a sequence in the engine, the kept positions are all that is needed once its answer comes.
        kept: deque[NDArray[np.int32] | None] = deque()

        def prompts() -> Iterator[list[int]]:
            for sequence in sequences:
                kept.append(None if all_rows else sequence.positions())
                yield sequence.input_ids.tolist()

        for n, output in self._stream(prompts(), columns, route):
            positions = kept.popleft()
            nbytes = n * (columns + 1) * ENTRY_BYTES[route]
            yield Answer(
                nbytes,
                lambda output=output, positions=positions: scored_rows(  # type: ignore[misc]
                    convert(route, output, columns), request, positions
                ),
            )

    def _ask(self, prompts: list[list[int]], columns: int, route: Route) -> list[Rows]:
        """What vLLM says of each prompt, asked for so many prompt logprobs."""
        return [convert(route, output, columns) for _, output in self._stream(prompts, columns, route)]

    def _stream(
        self, prompts: Iterable[list[int]], columns: int, route: Route, beside: Route | None = None
    ) -> Iterator[tuple[int, Any]]:
        """Length and prompt logprobs of each prompt, in order, as vLLM returns them.

        beside: a public route that what comes by ``raw`` is to carry as well.

        The engine always has some steps' worth of prompts, so that it never waits for the next group, and no more, so that
        memory stays flat. What it is given when depends on the prompts alone: an engine in this process forms the same
        batches again when a build is resumed. (One in another process takes what has arrived when a step begins.)
        """
        engine = self._llm.llm_engine
        params = self._vllm.SamplingParams(
            # In the constructor: set later, vLLM would go on reading its prefix cache for these requests.
            prompt_logprobs=columns,
            max_tokens=1,
            temperature=0.0,
            detokenize=False,
            output_kind=self._vllm.sampling_params.RequestOutputKind.FINAL_ONLY,
            **sampling(route, beside),
        )
        room = _STEPS_AHEAD["cpu" if self._on_cpu else "gpu"] * self._step_tokens
        source = iter(prompts)
        # In the order given: request, length, and the size of the engine's log then. Answers may come in another order, and
        # to another stream than asked.
        waiting: deque[tuple[str, int, int]] = deque()
        held, more = 0, True
        try:
            while more or waiting:
                added: list[list[int]] = []
                while more and held < room:
                    prompt = next(source, None)
                    if prompt is None:
                        more = False
                    else:
                        added.append(prompt)
                        held += len(prompt)
                with drawing(self._request), capturing(route), self._eager(), self._explained():
                    for prompt in added:
                        name = f"logitcask-{next(self._requests)}"
                        waiting.append((name, len(prompt), self._printed()))
                        engine.add_request(name, self._vllm.inputs.tokens_input(prompt), params)
                    if waiting and waiting[0][0] not in self._finished:
                        safe_point()
                        for output in engine.step():
                            self._finished[output.request_id] = output.prompt_logprobs
                while waiting and waiting[0][0] in self._finished:
                    name, length, self._harmless = waiting.popleft()
                    held -= length
                    yield length, self._finished.pop(name)
        finally:
            if waiting:
                names = [name for name, *_ in waiting]
                for name in names:
                    self._finished.pop(name, None)
                with contextlib.suppress(Exception):  # the engine may be dead
                    engine.abort_request(names)

    def _printed(self) -> int:
        """Bytes that the engine has printed."""
        return os.fstat(self._engine_log.fileno()).st_size

    @contextlib.contextmanager
    def _explained(self, work: str = "scoring") -> Iterator[None]:
        """Turns an engine's failure into one line with its cause."""
        try:
            yield
        except Exception as error:
            if not _is_engine_failure(error):
                raise
            logger.debug("vLLM stopped", exc_info=True)
            if self._starting:
                raise self._does_not_run(error) from error
            raise UserError(
                f"vLLM stopped while {work}: {self._cause(error)}; the same command goes on at the first "
                f"shard that is missing; where memory ran out, {self._less_memory()}"
            ) from error

    def _eager(self) -> contextlib.AbstractContextManager[Any]:
        """Without a C++ compiler, vLLM's CPU build runs what it would compile (it counts ranks) as it is, 9 % slower."""
        if not self._on_cpu or shutil.which(os.environ.get("CXX", "g++")):
            return contextlib.nullcontext()
        import torch

        return torch.compiler.set_stance("force_eager")

    @contextlib.contextmanager
    def _quiet(self) -> Iterator[None]:
        """Sends what the engine prints to its log, unless debugging.

        By file descriptor: native code and the engine's child processes print past ``sys.stdout`` and ``logging``.
        """
        if _debugging():
            yield
            return
        sys.stdout.flush()
        sys.stderr.flush()
        kept = os.dup(1), os.dup(2)
        try:
            os.dup2(self._engine_log.fileno(), 1)
            os.dup2(self._engine_log.fileno(), 2)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, original in zip((1, 2), kept, strict=True):
                os.dup2(original, descriptor)
                os.close(original)


def _import_vllm() -> Any:
    """Imports vLLM with the environment that it reads while it is imported. What the user has set stays as it is.

    Raises UserError where this build of vLLM has no device to run on.
    """
    if not _debugging():
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    import vllm
    import vllm.envs
    import vllm.inputs
    import vllm.platforms
    import vllm.sampling_params

    if vllm.platforms.current_platform.is_unspecified():
        raise UserError(
            "the installed vLLM finds no device it was built for (is there an NVIDIA driver?); "
            "install logitcask[teacher-cpu], or set teacher.backend=transformers"
        )
    if vllm.platforms.current_platform.is_cpu():
        # A separate engine process would bind the cores and reserve one; on a small machine that halves the speed.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    return vllm


@contextlib.contextmanager
def _torch_threads_kept() -> Iterator[None]:
    """vLLM's CPU worker replaces ``torch.set_num_threads`` for the whole process; this puts it back."""
    import torch

    original = torch.set_num_threads
    try:
        yield
    finally:
        torch.set_num_threads = original


def _max_model_len(max_length: int) -> int:
    """With one token of room: the engine insists on sampling one after the prompt."""
    return max(2, max_length) + 1


def _prompt(length: int, vocab_size: int) -> list[int]:
    """Ids from all over the vocabulary, for checks."""
    ids: list[int] = (np.arange(length) * 7919 % vocab_size).tolist()
    return ids


def _spread(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """Largest difference of two logprobs, nats; both may be -inf."""
    with np.errstate(invalid="ignore"):
        return float(np.nanmax(np.abs(a - b), initial=0))


def _wrong_draws(rows: Rows, dense: NDArray[np.float32], request: Request, tolerance: float) -> str | None:
    """What is wrong with the draws in ``rows``, given the whole distributions (float32[n-1, V]) as another run said them.

    tolerance: nats by which two runs may differ.
    """
    ids, logprobs, _ = rows
    top_ids, target_ids = ids[:, 1 : 1 + request.top], ids[:, 0]
    draws = drawn(ids, logprobs, request)
    if (draws.head_size > request.capture.top_k).all():
        return "the engine answers without draws (it loads them as a plugin; is VLLM_PLUGINS set?)"
    # Sizes and keys follow from what this run said to the last bit, which a second run need not repeat.
    exact = dense.copy()
    np.put_along_axis(exact, ids[:, : 1 + request.top].astype(np.int64), logprobs[:, : 1 + request.top], axis=1)
    if not np.allclose(exact, dense, atol=tolerance, rtol=0):
        return "the logprobs of the most probable ids change with what is asked for"
    return first_difference(draws, exact, top_ids, target_ids, request.capture, tolerance)


def _difference(a: Scored, b: Scored) -> str | None:
    """Name of the first field that is not the same in both."""
    names = [field.name for field in dataclasses.fields(Scored)]
    return next((name for name in names if not np.array_equal(getattr(a, name), getattr(b, name))), None)


def _debugging() -> bool:
    return logger.isEnabledFor(logging.DEBUG)


def _is_engine_failure(error: Exception) -> bool:
    """Whether the engine has failed at its work. A call that a version does not know (a TypeError, say) is another matter."""
    return type(error).__name__ == "EngineDeadError" or isinstance(
        error, RuntimeError | OSError | MemoryError | AssertionError
    )


def _explain(error: Exception, engine_log: IO[bytes], harmless: int = 0) -> str:
    """The innermost message of an engine's failure, in one line.

    In-process engines raise the cause itself. Engines in other processes leave it in what they printed, behind the first
    ``harmless`` bytes.
    """
    message = str(error)
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        message = ": ".join([*map(str, first["loc"]), first["msg"].removeprefix("Value error, ")])
    if "root cause" in message or "check the logs" in message:
        engine_log.flush()
        # The engine's processes write on at the file's one offset, so it stays where it is.
        size = os.fstat(engine_log.fileno()).st_size
        printed = os.pread(engine_log.fileno(), size - harmless, harmless).decode(errors="replace")
        # The first error is the cause; the rest is other processes noticing, or naming the process it came from.
        causes = re.findall(r"\b(?:\w+\.)*\w*Error: .+", printed)
        message = next((cause for cause in causes if "raised in subprocess" not in cause), message)
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
