"""The transformers teacher: whole distributions, the reference for other engines.

It is also the engine if vLLM is not installed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor

from logitcask.cache_format.errors import UserError, first_line
from logitcask.cache_format.manifest import TeacherIdentity
from logitcask.pipeline.config import TeacherConfig
from logitcask.pipeline.distribution.capture import Capture
from logitcask.pipeline.distribution.draws import KEY_IDS, no_draws
from logitcask.pipeline.distribution.draws_torch import draw, to_numpy
from logitcask.pipeline.distribution.keep import not_a_number
from logitcask.pipeline.teachers.base import Prompt, SampledAnswer, Sampling, bounded_groups
from logitcask.pipeline.teachers.model import (
    ResolvedModel,
    attention,
    auto_class,
    check_context,
    load_tokenizer,
    longest_with_short_rope,
    read_weights,
)
from logitcask.pipeline.types import Scored, Sequence

# Batches' worth of sequences that are sorted by length together, which keeps padding small.
_BATCHES_PER_GROUP = 8
_ANSWERS_PER_GROUP = 256
_BYTES_OF_A_CHARACTER = 4


class TransformersTeacher:
    """A causal language model of transformers, in this process: on ``device``, else on the GPU, if
    any, else on the CPU.

    Raises UserError, in one line with the cause, if the model cannot be loaded or supports only
    shorter texts.
    """

    def __init__(
        self,
        config: TeacherConfig,
        model: ResolvedModel,
        *,
        max_length: int,
        capture: Capture,
        sampling: Sampling | None = None,
        device: str | None = None,
    ) -> None:
        self._model = model
        self._sampling = sampling
        self._capture = capture
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._step_tokens = config.step_tokens(on_cpu=self._device.type == "cpu")
        check_context(model, max_length)
        self._longest_short = longest_with_short_rope(model)
        read_weights(model)
        dtype = "float32" if config.dtype == "auto" and self._device.type == "cpu" else config.dtype
        arguments: dict[str, Any] = {
            "dtype": dtype,
            "trust_remote_code": model.trust_remote_code,
            **config.engine_args,
        }
        if (chosen := attention(model, config.engine_args.get("attn_implementation"))) is not None:
            arguments["attn_implementation"] = chosen
        if self._device.type != "cpu":
            # Weights are loaded onto the device one by one; otherwise they would have to fit into
            # host memory, too.
            arguments.setdefault("device_map", {"": self._device})
        # Hides transformers' progress bar, which would disturb the command's own, and its long
        # error reports.
        logging = transformers.utils.logging
        bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        try:
            self._lm = auto_class(model).from_pretrained(
                model.location, revision=model.revision, **arguments
            )
        except Exception as error:  # reading a checkpoint may raise any error
            raise UserError(f"transformers cannot load {model.name}: {_cause(error)}") from error
        finally:
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()
        self._device = self._lm.device
        self._lm.eval()
        self.vocab_size: int = self._lm.config.get_text_config().vocab_size

    def identity(self) -> TeacherIdentity:
        return TeacherIdentity(
            model=self._model.name,
            revision=self._model.revision,
            weights_sha256=self._model.weights_sha256(),
            backend="transformers",
            engine=f"transformers {transformers.__version__}",
            dtype=str(self._lm.dtype).removeprefix("torch."),
            route="dense",
            vocab_size=self.vocab_size,
        )

    def score(self, sequences: Iterable[Sequence]) -> Iterator[Scored]:
        for group in bounded_groups(sequences, _BATCHES_PER_GROUP * self._step_tokens):
            scored: dict[int, Scored] = {}
            for batch in self._batches(group):
                logprobs = self._logprobs([group[index].input_ids for index in batch])
                for index, rows in zip(batch, logprobs, strict=True):
                    scored[index] = _summarise(rows, group[index], self._capture)
            for index in range(len(group)):
                yield scored.pop(index)

    def generate(self, prompts: Iterable[Prompt]) -> Iterator[NDArray[np.int32]]:
        return (answer.input_ids for answer in self.sample(prompts))

    def sample(self, prompts: Iterable[Prompt]) -> Iterator[SampledAnswer]:
        """Answers in batches of prompts of similar length. Each answer has its own generator."""
        assert self._sampling is not None
        tokenizer = None
        if self._sampling.stop:
            tokenizer = load_tokenizer(self._model)
        prompts = iter(prompts)
        while group := list(itertools.islice(prompts, _ANSWERS_PER_GROUP)):
            answers: dict[int, SampledAnswer] = {}
            by_length = sorted(range(len(group)), key=lambda index: -len(group[index].input_ids))
            while by_length:
                first = group[by_length[0]]
                rows = max(1, self._step_tokens // (len(first.input_ids) + first.max_tokens))
                if self._longest_short is not None and any(
                    len(group[index].input_ids) + group[index].max_tokens > self._longest_short
                    for index in by_length[:rows]
                ):
                    rows = 1  # as in _batches; the length of an answer is not known before
                batch, by_length = by_length[:rows], by_length[rows:]
                written = self._write([group[index] for index in batch], self._sampling, tokenizer)
                answers.update(zip(batch, written, strict=True))
            for index in range(len(group)):
                yield answers.pop(index)

    @torch.inference_mode()
    def _write(
        self, batch: list[Prompt], sampling: Sampling, tokenizer: Any
    ) -> list[SampledAnswer]:
        """One answer per prompt. Padding is on the left, so all answers begin in one column."""
        width = max(len(prompt.input_ids) for prompt in batch)
        input_ids = torch.zeros((len(batch), width), dtype=torch.int64)
        attention_mask = torch.zeros((len(batch), width), dtype=torch.int64)
        for row, prompt in enumerate(batch):
            input_ids[row, width - len(prompt.input_ids) :] = torch.from_numpy(
                prompt.input_ids.astype(np.int64)
            )
            attention_mask[row, width - len(prompt.input_ids) :] = 1
        # The model's own defaults (penalties, a temperature) are not used.
        self._lm.generation_config = transformers.GenerationConfig(
            do_sample=False, pad_token_id=0, eos_token_id=list(sampling.end_tokens) or None
        )
        seen = _Logprobs(sampling.top_ids)
        ends = _Ends(width, [prompt.max_tokens for prompt in batch], sampling.stop, tokenizer)
        out = self._lm.generate(
            input_ids=input_ids.to(self._device),
            attention_mask=attention_mask.to(self._device),
            max_new_tokens=max(prompt.max_tokens for prompt in batch),
            logits_processor=_processors(sampling, [prompt.seed for prompt in batch], seen),
            stopping_criteria=transformers.StoppingCriteriaList([ends]),
        )[:, width:]
        logprobs = seen.of(out)
        top_ids = seen.top_ids() if sampling.top_ids else None
        answers = []
        for row, length in enumerate(ends.lengths):
            ids = _until_end(out[row, :length].to(torch.int32).cpu().numpy(), sampling.end_tokens)
            top = None if top_ids is None else top_ids[row, : len(ids)]
            answers.append(SampledAnswer(ids, logprobs[row, : len(ids)], top))
        return answers

    def dense_logprobs(self, input_ids: NDArray[np.int32]) -> NDArray[np.float32]:
        """float32[n-1, V]: the whole distribution, nats; row ``i`` predicts token ``i + 1``."""
        return next(self._logprobs([input_ids])).cpu().numpy()

    def close(self) -> None:
        """Frees the model."""
        del self._lm

    def _batches(self, group: list[Sequence]) -> Iterator[list[int]]:
        """Indices into ``group``, by descending length, in batches of at most ``batch_tokens``
        padded tokens, or of one sequence.

        transformers chooses RoPE factors by the longest text of a batch, so texts above and below
        the limit are never in one batch.
        """
        by_length = sorted(range(len(group)), key=lambda index: -len(group[index].input_ids))
        while by_length:
            longest = len(group[by_length[0]].input_ids)
            rows = max(1, self._step_tokens // longest)
            batch = by_length[:rows]
            if self._longest_short is not None and longest > self._longest_short:
                batch = [
                    index for index in batch if len(group[index].input_ids) > self._longest_short
                ]
            yield batch
            by_length = by_length[len(batch) :]

    @torch.inference_mode()
    def _logprobs(self, batch: list[NDArray[np.int32]]) -> Iterator[Tensor]:
        """float32[n-1, V] per sequence. Padding is on the right, invisible to causal attention."""
        width = max(map(len, batch))
        input_ids = torch.zeros((len(batch), width), dtype=torch.int64)
        attention_mask = torch.zeros((len(batch), width), dtype=torch.int64)
        for row, ids in enumerate(batch):
            input_ids[row, : len(ids)] = torch.from_numpy(ids.astype(np.int64))
            attention_mask[row, : len(ids)] = 1
        inputs: dict[str, Any] = {"input_ids": input_ids.to(self._device)}
        if not bool(attention_mask.all()):
            inputs["attention_mask"] = attention_mask.to(self._device)
        logits = self._lm(**inputs, use_cache=False).logits
        for row, ids in enumerate(batch):
            logprobs = logits[row, : len(ids) - 1].float().log_softmax(dim=-1)
            if logprobs[:, 0].isnan().any():  # one NaN makes its whole row so
                raise not_a_number(f"in a sequence of {len(ids)} tokens")
            yield logprobs


def _cause(error: Exception) -> str:
    """The cause in one line, with a remedy if the message has none."""
    cause = first_line(error)
    if "ignore_mismatched_sizes" in cause:
        return "its weights do not have the shapes that its config.json says; put the files of one model together"
    if type(error).__name__ == "SafetensorError":
        return f"a file of its weights is damaged ({cause}); fetch it again"
    return cause


class _Logprobs(transformers.LogitsProcessor):
    """Keeps the logprob of each sampled token, before anything changes the logits, and the ``top``
    most probable ids. Holds the distributions of one step.
    """

    def __init__(self, top: int) -> None:
        self._last: Tensor | None = None
        self._columns: list[Tensor] = []
        self._top = top
        self._top_ids: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._last is not None:
            self._columns.append(self._last.gather(1, input_ids[:, -1:]))
        self._last = scores.float().log_softmax(dim=-1)
        if self._top:
            most = min(self._top, scores.shape[-1])
            self._top_ids.append(scores.topk(most, dim=-1).indices.to(torch.int32))
        return scores

    def top_ids(self) -> NDArray[np.int32]:
        """int32[B, m, top]: the most probable ids at each step."""
        return torch.stack(self._top_ids, dim=1).cpu().numpy()

    def of(self, answers: Tensor) -> NDArray[np.float32]:
        """float32[B, m]: the logprobs of ``answers``, int64[B, m], after their last step."""
        assert self._last is not None
        columns = [*self._columns, self._last.gather(1, answers[:, -1:].to(self._last.device))]
        return torch.cat(columns, dim=1).cpu().numpy()


class _Noise(transformers.LogitsProcessor):
    """Turns a greedy choice into a draw: the argmax of logits with Gumbel noise.

    Each row has its own generator, which transformers' sampling does not support, so an answer does
    not depend on its batch.
    """

    def __init__(self, seeds: list[int]) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        exponential = torch.empty(scores.shape, dtype=torch.float32)
        for row, generator in zip(exponential, self._generators, strict=True):
            row.exponential_(generator=generator)
        return scores.float() - exponential.log().to(scores.device)


class _Ends(transformers.StoppingCriteria):
    """Ends each row at its ``max_tokens`` or at a complete stop string; ``lengths``: the ends."""

    def __init__(
        self, width: int, max_tokens: list[int], stop: tuple[str, ...], tokenizer: Any
    ) -> None:
        self._width = width
        self._stop = stop
        self._tokenizer = tokenizer
        self._reach = max(map(len, stop), default=0) + _BYTES_OF_A_CHARACTER
        self.lengths = list(max_tokens)

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        length = input_ids.shape[1] - self._width
        for row, limit in enumerate(self.lengths):
            if (
                self._stop
                and length <= limit
                and self._stopped(input_ids[row, self._width :][-self._reach :])
            ):
                self.lengths[row] = length
        return torch.tensor([length >= limit for limit in self.lengths], device=input_ids.device)

    def _stopped(self, ids: Tensor) -> bool:
        text = self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return any(stop in text for stop in self._stop)


def _processors(sampling: Sampling, seeds: list[int], seen: _Logprobs) -> Any:
    processors = transformers.LogitsProcessorList([seen])
    if sampling.temperature > 0:
        processors.append(transformers.TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_p < 1:
            processors.append(transformers.TopPLogitsWarper(sampling.top_p))
        processors.append(_Noise(seeds))
    return processors


def _until_end(ids: NDArray[np.int32], end_tokens: tuple[int, ...]) -> NDArray[np.int32]:
    """A row without the padding behind its end token."""
    ended = np.flatnonzero(np.isin(ids, end_tokens))
    return ids[: ended[0] + 1] if len(ended) else ids


def _summarise(logprobs: Tensor, sequence: Sequence, capture: Capture) -> Scored:
    """The scores of float32[n-1, V] logprobs."""
    input_ids, chosen_logprobs = sequence.input_ids, None
    if sequence.chosen_ids is not None:
        at = torch.from_numpy(sequence.positions()).to(logprobs.device)
        ids = torch.from_numpy(sequence.chosen_ids.astype(np.int64)).to(logprobs.device)
        found = logprobs[at].gather(1, ids.clamp_min(0)).masked_fill(ids < 0, -torch.inf)
        chosen_logprobs = found.cpu().numpy()
    target_ids = torch.from_numpy(input_ids[1:].astype(np.int64)).to(logprobs.device)
    target = logprobs.gather(1, target_ids[:, None])
    top = logprobs.topk(max(capture.top_k, KEY_IDS), dim=1)
    head = top.values[:, : capture.top_k].cpu().numpy()
    draws = (
        to_numpy(draw(logprobs, top.indices, target_ids, capture))
        if capture.samples
        else no_draws(head, capture)
    )
    return Scored(
        ids=top.indices[:, : capture.top_k].to(torch.int32).cpu().numpy(),
        logprobs=head,
        target_ids=input_ids[1:].astype(np.int32),
        target_logprob=target[:, 0].cpu().numpy(),
        target_rank=(logprobs > target).sum(dim=1, dtype=torch.int32).cpu().numpy(),
        draws=draws,
        chosen_logprobs=chosen_logprobs,
    )
