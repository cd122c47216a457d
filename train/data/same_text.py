"""Texts of a reference cache, recognised in other caches by their content.

A text is its tokens, because the caches have one tokenizer. The reference is held as 64-bit hashes:
three for each sequence, and one for each 32 tokens of a document.

Shapes: N sequences of a record batch, M tokens of all of them, R sequences of the reference.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

WINDOW = 32
"""Tokens in the runs by which parts of documents are compared."""
LEAST_PROMPT = 4
"""If a prompt is shorter than this number of tokens, the sequence counts as a document."""
_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2**64
_INVERSE = pow(_BASE, -1, 2**64)

Hashes = NDArray[np.uint64]
Ints = NDArray[np.integer]


@dataclass(frozen=True, eq=False)
class TokenHashes:
    """The hashes of a record batch.

    whole:   uint64[N], of all tokens of a sequence.
    prompt:  uint64[N], of the tokens before the first learnt one.
    chat:    bool[N], whether there is such a prompt.
    row:     uint64[N], of the name of its row in the data.
    starts, lengths: int64[N], the first token of each sequence, and its number of tokens.
    windows: uint64[M], of the WINDOW tokens from each token on. Those that reach beyond the end of
             a sequence have no meaning.
    """

    whole: Hashes
    prompt: Hashes
    chat: NDArray[np.bool_]
    row: Hashes
    starts: Ints
    lengths: Ints
    windows: Hashes


def token_hashes(tokens: Ints, lengths: Ints, first_kept: Ints, rows: Sequence[str]) -> TokenHashes:
    """Hashes a record batch.

    tokens: int[M]. lengths: int[N]. first_kept: int[N], first kept position of each sequence. rows:
    N names of rows.
    """
    lengths = lengths.astype(np.int64)
    starts = np.cumsum(lengths) - lengths
    # A polynomial in _BASE modulo 2**64, whose running sums give the hash of any run of tokens.
    powers, inverses = (_powers(base, len(tokens) + 1) for base in (_BASE, _INVERSE))
    sums = np.zeros(len(tokens) + 1, np.uint64)
    np.cumsum(_mixed(tokens.astype(np.uint64)) * powers[:-1], out=sums[1:])

    def of_runs(first: Ints, length: Ints) -> Hashes:
        return _mixed((sums[first + length] - sums[first]) * inverses[first] + np.uint64(1)) ^ (
            length.astype(np.uint64)
        )

    every = np.arange(len(tokens))
    prompts = np.minimum(first_kept.astype(np.int64) + 1, lengths)
    return TokenHashes(
        whole=of_runs(starts, lengths),
        prompt=of_runs(starts, prompts),
        chat=prompts >= LEAST_PROMPT,
        row=np.array([_of_name(row) for row in rows], np.uint64),
        starts=starts,
        lengths=lengths,
        windows=of_runs(every, np.minimum(WINDOW, len(tokens) - every)),
    )


@dataclass(frozen=True, eq=False)
class ReferenceTexts:
    """The texts of a reference cache.

    whole, prompts, rows: sorted uint64, of its sequences.
    windows:  sorted uint64[W], of the consecutive runs of WINDOW tokens of its documents.
    owners:   int64[W], the sequence of each.
    sizes:    int64[R], number of these runs in each sequence.
    """

    whole: Hashes
    prompts: Hashes
    rows: Hashes
    windows: Hashes
    owners: Ints
    sizes: Ints

    @classmethod
    def of(cls, batches: Iterable[TokenHashes]) -> ReferenceTexts:
        """The texts of a cache, from all its record batches."""
        whole, prompts, rows, windows = ([np.zeros(0, np.uint64)] for _ in range(4))
        owners, sizes = ([np.zeros(0, np.int64)] for _ in range(2))
        count = 0
        for batch in batches:
            whole.append(batch.whole)
            prompts.append(batch.prompt[batch.chat])
            rows.append(batch.row)
            size = np.where(batch.chat, 0, batch.lengths // WINDOW)
            owner = np.repeat(np.arange(len(size)), size)
            number = np.arange(len(owner)) - (np.cumsum(size) - size)[owner]
            windows.append(batch.windows[batch.starts[owner] + number * WINDOW])
            owners.append(owner + count)
            sizes.append(size)
            count += len(size)
        joined = np.concatenate(windows)
        order = np.argsort(joined, kind="stable")
        return cls(
            whole=np.unique(np.concatenate(whole)),
            prompts=np.unique(np.concatenate(prompts)),
            rows=np.unique(np.concatenate(rows)),
            windows=joined[order],
            owners=np.concatenate(owners)[order],
            sizes=np.concatenate(sizes),
        )

    def holds(self, batch: TokenHashes, *, by_name: bool) -> NDArray[np.bool_]:
        """bool[N]: the sequences whose text is in the reference.

        The tokens of such a sequence are those of a sequence of the reference, or its prompt is a
        prompt of the reference, or it is a document that has about half of its runs of WINDOW
        tokens, or of those of a document of the reference, in common with the reference. With
        ``by_name``, equal names of rows are enough: both caches are of the same data.
        """
        same = np.isin(batch.whole, self.whole)
        same |= batch.chat & np.isin(batch.prompt, self.prompts)
        if by_name:
            same |= np.isin(batch.row, self.rows)
        for sequence, shared in self._shared(batch):
            same[sequence] |= self._is_most(int(batch.lengths[sequence]), shared)
        return same

    def _shared(self, batch: TokenHashes) -> Iterator[tuple[int, Hashes]]:
        """The documents that share runs with the reference, each with their distinct hashes."""
        if not len(self.windows):
            return
        at = np.minimum(np.searchsorted(self.windows, batch.windows), len(self.windows) - 1)
        hits = np.flatnonzero(self.windows[at] == batch.windows)
        sequence = np.searchsorted(batch.starts, hits, side="right") - 1
        inside = hits + WINDOW <= (batch.starts + batch.lengths)[sequence]
        counts = inside & ~batch.chat[sequence]
        hits, sequence = hits[counts], sequence[counts]
        for each in np.unique(sequence):
            yield int(each), np.unique(batch.windows[hits[sequence == each]])

    def _is_most(self, tokens: int, shared: Hashes) -> bool:
        # As many runs of the reference, which start at multiples of WINDOW, fit into any text.
        if 2 * len(shared) > (tokens - WINDOW + 1) // WINDOW:
            return True
        first, last = (
            np.searchsorted(self.windows, shared, side=side) for side in ("left", "right")
        )
        owners = np.concatenate([self.owners[a:b] for a, b in zip(first, last, strict=True)])
        found, count = np.unique(owners, return_counts=True)
        return bool((2 * count >= self.sizes[found]).any())


def _powers(base: int, count: int) -> Hashes:
    """uint64[count]: 1, base, base**2, ... modulo 2**64."""
    found = np.full(count, base, np.uint64)
    found[0] = 1
    return np.cumprod(found, dtype=np.uint64)


def _mixed(values: Hashes) -> Hashes:
    """The finaliser of SplitMix64, a bijection that spreads every bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _of_name(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
