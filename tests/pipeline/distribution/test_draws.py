"""Draws from the tail: right in expectation, right in number, the same in numpy and torch, and
the same again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode

from logitcask.pipeline.distribution import draws_torch
from logitcask.pipeline.distribution.capture import Capture, head_sizes
from logitcask.pipeline.distribution.draws import (
    KEY_IDS,
    LEAST_LOGPROB,
    Draws,
    draw,
    first_difference,
    fractions,
    mix,
    no_draws,
)

CAPTURES = [
    Capture(16, samples=16),
    Capture(0, samples=8, sets=3, seed=5),
    Capture(2, samples=1),
    Capture(16, samples=255, top_p=0.5, mass_per_sample=0.01, independent=True, seed=-3),
    Capture(16, min_k=2, samples=16, min_probability=0.01, sets=2, seed=2**70),
    Capture(258, samples=4),
]
PValue = Callable[[NDArray[np.integer], NDArray[np.floating]], float]
Rows = tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.int32]]


def some_rows(rng: np.random.Generator, rows: int, vocab_size: int, top: int) -> Rows:
    """Logprobs of laws from flat to sharp, some with impossible ids, the most probable ids, and
    targets.
    """
    logits = rng.normal(size=(rows, vocab_size)) * rng.uniform(0.5, 8, (rows, 1))
    logits[:: rows // 3, rng.choice(vocab_size, vocab_size // 3)] = -np.inf
    logprobs = (logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)).astype(np.float32)
    top_ids = np.argsort(-logprobs, axis=1, kind="stable")[:, : max(top, KEY_IDS)].astype(np.int32)
    return logprobs, top_ids, rng.integers(0, vocab_size, rows).astype(np.int32)


def by_torch(rows: Rows, capture: Capture, *, logits: bool = False) -> Draws:
    logprobs, top_ids, target_ids = map(torch.from_numpy, rows)
    return draws_torch.to_numpy(
        draws_torch.draw(logprobs, top_ids.long(), target_ids.long(), capture, logits=logits)
    )


def tails(rows: Rows, found: Draws, top_k: int) -> NDArray[np.float64]:
    """float64[R, V]: the truth that draws are held to."""
    tail = np.exp(rows[0].astype(np.float64))
    for row, (ids, size) in enumerate(zip(rows[1][:, :top_k], found.head_size, strict=True)):
        tail[row, ids[:size]] = 0
    return tail


@pytest.mark.parametrize("capture", CAPTURES)
def test_numpy_and_torch_draw_the_same(rng: np.random.Generator, capture: Capture) -> None:
    rows = some_rows(rng, 40, int(rng.choice([258, 1000, 1024, 5003])), capture.top_k)
    expected = draw(*rows, capture)
    shift = rng.normal(size=(40, 1)).astype(np.float32)
    # Draws are keyed by eighths of a nat: a row whose key hangs on the last bit of a logit may be
    # drawn from otherwise.
    named = np.take_along_axis(rows[0], np.stack([rows[1][:, 0], rows[2]], 1).astype(np.int64), 1)
    decided = (np.abs(8 * np.maximum(named, LEAST_LOGPROB) % 1 - 0.5) > 1e-3).all(axis=1)
    assert decided.sum() >= 35
    for found in (
        by_torch(rows, capture),
        by_torch((rows[0] + shift, *rows[1:]), capture, logits=True),
    ):
        np.testing.assert_array_equal(found.head_size, expected.head_size)
        np.testing.assert_array_equal(found.samples >= 0, expected.samples >= 0)
        same = found.samples == expected.samples
        assert same[decided].mean() > 0.99, "more differ than fall between two ids"
        np.testing.assert_allclose(
            found.sample_logprobs[same], expected.sample_logprobs[same], atol=1e-5, rtol=0
        )
        np.testing.assert_allclose(found.entropy, expected.entropy, atol=1e-5, rtol=0)
        for field in dataclasses.fields(Draws):
            assert getattr(found, field.name).dtype == getattr(expected, field.name).dtype
    assert first_difference(by_torch(rows, capture), *rows, capture) is None
    assert first_difference(expected, *rows, capture) is None


@pytest.mark.parametrize("capture", CAPTURES)
def test_draws_are_ids_of_the_tail_with_their_logprobs(
    rng: np.random.Generator, capture: Capture
) -> None:
    rows = some_rows(rng, 40, 400, capture.top_k)
    found = by_torch(rows, capture)
    assert found.samples.shape == found.sample_logprobs.shape == (40, capture.sets, capture.samples)
    np.testing.assert_array_equal(
        found.head_size,
        head_sizes(
            np.take_along_axis(rows[0], rows[1][:, : capture.top_k].astype(int), 1), capture
        ),
    )
    tail = tails(rows, found, capture.top_k)
    real = found.samples >= 0
    row = np.nonzero(real)[0]
    assert (tail[row, found.samples[real]] > 0).all(), (
        "a draw has no probability or lies in the head"
    )
    np.testing.assert_array_equal(found.sample_logprobs[real], rows[0][row, found.samples[real]])
    assert (found.samples[~real] == -1).all()
    assert np.isneginf(found.sample_logprobs[~real]).all()
    possible = np.isfinite(rows[0])
    terms = np.where(
        possible, np.exp(rows[0].astype(np.float64)) * np.where(possible, rows[0], 0), 0
    )
    np.testing.assert_allclose(found.entropy, -terms.sum(axis=1), atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("top_k", [0, 3])
@pytest.mark.parametrize("independent", [False, True])
def test_draws_come_up_as_often_as_they_should(
    rng: np.random.Generator, tail_p_value: PValue, top_k: int, independent: bool
) -> None:
    """Of one draw in each set, since those of a systematic set are not independent of each
    other.
    """
    rows = some_rows(rng, 6, 300, top_k)
    capture = Capture(
        top_k, samples=4, sets=2000, independent=independent, seed=int(rng.integers(2**60))
    )
    found = by_torch(rows, capture)
    tail = tails(rows, found, top_k)
    if independent:
        assert tail_p_value(found.samples.reshape(6, -1), tail) > 1e-6
    # One draw, picked blindly, of each systematic set is a draw from the whole tail.
    which = rng.integers(0, 4, (6, 2000, 1))
    picked = np.take_along_axis(found.samples, which, axis=2)[:, :, 0]
    assert tail_p_value(picked, tail) > 1e-6

    # The test can tell: of draws of the neighbour, of draws by a law a little too flat, and of
    # draws by another row's.
    allowed = tail > 0
    neighbour = np.where(
        np.take_along_axis(allowed, (picked + 1) % 300, 1), (picked + 1) % 300, picked
    )
    assert tail_p_value(neighbour, tail) < 1e-6
    flat = np.where(allowed, np.exp(0.8 * np.maximum(rows[0], -100)), 0)
    assert tail_p_value(_plain_draws(rng, flat, 8000), tail) < 1e-6
    assert tail_p_value(np.roll(picked, 1, axis=0), tail) < 1e-6


def _plain_draws(
    rng: np.random.Generator, weights: NDArray[np.floating], size: int
) -> NDArray[np.int64]:
    return np.stack([rng.choice(len(row), size, p=row / row.sum()) for row in weights])


def test_systematic_draws_come_up_the_floor_or_the_ceiling_of_what_is_expected(
    rng: np.random.Generator,
) -> None:
    capture = Capture(4, samples=64, sets=40, seed=int(rng.integers(2**60)))
    rows = some_rows(rng, 12, 300, 4)
    found = by_torch(rows, capture)
    tail = tails(rows, found, 4)
    expected = 64 * tail / tail.sum(axis=1, keepdims=True)
    counts = np.stack(
        [[np.bincount(each, minlength=300) for each in sets] for sets in found.samples]
    )
    # Block sums and exponentials are rounded in float32: an id's share may be off by that.
    assert (counts >= np.floor(expected - 1e-3)[:, None]).all()
    assert (counts <= np.ceil(expected + 1e-3)[:, None]).all()
    independent = by_torch(rows, dataclasses.replace(capture, independent=True))
    counts = np.stack(
        [[np.bincount(each, minlength=300) for each in sets] for sets in independent.samples]
    )
    assert (counts > np.ceil(expected + 1e-3)[:, None]).any()


def test_uniforms_are_uniform_and_independent(
    rng: np.random.Generator, tail_p_value: PValue
) -> None:
    """In 8 x 8 cells: of neighbouring draws, neighbouring sets, neighbouring targets,
    neighbouring seeds.
    """
    capture = Capture(0, samples=100, sets=8, independent=True, seed=int(rng.integers(2**60)))
    named = np.full((50, 2), -1.5, np.float32)
    top_ids = np.tile(np.arange(4, dtype=np.int32), (50, 1))
    targets = np.arange(50, dtype=np.int32)
    counts = np.full(50, 100)
    u = fractions(named, top_ids, targets, counts, capture)
    other = fractions(
        named, top_ids, targets, counts, dataclasses.replace(capture, seed=capture.seed + 1)
    )
    assert ((u >= 0) & (u < 1)).all()
    for a, b in ((u[..., :-1], u[..., 1:]), (u[:, :-1], u[:, 1:]), (u[:-1], u[1:]), (u, other)):
        cells = ((a * 8).astype(int) * 8 + (b * 8).astype(int)).reshape(1, -1)
        assert tail_p_value(cells, np.ones((1, 64))) > 1e-6
        assert tail_p_value(cells // 2 * 2, np.ones((1, 64))) < 1e-6


def test_mix_is_splitmix64() -> None:
    """The first outputs for seeds 0 and 1234567, as everyone gets them."""
    seeds = np.array([0, 1234567], np.int64)
    expected = np.array([0xE220A8397B1DCDAF, 6457827717110365317], np.uint64)
    np.testing.assert_array_equal(mix(seeds).view(np.uint64), expected)
    np.testing.assert_array_equal(mix(torch.from_numpy(seeds)).numpy().view(np.uint64), expected)


def test_draws_depend_on_the_position_and_the_seed_alone(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture = Capture(4, samples=32, sets=2)
    rows = some_rows(rng, 30, 3000, 4)
    found = by_torch(rows, capture)
    order = rng.permutation(30)
    monkeypatch.setattr(draws_torch, "_CHUNK", {"cpu": 4 * 3000, "gpu": 0})
    again = by_torch(tuple(each[order] for each in rows), capture)  # type: ignore[arg-type]
    np.testing.assert_array_equal(again.samples, found.samples[order])
    np.testing.assert_array_equal(again.entropy, found.entropy[order])

    assert (found.samples[:, 0] != found.samples[:, 1]).mean() > 0.2, "two sets are the same"
    reseeded = by_torch(rows, dataclasses.replace(capture, seed=1))
    assert (found.samples != reseeded.samples).mean() > 0.2
    retargeted = by_torch((*rows[:2], (rows[2] + 1) % 3000), capture)
    assert (found.samples != retargeted.samples).mean() > 0.2
    # Rounding in another batch, far below an eighth of a nat, changes next to nothing.
    noise = rng.uniform(-1e-6, 1e-6, rows[0].shape).astype(np.float32)
    noisy = by_torch((rows[0] + noise, *rows[1:]), capture)
    assert (found.samples == noisy.samples).mean() > 0.95


def test_mass_per_sample_sets_the_number_of_draws(rng: np.random.Generator) -> None:
    capture = Capture(8, samples=20, sets=2, mass_per_sample=0.02)
    rows = some_rows(rng, 60, 500, 8)
    found = by_torch(rows, capture)
    mass = tails(rows, found, 8).sum(axis=1)
    counts = (found.samples >= 0).sum(axis=2)
    np.testing.assert_array_equal(counts[:, 0], np.ceil(mass / 0.02).clip(1, 20))
    np.testing.assert_array_equal(counts[:, 0], counts[:, 1])
    assert len(np.unique(counts)) > 3


def test_heads_end_where_the_rule_says_in_numpy_and_torch_alike(rng: np.random.Generator) -> None:
    threshold = np.float32(np.log(0.1))
    below = np.nextafter(threshold, np.float32(-10))
    logprobs = np.full((2, 258), -9, np.float32)
    logprobs[:, :4] = [[-0.5, threshold, threshold, below], [below, below, below, below]]
    rows = logprobs, np.tile(np.arange(6, dtype=np.int32), (2, 1)), np.zeros(2, np.int32)
    for min_k, sizes in ((1, [3, 1]), (2, [3, 2]), (9, [6, 6])):
        capture = Capture(6, min_k=min_k, min_probability=0.1, samples=2)
        assert (
            by_torch(rows, capture).head_size.tolist()
            == draw(*rows, capture).head_size.tolist()
            == sizes
        )
    many = some_rows(rng, 500, 300, 16)
    for top_p in (0.1, 0.5, 0.9, 1.0):
        capture = Capture(16, top_p=top_p, min_probability=1e-3, samples=1)
        np.testing.assert_array_equal(
            by_torch(many, capture).head_size, draw(*many, capture).head_size
        )


def test_a_position_without_a_tail_has_no_draws(rng: np.random.Generator) -> None:
    everything = Capture(258, samples=4, sets=2)
    certain = np.full((3, 258), -np.inf, np.float32)
    certain[:, 0] = 0
    underflows = np.full((3, 258), -120, np.float32)
    underflows[:, 7] = 0
    for capture, logprobs in (
        (everything, some_rows(rng, 3, 258, 258)[0]),
        (Capture(1, samples=4, sets=2), certain),
        (Capture(2, samples=4, sets=2, mass_per_sample=0.1), underflows),
    ):
        top_ids = np.argsort(-logprobs, axis=1, kind="stable").astype(np.int32)
        rows = logprobs, top_ids, np.zeros(3, np.int32)
        for found in (draw(*rows, capture), by_torch(rows, capture)):
            assert (found.samples == -1).all()
            assert np.isneginf(found.sample_logprobs).all()
            assert np.isfinite(found.entropy).all()
            assert first_difference(found, *rows, capture) is None
    # With nothing in the head, the one possible id is drawn every time.
    only = by_torch(
        (certain, np.tile(np.arange(4, dtype=np.int32), (3, 1)), np.zeros(3, np.int32)),
        Capture(0, samples=4),
    )
    assert (only.samples == 0).all()
    assert (only.sample_logprobs == 0).all()


def test_no_draws_have_head_sizes_and_no_entropy(rng: np.random.Generator) -> None:
    head = np.sort(rng.normal(size=(5, 8)).astype(np.float32) - 2)[:, ::-1]
    capture = Capture(8, min_probability=0.1)
    found = no_draws(head, capture)
    np.testing.assert_array_equal(found.head_size, head_sizes(head, capture))
    assert found.samples.shape == found.sample_logprobs.shape == (5, 0, 0)
    assert found.entropy is None


class Operations(TorchDispatchMode):
    """How many operations torch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "capture", [*CAPTURES, Capture(16, samples=16, min_probability=0.01, mass_per_sample=0.02)]
)
@pytest.mark.parametrize("logits", [False, True])
def test_a_chunk_takes_few_operations(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, capture: Capture, logits: bool
) -> None:
    """Each costs a GPU more than its work does. The hash, half of all of them, is made once for
    all chunks.
    """
    rows = some_rows(rng, 12, 1000, capture.top_k)
    counts, found = [], []
    for chunks in (1, 3):
        monkeypatch.setattr(
            draws_torch, "_CHUNK", {"cpu": max(1000, capture.draws * 256) * 12 // chunks, "gpu": 0}
        )
        with Operations() as operations:
            found.append(by_torch(rows, capture, logits=logits))
        counts.append(operations.count)
    for field in dataclasses.fields(Draws):
        np.testing.assert_array_equal(*(getattr(each, field.name) for each in found))
    assert (counts[1] - counts[0]) / 2 <= 70
    assert counts[0] <= 260


def _other_seed(rows: Rows, capture: Capture, found: Draws) -> Draws:
    return draw(*rows, dataclasses.replace(capture, seed=capture.seed + 1))


def _head_not_left_out(rows: Rows, capture: Capture, found: Draws) -> Draws:
    wrong = draw(*rows, dataclasses.replace(capture, top_k=0, min_probability=None))
    return dataclasses.replace(wrong, head_size=found.head_size)


def _others_logprobs(rows: Rows, capture: Capture, found: Draws) -> Draws:
    return dataclasses.replace(found, sample_logprobs=np.roll(found.sample_logprobs, 1, axis=0))


def _neighbours(rows: Rows, capture: Capture, found: Draws) -> Draws:
    ids = np.where(found.samples >= 0, (found.samples + 1) % rows[0].shape[1], -1)
    logprobs = np.take_along_axis(rows[0], ids.reshape(len(ids), -1).clip(0), 1).reshape(ids.shape)
    return dataclasses.replace(found, samples=ids.astype(np.int32), sample_logprobs=logprobs)


def _other_size(rows: Rows, capture: Capture, found: Draws) -> Draws:
    return dataclasses.replace(found, head_size=found.head_size - 1)


def _half_the_draws(rows: Rows, capture: Capture, found: Draws) -> Draws:
    return dataclasses.replace(
        found, samples=np.where(np.arange(capture.samples) % 2, -1, found.samples)
    )


def _no_id(rows: Rows, capture: Capture, found: Draws) -> Draws:
    return dataclasses.replace(found, samples=found.samples + rows[0].shape[1])


def _other_entropy(rows: Rows, capture: Capture, found: Draws) -> Draws:
    return dataclasses.replace(found, entropy=np.roll(found.entropy, 1))


def _fewer_columns(rows: Rows, capture: Capture, found: Draws) -> Draws:
    return dataclasses.replace(found, samples=found.samples[:, :, 1:])


@pytest.mark.parametrize(
    "spoil",
    [
        _other_seed, _head_not_left_out, _others_logprobs, _neighbours, _other_size, _half_the_draws, _no_id,
        _other_entropy, _fewer_columns,
    ],
)  # fmt: skip
def test_wrong_draws_are_noticed(
    rng: np.random.Generator, spoil: Callable[[Rows, Capture, Draws], Draws]
) -> None:
    capture = Capture(8, min_k=4, min_probability=0.02, samples=16, sets=2)
    rows = some_rows(rng, 12, 600, 8)
    found = draw(*rows, capture)
    assert first_difference(found, *rows, capture) is None
    assert first_difference(spoil(rows, capture, found), *rows, capture) is not None
