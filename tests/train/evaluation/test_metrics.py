"""Agreement metrics against slow loops over whole distributions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from logitcask.train.evaluation.metrics import (
    Calibration,
    rank_agreement,
    rank_correlation,
    top_k_overlap,
)
from logitcask.train.losses import SparseTeacher

VOCAB = 30


def cached(logits: np.ndarray, k: int, step: float) -> SparseTeacher:
    """A cache's top-k: ordered by the exact values, which are rounded to ``step`` afterwards, so
    that many tie.
    """
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
def test_agreement_is_that_of_the_whole_distributions(
    rng: np.random.Generator, k: int, stored: int
) -> None:
    teacher = 2 * rng.standard_normal((300, VOCAB))
    student = teacher + rng.choice([0.0, 0.02, 0.5], size=(300, 1)) * rng.standard_normal(
        (300, VOCAB)
    )
    found = rank_agreement(torch.from_numpy(student), cached(teacher, stored, step=0.5), k)
    for row in range(300):
        ours, theirs = (
            np.argsort(-student[row])[:k].tolist(),
            np.argsort(-teacher[row])[:k].tolist(),
        )
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


@pytest.mark.parametrize("k", [2, 5])
def test_rank_correlation_is_spearmans_over_the_union(rng: np.random.Generator, k: int) -> None:
    """Against scipy's, on ranks counted in plain loops; ids that the head lacks are tied below
    it.
    """
    teacher = 2 * rng.standard_normal((200, VOCAB))
    student = teacher + rng.choice([0.1, 1.0, 3.0], size=(200, 1)) * rng.standard_normal(
        (200, VOCAB)
    )
    stored = 8
    found = rank_correlation(torch.from_numpy(student), cached(teacher, stored, step=1.0), k)
    for row in range(200):
        order = np.argsort(-teacher[row])[:stored].tolist()
        union = sorted(set(order[:k]) | set(np.argsort(-student[row])[:k].tolist()))
        theirs = [order.index(each) if each in order else stored for each in union]
        expected = spearmanr(theirs, [-student[row, each] for each in union]).statistic
        assert found[row].item() == pytest.approx(expected, abs=1e-4)


def test_calibration_error(rng: np.random.Generator) -> None:
    """A model that is right as often as it says has almost none; one that is too sure by 0.2 has
    0.2.
    """
    confidence = torch.from_numpy(rng.uniform(0.2, 1.0, 200_000))
    luck = torch.from_numpy(rng.uniform(size=200_000))
    honest, boastful, empty = Calibration(), Calibration(), Calibration()
    for part in torch.arange(200_000).chunk(7):
        honest.add(confidence[part], luck[part] < confidence[part])
        boastful.add(confidence[part], luck[part] < confidence[part] - 0.2)
    assert honest.error() < 0.01
    assert boastful.error() == pytest.approx(0.2, abs=0.01)
    assert empty.error() == 0
    one = Calibration()
    one.add(torch.tensor([1.0, 0.5]), torch.tensor([True, True]))
    assert one.error() == pytest.approx(0.25)
