"""Agreement metrics against slow loops over whole distributions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from train.losses import SparseTeacher
from train.metrics import rank_agreement, top_k_overlap

VOCAB = 30


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator with a new seed each time; pytest shows the seed of a failing test."""
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"seed {seed}")
    return np.random.default_rng(seed)


def cached(logits: np.ndarray, k: int, step: float) -> SparseTeacher:
    """A cache's top-k: ordered by the exact values, which are rounded to ``step`` afterwards, so that many tie."""
    logprobs = torch.from_numpy(logits).log_softmax(1)
    ids = torch.from_numpy(np.argsort(-logits, axis=1))[:, :k]
    return SparseTeacher(
        ids=ids,
        logprobs=((logprobs.gather(1, ids) / step).round() * step).float(),
        tail_logprob=torch.full((len(logits),), -1.0),
        target_ids=ids[:, 0],
        target_logprob=logprobs.max(1).values.float(),
        vocab_size=logits.shape[1],
    )


@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("stored", [8, VOCAB])
def test_agreement_is_that_of_the_whole_distributions(rng: np.random.Generator, k: int, stored: int) -> None:
    teacher = 2 * rng.standard_normal((300, VOCAB))
    student = teacher + rng.choice([0.0, 0.02, 0.5], size=(300, 1)) * rng.standard_normal((300, VOCAB))
    found = rank_agreement(torch.from_numpy(student), cached(teacher, stored, step=0.5), k)
    for row in range(300):
        ours, theirs = np.argsort(-student[row])[:k].tolist(), np.argsort(-teacher[row])[:k].tolist()
        assert found.top_1[row].item() == (ours[0] == theirs[0])
        assert found.identical[row].item() == (ours == theirs)
        assert found.overlap[row].item() == pytest.approx(len(set(ours) & set(theirs)) / k)
    assert found.identical.any()
    assert not found.identical.all()


def test_overlap_has_no_gradient(rng: np.random.Generator) -> None:
    logits = torch.from_numpy(rng.standard_normal((7, VOCAB))).requires_grad_()
    teacher = cached(rng.standard_normal((7, VOCAB)), 8, step=0.5)
    overlap = top_k_overlap(logits, teacher, 5)
    assert not overlap.requires_grad
    assert overlap.dtype == torch.float32
    assert torch.equal(overlap, rank_agreement(logits, teacher, 5).overlap)
    assert top_k_overlap(logits[:0], teacher[:0], 5).shape == (0,)


def test_heads_shorter_than_k(rng: np.random.Generator) -> None:
    """Padding never counts as shared, and what is not known is not called identical."""
    logits = rng.standard_normal((50, VOCAB))
    full, narrow = cached(logits, 8, step=0.5), cached(logits, 3, step=0.5)
    ragged = SparseTeacher(
        **{
            **vars(full),
            "ids": full.ids.masked_fill(torch.arange(8) >= 3, -1),
            "logprobs": full.logprobs.masked_fill(torch.arange(8) >= 3, -math.inf),
        }
    )
    for teacher in (narrow, ragged):
        found = rank_agreement(torch.from_numpy(logits), teacher, 5)
        assert found.top_1.all()
        assert not found.identical.any()
        torch.testing.assert_close(found.overlap, torch.full((50,), 0.6))
