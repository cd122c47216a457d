"""What the quality study compares: stores (what a cache keeps) and arms (what a student learns
from).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from logitcask.pipeline.config import StoreConfig
from logitcask.train.losses import LOSSES

FULL, TEXT = "full logits", "text"
"""Sources that are no cache: every logit, and the text alone."""
SCRATCH, PRETRAINED = "scratch", "pre-trained"
KL: dict[str, Any] = {"name": "forward_kl"}
RKL: dict[str, Any] = {"name": "reverse_kl"}
RANKING: dict[str, Any] = {"name": "ranking", "weight": 2.0, "k": 5}


def head(k: int) -> StoreConfig:
    """k entries and no draws."""
    return StoreConfig(top_k=k, min_k=0, min_probability=None, tail_samples=0, mass_per_sample=None)


def fixed(k: int, draws: int, *, independent: bool = False) -> StoreConfig:
    """k entries and so many draws everywhere; without entries: random-sampling distillation."""
    return StoreConfig(
        top_k=k,
        min_k=k,
        min_probability=None,
        tail_samples=draws,
        mass_per_sample=None,
        draws="independent" if independent else "systematic",
    )


def ragged(bound: float, min_k: int, *, at_most: int = 32) -> StoreConfig:
    """Entries of at least this probability, and a draw for as much of the tail."""
    return StoreConfig(
        top_k=at_most,
        min_k=min_k,
        min_probability=bound,
        tail_samples=at_most,
        mass_per_sample=bound,
    )


HEADS = {f"top {k}": head(k) for k in (12, 50)}
SAMPLED = {
    "12 draws, independent": fixed(0, 12, independent=True),
    "12 draws": fixed(0, 12),
    "25 draws": fixed(0, 25),
    "50 draws, independent": fixed(0, 50, independent=True),
    "50 draws": fixed(0, 50),
    "head 2 + 6 draws": fixed(2, 6),
    "head 4 + 8 draws": fixed(4, 8),
    "head 8 + 8 draws": fixed(8, 8),
    "head 8 + 8 draws, independent": fixed(8, 8, independent=True),
    "head 16 + 16 draws": fixed(16, 16),
    "p >= 0.1 + draws of 0.1": ragged(0.1, 0),
    "p >= 0.05 + draws of 0.05": ragged(0.05, 0),
    "p >= 0.02 + draws of 0.02": ragged(0.02, 0, at_most=50),
    "default": StoreConfig(),
}
FOR_LOSSES = "default, logprobs of draws"
STORES = {**HEADS, **SAMPLED, FOR_LOSSES: StoreConfig(sample_logprobs=True)}


@dataclass(frozen=True)
class Arm:
    """One thing to learn from. ``name`` is unique among the arms of a group.

    group:       the table it belongs to: bytes, ranking, losses, tails, noise.
    source:      FULL, TEXT or the name of a store.
    losses:      as in a student config. ce: weight of the hard labels beside them.
    renormalise: scale heads up to be whole distributions.
    start:       SCRATCH or PRETRAINED.
    """

    group: str
    name: str
    source: str
    losses: tuple[dict[str, Any], ...] = field(default=(KL,), hash=False)
    ce: float = 0.0
    renormalise: bool = False
    start: str = SCRATCH


def halved(arm: Arm) -> Arm:
    """Half of the arm, half of hard labels."""
    losses = tuple({**term, "weight": 0.5 * term.get("weight", 1.0)} for term in arm.losses)
    return Arm(arm.group, f"half {arm.name}", arm.source, losses, 0.5, arm.renormalise, arm.start)


def text_arm(start: str) -> Arm:
    """Hard labels alone: what needs no teacher."""
    return Arm("text", "text alone", TEXT, (), 1.0, start=start)


def bytes_arms() -> list[Arm]:
    """(b): how much of full logits each store recovers, alone and with hard labels."""
    arms = [Arm("bytes", FULL, FULL)]
    for name in HEADS:
        arms.append(Arm("bytes", f"{name}, ghost", name, ({**KL, "tail": "ghost"},)))
        arms.append(Arm("bytes", f"{name}, prior", name, ({**KL, "tail": "prior"},)))
        arms.append(Arm("bytes", f"{name}, renormalised", name, renormalise=True))
    arms += [Arm("bytes", name, name) for name in SAMPLED]
    return [*arms, *map(halved, arms)]


def ranking_arms(start: str) -> list[Arm]:
    """(a): RLKD on full logits, as in the paper; pre-trained students, as in the paper, also in
    its variants.
    """
    arms = []
    for label, loss in (("KL", KL), ("RKL", RKL)):
        arms.append(Arm("ranking", label, FULL, (loss,), start=start))
        arms.append(Arm("ranking", f"{label} + 2 ranking", FULL, (loss, RANKING), start=start))
        if start == PRETRAINED:
            dynamic = {**RANKING, "dynamic": True}
            arms.append(
                Arm("ranking", f"{label} + 2 ranking, dynamic", FULL, (loss, dynamic), start=start)
            )
    if start == PRETRAINED:
        l2 = {**RANKING, "soft_rank": "l2"}
        arms.append(Arm("ranking", "KL + 2 ranking, l2 soft ranks", FULL, (KL, l2), start=start))
        arms.append(
            Arm(
                "ranking",
                "ranking alone, k = 10",
                FULL,
                ({"name": "ranking", "k": 10},),
                start=start,
            )
        )
        arms.append(Arm("ranking", "KL, default cache", "default", start=start))
        arms.append(
            Arm("ranking", "KL + 2 ranking, default cache", "default", (KL, RANKING), start=start)
        )
    return arms


_ORDER_ONLY = {"ranking", "listmle", "pairwise_logistic", "bild"}
"""Losses that see differences of some logits only: alone they leave the rest of the distribution
free.
"""
_SOURCES = {"random_sampling": "50 draws, independent"}


def losses_arms() -> list[Arm]:
    """(c): every loss of the library for given text on one cache, and those that only order ids with a KL
    beside them as well.
    """
    arms = []
    for name in sorted(LOSSES.keys() - {"ce", "policy_gradient", "dpkd_sequence"}):
        source = _SOURCES.get(name, FOR_LOSSES)
        arms.append(Arm("losses", name, source, ({"name": name},), start=PRETRAINED))
        if name in _ORDER_ONLY:
            arms.append(
                Arm(
                    "losses", f"forward_kl + {name}", source, (KL, {"name": name}), start=PRETRAINED
                )
            )
    return arms


def tails_arms() -> list[Arm]:
    """What may stand for the tail where draws cannot: they have no logprobs, or there are none
    (then, as for ``forward_kl`` here, the prior is still the one that draws made)."""
    return [
        Arm(
            "tails", f"{name}, {tail}", "default", ({"name": name, "tail": tail},), start=PRETRAINED
        )
        for name in ("forward_kl", "jsd", "skew_kl", "reverse_kl")
        for tail in ("ghost", "prior")
    ]
