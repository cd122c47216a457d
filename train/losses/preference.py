"""Preference between two texts of one prompt: the teacher's, and one that a student wrote.

Shapes: P positions of both texts.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from logitcask.cache_format.errors import UserError
from logitcask.train.losses.base import SparseTeacher, loss
from logitcask.train.losses.student_pass import StudentPass


@loss(
    source="arXiv 2406.19774 (DPKD), sequence form",
    formula="-log sigmoid(beta [log(q/p)(y_t) / |y_t| - log(q/p)(y_s) / |y_s|]) - lm log q(y_t) / "
    "|y_t|, y_t the preferred text, y_s the other",
    needs="pairs of texts (preferred, of a cache)",
    from_head="exact",
    from_samples=None,
    use="preference for the teacher's text of a prompt over the student's: two numbers per text, "
    "without heads and draws",
    by_overlap=False,
    of_pairs=True,
)
def dpkd_sequence(
    student_logits: Tensor | StudentPass,
    teacher: SparseTeacher,
    *,
    beta: float = 0.1,
    lm: float = 0.5,
    length_normalised: bool = True,
) -> Tensor:
    """Direct preference distillation of whole texts: [P], nats.

    The loss of a pair is that of the paper. log q(y) and log p(y) are sums over the learnt tokens of
    a text, at temperature 1. **Exact** from any head: only the targets' logprobs are used. The value
    of each position is the ``share`` of its pair's loss (``PairTexts``). The gradient of the sum
    over a pair is that of its loss, times the sum of the shares.

    Args:
        student_logits: [P, V].
        teacher: with ``pairs``.
        beta: scale of the preference.
        lm: weight of the cross-entropy with the preferred text, a mean over its tokens. 0: none.
        length_normalised: whether log(q/p) of a text is divided by its length.

    Returns: [P].

    Raises UserError if the positions are not those of pairs, or for a beta that is not positive or
    a negative lm.
    """
    pairs = teacher.pairs
    if pairs is None:
        raise UserError(
            "dpkd_sequence: the text is not read in pairs, expected two texts of each prompt; name the cache of the preferred "
            "ones (cache: preferred)"
        )
    if not teacher.targets_known:
        raise UserError(
            "dpkd_sequence: the cache does not know the teacher's logprobs of its text, which a preference compares; use a cache "
            "that the teacher has scored"
        )
    if not beta > 0:
        raise UserError(f"dpkd_sequence: beta is {beta}, expected a positive number")
    if not lm >= 0:
        raise UserError(f"dpkd_sequence: lm is {lm}, expected a number of at least 0")
    log_q = StudentPass.of(student_logits, teacher).log_target
    log_q_P2, log_p_P2, tokens_P2 = (
        each.to(log_q.dtype) for each in (pairs.log_q, pairs.log_p, pairs.tokens)
    )
    # The sum of the position's own text gets the gradient of the position's token. Added up over
    # the positions of a text, that is the gradient of the sum.
    moving_P = log_q - log_q.detach()
    own_P2 = torch.stack([pairs.preferred, ~pairs.preferred], 1)
    log_q_P2 = log_q_P2 + own_P2 * moving_P.unsqueeze(1)
    gap_P2 = log_q_P2 - log_p_P2
    if length_normalised:
        gap_P2 = gap_P2 / tokens_P2
    of_pair_P = softplus(-beta * (gap_P2[:, 0] - gap_P2[:, 1]))
    of_pair_P = of_pair_P - lm * log_q_P2[:, 0] / tokens_P2[:, 0]
    # The value is shared among the positions. The gradient of the pair's loss has been already.
    constant = of_pair_P.detach()
    moved = (of_pair_P - constant) * tokens_P2.sum(1)
    return (constant + moved) * pairs.share.to(log_q.dtype)
