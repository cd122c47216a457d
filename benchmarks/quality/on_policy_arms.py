"""What the study of rounds compares. Each arm has as many optimizer steps as the others, and the
teacher reads about as many tokens for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Text = Literal["documents", "teacher", "rounds"]
KL: dict[str, Any] = {"name": "forward_kl"}
GKD: dict[str, Any] = {"name": "jsd", "beta": 0.5}


@dataclass(frozen=True)
class Arm:
    """A way to learn from a teacher.

    text:    whose text is learnt: documents, the teacher's answers, or what rounds write. The first
             two are built before the training begins.
    losses:  as in a student config.
    prompts: of a round, as a share of the study's, so that the teacher reads as many tokens.
    given:   documents, as a share of the study's.
    rounds:  further fields of the rounds.
    generate: further fields of ``data.generate``.
    pairs:   whether a batch counts pairs of texts.
    """

    name: str
    text: Text
    losses: tuple[dict[str, Any], ...]
    prompts: float = 1.0
    given: float = 0.0
    rounds: dict[str, Any] = field(default_factory=dict)
    generate: dict[str, Any] = field(default_factory=dict)
    pairs: bool = False


def skd(name: str, prompts: float, passes: int) -> Arm:
    """Each pass reads the answers again that have changed, so ``prompts`` is small."""
    return Arm(
        name,
        "rounds",
        (KL,),
        prompts,
        0.5,
        {"on_policy_fraction": 0.5, "skd": {"top_k": 25, "passes": passes}},
        {"temperature": 0.5, "top_p": 0.5},
    )


ARMS = (
    Arm("KL, documents", "documents", (KL,), given=1.0),
    Arm("KL, teacher's answers", "teacher", (KL,)),
    Arm("KL, student's answers", "rounds", (KL,)),
    Arm("GKD, lambda 0.5", "rounds", (GKD,), 0.5, 0.5, {"on_policy_fraction": 0.5}),
    Arm("GKD, lambda 1", "rounds", (GKD,)),
    skd("SKD, 4 passes", 0.14, 4),
    skd("SKD, 16 passes", 0.25, 16),
    Arm(
        "DistiLLM-2",
        "rounds",
        (
            {"name": "skew_kl", "alpha": 0.1, "caches": ["teacher-*"]},
            {"name": "skew_reverse_kl", "alpha": 0.1, "caches": ["round-*"]},
        ),
        0.5,
        rounds={"on_policy_fraction": 0.5, "teacher_text": True},
    ),
    Arm("policy gradient", "rounds", ({"name": "policy_gradient"},)),
    Arm(
        "DPKD",
        "rounds",
        ({"name": "dpkd_sequence"},),
        0.5,
        rounds={"on_policy_fraction": 0.5, "teacher_text": True},
        pairs=True,
    ),
    Arm(
        "CoMD",
        "rounds",
        (KL,),
        0.375,
        rounds={
            "on_policy_fraction": 0,
            "teacher_text": True,
            "augment": {"prompts": 8, "max_length": 120, "max_prompt_tokens": 12},
        },
    ),
)
