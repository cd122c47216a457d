"""The exactness of a loss with a given cache, in one place for losses, metrics and reports."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from logitcask.cache_format.manifest import StoreSettings
from logitcask.train.exactness_words import IN_WORDS
from logitcask.train.losses.base import SPECS, Exactness, SparseTeacher
from logitcask.train.losses.tails import choose_tail


def exactness_of(
    name: str, options: dict[str, Any], teacher: SparseTeacher, shortest_head: int
) -> Exactness:
    """The exactness of loss ``name`` with these options and a cache like ``teacher``.

    ``shortest_head``: smallest number of entries of the cache's heads. Raises UserError for a
    ``tail`` that the cache cannot serve.
    """
    if bool(torch.isneginf(teacher.tail_logprob).all()):
        return "exact"
    spec = SPECS[SPECS[name].same_as(options) or name]
    samples = teacher.draws is not None and spec.from_samples is not None
    if spec.tails:
        tail = choose_tail(
            name,
            teacher,
            options.get("tail", "auto"),
            spec.tails,
            logprobs=spec.needs_sample_logprobs,
        )
        samples = tail == "samples"
        if tail in ("prior", "renormalised"):
            return "biased"
    if shortest_head < spec.head_k(options):
        return "biased"
    return spec.from_samples if samples and spec.from_samples is not None else spec.from_head


def shortest_head(store: StoreSettings) -> int:
    """Smallest number of entries that a head of such a cache may have."""
    return store.min_k if store.ragged else store.top_k


def weakest(kinds: Iterable[Exactness]) -> Exactness:
    """The exactness of a number that comes from several caches."""
    return max(kinds, key=list(IN_WORDS).index)
