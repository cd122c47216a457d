"""The size of a cache in bytes: measured on a probe, or computed from a reference teacher.

The computation has two parts: the numbers of head entries and draws that a config keeps of the
reference teacher's distributions, and the packed size of each. The constants are those of
SmolLM2-135M-Instruct (49,152 ids) in float32 over 29,713 positions of `python-docs`, max_length
512, and of the 45 caches in ``benchmarks/results/format.json``, whose sizes they give to within 5
%.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from logitcask.cache_format import CachedSequence
from logitcask.cache_format.manifest import MAX_MANIFEST_BYTES
from logitcask.cache_format.shards.codec import Codec
from logitcask.cache_format.shards.prior import TailPrior
from logitcask.cache_format.shards.shard_writer import ShardWriter
from logitcask.pipeline.config import StoreConfig
from logitcask.pipeline.distribution.capture import Capture, head_sizes
from logitcask.pipeline.distribution.draws import set_sizes

# Mean probability at these ranks, of tenths of the positions by rising entropy.
_RANKS = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128, 256)
_TENTHS = (
    (
        0.968,
        0.0151,
        0.00406,
        0.00211,
        9.50e-04,
        5.56e-04,
        2.78e-04,
        1.74e-04,
        6.04e-05,
        2.16e-05,
        7.87e-06,
        2.88e-06,
    ),
    (
        0.819,
        0.0971,
        0.0221,
        0.0104,
        0.00453,
        0.00268,
        0.00133,
        8.37e-04,
        2.78e-04,
        9.83e-05,
        3.54e-05,
        1.27e-05,
    ),
    (
        0.668,
        0.158,
        0.0496,
        0.0229,
        0.00966,
        0.00561,
        0.00271,
        0.00166,
        5.33e-04,
        1.81e-04,
        6.32e-05,
        2.22e-05,
    ),
    (
        0.557,
        0.169,
        0.0702,
        0.0377,
        0.0163,
        0.00946,
        0.00439,
        0.00269,
        8.56e-04,
        2.88e-04,
        9.96e-05,
        3.45e-05,
    ),
    (
        0.464,
        0.167,
        0.0817,
        0.0482,
        0.0233,
        0.014,
        0.00639,
        0.00389,
        0.00124,
        4.17e-04,
        1.45e-04,
        5.02e-05,
    ),
    (
        0.392,
        0.156,
        0.0843,
        0.0531,
        0.0275,
        0.0173,
        0.00884,
        0.00547,
        0.00177,
        5.94e-04,
        2.06e-04,
        7.08e-05,
    ),
    (
        0.326,
        0.141,
        0.0827,
        0.0556,
        0.0307,
        0.02,
        0.0109,
        0.00693,
        0.00236,
        8.18e-04,
        2.92e-04,
        1.02e-04,
    ),
    (
        0.267,
        0.124,
        0.0767,
        0.0536,
        0.0316,
        0.0213,
        0.0123,
        0.00815,
        0.00302,
        0.00113,
        4.18e-04,
        1.51e-04,
    ),
    (
        0.2,
        0.101,
        0.0669,
        0.0496,
        0.0313,
        0.0221,
        0.0133,
        0.00931,
        0.00382,
        0.00154,
        6.04e-04,
        2.28e-04,
    ),
    (
        0.123,
        0.0685,
        0.0477,
        0.0369,
        0.0253,
        0.019,
        0.0127,
        0.00948,
        0.00451,
        0.00208,
        9.29e-04,
        3.92e-04,
    ),
)

# Bytes, by least squares of the relative error over those caches.
_SEQUENCE = 40.0  # name and offsets: the same text cut into short pieces
_TOKEN = 1.5  # input id and mask
_POSITION = 4.1  # target logprob and rank, tail mass
_POSITION_WITH_DRAWS = 1.9  # entropy, sizes of the sets
_RAGGED = 0.2  # sizes of the heads
_ENTRY = 1.84  # at a step of 1/16 nat
_DRAW = 1.42  # a distinct id of a set
_DRAW_LOGPROB = 0.89
_PER_DOUBLED_STEP = -0.085
# manifest.json without its shards, and README.md.
_CARDS = 4_900
# One element of ``shards`` in manifest.json.
_MANIFEST_ENTRY = 500
# A shard's own bytes over those of an empty one: 2.2 to 2.4 on caches with and without draws, cut
# into shards of 300 to 2,500 tokens.
_SHARD_OVER_EMPTY = 2.33

# Bytes of the prior after so many positions of `python-docs`. It depends on the ids that occur, not
# on the size of the vocabulary. Of other texts it was 0.44 (Chinese) to 1.25 (short sentences)
# times that.
_PRIOR_POSITIONS = (1, 500, 1_000, 2_000, 4_000, 8_000, 16_384)
_PRIOR_BYTES = (1_200, 4_700, 6_400, 8_500, 11_300, 14_200, 16_750)
_PRIOR_OF_OTHER_TEXTS = (0.4, 1.3)

_REFERENCE_LOW, _REFERENCE_HIGH = 0.45, 1.15
_PROBE_ERROR = 0.1


class Range(BaseModel):
    """A number and its possible range."""

    model_config = ConfigDict(frozen=True)

    low: float
    likely: float
    high: float

    def times(self, factor: float) -> Range:
        return Range(low=self.low * factor, likely=self.likely * factor, high=self.high * factor)

    def plus(self, term: float | Range) -> Range:
        low, likely, high = (
            (term.low, term.likely, term.high) if isinstance(term, Range) else (term,) * 3
        )
        return Range(low=self.low + low, likely=self.likely + likely, high=self.high + high)


class Size(BaseModel):
    """Bytes of a cache, linear in its content but for the prior.

    heads, draws: means per kept position.
    prior: its bytes, over those of the reference after as many positions.
    """

    model_config = ConfigDict(frozen=True)

    source: Literal["probe", "reference"]
    heads: float
    draws: float
    per_sequence: float
    per_token: float
    per_position: Range
    per_shard: Range
    per_cache: float
    prior: Range

    def of(self, *, sequences: int, tokens: int, positions: int, shards: int) -> Range:
        """Bytes on disk, those of a finished cache."""
        rest = sequences * self.per_sequence + tokens * self.per_token + self.per_cache
        content = self.per_position.times(positions).plus(self.per_shard.times(shards))
        return content.plus(self.prior.times(_reference_prior(positions))).plus(rest)

    @property
    def most_shards(self) -> int:
        """Approximate number of shards that a manifest can name."""
        return MAX_MANIFEST_BYTES // _MANIFEST_ENTRY


def size_from_reference(store: StoreConfig, vocab_size: int) -> Size:
    """Size with the reference teacher's distributions in ``store``.

    The range is that of a sharper teacher (without the three tenths of highest entropy) and a
    flatter one (without the three of lowest entropy). Its upper end is 15 % higher for differences
    in packing: ids, vocabulary, text. Its lower end is at 45 % of the sharper teacher: rows of
    numbers, of few different tokens, take 0.44 of the likely bytes (benchmarks/estimate.py).
    """
    capture = store.capture()
    heads, draws = reference_entries(capture, vocab_size)
    bytes_each = position_bytes(store, capture, heads, draws)
    return Size(
        source="reference",
        heads=float(heads.mean()),
        draws=float(draws.mean()),
        per_sequence=_SEQUENCE,
        per_token=_TOKEN,
        per_position=Range(
            low=float(bytes_each[:-3].mean()) * _REFERENCE_LOW,
            likely=float(bytes_each.mean()),
            high=float(bytes_each[3:].mean()) * _REFERENCE_HIGH,
        ),
        per_shard=_of_a_shard(
            _SHARD_OVER_EMPTY * _shard_bytes(Codec(store.settings(vocab_size)), [], store)
        ),
        per_cache=_CARDS,
        prior=Range(low=_PRIOR_OF_OTHER_TEXTS[0], likely=1, high=_PRIOR_OF_OTHER_TEXTS[1]),
    )


def size_from_probe(store: StoreConfig, vocab_size: int, kept: Seq[CachedSequence]) -> Size:
    """Size from sequences that the real teacher scored, packed by the codec.

    They are packed with their own prior, as the first sequences of a build. On 2,000 tokens of the
    reference, the result was 2 % above the bytes per token of the whole text.
    """
    settings = store.settings(vocab_size)
    prior = TailPrior.estimate(kept, vocab_size)
    codec = Codec(settings, prior)
    whole = _shard_bytes(codec, kept, store)
    half = len(kept) // 2
    # What a second shard adds to the same sequences.
    shard = (
        _shard_bytes(codec, kept[:half], store) + _shard_bytes(codec, kept[half:], store) - whole
        if half
        else _SHARD_OVER_EMPTY * _shard_bytes(codec, [], store)
    )
    tokens, positions = sum(map(len, kept)), sum(len(sequence.positions) for sequence in kept)
    packed = whole - shard
    per_position = (packed - _SEQUENCE * len(kept) - _TOKEN * tokens) / positions
    # The error is that of all bytes, including those of sequences and tokens.
    error = _PROBE_ERROR * packed / positions
    prior_ratio = len(prior.to_bytes()) / _reference_prior(positions)
    return Size(
        source="probe",
        heads=sum(int((sequence.ids >= 0).sum()) for sequence in kept) / positions,
        draws=sum(0 if s.samples is None else int((s.samples.ids >= 0).sum()) for s in kept)
        / positions,
        per_sequence=_SEQUENCE,
        per_token=_TOKEN,
        per_position=Range(
            low=per_position - error, likely=per_position, high=per_position + error
        ),
        per_shard=_of_a_shard(shard),
        per_cache=_CARDS,
        prior=Range(low=0.8 * prior_ratio, likely=prior_ratio, high=1.2 * prior_ratio),
    )


def _of_a_shard(own: float) -> Range:
    """Bytes of one shard more: its own, and its manifest entry. A shard of a few hundred tokens
    takes hardly more than an empty one.
    """
    return Range(low=own / _SHARD_OVER_EMPTY, likely=own, high=1.1 * own).plus(_MANIFEST_ENTRY)


def _reference_prior(positions: int) -> float:
    """Bytes of the reference's prior, estimated from its first ``positions``, as a build does."""
    return float(
        np.exp(np.interp(np.log(max(positions, 1)), np.log(_PRIOR_POSITIONS), np.log(_PRIOR_BYTES)))
    )


def reference_entries(
    capture: Capture, vocab_size: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """float64[10] each: head entries per position of every tenth, and distinct ids among its draws,
    over all sets.

    Systematic draws contain id v with probability ``min(1, S p_v / m)``, and independent draws with
    about ``1 - exp(-S p_v / m)``, with S the draws of a set and m the tail's mass.
    """
    probabilities = _curves(max(_RANKS[-1], capture.top_k))[:, :vocab_size]
    heads = head_sizes(
        np.log(probabilities[:, : capture.top_k]).astype(np.float32), capture
    ).astype(np.int64)
    outside = probabilities * (np.arange(probabilities.shape[1]) >= heads[:, None])
    mass = np.maximum(1 - (probabilities.sum(axis=1) - outside.sum(axis=1)), outside.sum(axis=1))
    if not capture.samples:
        return heads.astype(np.float64), np.zeros(len(heads))
    per_mass = set_sizes(mass, capture) / np.maximum(mass, 1e-9)
    expected = per_mass[:, None] * outside
    known = (1 - np.exp(-expected) if capture.independent else np.minimum(1, expected)).sum(axis=1)
    # Beyond the last rank of the table no id is drawn twice.
    beyond = per_mass * (mass - outside.sum(axis=1))
    return heads.astype(np.float64), capture.sets * (known + beyond)


def position_bytes(
    store: StoreConfig, capture: Capture, heads: NDArray[np.float64], draws: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Bytes of kept positions with so many head entries and distinct draws each."""
    step = _PER_DOUBLED_STEP * math.log2(16 * store.logprob_step)
    result = _POSITION + _RAGGED * capture.ragged + max(1.2, _ENTRY + step) * heads
    if store.tail_samples:
        result = result + _POSITION_WITH_DRAWS + _DRAW * draws
    if store.sample_logprobs:
        result = result + max(0.3, _DRAW_LOGPROB + step) * draws
    return np.asarray(result, np.float64)


def _curves(width: int) -> NDArray[np.float64]:
    """float64[10, width]: probability by rank, a power law between two ranks of the table and
    beyond its last.
    """
    at, known = np.log(_RANKS), np.log(_TENTHS)
    ranks = np.log(np.arange(1, width + 1))
    curves = np.exp([np.interp(ranks, at, row) for row in known])
    slope = (known[:, -1] - known[:, -2]) / (at[-1] - at[-2])
    beyond = np.maximum(ranks - at[-1], 0)
    result: NDArray[np.float64] = curves * np.exp(slope[:, None] * beyond)
    # The power law ends when no mass is left.
    room = np.maximum(1 - (result.cumsum(axis=1) - result), 1e-12)
    return np.minimum(result, room)


def _shard_bytes(codec: Codec, sequences: Seq[CachedSequence], store: StoreConfig) -> int:
    """Size of one shard with these sequences, written as in a build."""
    with tempfile.TemporaryDirectory() as folder:
        writer = ShardWriter(
            Path(folder) / "shard", codec, store.compression_level, None, mass_slack=1e-3
        )
        for sequence in sequences:
            writer.append(sequence)
        return int(str(writer.close()["bytes"]))
