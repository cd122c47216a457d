"""The vLLM teacher (vLLM 0.30 - 0.33): text goes in as a prompt, and its prompt logprobs come out as arrays.

vLLM's engine hands the prompt logprobs of a request to its front end as tensors, which the front end then turns into
Python objects, one per entry; on a GPU that costs more than the model does. There are two ways out here:

raw   ``LogprobsProcessor``, a private class of the front end, is told to keep the arrays of our requests as they come.
flat  the public ``SamplingParams(flat_logprobs=True)``: Python lists, the least wasteful of what vLLM offers.

Both give the same numbers. ``raw`` is compared with ``flat`` every time an engine starts, and not used where they differ.

Draws from the tail are made in the engine by ``pipeline.vllm_plugin``, and come in columns beside the most probable ids.
They too are checked at every start, against whole distributions, which vLLM gives of its own; there is no other way to
get them, so where the check fails the teacher does not start.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import logging
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from cache_format.errors import ConfigError, UserError
from cache_format.manifest import TeacherIdentity
from pipeline.capture import Capture
from pipeline.config import TeacherConfig
from pipeline.draws import Draws, first_difference, no_draws
from pipeline.models import ResolvedModel, check_context, context_limit, is_quantised, kv_bytes_per_token, vocab_size
from pipeline.sequence import Scored, Sequence
from pipeline.teachers import bounded_groups
from pipeline.vllm_plugin import Request, drawing

logger = logging.getLogger(__name__)

Route = Literal["raw", "flat"]

_RAW = "logitcask_raw"
# A request's arrays as they come out of vLLM: ids and logprobs [n-1, 1 + columns], ranks [n-1].
_Rows = tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.int64]]
_STEPS_PER_GROUP = {"cpu": 4, "gpu": 64}
# Other values of these would silently change or break what is stored; each has a field of its own or just one right value.
_RESERVED = {
    "model": "teacher.model",
    "revision": "teacher.revision",
    "dtype": "teacher.dtype",
    "tensor_parallel_size": "teacher.tensor_parallel_size",
    "max_num_batched_tokens": "teacher.batch_tokens",
    "max_model_len": "data.max_length",
    "max_logprobs": "store.top_k",
    "logprobs_mode": None,
    "enable_prefix_caching": None,
    "speculative_config": None,
}


class VllmTeacher:
    """A model inside a vLLM engine: in this process on a CPU, in processes of its own on GPUs.

    Raises UserError, in one line with the cause, where the engine cannot start, or where ``route`` is ``raw`` or draws
    are asked for and this vLLM does not allow it.
    """

    def __init__(self, config: TeacherConfig, model: ResolvedModel, *, max_length: int, capture: Capture) -> None:
        for key in _RESERVED.keys() & config.engine_args.keys():
            instead = f"use {_RESERVED[key]}" if _RESERVED[key] else "its value is part of how logprobs are captured"
            raise ConfigError(f"teacher.engine_args.{key} cannot be set; {instead}")
        check_context(model, max_length)
        self._config = config
        self._model = model
        self._request = Request.of(capture, vocab_size(model))
        # What the engine prints goes here for as long as it lives; it is read only to find the cause of a failure.
        self._engine_log = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            with self._quiet():
                self._vllm = _import_vllm()
                self._on_cpu = self._vllm.platforms.current_platform.is_cpu()
                self._step_tokens = config.step_tokens(on_cpu=self._on_cpu)
                with drawing(self._request):
                    self._llm = self._start(max_length)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"vLLM cannot start with {model.name}: {_explain(error, self._engine_log)}") from error
        model_config = self._llm.llm_engine.model_config
        self.vocab_size: int = model_config.get_vocab_size()
        self._dtype = str(model_config.dtype).removeprefix("torch.")
        self._head_dtype = str(model_config.head_dtype).removeprefix("torch.")
        try:
            # An engine that fails in the middle of its work prints all that it holds.
            with self._quiet():
                self.check_draws(max_length)
            self.route: Route = self.choose_route(max_length)
        except BaseException:
            self.close()
            raise

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
        """Scores in groups of a few engine steps, so that memory stays flat however many sequences there are."""
        steps = _STEPS_PER_GROUP["cpu" if self._on_cpu else "gpu"]
        for group in bounded_groups(sequences, steps * self._step_tokens):
            yield from self._score_group([sequence.input_ids.tolist() for sequence in group], self.route)

    def close(self) -> None:
        """Shuts the engine down and frees its memory."""
        from vllm.distributed import cleanup_dist_env_and_memory

        with self._quiet():
            self._llm.llm_engine.engine_core.shutdown()
            del self._llm
            cleanup_dist_env_and_memory()
        self._engine_log.close()

    def check_draws(self, max_length: int) -> None:
        """Compares the draws of a short prompt with the whole distributions, where draws are asked for.

        Raises UserError where they are not what ``pipeline.draws`` gives.
        """
        if not self._request.capture.samples:
            return
        prompt = _prompt(min(9, max(2, max_length)), self.vocab_size)
        try:
            ((ids, logprobs, _),) = self._ask([prompt], self.vocab_size, "flat")
            dense = np.empty((len(ids), self.vocab_size), np.float32)
            np.put_along_axis(dense, ids[:, 1:].astype(np.int64), logprobs[:, 1:], axis=1)
            (rows,) = self._ask([prompt], self._request.columns, "flat")
            reason = _wrong_draws(rows, dense, self._request)
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
        if reason is not None:
            raise UserError(
                f"draws from the tail do not work with vLLM {self._vllm.__version__}: {reason}; "
                "set store.tail_samples=0 or teacher.backend=transformers"
            )

    def choose_route(self, max_length: int) -> Route:
        """The configured route, checked: scores two short prompts both ways and compares every entry.

        This is also the engine's warm-up: its first call compiles kernels, which would spoil any figure of progress.
        Raises UserError where ``raw`` is asked for and does not give what ``flat`` gives.
        """
        prompts = [_prompt(length, self.vocab_size) for length in sorted({2, min(16, max(2, max_length))})]
        # One prompt a call: both routes must see the same batch, since its shape can change the last bits on a GPU.
        public = [self._score_group([prompt], "flat")[0] for prompt in prompts]
        if self._config.route == "flat":
            return "flat"
        try:
            private = [self._score_group([prompt], "raw")[0] for prompt in prompts]
            differs = next((name for a, b in zip(public, private, strict=True) if (name := _difference(a, b))), None)
            reason = f"{differs} differ from the flat route's" if differs else None
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
        if reason is None:
            return "raw"
        found = f"the raw route does not work with vLLM {self._vllm.__version__}: {reason}"
        if self._config.route == "raw":
            raise UserError(f"{found}; set teacher.route=auto or flat")
        logger.warning("%s; using the flat route, which gives the same numbers more slowly", found)
        return "flat"

    def _start(self, max_length: int) -> Any:
        config, model, request = self._config, self._model, self._request
        # One token of room: the engine insists on sampling one after the prompt.
        max_model_len = max(2, max_length) + 1
        overrides: dict[str, Any] = {}
        if max_length == context_limit(model):
            # The sampled token is never read, so a prompt may fill the model's context; this field says that it may.
            overrides["model_max_length"] = max_model_len
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
        }
        if self._on_cpu:
            arguments["enforce_eager"] = True
            room = 2 * (max_model_len + self._step_tokens)
            arguments["kv_cache_memory_bytes"] = max(1 << 30, room * kv_bytes_per_token(model, value_bytes=4))
        arguments |= config.engine_args
        asked = arguments.get("hf_overrides") or {}
        arguments["hf_overrides"] = overrides | asked
        with _torch_threads_kept():
            return self._vllm.LLM(**arguments)

    def _score_group(self, prompts: list[list[int]], route: Route) -> list[Scored]:
        return [_scored(*rows, self._request) for rows in self._ask(prompts, self._request.columns, route)]

    def _ask(self, prompts: list[list[int]], columns: int, route: Route) -> list[_Rows]:
        """What vLLM says of each prompt, asked for so many prompt logprobs."""
        params = self._vllm.SamplingParams(
            # In the constructor: set later, vLLM would go on reading its prefix cache for these requests.
            prompt_logprobs=columns,
            max_tokens=1,
            temperature=0.0,
            detokenize=False,
            flat_logprobs=True,
            extra_args={_RAW: True} if route == "raw" else None,
        )
        kept = _raw_capture() if route == "raw" else contextlib.nullcontext()
        try:
            with drawing(self._request), kept, self._eager():
                outputs = self._llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        except Exception as error:
            if not _is_engine_failure(error):
                raise
            raise UserError(
                f"vLLM stopped while scoring: {_explain(error, self._engine_log)}; "
                f"where memory ran out, lower teacher.batch_tokens ({self._step_tokens}) "
                f"or store.top_k ({self._request.capture.top_k})"
            ) from error
        convert = _from_arrays if route == "raw" else _from_flat
        return [convert(output.prompt_logprobs, columns) for output in outputs]

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
    import vllm.platforms

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


class _Captured(list[Any]):
    """Stands where vLLM keeps a request's prompt logprobs: a list, as there, but of (ids, logprobs, ranks) arrays.

    Being a list, it takes whatever another vLLM may append, to be refused once the request is finished: an exception
    inside the engine's loop would leave it waiting for ever for a request that it has lost.
    """


@contextlib.contextmanager
def _raw_capture() -> Iterator[None]:
    """While this is entered, requests with ``extra_args[_RAW]`` keep their prompt logprobs as arrays.

    Raises AttributeError where vLLM no longer has the two methods of ``LogprobsProcessor`` this stands on.
    """
    from vllm.v1.engine.logprobs import LogprobsProcessor

    # The descriptors themselves, so that leaving puts back exactly what was there.
    originals = {
        name: inspect.getattr_static(LogprobsProcessor, name)
        for name in ("from_new_request", "_update_prompt_logprobs")
    }
    from_new_request = LogprobsProcessor.from_new_request
    update: Callable[[Any, Any], None] = LogprobsProcessor._update_prompt_logprobs

    def marked(cls: type, tokenizer: Any, request: Any) -> Any:
        processor = from_new_request(tokenizer, request)
        if (request.sampling_params.extra_args or {}).get(_RAW):
            processor.prompt_logprobs = _Captured()
        return processor

    def keep(self: Any, tensors: Any) -> None:
        if not isinstance(self.prompt_logprobs, _Captured):
            update(self, tensors)
            return
        try:
            # Copies: the originals lie in the transport's receive buffer, which they would keep alive.
            ids = tensors.logprob_token_ids.numpy().astype(np.int32)
            logprobs = tensors.logprobs.numpy().astype(np.float32)
            ranks = tensors.selected_token_ranks.numpy().astype(np.int64)
            self.prompt_logprobs.append((ids, logprobs, ranks))
        except Exception as error:
            self.prompt_logprobs.append(error)

    LogprobsProcessor.from_new_request = classmethod(marked)
    LogprobsProcessor._update_prompt_logprobs = keep
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(LogprobsProcessor, name, original)


def _prompt(length: int, vocab_size: int) -> list[int]:
    """Ids from all over the vocabulary, for checks."""
    ids: list[int] = (np.arange(length) * 7919 % vocab_size).tolist()
    return ids


def _from_arrays(captured: Any, columns: int) -> _Rows:
    if not isinstance(captured, _Captured) or not captured or not all(isinstance(part, tuple) for part in captured):
        raise TypeError(f"expected arrays, found {str(captured[:1] or captured)[:80]}")
    ids, logprobs, ranks = (np.concatenate(parts) for parts in zip(*captured, strict=True))
    return _checked(ids, logprobs, ranks, columns)


def _from_flat(flat: Any, columns: int) -> _Rows:
    # Row 0 stands for the first token, which nothing predicts, and is empty; all others have 1 + columns entries.
    ids = np.array(flat.token_ids, dtype=np.int32).reshape(-1, columns + 1)
    logprobs = np.array(flat.logprobs, dtype=np.float32).reshape(-1, columns + 1)
    ranks = np.array(flat.ranks[:: columns + 1], dtype=np.int64)
    return _checked(ids, logprobs, ranks, columns)


def _checked(ids: NDArray[np.int32], logprobs: NDArray[np.float32], ranks: NDArray[np.int64], columns: int) -> _Rows:
    if ids.shape != logprobs.shape or ids.shape[1:] != (columns + 1,) or ranks.shape != ids.shape[:1]:
        raise ValueError(
            f"vLLM returned ids {ids.shape}, logprobs {logprobs.shape}, ranks {ranks.shape} for {columns} columns"
        )
    return ids, logprobs, ranks


def _scored(
    ids: NDArray[np.int32], logprobs: NDArray[np.float32], ranks: NDArray[np.int64], request: Request
) -> Scored:
    """Column 0 is the token that really follows, the next ones are the most probable ids, by falling logprob.

    vLLM's rank counts the ids whose logprob is at least the target's, itself included, so ids tied with the target push
    it down. Inside the head the right rank is counted here; below the head it is vLLM's, less one, which still counts
    tied ids as higher. In float32 ties are rare; a 16-bit head has many.
    """
    capture = request.capture
    target, head = logprobs[:, 0], np.ascontiguousarray(logprobs[:, 1 : 1 + capture.top_k])
    rank_in_head = (head > target[:, None]).sum(axis=1)
    in_head = (target[:, None] >= head[:, -1:]).any(axis=1)
    draws = _draws(ids, logprobs, request) if capture.samples else no_draws(head, capture)
    return Scored(
        ids=np.ascontiguousarray(ids[:, 1 : 1 + capture.top_k]),
        logprobs=head,
        head_size=draws.head_size,
        target_ids=ids[:, 0].copy(),
        target_logprob=target.copy(),
        target_rank=np.where(in_head, rank_in_head, ranks - 1).astype(np.int32),
        samples=draws.samples,
        sample_logprobs=draws.sample_logprobs,
        entropy=draws.entropy,
    )


def _draws(ids: NDArray[np.int32], logprobs: NDArray[np.float32], request: Request) -> Draws:
    """The columns that ``pipeline.vllm_plugin`` fills: the draws of each set, and the statistics in the last."""
    shape = (len(ids), request.capture.sets, request.capture.samples)
    return Draws(
        head_size=ids[:, -1].copy(),
        samples=ids[:, 1 + request.top : -1].reshape(shape),
        sample_logprobs=logprobs[:, 1 + request.top : -1].reshape(shape),
        entropy=logprobs[:, -1].copy(),
    )


def _wrong_draws(rows: _Rows, dense: NDArray[np.float32], request: Request) -> str | None:
    """What is wrong with the draws in ``rows``, given the whole distributions (float32[n-1, V]), which may be reordered."""
    ids, logprobs, _ = rows
    top_ids, target_ids = ids[:, 1 : 1 + request.top], ids[:, 0]
    draws = _draws(ids, logprobs, request)
    if (draws.head_size > request.capture.top_k).all():
        return "the engine answers without draws (it loads them as a plugin; is VLLM_PLUGINS set?)"
    # Sizes and keys follow from what this run said to the last bit, which a second run need not repeat.
    exact = dense.copy()
    np.put_along_axis(exact, ids[:, : 1 + request.top].astype(np.int64), logprobs[:, : 1 + request.top], axis=1)
    if not np.allclose(exact, dense, atol=1e-3, rtol=0):
        return "the logprobs of the most probable ids change with what is asked for"
    return first_difference(draws, exact, top_ids, target_ids, request.capture)


def _difference(a: Scored, b: Scored) -> str | None:
    """Name of the first field that is not the same in both."""
    names = [field.name for field in dataclasses.fields(Scored)]
    return next((name for name in names if not np.array_equal(getattr(a, name), getattr(b, name))), None)


def _debugging() -> bool:
    return logger.isEnabledFor(logging.DEBUG)


def _is_engine_failure(error: Exception) -> bool:
    message = str(error).lower()
    return type(error).__name__ == "EngineDeadError" or any(
        sign in message for sign in ("out of memory", "can't allocate memory", "cannot allocate memory")
    )


def _explain(error: Exception, engine_log: IO[bytes]) -> str:
    """The innermost message of an engine's failure, in one line.

    In-process engines raise the cause itself. Engines in other processes leave it in what they printed.
    """
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return ": ".join([*map(str, first["loc"]), first["msg"].removeprefix("Value error, ")])
    message = str(error)
    if "root cause" in message:
        engine_log.seek(0)
        printed = engine_log.read().decode(errors="replace")
        # The first error is the cause; the rest is other processes noticing.
        raised = re.search(r"\b(?:\w+\.)*\w*Error: .+", printed)
        message = raised[0] if raised else message
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
