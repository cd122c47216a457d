"""Losses of order and of differences: they compare the logits of a few ids with each other.

A cache stores all that they need: the top ids, their order and their differences. Shapes: P
positions, K head entries (padded), k ids compared.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from logitcask.cache_format.errors import UserError
from logitcask.train.losses.base import SparseTeacher, loss
from logitcask.train.losses.student_pass import StudentPass
from logitcask.train.losses.tails import NOTHING


def _checked(name: str, teacher: SparseTeacher, temperature: float) -> None:
    if teacher.ids.shape[1] == 0:
        raise UserError(
            f"{name}: the cache stores no heads (top_k is 0), so the teacher's order is unknown; drop this loss"
        )
    if not temperature > 0:
        raise UserError(f"{name}: temperature is {temperature}, expected a positive number")


@loss(
    source="Xia et al. 2008 (ListMLE)",
    formula="-sum_{i<=k} [z_i - logsumexp(z_i, z_(i+1), ..., all below)], by the teacher's order",
    needs="head of at least k entries",
    from_head="exact",
    from_samples=None,
    use="the order of the teacher's top tokens, and their place above all others",
    head_k=lambda options: options.get("k", 10),
)
def listmle(
    student_logits: Tensor | StudentPass,
    teacher: SparseTeacher,
    *,
    k: int = 10,
    temperature: float = 1.0,
) -> Tensor:
    """-log of the probability that the student draws the teacher's top k in the teacher's order, in
    nats per position.

    The student draws without replacement from softmax(z / temperature) (Plackett-Luce). **Exact**:
    the list is the whole vocabulary, and the ids that are not stored only have to rank below. Equal
    stored logprobs keep their stored order, which is the order before rounding. Any temperature is
    possible, because it softens only the student. A temperature other than 1 costs its own pass.

    A head of less than k entries makes a shorter list, which is a different loss (**biased**).

    Args, returns: as ``forward_kl``. Raises UserError for a temperature that is not
        positive, or a cache without heads.
    """
    _checked("listmle", teacher, temperature)
    student = StudentPass.of(student_logits, teacher, scale=1 / temperature)
    stored = teacher.ids >= 0
    # Clamped before the addition: the gradient of logaddexp(-inf, -inf) is not a number.
    rest = torch.logaddexp(
        student.log_tail.clamp_min(NOTHING), student.log_others.clamp_min(NOTHING)
    ).unsqueeze(1)
    z = student.z_head.masked_fill(~stored, NOTHING)
    below = torch.cat([rest, z.flip(1)], 1).logcumsumexp(1).flip(1)[:, :-1]
    return (below - z)[:, :k].where(stored[:, :k], 0).sum(1)


def _pairs(width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(i, j), each [width * (width - 1) / 2]: all pairs i < j."""
    i, j = torch.triu_indices(width, width, offset=1, device=device)
    return i, j


@loss(
    source="Burges et al. 2005 (RankNet)",
    formula="mean_{i<j<=k} log(1 + exp(-(z_i - z_j) / T)), by the teacher's order",
    needs="head of at least k entries",
    from_head="exact",
    from_samples=None,
    use="only the order of the teacher's top tokens; cheap",
    head_k=lambda options: options.get("k", 10),
    masses=False,
)
def pairwise_logistic(
    student_logits: Tensor | StudentPass,
    teacher: SparseTeacher,
    *,
    k: int = 10,
    temperature: float = 1.0,
    targets: Literal["hard", "soft"] = "hard",
) -> Tensor:
    """Logistic loss on the differences of the student's logits at the teacher's top k, averaged
    over pairs: [P], nats.

    ``hard``: log(1 + exp(-(z_i - z_j) / T)) for i above j. ``soft``: cross-entropy to the teacher's
    own sigmoid((log p_i - log p_j) / T), as in RankNet. It is smallest if the differences are
    equal, and a tie gives no preference. **Exact** for k up to the head's length. Shorter heads
    have fewer pairs (**biased**), and a head of one id has none (loss 0).

    Args, returns: as ``forward_kl``. Raises UserError for unknown ``targets``, a temperature that
    is not positive, or a
        cache without heads.
    """
    _checked("pairwise_logistic", teacher, temperature)
    if targets not in ("hard", "soft"):
        raise UserError(f"pairwise_logistic: targets is {targets!r}, expected hard or soft")
    student = StudentPass.of(student_logits, teacher, scale=1.0, masses=False)
    stored, z = teacher.ids[:, :k] >= 0, student.z_head[:, :k]
    i, j = _pairs(z.shape[1], z.device)
    valid = stored[:, j]
    z = z.where(stored, 0)
    apart = (z[:, i] - z[:, j]) / temperature
    value = softplus(-apart)
    if targets == "soft":
        log_p = teacher.logprobs[:, :k].to(student.dtype).where(stored, 0)
        value = value + apart * torch.sigmoid(-(log_p[:, i] - log_p[:, j]) / temperature)
    return value.where(valid, 0).sum(1) / valid.sum(1).clamp_min(1)


@loss(
    source="arXiv 2406.13555 (BiLD)",
    formula="KL(softmax(d_p / T) || softmax(d_q / T)), d all differences of logits within a top "
    "k, for the teacher's top k plus the student's",
    needs="head of at least k entries",
    from_head="biased",
    from_samples=None,
    use="the differences between top tokens, without the noise of the long tail",
    top_k=lambda options: options.get("k", 8) if options.get("sides", "both") == "both" else 0,
    masses=False,
)
def bild(
    student_logits: Tensor | StudentPass,
    teacher: SparseTeacher,
    *,
    k: int = 8,
    temperature: float = 3.0,
    sides: Literal["both", "teacher"] = "both",
) -> Tensor:
    """Bi-directional logits difference in nats per position.

    The k (k - 1) / 2 differences of logits, higher minus lower, among the teacher's top k ids give
    one distribution for the teacher and one for the student, at ``temperature``. Their KL is t-LD.
    The same among the student's top k is s-LD. Constants cancel, so logprobs can replace logits,
    and **any temperature is exact**. t-LD (``sides: teacher``) is **exact** for k up to the head's
    length. s-LD is exact if the head has the student's ids. An id that was not stored gets the
    highest logprob that it can have, so the loss is **biased**. This is rare if the head is several
    times as long as k.

    Args, returns: as ``forward_kl``. Raises UserError for unknown ``sides``, a temperature that is
    not positive, or a cache
        without heads.
    """
    _checked("bild", teacher, temperature)
    if sides not in ("both", "teacher"):
        raise UserError(f"bild: sides is {sides!r}, expected both or teacher")
    both = sides == "both"
    student = StudentPass.of(
        student_logits, teacher, top_k=k if both else 0, scale=1.0, masses=False
    )
    stored = teacher.ids[:, :k] >= 0
    value = _difference_kl(
        teacher.logprobs[:, :k].to(student.dtype), student.z_head[:, :k], stored, temperature
    )
    if not both:
        return value
    ours = student.top_ids[:, :k]
    log_p = teacher.known(ours)[0].to(student.dtype)
    return value + _difference_kl(
        log_p, student.z_top[:, :k], torch.ones_like(ours, dtype=torch.bool), temperature
    )


def _difference_kl(x_Pk: Tensor, y_Pk: Tensor, valid_Pk: Tensor, temperature: float) -> Tensor:
    i, j = _pairs(x_Pk.shape[1], x_Pk.device)
    valid = valid_Pk[:, i] & valid_Pk[:, j]
    x, y = x_Pk.where(valid_Pk, 0) / temperature, y_Pk.where(valid_Pk, 0) / temperature
    log_x, log_y = ((v[:, i] - v[:, j]).masked_fill(~valid, NOTHING).log_softmax(1) for v in (x, y))
    # Without a valid pair, all values are equal on both sides: the loss is 0.
    return (log_x.exp() * (log_x - log_y)).where(valid, 0).sum(1)


@loss(
    source="arXiv 2406.19774 (DPKD), token form",
    formula="-log sigmoid(beta [(log q(y_t) - log q(y_s)) - (log p(y_t) - log p(y_s))]), y_t, y_s "
    "the argmax of p and q",
    needs="head",
    from_head="lower",
    from_samples=None,
    use="preference for the teacher's top token over the student's; the paper gives it and ce the "
    "same weight",
    top_k=lambda options: 1,
    masses=False,
)
def dpkd_token(
    student_logits: Tensor | StudentPass, teacher: SparseTeacher, *, beta: float = 0.1
) -> Tensor:
    """Direct preference distillation of each next token: the teacher's argmax is preferred to the
    student's. [P], nats.

    **Exact** if the cache has the student's argmax (in the head, as target or as draw). Otherwise
    the argmax gets the highest logprob that it can have, and the loss is a **lower bound**. If both
    have the same argmax, the loss is log 2, without gradient.

    Args, returns: as ``forward_kl``. Raises UserError for a beta that is not positive, or a cache
    without heads.
    """
    _checked("dpkd_token", teacher, 1.0)
    if not beta > 0:
        raise UserError(f"dpkd_token: beta is {beta}, expected a positive number")
    student = StudentPass.of(student_logits, teacher, top_k=1, scale=1.0, masses=False)
    log_ps = teacher.known(student.top_ids[:, :1])[0].squeeze(1).to(student.dtype)
    has_head = teacher.ids[:, 0] >= 0
    apart_q = student.z_head[:, 0].where(has_head, 0) - student.z_top[:, 0].where(has_head, 0)
    apart_p = teacher.logprobs[:, 0].to(student.dtype).where(has_head, 0) - log_ps.where(
        has_head, 0
    )
    return softplus(-beta * (apart_q - apart_p))
