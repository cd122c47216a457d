"""The distance from the teacher, told from a cache, against dense distributions."""

from __future__ import annotations

import dataclasses

import numpy as np

from logitcask.cache_format import TailSamples
from logitcask.cache_format.derive.fidelity import reconstruction_kl
from logitcask.cache_format.shards.prior import TailPrior

VOCAB = 300


def test_reconstruction_kl_is_that_of_the_dense_distributions(rng, sequence_of):
    """With the tail spread evenly it is exact; with a prior, its mean over draws is."""
    p = np.sort(rng.dirichlet(np.full(VOCAB, 0.3)))[::-1]
    ids = rng.permutation(VOCAB)
    prior = TailPrior(rng.integers(0, 20, VOCAB).astype(np.uint8))
    size = np.full(2000, 5)
    made = sequence_of(ids[:9], np.log(p[:9]), np.log(p[9:].sum()), 2000)
    draws = rng.choice(ids[9:], (2000, 1, 8), p=p[9:] / p[9:].sum()).astype(np.int32)
    entropy = np.full(2000, -(p * np.log(p)).sum(), np.float32)
    made = dataclasses.replace(made, samples=TailSamples(draws), entropy=entropy)
    for spread in (None, prior):
        b = np.ones(VOCAB) if spread is None else spread.probabilities()
        q = np.empty(VOCAB)
        q[ids[:5]] = p[:5]
        q[ids[5:]] = p[5:].sum() * b[ids[5:]] / b[ids[5:]].sum()
        true = (p * np.log(p / q[ids])).sum()
        found = reconstruction_kl(made, size, VOCAB, spread)
        if spread is None:
            np.testing.assert_allclose(found, true, atol=1e-5)
        else:
            assert abs(found.mean() - true) < 5 * found.std() / 2000**0.5
