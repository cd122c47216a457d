"""The vLLM teacher (vLLM 0.30 - 0.33): a text is a prompt, and its prompt logprobs become arrays.

``routes`` has the ways to get the logprobs. The fastest route uses a private method, so it is
compared with a public route at every start of an engine, and not used if they differ
(``self_check``).

``plugin`` makes draws from the tail in the engine and returns them in columns beside the most
probable ids. They are also checked at every start, against vLLM's own whole distributions. There is
no other way to get draws, so the teacher does not start if the check fails.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import math
import re
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcask.cache_format.errors import UserError
from logitcask.cache_format.manifest import TeacherIdentity
from logitcask.cache_format.runtime.interruption import safe_point
from logitcask.pipeline.config import TeacherConfig
from logitcask.pipeline.distribution.capture import Capture
from logitcask.pipeline.memory import map_large_blocks
from logitcask.pipeline.teachers.base import Prompt, SampledAnswer, Sampling
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
from logitcask.pipeline.teachers.rows import ColumnRequest, scored_rows
from logitcask.pipeline.teachers.vllm.arguments import (
    CHUNK_ROWS,
    check_engine_args,
    logits_bytes,
    memory_utilization,
)
from logitcask.pipeline.teachers.vllm.choice import (
    check_scores,
    check_vllm,
    parameters,
    refusal,
    rows_of,
    scores_of,
    with_next_token,
)
from logitcask.pipeline.teachers.vllm.plugin import drawing
from logitcask.pipeline.teachers.vllm.process import (
    EngineLog,
    eager,
    import_vllm,
    is_engine_failure,
    torch_threads_kept,
)
from logitcask.pipeline.teachers.vllm.routes import ENTRY_BYTES, Route, capturing, convert, sampling
from logitcask.pipeline.teachers.vllm.self_check import SelfCheck, prompt_of
from logitcask.pipeline.teachers.vllm.writing import engine_arguments, write
from logitcask.pipeline.types import PendingScores, Scored, Sequence

logger = logging.getLogger(__name__)

# Prompts that an engine gets beyond its current step, in steps.
_STEPS_AHEAD = {"cpu": 3, "gpu": 8}
# Steps' worth of prompts that are scored at the start. With any order of prompts, at least one step
# is full.
_STEPS_AT_START = 3
_OUT_OF_MEMORY = re.compile(r"out ?of ?memory|MemoryError|can(?:not|'t) allocate", re.IGNORECASE)


def check_location(model: ResolvedModel) -> None:
    """Raises UserError for a folder whose name vLLM treats as a pattern: it would read the weights
    of another folder.
    """
    if re.search(r"[*?\[]", model.location):
        raise UserError(
            f"vLLM takes the '*', '?' or '[' in {model.location} for a pattern and reads the weights of other folders by "
            "it; rename the folder, or name a link to it that has none of them"
        )


class VllmTeacher:
    """A model inside a vLLM engine: in this process on a CPU, in other processes on GPUs.

    Raises UserError, in one line with the cause, if the engine cannot start, or if this vLLM does
    not support the route ``raw`` or the draws that the config asks for.
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
        self._request = ColumnRequest.of(capture, vocab_size(model))
        self._requests = itertools.count()
        self._starting = True
        # Finished prompt logprobs and scores of chosen ids by request, until their stream takes
        # them; the chosen ids of requests that are not finished.
        self._finished: dict[str, tuple[Any, NDArray[np.float32] | None]] = {}
        self._chosen: dict[str, NDArray[np.int32]] = {}
        self._engine_log = EngineLog()
        try:
            with self._engine_log.quiet():
                self._vllm = import_vllm()
                if capture.chosen:
                    check_vllm(self._vllm, capture.chosen)
                self._on_cpu = self._vllm.platforms.current_platform.is_cpu()
                # GPUs use model runner V2, unless a user or vLLM selects another.
                self._runner_v2 = (
                    not self._on_cpu and self._vllm.envs.VLLM_USE_V2_MODEL_RUNNER is not False
                )
                self._step_tokens = config.step_tokens(on_cpu=self._on_cpu)
                if not (self._on_cpu or self._runner_v2 or config.batch_tokens):
                    self._step_tokens = CHUNK_ROWS  # V1 makes the logits of a whole step
                if sampling is not None and self._on_cpu:  # prompts are read whole there
                    self._step_tokens = max(self._step_tokens, max_length + 1)
                with drawing(self._request):
                    self._llm = self._start(max_length)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"vLLM cannot start with {model.name}: {self._engine_log.cause(error)}"
            ) from error
        model_config = self._llm.llm_engine.model_config
        self.vocab_size: int = model_config.get_vocab_size()
        self._dtype = str(model_config.dtype).removeprefix("torch.")
        self._head_dtype = str(model_config.head_dtype).removeprefix("torch.")
        try:
            # An engine that fails in the middle of its work prints its whole state.
            self._check_runner()
            with self._engine_log.quiet():
                self.check_engine(max_length)
                self.check_draws(max_length)
                self.check_chosen(max_length)
            self.route: Route = self.choose_route(max_length)
            if not self._on_cpu:
                with self._engine_log.quiet():
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

    def answers(self, sequences: Iterable[Sequence]) -> Iterator[PendingScores]:
        return self._answers(sequences, self.route, all_rows=False)

    def generate(self, prompts: Iterable[Prompt]) -> Iterator[NDArray[np.int32]]:
        return (answer.input_ids for answer in self._write(prompts, logprobs=False))

    def sample(self, prompts: Iterable[Prompt]) -> Iterator[SampledAnswer]:
        return self._write(prompts, logprobs=True)

    def _write(self, prompts: Iterable[Prompt], *, logprobs: bool) -> Iterator[SampledAnswer]:
        assert self._sampling is not None
        engine = self._llm.llm_engine
        self._engine_log.harmless = self._engine_log.printed()

        def step() -> Iterable[Any]:
            safe_point()
            with eager(on_cpu=self._on_cpu), self._explained("writing"):
                return [output for output in engine.step() if output.finished]

        params = self._vllm.SamplingParams
        return write(engine, params, prompts, self._sampling, step, logprobs=logprobs)

    def close(self) -> None:
        """Shuts the engine down and frees its memory."""
        from vllm.distributed import cleanup_dist_env_and_memory

        with self._engine_log.quiet():
            self._llm.llm_engine.engine_core.shutdown()
            del self._llm
            cleanup_dist_env_and_memory()
        self._engine_log.close()

    def check_engine(self, max_length: int) -> None:
        """Scores a short prompt without our changes: some kernels fail only at their first run.

        Raises UserError with the kernel's message.
        """
        prompt = prompt_of(min(9, max(2, max_length)), self.vocab_size)
        try:
            list(self._stream([prompt], 1, "stock"))
        except UserError:
            raise
        except Exception as error:
            raise self._does_not_run(error) from error

    def check_memory(self, max_length: int) -> None:
        """Scores prompts that fill whole steps, so that a lack of memory shows at the start.

        vLLM's profiler does not count prompt logprobs. Raises UserError naming the settings to
        change.
        """
        length = min(self._step_tokens, max(2, max_length))
        prompt = prompt_of(length, self.vocab_size)
        prompts = itertools.repeat(prompt, math.ceil(_STEPS_AT_START * self._step_tokens / length))
        for _ in self._stream(prompts, self._request.columns, self.route):
            pass

    def _check_runner(self) -> None:
        """Raises UserError if vLLM has chosen model runner V1 on a GPU and its steps need more
        memory than was left free.
        """
        runner_v2 = self._llm.llm_engine.vllm_config.use_v2_model_runner
        if self._runner_v2 and not runner_v2 and self._step_tokens > CHUNK_ROWS:
            raise UserError(
                f"vLLM {self._vllm.__version__} runs {self._model.name} by its model runner V1, which makes the logits of all "
                f"{self._step_tokens} tokens of a step at a time; set VLLM_USE_V2_MODEL_RUNNER=0 in the environment, so that "
                f"there is room for them, or teacher.batch_tokens to {CHUNK_ROWS} or less"
            )
        self._runner_v2 = runner_v2 and not self._on_cpu

    def check_draws(self, max_length: int) -> None:
        """Raises UserError if the draws are wrong (``self_check``)."""
        self._self_check(max_length).check_draws()

    def check_chosen(self, max_length: int) -> None:
        """Scores a short prompt whose next tokens are its chosen ids, if any are to be scored.

        Raises UserError if the engine cannot score them, or gives other logprobs for the same
        tokens.
        """
        capture, columns = self._request.capture, self._request.columns
        if not capture.chosen:
            return
        if not self._runner_v2:
            raise refusal(
                capture.chosen,
                f"vLLM {self._vllm.__version__} runs {self._model.name} by its model runner V1, which cannot",
            )
        prompt = prompt_of(min(9, max(2, max_length)), self.vocab_size)
        rows = with_next_token(prompt, capture.chosen)
        ((_, (answer, scores)),) = self._stream([prompt], columns, "flat", chosen=iter([rows]))
        check_scores(scores, convert("flat", answer, columns)[1][:, 0])

    def choose_route(self, max_length: int) -> Route:
        """The route in ``teacher.route``, or the fastest that works (``self_check``).

        This is also the engine's warm-up: its first call compiles kernels, which would distort the
        figures of progress.
        """
        return self._self_check(max_length).choose_route(self._config.route)

    def _self_check(self, max_length: int) -> SelfCheck:
        return SelfCheck(
            self._stream, self._request, self.vocab_size, max_length, self._vllm.__version__
        )

    def _does_not_run(self, error: Exception) -> UserError:
        """The error of an engine that has started but fails at its first prompts."""
        cause = self._engine_log.cause(error)
        another = "another kernel may (teacher.engine_args.attention_backend), or set teacher.backend=transformers"
        return UserError(
            f"vLLM {self._vllm.__version__} cannot run {self._model.name} here: {cause}; "
            f"{self._less_memory() if _OUT_OF_MEMORY.search(cause) else another}"
        )

    def _less_memory(self) -> str:
        """The settings to change if memory runs out."""
        if self._on_cpu or not self._runner_v2:
            return f"lower teacher.batch_tokens ({self._step_tokens})"
        if "kv_cache_memory_bytes" in self._config.engine_args:
            return f"lower teacher.engine_args.kv_cache_memory_bytes ({self._config.engine_args['kv_cache_memory_bytes']})"
        return (
            f"lower teacher.engine_args.gpu_memory_utilization ({self._utilization:g}), or end what else runs on the GPU; "
            f"teacher.batch_tokens helps below {CHUNK_ROWS}"
        )

    def _start(self, max_length: int) -> Any:
        config, model, request = self._config, self._model, self._request
        max_model_len = _max_model_len(max_length)
        overrides: dict[str, Any] = {}
        if max_length == context_limit(model):
            # The sampled token is never read, so a prompt may fill the model's context. This field
            # allows it.
            overrides |= for_text(model, {"model_max_length": max_model_len})
        if not self._on_cpu and config.dtype != "float32" and not is_quantised(model):
            # 16-bit logits are on a grid of 1/8 nat near 16. A float32 head keeps the tail exact,
            # at almost no cost on a GPU.
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
            "max_logprobs": max(
                request.columns,
                request.capture.chosen,
                0 if self._sampling is None else self._sampling.top_ids,
                vocab_size(model) if request.capture.samples else 0,
            ),
            "logprobs_mode": "raw_logprobs",
            # A prompt read from the prefix cache comes back with rows missing or stale
            # (vllm-project/vllm#42019).
            "enable_prefix_caching": False,
            "use_tqdm_on_load": False,
            # There are no images or other media, so a multimodal model needs no processor and no
            # encoders for them.
            "language_model_only": True,
        }
        if self._on_cpu:
            map_large_blocks()
            arguments["enforce_eager"] = True
            room = 2 * (max_model_len + self._step_tokens)
            arguments["kv_cache_memory_bytes"] = max(
                1 << 30, room * kv_bytes_per_token(model, value_bytes=4)
            )
        elif not {"gpu_memory_utilization", "kv_cache_memory_bytes"} & config.engine_args.keys():
            arguments["gpu_memory_utilization"] = self._leave_room()
        arguments |= engine_arguments(
            self._sampling, on_cpu=self._on_cpu, step_tokens=self._step_tokens
        )
        arguments |= config.engine_args
        for name, asked in (arguments.get("hf_overrides") or {}).items():
            ours = overrides.get(name)
            overrides[name] = (
                ours | asked if isinstance(ours, dict) and isinstance(asked, dict) else asked
            )
        arguments["hf_overrides"] = overrides
        self._utilization = arguments.get(
            "gpu_memory_utilization", self._vllm.EngineArgs.gpu_memory_utilization
        )
        with torch_threads_kept():
            return self._vllm.LLM(**arguments)

    def _leave_room(self) -> float:
        """``gpu_memory_utilization`` that leaves room for the logits of prompts."""
        usual: float = self._vllm.EngineArgs.gpu_memory_utilization
        try:
            card = self._vllm.platforms.current_platform.get_device_total_memory()
        except (
            Exception
        ):  # a driver's own: it does not know the memory that some GPUs share with the CPU (GB10)
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

    def _answers(
        self, sequences: Iterable[Sequence], route: Route, *, all_rows: bool
    ) -> Iterator[PendingScores]:
        columns, request = self._request.columns, self._request
        # Only the kept positions of a sequence are needed when its result arrives.
        kept: deque[NDArray[np.int32]] = deque()
        # Of the sequences that have chosen ids, at the time when the engine gets them.
        chosen: deque[NDArray[np.int32] | None] = deque()

        def prompts() -> Iterator[list[int]]:
            for sequence in sequences:
                kept.append(sequence.positions())
                chosen.append(rows_of(sequence))
                yield sequence.input_ids.tolist()

        def ids() -> Iterator[NDArray[np.int32] | None]:
            while True:
                yield chosen.popleft()

        asks = bool(request.capture.chosen)

        def read(output: Any, positions: NDArray[np.int32]) -> Scored:
            output, scores = output if asks else (output, None)
            found = scored_rows(
                convert(route, output, columns), request, None if all_rows else positions
            )
            if scores is None:
                return found
            return dataclasses.replace(found, chosen_logprobs=scores[positions])

        for n, output in self._stream(prompts(), columns, route, chosen=ids() if asks else None):
            positions = kept.popleft()
            nbytes = n * ((columns + 1) * ENTRY_BYTES[route] + 4 * request.capture.chosen)
            yield PendingScores(
                nbytes,
                lambda output=output, positions=positions: read(output, positions),  # type: ignore[misc]
            )

    def _stream(
        self,
        prompts: Iterable[list[int]],
        columns: int,
        route: Route,
        beside: Route | None = None,
        *,
        chosen: Iterator[NDArray[np.int32] | None] | None = None,
    ) -> Iterator[tuple[int, Any]]:
        """Length and prompt logprobs of each prompt, in order, as vLLM returns them.

        beside: a public route whose form the results of ``raw`` should also have.
        chosen: for each prompt, when it has been read, the ids to score, int32[n-1, C], or None.
                The second part of a result is then a pair: the prompt logprobs, and the scores of
                these ids, or None.

        The engine always has some steps' worth of prompts, so it never waits for the next group. It
        has no more than that, so memory does not grow. The times at which prompts are added depend
        only on the prompts, so an engine in this process forms the same batches when a build is
        resumed. (An engine in another process uses the prompts that have arrived when a step
        begins.)
        """
        engine = self._llm.llm_engine

        def asking(rows: NDArray[np.int32] | None) -> Any:
            return self._vllm.SamplingParams(
                # Set in the constructor: if it is set later, vLLM reads its prefix cache for these
                # requests.
                prompt_logprobs=columns,
                max_tokens=1,
                temperature=0.0,
                detokenize=False,
                output_kind=self._vllm.sampling_params.RequestOutputKind.FINAL_ONLY,
                **sampling(route, beside),
                **parameters(rows),
            )

        params = asking(None)
        room = _STEPS_AHEAD["cpu" if self._on_cpu else "gpu"] * self._step_tokens
        source = iter(prompts)
        # In order: request, length, and the size of the engine's log at that time. Results may
        # arrive in another order, and in another stream.
        waiting: deque[tuple[str, int, int]] = deque()
        held, more = 0, True
        try:
            while more or waiting:
                added: list[tuple[list[int], NDArray[np.int32] | None]] = []
                while more and held < room:
                    prompt = next(source, None)
                    if prompt is None:
                        more = False
                    else:
                        added.append((prompt, None if chosen is None else next(chosen)))
                        held += len(prompt)
                with (
                    drawing(self._request),
                    capturing(route),
                    eager(on_cpu=self._on_cpu),
                    self._explained(),
                ):
                    for prompt, rows in added:
                        name = f"logitcask-{next(self._requests)}"
                        waiting.append((name, len(prompt), self._engine_log.printed()))
                        if rows is not None:
                            self._chosen[name] = rows
                        engine.add_request(
                            name,
                            self._vllm.inputs.tokens_input(prompt),
                            params if rows is None else asking(rows),
                        )
                    if waiting and waiting[0][0] not in self._finished:
                        safe_point()
                        for output in engine.step():
                            rows = self._chosen.pop(output.request_id, None)
                            scores = None if rows is None else scores_of(output, rows)
                            self._finished[output.request_id] = output.prompt_logprobs, scores
                while waiting and waiting[0][0] in self._finished:
                    name, length, self._engine_log.harmless = waiting.popleft()
                    held -= length
                    found = self._finished.pop(name)
                    yield length, found[0] if chosen is None else found
        finally:
            if waiting:
                names = [name for name, *_ in waiting]
                for name in names:
                    self._finished.pop(name, None)
                    self._chosen.pop(name, None)
                with contextlib.suppress(Exception):  # the engine may be dead
                    engine.abort_request(names)

    @contextlib.contextmanager
    def _explained(self, work: str = "scoring") -> Iterator[None]:
        """Turns an engine's failure into one line with its cause."""
        try:
            yield
        except Exception as error:
            if not is_engine_failure(error):
                raise
            logger.debug("vLLM stopped", exc_info=True)
            if self._starting:
                raise self._does_not_run(error) from error
            raise UserError(
                f"vLLM stopped while {work}: {self._engine_log.cause(error)}; the same command goes on at the first "
                f"shard that is missing; where memory ran out, {self._less_memory()}"
            ) from error


def _max_model_len(max_length: int) -> int:
    """Includes one additional token, because the engine always samples one after the prompt."""
    return max(2, max_length) + 1
