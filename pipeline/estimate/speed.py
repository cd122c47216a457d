"""The speed of a teacher: measured for some seconds, given by the user, or computed from the
figures of a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from logitcask.cache_format import CachedSequence, UserError
from logitcask.pipeline.config import BuildConfig
from logitcask.pipeline.distribution.keep import keep
from logitcask.pipeline.estimate.size import Range
from logitcask.pipeline.teachers.model import (
    EXPERTS,
    ResolvedModel,
    activation_bits,
    empty_model,
    is_quantised,
    resolve_model,
)
from logitcask.pipeline.teachers.open import open_teacher
from logitcask.pipeline.types import Sequence


@dataclass(frozen=True, slots=True)
class Gpu:
    """Peak figures of NVIDIA's data sheets, without sparsity.

    tensor:    FLOP/s of the tensor cores in bfloat16, summed in float32.
    fp8:       the same in FP8; as ``tensor`` if the tensor cores do not have it.
    float32:   FLOP/s outside the tensor cores.
    bandwidth: bytes per second of its memory.
    link:      bytes per second to its neighbours, in one direction: NVLink if the board has it,
               else PCIe.
    memory:    bytes.
    """

    title: str
    tensor: float
    fp8: float
    float32: float
    bandwidth: float
    link: float
    memory: float


GPUS = {
    "b200": Gpu("B200", 2250e12, 4500e12, 75e12, 7.7e12, 900e9, 180e9),
    "h200": Gpu("H200 SXM", 989e12, 1979e12, 67e12, 4.8e12, 450e9, 141e9),
    "h100": Gpu("H100 SXM", 989e12, 1979e12, 67e12, 3.35e12, 450e9, 80e9),
    "h100-pcie": Gpu("H100 PCIe", 756e12, 1513e12, 51e12, 2.0e12, 64e9, 80e9),
    "a100": Gpu("A100 80 GB SXM", 312e12, 312e12, 19.5e12, 2.04e12, 300e9, 80e9),
    "l40s": Gpu("L40S", 362e12, 733e12, 91.6e12, 0.864e12, 32e9, 48e9),
    "l4": Gpu("L4", 121e12, 242e12, 30.3e12, 0.3e12, 32e9, 24e9),
    "a10": Gpu("A10", 125e12, 125e12, 31.2e12, 0.6e12, 32e9, 24e9),
    "rtx-4090": Gpu("RTX 4090", 165e12, 330e12, 82.6e12, 1.01e12, 32e9, 24e9),
    "rtx-3090": Gpu("RTX 3090", 71e12, 71e12, 35.6e12, 0.936e12, 32e9, 24e9),
}

# Part of the peak that long batches of text reach, including all other work in a GPU (norms,
# launches, waiting).
_UTILISATION = Range(low=0.2, likely=0.4, high=0.6)
# Part of a link's figure that collectives over several GPUs reach.
_LINK_UTILISATION = 0.65
# Number of reads and writes of a position's float32 logprobs: softmax, top k, ranks, the CDF for
# draws.
_PASSES = 20
# Seconds of one CPU core, to make arrays of what the engine returns, choose what is kept, pack,
# hash and write it: of a token, and of an entry kept of it. The vocabulary's size does not matter:
# at 152,064 ids a core of an AMD EPYC took 1.3 us for a head of one, 3.8 to 5.3 us with the default
# store (26 entries), 11 us for 64 + 64 and 20 us for a head of 256.
_WRITING = 1.5e-6
_WRITING_AN_ENTRY = 0.1e-6
# Tokens per second of a build with the synthetic teacher, writing included (one core of an AMD
# EPYC).
_SYNTHETIC = 3e5

_FIRST_PART = 512
_LONG_ENOUGH = 8.0
# Positions that a probe keeps for the codec: as many as for a build's prior.
_KEPT_TOKENS = 32_768


class Speed(BaseModel):
    """Tokens per second of one engine with ``gpus_per_engine`` GPUs; ``notes`` give the source."""

    model_config = ConfigDict(frozen=True)

    source: Literal["probe", "given", "hardware"]
    tokens_per_second: Range
    gpus_per_engine: int
    notes: tuple[str, ...]


def given_speed(config: BuildConfig, tokens_per_second: float) -> Speed:
    """The speed the user gave."""
    return Speed(
        source="given",
        tokens_per_second=_exactly(tokens_per_second),
        gpus_per_engine=_gpus(config),
        notes=(f"speed: {_round(tokens_per_second)} tokens/s for each engine, as given",),
    )


def probe(config: BuildConfig, sequences: Iterable[Sequence]) -> tuple[list[CachedSequence], Speed]:
    """Starts the engine and scores some of ``sequences``. Returns their cached form, and the speed.

    The parts double in length until one takes some seconds. Only the longest part counts, so the
    warm-up is excluded. Raises UserError as ``open_teacher``, and if no sequence has a kept
    position.
    """
    teacher = open_teacher(
        config.teacher, max_length=config.data.max_length, capture=config.store.capture()
    )
    try:
        store = config.store.settings(teacher.vocab_size)
        kept: list[CachedSequence] = []
        kept_tokens = most = 0
        seconds = 0.0
        for part in _doubling(s for s in sequences if s.loss_mask.any()):
            tokens, started = 0, time.perf_counter()
            for sequence, scored in zip(part, teacher.score(part), strict=True):
                cached = keep(sequence, scored, store)
                tokens += len(cached)
                if kept_tokens < _KEPT_TOKENS:
                    kept.append(cached)
                    kept_tokens += len(cached)
            took = time.perf_counter() - started
            if tokens > most:
                most, seconds = tokens, took
            if took >= _LONG_ENOUGH:
                break
        engine = teacher.identity().engine
    finally:
        teacher.close()
    if not kept:
        raise UserError(
            f"no sequence at the head of {config.data.where} has anything to learn; a probe needs one"
        )
    entries = sum(
        int((s.ids >= 0).sum()) + (0 if s.samples is None else int((s.samples.ids >= 0).sum()))
        for s in kept
    )
    rate = 1 / (seconds / most + writing_seconds(entries / kept_tokens))
    note = (
        f"speed: {_round(rate)} tokens/s, measured here with {engine} on {most:,} tokens in {seconds:.1f} s, after "
        "shorter ones as a warm-up; taken to hold within 15 %"
    )
    measured = Range(low=0.85 * rate, likely=rate, high=1.15 * rate)
    return kept, Speed(
        source="probe", tokens_per_second=measured, gpus_per_engine=_gpus(config), notes=(note,)
    )


def writing_seconds(entries: float) -> float:
    """Seconds of one CPU core per token, with ``entries`` kept entries on average."""
    return _WRITING + _WRITING_AN_ENTRY * entries


def speed_from_hardware(
    config: BuildConfig, gpu_name: str, context: float, entries: float
) -> Speed:
    """From a model's shape and a GPU's peak figures; neither weights nor a GPU are needed.

    context: mean number of tokens before a token.
    entries: head entries and draws kept of a token on average.

    The speed is that of the slowest stage (``seconds_per_token``) or, if that is slower, of the CPU
    core that writes at the same time: on GPUs the engine has its own process.

    Raises UserError for an unknown GPU, and for a model whose shape transformers does not know.
    """
    if config.teacher.is_synthetic:
        note = f"speed: {_SYNTHETIC:,.0f} tokens/s, what a build with the synthetic teacher reaches on a CPU core; no GPU is involved"
        return Speed(
            source="hardware",
            tokens_per_second=_exactly(_SYNTHETIC),
            gpus_per_engine=1,
            notes=(note,),
        )
    if config.teacher.has_own_backend:
        raise UserError(
            f"no figures for the speed of {config.teacher.backend}; give --tokens-per-second or --probe"
        )
    gpu = GPUS.get(gpu_name.lower())
    if gpu is None:
        raise UserError(
            f"no figures for a GPU {gpu_name!r}; expected {', '.join(GPUS)}; for others give --tokens-per-second or --probe"
        )
    model = resolve_model(
        config.teacher.model,
        config.teacher.revision,
        trust_remote_code=config.teacher.trust_remote_code,
    )
    shape = shape_of(model)
    quantised = (
        activation_bits(model) is not None
        or config.teacher.engine_args.get("quantization") == "fp8"
    )
    arithmetic: Arithmetic = (
        "float32" if config.teacher.dtype == "float32" else "fp8" if quantised else "16 bits"
    )
    wide = _float32_head(config, model)
    gpus, tensor_parallel = _gpus(config), config.teacher.tensor_parallel_size
    writing = writing_seconds(entries)

    def seconds(utilisation: float) -> Seconds:
        return seconds_per_token(
            shape,
            gpu,
            context,
            arithmetic=arithmetic,
            wide_head=wide,
            tensor_parallel=tensor_parallel,
            stages=config.teacher.pipeline_stages,
            utilisation=utilisation,
        )

    def rate(utilisation: float) -> float:
        return 1 / max(seconds(utilisation).all, writing)

    likely = Range(
        low=rate(_UTILISATION.low), likely=rate(_UTILISATION.likely), high=rate(_UTILISATION.high)
    )
    took = seconds(_UTILISATION.likely)
    peak = _layer_peak(gpu, arithmetic)
    notes = [
        f"speed: {_round(likely.likely)} tokens/s for each engine of {gpus} {gpu.title}, from peak figures "
        f"({peak / 1e12:,.0f} TFLOP/s) at {_UTILISATION.likely:.0%} utilisation ({_UTILISATION.low:.0%} to "
        f"{_UTILISATION.high:.0%}); nothing was run: --probe measures, --gpu names another GPU",
        f"a token costs {2e-9 * shape.weights:.3g} GFLOP in the layers, {4e-9 * shape.attention * context:.2g} in attention "
        f"over {context:,.0f} tokens on average, {2e-9 * shape.head:.2g} in the output head "
        f"({'with float32 logits, as the build has it' if wide else 'in the precision of the rest'}), and "
        f"{_PASSES} passes over {shape.vocab_size:,} float32 logprobs, which every GPU makes for itself; in microseconds: "
        f"{1e6 * took.layers:.2g} layers, {1e6 * took.sharing:.2g} sums over GPUs, {1e6 * took.head:.2g} head, "
        f"{1e6 * took.gather:.2g} logits from other GPUs, {1e6 * took.passes:.2g} passes, and {1e6 * writing:.2g} of a "
        "CPU core that writes meanwhile",
    ]
    needed = 2 * (shape.all_weights + shape.head)
    if needed > 0.85 * gpu.memory * gpus:
        notes.append(
            f"WARNING: {needed / 1e9:,.0f} GB of 16-bit weights will not fit into {gpus} x {gpu.memory / 1e9:.0f} GB; "
            "raise teacher.tensor_parallel_size or name another --gpu (quantised weights take less)"
        )
    return Speed(
        source="hardware", tokens_per_second=likely, gpus_per_engine=gpus, notes=tuple(notes)
    )


Arithmetic = Literal["float32", "16 bits", "fp8"]


@dataclass(frozen=True, slots=True)
class Seconds:
    """Seconds per token of the slowest stage of an engine.

    layers:  its share of the layers and of attention.
    sharing: sums over the GPUs of a layer.
    head:    the output head.
    gather:  logits that come from other GPUs.
    passes:  over the logprobs of the whole vocabulary.
    """

    layers: float
    sharing: float
    head: float
    gather: float
    passes: float

    @property
    def prefill(self) -> float:
        """Seconds without the work for logprobs, as in the prefill of engines."""
        return self.layers + self.sharing

    @property
    def all(self) -> float:
        return self.layers + self.sharing + self.head + self.gather + self.passes


@dataclass(frozen=True, slots=True)
class Shape:
    """Shape of a model. ``weights``: those of the layers that one token uses; ``attention``: layers
    x heads x head size; ``stream``: layers x width; ``head``: vocabulary x width; ``all_weights``:
    of the layers, experts included.
    """

    weights: float
    all_weights: float
    attention: float
    stream: float
    head: float
    vocab_size: int


def seconds_per_token(
    shape: Shape,
    gpu: Gpu,
    context: float,
    *,
    arithmetic: Arithmetic = "16 bits",
    wide_head: bool = True,
    tensor_parallel: int = 1,
    stages: int = 1,
    utilisation: float = _UTILISATION.likely,
) -> Seconds:
    """Seconds of a forward pass per token.

    Layers: 2 x weights that a token uses + 4 x layers x heads x head size x context FLOP (Kaplan et
    al., arXiv 2001.08361, section 2.1; attention without the savings of causality would be twice as
    much). All GPUs share them. The other terms are the work of the last stage only.

    Two sums over the GPUs of a layer, after attention and after the MLP: a GPU sends 2 (T - 1) / T
    of the width each time.

    Head: 2 x vocabulary x width FLOP on tensor cores, also for float32 logits: vLLM multiplies
    16-bit factors and keeps the float32 sums (``torch.mm(..., out_dtype=torch.float32)``). The GPUs
    of a layer share the vocabulary. Each of them then receives the logits of the others, and makes
    all passes over all logits.
    """
    gpus = tensor_parallel * stages
    matrices = 2 * shape.weights / _layer_peak(gpu, arithmetic)
    peak = gpu.float32 if arithmetic == "float32" else gpu.tensor
    value_bytes = 4 if arithmetic == "float32" else 2
    others = (tensor_parallel - 1) / tensor_parallel
    link = _LINK_UTILISATION * gpu.link
    return Seconds(
        layers=(matrices + 4 * shape.attention * context / peak) / utilisation / gpus,
        sharing=2 * 2 * others * value_bytes * shape.stream / stages / link,
        head=2 * shape.head / peak / utilisation / tensor_parallel,
        gather=others * (4 if wide_head else value_bytes) * shape.vocab_size / link,
        passes=_PASSES * 4 * shape.vocab_size / gpu.bandwidth,
    )


def _layer_peak(gpu: Gpu, arithmetic: Arithmetic) -> float:
    return {"float32": gpu.float32, "16 bits": gpu.tensor, "fp8": gpu.fp8}[arithmetic]


def shape_of(model: ResolvedModel) -> Shape:
    """The shape, read from a model without weights."""
    try:
        lm = empty_model(model)
    except UserError as error:
        raise UserError(f"{error}; give --tokens-per-second or --probe") from error
    config = lm.config
    ends = {id(layer.weight) for layer in (lm.get_input_embeddings(), lm.get_output_embeddings())}
    share = _share_of_experts(config)
    weights = all_weights = 0.0
    for name, parameter in lm.named_parameters():
        if id(parameter) not in ends:
            all_weights += parameter.numel()
            weights += parameter.numel() * (share if ".experts." in name else 1)
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Shape(
        weights=weights,
        all_weights=all_weights,
        attention=config.num_hidden_layers * heads * head_size,
        stream=config.num_hidden_layers * config.hidden_size,
        head=config.vocab_size * config.hidden_size,
        vocab_size=config.vocab_size,
    )


def _share_of_experts(config: Any) -> float:
    """Share of the routed experts that one token uses; 1 if the config has none."""
    used = getattr(config, "num_experts_per_tok", None)
    all_of_them = next(filter(None, (getattr(config, name, None) for name in EXPERTS)), None)
    return used / all_of_them if used and all_of_them else 1.0


def _float32_head(config: BuildConfig, model: ResolvedModel) -> bool:
    """Whether vLLM multiplies by the output head in float32 on a GPU (see
    ``logitcask.pipeline.teachers.vllm.engine``).
    """
    teacher = config.teacher
    if teacher.backend != "vllm" or teacher.dtype == "float32" or is_quantised(model):
        return False
    overrides = teacher.engine_args.get("hf_overrides")
    asked = overrides.get("head_dtype", "float32") if isinstance(overrides, dict) else "float32"
    return asked == "float32"


def _doubling(sequences: Iterable[Sequence]) -> Iterator[list[Sequence]]:
    """The sequences in parts of about ``_FIRST_PART`` tokens, twice that, and so on."""
    part: list[Sequence] = []
    wanted, held = _FIRST_PART, 0
    for sequence in sequences:
        part.append(sequence)
        held += len(sequence.input_ids)
        if held >= wanted:
            yield part
            part, wanted, held = [], 2 * wanted, 0
    if part:
        yield part


def _round(value: float) -> str:
    return f"{float(f'{value:.3g}'):,g}" if value < 1e5 else f"{float(f'{value:.3g}'):,.0f}"


def _exactly(value: float) -> Range:
    return Range(low=value, likely=value, high=value)


def _gpus(config: BuildConfig) -> int:
    return max(1, config.teacher.gpus_per_engine)
