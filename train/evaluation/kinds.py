"""The relation of each metric to its value with the teacher's whole distributions."""

from __future__ import annotations

from logitcask.train.data.batch import collate
from logitcask.train.data.dataset import CachedDataset, HeldOut
from logitcask.train.evaluation.evaluate import reverse_tail
from logitcask.train.losses.base import Exactness
from logitcask.train.losses.exactness import exactness_of, shortest_head, weakest

KL_KIND: dict[Exactness, str] = {
    "exact": "The KL is exact: the cache holds the teacher's whole distributions.",
    "unbiased": "The KL is estimated from the stored head and draws from the rest of the teacher's distribution: without bias, "
    "from the same draws before and after.",
    "lower": "The KL is from the stored head and the exact mass of everything outside it taken as one cell: a lower bound of "
    "the KL over the whole vocabulary, the same one before and after.",
    "biased": "The KL is between the stored heads alone, both scaled to 1, since the cache does not know the mass outside "
    "them: an approximation of the KL over the whole vocabulary, the same one before and after.",
}
"""``kl`` in a sentence, by its exactness."""


def metric_kinds(data: HeldOut, names: list[str]) -> dict[str, Exactness]:
    """The exactness of the metrics ``names`` on ``data``; of several caches, the weakest counts."""
    kinds = [_kinds(part, names) for part in data.parts]
    return {name: weakest(found[name] for found in kinds) for name in names}


def _kinds(data: CachedDataset, names: list[str]) -> dict[str, Exactness]:
    teacher = data.teacher(collate([data[0]]))
    shortest = shortest_head(data.cache.manifest.store)
    losses = {
        "kl": ("forward_kl", {}),
        "reverse_kl": ("reverse_kl", {"tail": reverse_tail(teacher)}),
    }
    whole = exactness_of("forward_kl", {}, teacher, shortest) == "exact"
    kinds: dict[str, Exactness] = {}
    for name in names:
        metric, _, k = name.partition("@")
        if metric in losses:
            loss, options = losses[metric]
            kinds[name] = exactness_of(loss, options, teacher, shortest)
        elif metric in ("top1_agreement", "mor", "cr"):
            # A head of fewer entries hides some that both may have in common.
            kinds[name] = "exact" if whole or shortest >= int(k or 1) else "lower"
        elif metric == "spearman":
            # Ids of the student's top k that the head lacks share a rank.
            kinds[name] = "exact" if whole else "biased"
        else:  # ce, perplexity and ece compare the student with the text
            kinds[name] = "exact"
    return kinds
