"""A teacher without a model: known, seeded distributions in closed form.

With it the whole pipeline can be tried, tested and timed in seconds, and every number in a cache
can be checked against the truth. It needs only numpy, and scores more than a million tokens per
second.

The distribution: a hash of the last two tokens picks one of 16 Zipf laws (from flat to peaked) and
a permutation ``rank -> id`` of the vocabulary, ``id = (multiplier * rank + shift) mod V`` with a
multiplier coprime to V. The head is then a row of a table, and the rank of any id follows from the
inverse of the multiplier. Draws from the tail are made among the ranks, with one CDF per law.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from logitcask.cache_format.manifest import TeacherIdentity
from logitcask.pipeline.config import TeacherConfig
from logitcask.pipeline.distribution.capture import Capture, head_sizes
from logitcask.pipeline.distribution.draws import (
    KEY_IDS,
    Draws,
    entropy,
    fractions,
    mix,
    no_draws,
    padded,
    set_sizes,
)
from logitcask.pipeline.teachers.base import Prompt, SampledAnswer, Sampling
from logitcask.pipeline.types import Scored, Sequence

# Part of the teacher's identity: a change of any of its numbers needs a new version.
VERSION = 1

_ANSWERS_AT_ONCE = 256
_LAWS = 16
_MULTIPLIERS = 64


class SyntheticTeacher:
    """A teacher whose distributions depend on the last two tokens, ``seed`` and ``vocab_size``."""

    def __init__(
        self, config: TeacherConfig, capture: Capture, sampling: Sampling | None = None
    ) -> None:
        self._capture = capture
        self._sampling = sampling
        self.vocab_size = vocab = config.vocab_size
        self._name = config.model
        self._seed = config.seed
        random = np.random.default_rng([VERSION, config.seed, vocab])
        multipliers: list[int] = []
        while len(multipliers) < _MULTIPLIERS:
            candidate = int(random.integers(1, vocab))
            if math.gcd(candidate, vocab) == 1:
                multipliers.append(candidate)
        self._multipliers = np.array(multipliers, dtype=np.int64)
        self._inverses = np.array(
            [pow(multiplier, -1, vocab) for multiplier in multipliers], dtype=np.int64
        )
        # Zipf-Mandelbrot: p(rank) ~ (rank + 2) ** -exponent, float64[laws, V] of logprobs.
        exponents = np.linspace(0.9, 2.4, _LAWS)
        weights = -exponents[:, None] * np.log(np.arange(vocab) + 2.0)
        self._laws = weights - np.logaddexp.reduce(weights, axis=1, keepdims=True)
        self._laws32 = self._laws.astype(np.float32)
        self._entropies = entropy(self._laws)
        self._head_sizes = head_sizes(self._laws32[:, : capture.top_k], capture)
        in_tail = np.arange(vocab) >= self._head_sizes[:, None]
        # float64[laws, V]: the CDF of each law's tail, not normalised.
        self._tails = np.cumsum(np.exp(self._laws) * in_tail, axis=1)

    def identity(self) -> TeacherIdentity:
        return TeacherIdentity(
            model=self._name,
            revision=f"seed-{self._seed}",
            weights_sha256=None,
            backend="synthetic",
            engine=f"synthetic {VERSION}",
            dtype="float32",
            route="synthetic",
            vocab_size=self.vocab_size,
        )

    def score(self, sequences: Iterable[Sequence]) -> Iterator[Scored]:
        top_k = self._capture.top_k
        ranks = np.arange(max(top_k, KEY_IDS))
        for sequence in sequences:
            law, which, shift = self._context(sequence.input_ids)
            target_ids = sequence.input_ids[1:].astype(np.int32)
            target_rank = self._inverses[which] * (target_ids - shift) % self.vocab_size
            top_ids = self._ids(ranks, which[:, None], shift[:, None])
            head = self._laws32[law, :top_k]
            draws = (
                self._draw(law, which, shift, top_ids, target_ids, target_rank)
                if self._capture.samples
                else no_draws(head, self._capture)
            )
            chosen_logprobs = None
            if sequence.chosen_ids is not None:
                at, ids = sequence.positions(), sequence.chosen_ids
                of_ids = self._inverses[which[at, None]] * (ids - shift[at, None]) % self.vocab_size
                found = self._laws32[law[at, None], of_ids]
                chosen_logprobs = np.where(ids >= 0, found, np.float32(-np.inf))
            yield Scored(
                ids=top_ids[:, :top_k],
                logprobs=head,
                target_ids=target_ids,
                target_logprob=self._laws32[law, target_rank],
                target_rank=target_rank.astype(np.int32),
                draws=draws,
                chosen_logprobs=chosen_logprobs,
            )

    def generate(self, prompts: Iterable[Prompt]) -> Iterator[NDArray[np.int32]]:
        return (answer.input_ids for answer in self.sample(prompts))

    def sample(self, prompts: Iterable[Prompt]) -> Iterator[SampledAnswer]:
        """Answers by inverse CDF, exactly the same in any batch: token ``t`` uses the ``t``-th
        number of its seed.
        """
        assert self._sampling is not None
        cdf = _sampling_cdf(self._laws, self._sampling)
        prompts = iter(prompts)
        while group := list(itertools.islice(prompts, _ANSWERS_AT_ONCE)):
            yield from self._answers(group, cdf, self._sampling)

    def _answers(
        self, group: list[Prompt], cdf: NDArray[np.float64], sampling: Sampling
    ) -> list[SampledAnswer]:
        """All answers of a group, a token of each at a time."""
        top_ranks = np.arange(min(sampling.top_ids, self.vocab_size))
        longest = max(prompt.max_tokens for prompt in group)
        uniforms = np.stack(
            [np.random.Generator(np.random.Philox(prompt.seed)).random(longest) for prompt in group]
        )
        room = np.array([prompt.max_tokens for prompt in group])
        last = np.array([prompt.input_ids[-1] for prompt in group], np.int64)
        before = np.array(
            [p.input_ids[-2] if len(p.input_ids) > 1 else self.vocab_size for p in group], np.int64
        )
        answers = np.zeros((len(group), longest), np.int32)
        logprobs = np.zeros((len(group), longest), np.float32)
        top_ids = np.zeros((len(group), longest, len(top_ranks)), np.int32)
        length = np.zeros(len(group), np.int64)
        going = np.arange(len(group))
        for step in range(longest):
            law, which, shift = self._after(last[going], before[going])
            ranks = np.zeros(len(going), np.int64)
            for each in np.unique(law):
                rows = law == each
                ranks[rows] = np.searchsorted(cdf[each], uniforms[going[rows], step], side="right")
            ids = self._ids(ranks, which, shift)
            answers[going, step] = ids
            logprobs[going, step] = self._laws32[law, ranks]
            top_ids[going, step] = self._ids(top_ranks, which[:, None], shift[:, None])
            length[going] = step + 1
            before[going], last[going] = last[going], ids
            going = going[~np.isin(ids, sampling.end_tokens) & (step + 1 < room[going])]
            if not len(going):
                break
        return [
            SampledAnswer(answer[:n], of_answer[:n], top[:n] if sampling.top_ids else None)
            for answer, of_answer, top, n in zip(answers, logprobs, top_ids, length, strict=True)
        ]

    def dense_logprobs(self, input_ids: NDArray[np.int32]) -> NDArray[np.float64]:
        """float64[n-1, V]: the truth, nats; row ``i`` predicts token ``i + 1``."""
        law, which, shift = self._context(input_ids)
        ids = self._ids(np.arange(self.vocab_size), which[:, None], shift[:, None]).astype(np.int64)
        dense = np.empty(ids.shape)
        np.put_along_axis(dense, ids, self._laws[law], axis=1)
        return dense

    def close(self) -> None:
        """Does nothing."""

    def _draw(
        self,
        law: NDArray[np.int64],
        which: NDArray[np.int64],
        shift: NDArray[np.int64],
        top_ids: NDArray[np.int32],
        target_ids: NDArray[np.int32],
        target_rank: NDArray[np.int64],
    ) -> Draws:
        """As ``logitcask.pipeline.distribution.draws.draw``, but in the order of ranks."""
        mass = self._tails[law, -1]
        counts = set_sizes(mass, self._capture)
        named = self._laws32[
            law[:, None], np.stack([np.zeros_like(target_rank), target_rank], axis=1)
        ]
        points = fractions(named, top_ids, target_ids, counts, self._capture) * mass[:, None, None]
        points = np.minimum(points, np.nextafter(mass, 0)[:, None, None])
        ranks = np.zeros(points.shape, np.int64)
        for each in np.unique(law[counts > 0]):
            rows = law == each
            ranks[rows] = np.searchsorted(self._tails[each], points[rows], side="right")
        ids = self._ids(ranks, which[:, None, None], shift[:, None, None])
        return padded(
            self._head_sizes[law],
            ids,
            self._laws32[law[:, None, None], ranks],
            counts,
            self._entropies[law],
        )

    def _ids(
        self, ranks: NDArray[np.int64], which: NDArray[np.int64], shift: NDArray[np.int64]
    ) -> NDArray[np.int32]:
        return ((self._multipliers[which] * ranks + shift) % self.vocab_size).astype(np.int32)

    def _context(
        self, input_ids: NDArray[np.int32]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Law, multiplier and shift, int64[n-1] each, of every position."""
        last = input_ids[:-1].astype(np.int64)
        # V is not a token: it means "before the first token".
        return self._after(
            last, np.concatenate([np.array([self.vocab_size], dtype=np.int64), last[:-1]])
        )

    def _after(
        self, last: NDArray[np.int64], before: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Law, multiplier and shift after two tokens."""
        seed = np.array([self._seed % 2**64], np.uint64).view(np.int64)
        bits = mix(mix(mix(seed + last) + before)).view(np.uint64)
        law = bits % np.uint64(_LAWS)
        which = bits // np.uint64(_LAWS) % np.uint64(_MULTIPLIERS)
        shift = bits // np.uint64(_LAWS * _MULTIPLIERS) % np.uint64(self.vocab_size)
        return law.astype(np.int64), which.astype(np.int64), shift.astype(np.int64)


def _sampling_cdf(laws: NDArray[np.float64], sampling: Sampling) -> NDArray[np.float64]:
    """float64[laws, V]: the CDF over ranks of each law with ``sampling``; it ends above 1."""
    if sampling.temperature == 0:
        return np.full(laws.shape, 2.0)
    probabilities = np.exp((laws - laws[:, :1]) / sampling.temperature)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    before = np.cumsum(probabilities, axis=1) - probabilities
    probabilities = np.where(before < sampling.top_p, probabilities, 0)
    cdf = np.cumsum(probabilities, axis=1)
    return np.where(cdf >= cdf[:, -1:], 2.0, cdf / cdf[:, -1:])
