"""The columns of vLLM's results: the request for them, and their conversion to ``Scored``.

The engine in this process and the server behind HTTP give the same columns: the next token in the
text, the most probable ids by descending logprob, and, if draws are requested, the draws and one
column of statistics.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from logitcask.pipeline.distribution.capture import Capture
from logitcask.pipeline.distribution.draws import KEY_IDS, Draws, no_draws
from logitcask.pipeline.types import Scored

# The arrays of one sequence: ids and logprobs [n-1, 1 + columns], ranks [n-1].
Rows = tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.int64]]


@dataclasses.dataclass(frozen=True, slots=True)
class ColumnRequest:
    """The teacher's request to vLLM.

    capture: the data to return per position.
    top:     columns of most probable ids; at least those in the key of the draws, even if ``top_k``
             is less.
    columns: prompt logprobs to ask for: ``top``, then the draws of each set, then the statistics
             (id: head size, logprob: entropy).
    """

    capture: Capture
    top: int

    @classmethod
    def of(cls, capture: Capture, vocab_size: int) -> ColumnRequest:
        if not capture.samples:
            return cls(capture, capture.top_k)
        request = cls(capture, max(capture.top_k, KEY_IDS))
        # A request for the whole vocabulary must differ from one for draws.
        return dataclasses.replace(request, top=request.top + (request.columns == vocab_size))

    @property
    def columns(self) -> int:
        return self.top + self.capture.draws + 1 if self.capture.samples else self.top


def scored_rows(
    rows: Rows, request: ColumnRequest, positions: NDArray[np.int32] | None = None
) -> Scored:
    """A sequence's rows as ``Scored``. Column 0 is the next token, then come the most probable ids.

    positions: rows to convert; all if None.

    vLLM's rank is the number of ids whose logprob is at least the target's, including the target,
    so it counts tied ids as higher. Inside the head the right rank is computed here. Below the head
    it is vLLM's minus one, which still counts tied ids as higher. In float32 ties are rare; a
    16-bit head has many.
    """
    capture, (ids, logprobs, ranks) = request.capture, rows
    target_ids = ids[:, 0].copy()
    if positions is not None:
        ids, logprobs, ranks = ids[positions], logprobs[positions], ranks[positions]
    target, head = logprobs[:, 0], np.ascontiguousarray(logprobs[:, 1 : 1 + capture.top_k])
    rank_in_head = (head > target[:, None]).sum(axis=1)
    in_head = (target[:, None] >= head[:, -1:]).any(axis=1)
    draws = drawn(ids, logprobs, request) if capture.samples else no_draws(head, capture)
    return Scored(
        ids=np.ascontiguousarray(ids[:, 1 : 1 + capture.top_k]),
        logprobs=head,
        target_ids=target_ids,
        target_logprob=target.copy(),
        target_rank=np.where(in_head, rank_in_head, ranks - 1).astype(np.int32),
        draws=draws,
        positions=positions,
    )


def drawn(ids: NDArray[np.int32], logprobs: NDArray[np.float32], request: ColumnRequest) -> Draws:
    """The columns that the engine's plugin fills: each set's draws, and statistics in the last."""
    shape = (len(ids), request.capture.sets, request.capture.samples)
    return Draws(
        head_size=ids[:, -1].copy(),
        samples=ids[:, 1 + request.top : -1].reshape(shape),
        sample_logprobs=logprobs[:, 1 + request.top : -1].reshape(shape),
        entropy=logprobs[:, -1].copy(),
    )
