"""``data.generate.splice``: answers that a writer has begun, with tokens of the teacher among them.

Speculative knowledge distillation (arXiv 2410.11325) interleaves two models: the student drafts
tokens, and the first one that is not among the teacher's K most probable ids is replaced by a
sample of the teacher. Here the two are never in memory together, so a pass works on whole answers.
An earlier cache has the teacher's rank of every token. The first token of a rank of K or more is
replaced, what follows is dropped, and the writer goes on from there.

The result has the distribution of the paper's, whose drafts have five tokens: a token is examined
only if all tokens before it have been accepted or spliced, it is drawn from the student behind
them, and five accepted tokens earn no further one of the teacher.

**The sample of the teacher** is drawn from the stored head. Its nucleus, the smallest set of ids
whose probabilities at the temperature reach ``top_p``, is known where the tail cannot change it:
the tail's weight at the temperature has an upper bound. Where that is not so, or the nucleus has
more than K ids, the draw is one of top-k sampling, from the first ids of the head scaled to 1, and
it is counted.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from logitcask.cache_format import CachedSequence, CacheReader
from logitcask.cache_format.errors import UserError
from logitcask.cache_format.manifest import SpliceIdentity
from logitcask.pipeline.generate.prompts import PromptRow
from logitcask.pipeline.text.config import SpliceConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Begun:
    """An answer so far, int32[m]. ``open``: the writer goes on; if not, the answer is complete."""

    input_ids: NDArray[np.int32]
    open: bool


class Splicer:
    """The answers of an earlier cache, read once in the order of the prompts.

    ``counters``: ``answers_spliced``, answers with a rejected token; ``tokens_accepted``, of them,
    in front of it; ``tokens_dropped``, of them, from the rejected one on; ``splices_cut``, draws
    from a nucleus that the head does not show whole.
    """

    def __init__(
        self,
        earlier: CacheReader,
        splice: SpliceConfig,
        *,
        end_tokens: tuple[int, ...],
        seed: int,
    ) -> None:
        self._earlier, self._splice, self._seed = earlier, splice, seed
        self._end_tokens = frozenset(end_tokens)
        manifest = earlier.manifest
        self.identity = SpliceIdentity(
            number=pass_number(earlier) + 1,
            top_k=splice.top_k,
            temperature=splice.temperature,
            top_p=splice.top_p,
            fingerprint=manifest.fingerprint,
            content_sha256=manifest.content_sha256,
        )
        self.counters: Counter[str] = Counter(
            answers_spliced=0, tokens_accepted=0, tokens_dropped=0, splices_cut=0
        )
        counted = manifest.data.counters
        # Answers without a token are no sequences.
        self._empty = counted.get("generations", 0) - manifest.statistics.sequences
        self._sequences: Iterator[CachedSequence] = iter(earlier)
        self._next = next(self._sequences, None)

    def begun(self, row: PromptRow, samples: int, longest: int) -> list[Begun]:
        """The answers to a prompt so far, of at most ``longest`` tokens each.

        Raises UserError if the cache has an answer to another prompt, or a longer one.
        """
        return [self._begun(row, f"{row.row_id}/{sample}", longest) for sample in range(samples)]

    def _begun(self, row: PromptRow, name: str, longest: int) -> Begun:
        sequence = self._next
        if sequence is None or sequence.sequence_id != name:
            if self._empty == 0:
                raise self._other(f"it has no answer {name}")
            self._empty -= 1
            return Begun(np.empty(0, np.int32), False)
        self._next = next(self._sequences, None)
        prompt = len(row.input_ids)
        learnt = np.arange(len(sequence)) >= prompt
        if not (
            np.array_equal(sequence.input_ids[:prompt], row.input_ids)
            and np.array_equal(sequence.loss_mask, learnt)
        ):
            raise self._other(f"{name} has another prompt there")
        answer = sequence.input_ids[prompt:]
        if len(answer) > longest:
            raise self._other(f"{name} has {len(answer)} tokens there, and at most {longest} here")
        at = first_rejected(sequence.target_rank, self._splice.top_k)
        if at is None:
            return Begun(answer, False)
        return self._spliced(sequence, answer, at, longest)

    def _spliced(
        self, sequence: CachedSequence, answer: NDArray[np.int32], at: int, longest: int
    ) -> Begun:
        count = self.counters
        count["answers_spliced"] += 1
        count["tokens_accepted"] += at
        count["tokens_dropped"] += len(answer) - at
        held = sequence.ids[at] >= 0
        token, whole = teacher_sample(
            sequence.ids[at][held],
            sequence.logprobs[at][held],
            float(sequence.tail_logprob[at]),
            self._earlier.manifest.store.vocab_size,
            self._splice,
            uniform(self._seed, sequence.sequence_id, self.identity.number),
        )
        count["splices_cut"] += not whole
        begun = np.append(answer[:at], np.int32(token)).astype(np.int32)
        return Begun(begun, token not in self._end_tokens and len(begun) < longest)

    def end(self) -> None:
        """Raises UserError if the cache has further answers, or no token that is rejected. Warns of
        draws that the heads do not show whole.
        """
        if self._next is not None:
            raise self._other(f"{self._next.sequence_id} is not asked for here")
        spliced, cut = self.counters["answers_spliced"], self.counters["splices_cut"]
        if spliced == 0:
            raise UserError(
                f"{self._earlier.path} has no token of rank {self._splice.top_k} or more, so there is nothing to splice: it is "
                "the last pass (data.generate.splice.top_k)"
            )
        if cut:
            log.warning(
                "%d of %d tokens of the teacher are drawn from the first ids of the stored head, scaled to 1, because its nucleus at "
                "temperature %g and top_p %g may be larger; store.min_k=%d stores larger heads",
                cut,
                spliced,
                self._splice.temperature,
                self._splice.top_p,
                self._splice.top_k,
            )

    def _other(self, what: str) -> UserError:
        return UserError(
            f"{self._earlier.path} does not hold the answers to these prompts: {what}; name in data.generate.splice.cache "
            "the pass before, of the same data, samples and lengths"
        )


def pass_number(cache: CacheReader) -> int:
    """The number of the pass that a cache of written answers comes from. 1: nothing was spliced."""
    generation = cache.manifest.data.generation
    return 1 if generation is None or generation.splice is None else generation.splice.number


def first_rejected(rank: NDArray[np.int32], top_k: int) -> int | None:
    """Index of the first of the ranks, int32[m], that is ``top_k`` or more; None if there is none.

    A rank is the number of ids with a higher logprob, so a token that ties with the last accepted
    one is accepted.
    """
    rejected = np.flatnonzero(rank >= top_k)
    return int(rejected[0]) if len(rejected) else None


def teacher_sample(
    ids: NDArray[np.int32],
    logprobs: NDArray[np.float32],
    tail_logprob: float,
    vocab_size: int,
    splice: SpliceConfig,
    u: float,
) -> tuple[int, bool]:
    """A draw of the teacher at ``splice.temperature`` and ``splice.top_p``, by ``u`` in [0, 1).

    ids, logprobs: the head, int32[k] and float32[k], k >= 1, nats at temperature 1, falling.
    tail_logprob:  log of the mass outside it, nats.

    Returns the id, and whether the nucleus is known to be within the head and ``splice.top_k``. If
    not, the draw is from the nucleus of the first min(k, top_k) ids scaled to 1.
    """
    if splice.temperature == 0:
        return int(ids[0]), True
    power = 1 / splice.temperature
    scaled = logprobs.astype(np.float64) * power
    # Weights at the temperature, of which the most probable id has 1.
    weights = np.exp(scaled - scaled[0])
    reached = weights.cumsum()
    most = min(len(ids), splice.top_k)
    # The sum over all ids is at least that of the head, and at most this more.
    tail = math.exp(min(_tail_weight(logprobs, tail_logprob, vocab_size, power) - scaled[0], 700.0))
    least_size, most_size = (
        1 + int((reached < splice.top_p * total).sum())
        for total in (reached[-1], reached[-1] + tail)
    )
    whole = least_size == most_size <= most
    size = (
        least_size
        if whole
        else min(most, 1 + int((reached[:most] < splice.top_p * reached[most - 1]).sum()))
    )
    at = int(np.searchsorted(reached[:size], u * reached[size - 1], side="right"))
    return int(ids[min(at, size - 1)]), whole


def _tail_weight(
    logprobs: NDArray[np.float32], tail_logprob: float, vocab_size: int, power: float
) -> float:
    """Log of an upper bound of the sum over the tail of ``p ** power``; -inf without a tail.

    No id of the tail is more probable than the head's last entry, q. The n ids of the tail have the
    mass m. So the sum is at most ``n q^power``. If power >= 1, it is at most ``m q^(power - 1)``,
    because ``p^power <= p q^(power - 1)``. Else it is at most ``n (m/n)^power``, because
    ``p^power`` is concave.
    """
    outside = vocab_size - len(logprobs)
    if outside == 0 or tail_logprob == -math.inf:
        return -math.inf
    last = float(logprobs[-1])
    by_mass = (
        tail_logprob + (power - 1) * last
        if power >= 1
        else math.log(outside) + power * (tail_logprob - math.log(outside))
    )
    return min(by_mass, math.log(outside) + power * last)


def uniform(seed: int, sequence_id: str, number: int) -> float:
    """A number in [0, 1), the same for the same answer and pass in every place and at every time."""
    name = f"splice\0{seed}\0{sequence_id}\0{number}".encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(name, digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53
