"""The two teachers of the quality study: every distribution of both, dense, and caches made of
them.

strong SmolLM2-135M-Instruct, trained on two trillion tokens, over the ids of the study's vocabulary
(``quality_text``) weak a Llama of a few million weights, trained here for some minutes on text that
the student never sees

Both have read neither ``train`` nor ``held_out`` here. Their log-softmaxes are kept as float16, so
that "full logits" is an arm like any other and held-out KL is exact; caches are made of them by the
same draws, the same estimator and the same writer as in a build.

Shapes: N sequences, T tokens each, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from text import Text
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from logitcask.cache_format import CachedSequence, CacheReader, CacheWriter
from logitcask.cache_format.layout import MANIFEST
from logitcask.cache_format.manifest import (
    DataHash,
    DataIdentity,
    Header,
    TeacherIdentity,
    TokenizerIdentity,
)
from logitcask.cache_format.shards.prior import TailPrior
from logitcask.cache_format.writer import remove_cache
from logitcask.pipeline.config import StoreConfig
from logitcask.pipeline.distribution.draws import KEY_IDS, Draws, no_draws
from logitcask.pipeline.distribution.draws_torch import draw, to_numpy
from logitcask.pipeline.distribution.keep import keep
from logitcask.pipeline.types import Scored, Sequence

_ROWS = 4096
"""Positions whose distributions are looked at together."""
Logprobs = NDArray[np.float16]


class OutOfTime(Exception):
    """The minutes given are over; the same command goes on."""


@dataclass(frozen=True)
class Teacher:
    """What a teacher says of both parts: float16[N, T-1, V] logprobs, nats; row ``i`` predicts
    token ``i + 1``.
    """

    name: str
    train: Logprobs
    held_out: Logprobs


def load_teacher(folder: Path, name: str) -> Teacher:
    """What ``score`` left in ``folder``."""
    return Teacher(
        name,
        *(np.load(folder / f"{name}-{part}.npy", mmap_mode="r") for part in ("train", "held_out")),
    )


def score(
    folder: Path,
    name: str,
    model: PreTrainedModel,
    text: Text,
    rows: Tensor | None,
    deadline: float,
) -> None:
    """Writes every distribution of ``model`` over both parts to ``folder``, or goes on with it.

    rows: int64[V], the model's ids that are kept, in order; None where its vocabulary is the
    study's.
    """
    model.eval()
    for part in ("train", "held_out"):
        ids = getattr(text, part)
        file, progress = folder / f"{name}-{part}.npy", folder / f"{name}-{part}.part.json"
        if file.exists():
            continue
        shape = (len(ids), ids.shape[1] - 1, len(text.vocabulary))
        scratch = file.with_suffix(".part.npy")
        done = json.loads(progress.read_text()) if progress.exists() else 0
        dense = np.lib.format.open_memmap(scratch, "r+" if done else "w+", np.float16, shape)
        while done < len(ids):
            if time.monotonic() > deadline:
                raise OutOfTime
            dense[done : done + 8] = (
                _logprobs(model, ids[done : done + 8], rows).half().cpu().numpy()
            )
            dense.flush()
            done = min(done + 8, len(ids))
            progress.write_text(json.dumps(done))
        scratch.rename(file)
        progress.unlink()


@torch.inference_mode()
def _logprobs(model: PreTrainedModel, ids: NDArray[np.uint16], rows: Tensor | None) -> Tensor:
    device = model.device
    inputs = torch.from_numpy(ids.astype(np.int64)).to(device)
    head = model.get_output_embeddings().weight
    if rows is not None:
        inputs, head = rows.to(device)[inputs], head[rows.to(device)]
    hidden = model.base_model(input_ids=inputs, use_cache=False).last_hidden_state[:, :-1]
    return torch.log_softmax((hidden @ head.T).float(), -1)


def strong_model(folder: str, device: torch.device) -> PreTrainedModel:
    """SmolLM2, in float32."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(
        device
    )
    return model


def small_llama(vocab: int, width: int, layers: int, length: int) -> LlamaForCausalLM:
    """A Llama with tied embeddings and random weights, heads of 32."""
    heads = max(1, width // 32)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=32,
        max_position_embeddings=length,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def cache_of(
    folder: Path, teacher: Teacher, text: Text, store: StoreConfig, *, name: str, seed: int
) -> tuple[Path, float]:
    """(path, bytes per token) of the cache of ``train`` with these settings; it is written where
    it does not stand yet.
    """
    if store.tail_samples:
        store, name = store.model_copy(update={"seed": seed}), f"{name}-{seed}"
    path = folder / teacher.name / name.replace(" ", "-").replace("/", "-")
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not (path / MANIFEST).exists():
            if path.exists():
                remove_cache(path)
            scored = scored_rows(teacher.train, text.train, store)
            write_cache(
                path, text.train, scored, store, vocab_size=len(text.vocabulary), model=teacher.name
            )
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path, size / text.train.size


def scored_rows(
    dense: Logprobs | NDArray[np.float32], ids: NDArray[np.integer[Any]], store: StoreConfig
) -> Iterator[Scored]:
    """What an engine hands over for each sequence, from its whole distributions [N, T-1, V]: as
    TransformersTeacher does.
    """
    capture = store.capture()
    positions = dense.shape[1]
    together = max(1, _ROWS * 4096 // (positions * dense.shape[2]))
    for start in range(0, len(dense), together):
        logprobs = torch.from_numpy(np.array(dense[start : start + together], np.float32)).flatten(
            0, 1
        )
        # float16 moved each sum a little off 1.
        logprobs -= logprobs.logsumexp(1, keepdim=True)
        targets = torch.from_numpy(ids[start : start + together, 1:].astype(np.int64)).flatten()
        target = logprobs.gather(1, targets[:, None])
        top = logprobs.topk(max(capture.top_k, KEY_IDS), dim=1)
        head = top.values[:, : capture.top_k].numpy()
        drawn = (
            to_numpy(draw(logprobs, top.indices, targets, capture))
            if capture.samples
            else no_draws(head, capture)
        )
        rank = (logprobs > target).sum(1, dtype=torch.int32).numpy()
        head_ids = top.indices[:, : capture.top_k].int().numpy()
        for row in range(0, len(targets), positions):
            at = slice(row, row + positions)
            yield Scored(
                ids=head_ids[at],
                logprobs=head[at],
                target_ids=targets[at].int().numpy(),
                target_logprob=target[at, 0].numpy(),
                target_rank=rank[at],
                draws=Draws(
                    head_size=drawn.head_size[at],
                    samples=drawn.samples[at],
                    sample_logprobs=drawn.sample_logprobs[at],
                    entropy=None if drawn.entropy is None else drawn.entropy[at],
                ),
            )


def write_cache(
    path: Path,
    ids: NDArray[np.integer[Any]],
    scored: Iterator[Scored],
    store: StoreConfig,
    *,
    vocab_size: int,
    model: str,
) -> None:
    """A finished cache of one shard at ``path``, as a build writes it."""
    settings = store.settings(vocab_size)
    digest = DataHash()
    kept: list[CachedSequence] = []
    for number, (row, rows) in enumerate(zip(ids, scored, strict=True)):
        mask = np.arange(len(row)) > 0
        sequence = Sequence(f"{number:06d}", row.astype(np.int32), mask)
        digest.update(sequence.sequence_id, sequence.input_ids, sequence.loss_mask)
        kept.append(keep(sequence, rows, settings))
    identity = hashlib.sha256(f"quality study, {vocab_size} ids".encode()).hexdigest()
    header = Header(
        created_by=f"logitcask {version('logitcask')}",
        teacher=TeacherIdentity(
            model=model,
            backend="transformers",
            engine=f"transformers {version('transformers')}",
            dtype="float32",
            route="dense",
            vocab_size=vocab_size,
        ),
        tokenizer=TokenizerIdentity(
            name="quality study", sha256=identity, vocab_sha256=identity, vocab_size=vocab_size
        ),
        data=DataIdentity(
            source="python documentation",
            split="train",
            kind="documents",
            mask_policy="all",
            max_length=ids.shape[1],
            overlong="split",
            sha256=digest.hexdigest(),
        ),
        store=settings,
        config={"store": store.model_dump(mode="json")},
    )
    with CacheWriter(path, compression_level=store.compression_level) as writer:
        header = writer.begin(header, TailPrior.estimate(kept, vocab_size))
        with writer.shard(0) as shard:
            for sequence in kept:
                shard.append(sequence)
        writer.finish(header, 1)


def read_cache(path: Path) -> tuple[list[CachedSequence], Tensor | None]:
    """All sequences of a cache, and its prior as float32[V]."""
    cache = CacheReader(path)
    prior = cache.prior
    return list(cache), None if prior is None else torch.from_numpy(prior.probabilities()).float()  # type: ignore[call-overload]


def sharpness(
    teacher: Teacher, targets: NDArray[np.uint16], ks: tuple[int, ...] = (1, 4, 12, 64)
) -> dict[str, float]:
    """Mean entropy and cross-entropy on the held-out text (nats), and the mass of the k most
    probable ids.
    """
    sums: dict[str, float] = {}
    for dense, row in zip(teacher.held_out, targets, strict=True):
        logprobs = torch.from_numpy(np.array(dense, np.float32))
        p = logprobs.exp()
        largest = p.topk(max(ks), 1).values.cumsum(1)
        values = {f"mass@{k}": largest[:, k - 1].mean().item() for k in ks}
        values["entropy"] = -(p * logprobs.clamp_min(-100)).sum(1).mean().item()
        values["ce"] = (
            -logprobs.gather(1, torch.from_numpy(row[1:, None].astype(np.int64))).mean().item()
        )
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value
    return {name: round(value / len(targets), 4) for name, value in sums.items()}
