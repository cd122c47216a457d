"""The policy gradient of reverse KL: the student's own tokens, judged by the teacher.

Shapes: P positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from logitcask.cache_format.errors import UserError
from logitcask.train.losses.base import SparseTeacher, loss
from logitcask.train.losses.student_pass import StudentPass


@loss(
    source="reverse KL by sampled tokens (on-policy distillation, 2025), clipped as in PPO, arXiv 1707.06347",
    formula="-min(r A, clip(r, 1 - clip, 1 + clip) A), r = q(y) / w(y), A = log p(y) - log w(y), w the writer's",
    needs="text of a student with its logprobs (data.generate.writer)",
    from_head="exact",
    from_samples=None,
    use="the newest student's own text: reverse KL from two numbers per token, without heads and draws",
    own_samples=True,
)
def policy_gradient(
    student_logits: Tensor | StudentPass, teacher: SparseTeacher, *, clip: float | None = 0.2
) -> Tensor:
    """The clipped policy gradient loss with the advantage log p - log w of each token, per position.

    y is the token that the writer w has sampled, p the teacher, q the student, w the student when it
    wrote. Where q = w and the text was sampled at temperature 1 and top_p 1, the mean of the
    gradient is that of KL(q || p) at each position, on the student's own text. The effect of a token
    on the positions behind it is left out. The value is no divergence: it may be negative. **Exact**
    from any head: only the target's logprobs are used.

    Args:
        student_logits: [P, V].
        teacher: with ``writer_logprob``.
        clip: largest distance from 1 of the ratio q/w that has a gradient, if the advantage pulls
            further away. None: any.

    Returns: [P].

    Raises UserError if the cache has no logprobs of the writer, or for a negative ``clip``.
    """
    if teacher.writer_logprob is None:
        raise UserError(
            "policy_gradient: the cache has no logprobs of the model that wrote its text, expected text of a student; build it "
            "with data.generate.writer and without data.generate.splice (in student-rounds set rounds.on_policy_fraction to 1)"
        )
    if clip is not None and not clip >= 0:
        raise UserError(f"policy_gradient: clip is {clip}, expected a number of at least 0")
    log_q = StudentPass.of(student_logits, teacher).log_target
    written = teacher.writer_logprob.to(log_q.dtype)
    advantage = teacher.target_logprob.to(log_q.dtype) - written
    ratio = (log_q - written).exp()
    gain = ratio * advantage
    if clip is not None:
        gain = torch.minimum(gain, ratio.clamp(1 - clip, 1 + clip) * advantage)
    return -gain
