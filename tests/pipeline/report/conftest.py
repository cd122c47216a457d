"""Caches with known texts, and a tokenizer that has them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from logitcask.cache_format import CachedSequence, CacheReader, CacheWriter, TailSamples
from logitcask.cache_format.manifest import (
    DataIdentity,
    Header,
    StoreSettings,
    TeacherIdentity,
    TokenizerIdentity,
)

HEAD, DRAWS = 8, 6


class WordTokenizer:
    """A tokenizer whose ids are the places of ``texts``. Bytes stand for a part of a character."""

    all_special_ids = (0,)

    def __init__(self, texts: Sequence[str | bytes]) -> None:
        self.texts = texts

    def decode(self, tokens: list[int], clean_up_tokenization_spaces: bool = False) -> str:
        return "".join(
            each.decode(errors="replace") if isinstance(each, bytes) else each
            for each in (self.texts[token] for token in tokens)
        )

    def convert_ids_to_tokens(self, tokens: list[int]) -> list[str]:
        (text,) = (self.texts[token] for token in tokens)
        return [f"<0x{text[0]:02X}>" if isinstance(text, bytes) else text]


def cached(
    rng: np.random.Generator, name: str, tokens: Sequence[int], vocab_size: int, kept: float = 1.0
) -> CachedSequence:
    """A sequence whose distributions are softmaxes of random logits over the whole vocabulary."""
    ids = np.array(tokens, np.int32)
    mask = rng.random(len(ids)) < kept
    mask[0] = False
    positions = np.flatnonzero(mask[1:]).astype(np.int32)
    logits = rng.normal(0, 3, (len(positions), vocab_size))
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    order = np.argsort(-logprobs, axis=1)
    ranked = np.take_along_axis(logprobs, order, axis=1)
    target = np.take_along_axis(logprobs, ids[positions + 1, None], axis=1)
    drawn = np.array(
        [rng.choice(each[HEAD:], DRAWS) if len(each) else each for each in order], np.int32
    ).reshape(len(positions), 1, DRAWS)
    return CachedSequence(
        sequence_id=name,
        input_ids=ids,
        loss_mask=mask,
        positions=positions,
        ids=order[:, :HEAD].astype(np.int32),
        logprobs=ranked[:, :HEAD].astype(np.float32),
        tail_logprob=np.log(np.exp(ranked[:, HEAD:]).sum(axis=1)).astype(np.float32),
        target_logprob=target[:, 0].astype(np.float32),
        target_rank=(logprobs > target).sum(axis=1).astype(np.int32),
        entropy=-(np.exp(logprobs) * logprobs).sum(axis=1).astype(np.float32),
        samples=TailSamples(drawn),
    )


def write(path: Path, sequences: Sequence[CachedSequence], vocab_size: int, **data) -> CacheReader:
    """A finished cache of these sequences in two shards. ``data``: fields of its DataIdentity."""
    identity = {
        "source": "texts",
        "split": "train",
        "kind": "documents",
        "mask_policy": "all",
        "max_length": 64,
        "overlong": "split",
        "sha256": "0",
        **data,
    }
    digest = hashlib.sha256(b"").hexdigest()
    header = Header(
        created_by="tests",
        teacher=TeacherIdentity(
            model=identity["source"], backend="synthetic", engine="none", dtype="float32",
            route="synthetic", vocab_size=vocab_size,
        ),
        tokenizer=TokenizerIdentity(
            name="t", sha256=digest, vocab_sha256=digest, vocab_size=vocab_size
        ),
        data=DataIdentity(**identity),
        store=StoreSettings(
            vocab_size=vocab_size, top_k=HEAD, capture_k=HEAD, tail_samples=DRAWS, entropy=True,
            logprob_step=1 / 64,
        ),
    )  # fmt: skip
    with CacheWriter(path) as writer:
        started = writer.begin(header)
        half = -(-len(sequences) // 2)
        for number in range(2):
            with writer.shard(number) as shard:
                for sequence in sequences[number * half : (number + 1) * half]:
                    shard.append(sequence)
        writer.finish(started, 2)
    return CacheReader(str(path))


TEXTS = ["<|start|>", "The", " cat", "s", " 12", "\n", "  ", ".", b"\xe4", b"\xb8", b"\xad", "ally"]
TEXTS += [f" word{number}" for number in range(28)]


@pytest.fixture
def tokenizer() -> WordTokenizer:
    return WordTokenizer(TEXTS)


@pytest.fixture
def reader(tmp_path: Path, rng: np.random.Generator) -> CacheReader:
    """40 sequences of three sources; some tokens are not predicted."""
    sequences = [
        cached(
            rng,
            f"{('web/train', 'book', 'code/x')[i % 3]}/{i}" + ("/1" if i == 7 else ""),
            [0, *rng.integers(0, len(TEXTS), int(rng.integers(1, 60)))],
            len(TEXTS),
            kept=0.8,
        )
        for i in range(40)
    ]
    return write(tmp_path / "cache", sequences, len(TEXTS))


@pytest.fixture
def make_reader(
    tmp_path: Path, rng: np.random.Generator
) -> Callable[..., tuple[CacheReader, WordTokenizer]]:
    """``make_reader(texts, {name: tokens}, **data)``: a cache of these sequences, every token of
    which is predicted, and its tokenizer. Ids of the vocabulary are the places of ``texts``; there
    are at least 40.
    """

    def make(texts: Sequence[str | bytes], rows: dict[str, Sequence[int]], **data):
        texts = [*texts, *(f" filler{number}" for number in range(40 - len(texts)))]
        sequences = [cached(rng, name, tokens, len(texts)) for name, tokens in rows.items()]
        return write(tmp_path / "made", sequences, len(texts), **data), WordTokenizer(texts)

    return make
