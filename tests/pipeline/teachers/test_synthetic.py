"""The synthetic teacher against its own dense truth."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest

from logitcask.pipeline.config import TeacherConfig
from logitcask.pipeline.distribution.capture import Capture, head_sizes
from logitcask.pipeline.teachers.synthetic import SyntheticTeacher
from logitcask.pipeline.teachers.synthetic_tokenizer import SyntheticTokenizer
from logitcask.pipeline.types import Sequence

Make = Callable[[str, list[int]], Sequence]
Check = Callable[..., None]


@pytest.fixture
def synthetic(rng: np.random.Generator) -> SyntheticTeacher:
    return synthetic_teacher(rng, Capture(16))


def synthetic_teacher(rng: np.random.Generator, capture: Capture) -> SyntheticTeacher:
    vocab_size = int(rng.choice([258, 1000, 1009, 4096, 49_152]))
    config = TeacherConfig(model="synthetic", vocab_size=vocab_size, seed=int(rng.integers(2**40)))
    return SyntheticTeacher(config, capture)


@pytest.mark.parametrize(
    "capture",
    [
        Capture(1),
        Capture(16, samples=16, seed=7),
        Capture(258, top_p=0.7, min_probability=0.01, samples=32, sets=3, mass_per_sample=0.02),
        Capture(0, samples=255, independent=True),
    ],
)
def test_synthetic_is_normalised_and_matches_its_dense_truth(
    rng: np.random.Generator, as_sequence: Make, assert_same_scores: Check, capture: Capture
) -> None:
    synthetic = synthetic_teacher(rng, capture)
    sequences = [
        as_sequence(str(n), rng.integers(0, synthetic.vocab_size, n).tolist()) for n in (2, 3, 40)
    ]
    for found, sequence in zip(synthetic.score(sequences), sequences, strict=True):
        dense = synthetic.dense_logprobs(sequence.input_ids)
        np.testing.assert_allclose(np.exp(dense).sum(axis=1), 1, atol=1e-9)
        assert_same_scores(found, dense, sequence.input_ids, tolerance=1e-5)
        np.testing.assert_array_equal(found.draws.head_size, head_sizes(found.logprobs, capture))
        exact_rank = (
            dense > np.take_along_axis(dense, found.target_ids[:, None].astype(np.int64), 1)
        ).sum(axis=1)
        np.testing.assert_array_equal(found.target_rank, exact_rank)
        np.testing.assert_array_equal(
            found.ids, np.argsort(-dense, axis=1, kind="stable")[:, : capture.top_k]
        )


@pytest.mark.parametrize("independent", [False, True])
def test_synthetic_draws_come_up_as_often_as_they_should(
    rng: np.random.Generator,
    as_sequence: Make,
    tail_p_value: Callable[..., float],
    independent: bool,
) -> None:
    capture = Capture(
        4, samples=255, sets=40, independent=independent, seed=int(rng.integers(2**40))
    )
    teacher = SyntheticTeacher(TeacherConfig(model="synthetic", vocab_size=500), capture)
    sequence = as_sequence("a", rng.integers(0, 500, 20).tolist())
    (found,) = teacher.score([sequence])
    tail = np.exp(teacher.dense_logprobs(sequence.input_ids))
    np.put_along_axis(tail, found.ids.astype(np.int64), 0, axis=1)
    if independent:
        samples = found.draws.samples.reshape(19, -1)
        assert tail_p_value(samples, tail) > 1e-6
        assert tail_p_value(np.roll(samples, 1, axis=0), tail) < 1e-6
    else:
        counts = np.stack(
            [[np.bincount(each, minlength=500) for each in sets] for sets in found.draws.samples]
        )
        expected = 255 * tail / tail.sum(axis=1, keepdims=True)
        assert (counts >= np.floor(expected - 1e-6)[:, None]).all()
        assert (counts <= np.ceil(expected + 1e-6)[:, None]).all()


def test_synthetic_depends_on_the_last_two_tokens_and_the_seed_alone(
    synthetic: SyntheticTeacher, rng: np.random.Generator
) -> None:
    ids = rng.integers(0, synthetic.vocab_size, 30).astype(np.int32)
    dense = synthetic.dense_logprobs(ids)
    other = ids.copy()
    other[10] = (other[10] + 1) % synthetic.vocab_size
    changed = (synthetic.dense_logprobs(other) != dense).any(axis=1)
    np.testing.assert_array_equal(np.flatnonzero(changed), [10, 11])

    config = TeacherConfig(model="synthetic", vocab_size=synthetic.vocab_size, seed=synthetic._seed)
    np.testing.assert_array_equal(SyntheticTeacher(config, Capture(1)).dense_logprobs(ids), dense)
    reseeded = SyntheticTeacher(config.model_copy(update={"seed": config.seed + 1}), Capture(1))
    assert (reseeded.dense_logprobs(ids) != dense).any(axis=1).all()
    assert reseeded.identity() != synthetic.identity()


def test_synthetic_entropies_differ_from_row_to_row(rng: np.random.Generator) -> None:
    teacher = SyntheticTeacher(
        TeacherConfig(model="synthetic", seed=int(rng.integers(2**40))), Capture(1)
    )
    dense = teacher.dense_logprobs(rng.integers(0, teacher.vocab_size, 200).astype(np.int32))
    entropy = -(np.exp(dense) * dense).sum(axis=1)
    assert entropy.min() < 3
    assert entropy.max() > 7


def test_synthetic_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, numpy as np\n"
        "from logitcask.pipeline.distribution.capture import Capture\n"
        "from logitcask.pipeline.config import TeacherConfig\n"
        "from logitcask.pipeline.types import Sequence\n"
        "from logitcask.pipeline.teachers.open import open_teacher, open_tokenizer\n"
        "config = TeacherConfig(model='synthetic')\n"
        "ids = np.array(open_tokenizer(config)('one text')['input_ids'], np.int32)\n"
        "teacher = open_teacher(config, max_length=64, capture=Capture(8, samples=4))\n"
        "(scored,) = teacher.score([Sequence('a', ids, ids > 0)])\n"
        "assert scored.ids.shape == (len(ids) - 1, 8)\n"
        "assert scored.draws.samples.shape == (len(ids) - 1, 1, 4)\n"
        "assert not {'torch', 'transformers', 'vllm'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_synthetic_refuses_a_vocabulary_below_its_tokenizers() -> None:
    assert len(SyntheticTokenizer()) == 258
    with pytest.raises(ValueError, match="greater than or equal to 258"):
        TeacherConfig(model="synthetic", vocab_size=257)
