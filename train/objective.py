"""The weighted sum of losses that a config asks for, as one function of a chunk of logits."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cross_entropy

from train.config import TrainConfig
from train.linear import PerChunk
from train.losses import LOSSES, SparseTeacher
from train.metrics import top_k_overlap


class Objective:
    """``weight * loss`` summed over the config's losses, plus ``ce_weight`` times the hard-label cross-entropy.

    With a dynamic ranking term (RLKD, equation 2) the other teacher losses of a position are weighted by the overlap of
    the student's and the teacher's top k there, k being the ranking's own.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.terms = config.losses
        self.ce_weight = config.ce_weight
        dynamic = [term for term in config.losses if term.dynamic]
        self._overlap_k: int | None = dynamic[0].options.get("k", 5) if dynamic else None

    def weights(self) -> list[tuple[str, float]]:
        """(name, weight) of every term, the hard-label cross-entropy as "ce"."""
        named = [(term.name, term.weight) for term in self.terms]
        return [*named, ("ce", self.ce_weight)] if self.ce_weight else named

    def per_chunk(self, teacher: SparseTeacher) -> PerChunk:
        """The function ``train.linear.head_losses`` calls; its values are the unweighted terms, by name."""

        def losses(logits_CV: Tensor, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
            part = teacher[rows]
            total = logits_CV.new_zeros(len(logits_CV), dtype=part.logprobs.dtype)
            overlap = None if self._overlap_k is None else top_k_overlap(logits_CV, part, self._overlap_k)
            values = {}
            for term in self.terms:
                value = LOSSES[term.name](logits_CV, part, **term.options)
                values[term.name] = value
                weighted = value * term.weight
                total = total + (weighted if overlap is None or term.name == "ranking" else weighted * overlap)
            if self.ce_weight:
                values["ce"] = cross_entropy(logits_CV.float(), part.target_ids, reduction="none")
                total = total + self.ce_weight * values["ce"]
            return total, values

        return losses
