"""Whole distributions to the rows that a teacher yields, in numpy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from logitcask.pipeline.distribution.capture import Capture
from logitcask.pipeline.distribution.draws import KEY_IDS, draw, no_draws
from logitcask.pipeline.types import Scored


def scored_from_dense(
    logprobs: NDArray[np.floating], input_ids: NDArray[np.int32], capture: Capture
) -> Scored:
    """The scores of one sequence, as ``capture`` asks for them, from whole distributions.

    logprobs:  float[n-1, V], nats; row ``i`` predicts token ``i + 1``. -inf is allowed. Ids of
               equal logprobs are in the order of ids.
    input_ids: int32[n].

    Raises ValueError for another shape.
    """
    if logprobs.ndim != 2 or len(logprobs) != len(input_ids) - 1:
        raise ValueError(
            f"logprobs of shape {logprobs.shape} for {len(input_ids)} tokens; expected ({len(input_ids) - 1}, V)"
        )
    exact = logprobs.astype(np.float32)
    target_ids = input_ids[1:].astype(np.int32)
    target = np.take_along_axis(exact, target_ids[:, None].astype(np.int64), axis=1)
    order = np.argsort(-exact, axis=1, kind="stable")[:, : max(capture.top_k, KEY_IDS)]
    top_ids = order.astype(np.int32)
    head = np.take_along_axis(exact, order, axis=1)[:, : capture.top_k]
    draws = (
        draw(exact, top_ids, target_ids, capture) if capture.samples else no_draws(head, capture)
    )
    return Scored(
        ids=top_ids[:, : capture.top_k],
        logprobs=head,
        target_ids=target_ids,
        target_logprob=target[:, 0],
        target_rank=(exact > target).sum(axis=1, dtype=np.int32),
        draws=draws,
    )
