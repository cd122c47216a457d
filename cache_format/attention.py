"""The attention implementation that a model's config needs, for both stages.

transformers picks ``sdpa`` for most models. ``sdpa`` ignores a soft cap of the attention scores, so
the same weights give another function (a tiny Gemma 2: up to 7.5 nats away from eager). ``eager``,
``flex_attention`` and the flash kernels apply the cap. transformers itself does not offer ``sdpa``
for models with attention sinks (gpt-oss). Sliding windows and ALiBi are part of the mask.
"""

from __future__ import annotations

from typing import Any

from logitcask.cache_format.errors import UserError

_SOFT_CAP = "attn_logit_softcapping"


def attention_implementation(config: Any, asked: Any, option: str) -> Any:
    """``attn_implementation`` to load a model with; None leaves the choice to transformers.

    config: the model's transformers config; only its text model matters.
    asked:  the value the user gave, or None.
    option: name of the user's option, for the message.

    Raises UserError if ``asked`` is an implementation that ignores a field of the config.
    """
    cap = getattr(config.get_text_config(), _SOFT_CAP, None)
    if cap is None:
        return asked
    if asked is None:
        return "eager"
    if any(
        "sdpa" in str(each) for each in (asked.values() if isinstance(asked, dict) else [asked])
    ):
        raise UserError(
            f"{option} is {asked!r}, which leaves out the soft cap of the attention scores that the model's config asks for "
            f"({_SOFT_CAP} {cap:g}); use eager, flex_attention or flash_attention_2, or leave it unset"
        )
    return asked
