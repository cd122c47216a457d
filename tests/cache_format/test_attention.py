"""Which attention a config needs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from logitcask.cache_format.attention import attention_implementation
from logitcask.cache_format.errors import UserError


def config(cap: float | None) -> SimpleNamespace:
    """Of a model that holds a text model: fields of its own decide nothing."""
    return SimpleNamespace(get_text_config=lambda: SimpleNamespace(attn_logit_softcapping=cap))


@pytest.mark.parametrize("asked", [None, "sdpa", "eager", {"": "sdpa"}])
def test_without_a_cap_it_is_the_users(asked: object) -> None:
    assert attention_implementation(config(None), asked, "x") == asked
    assert (
        attention_implementation(SimpleNamespace(get_text_config=lambda: object()), asked, "x")
        == asked
    )


def test_a_cap_needs_attention_that_applies_it() -> None:
    assert attention_implementation(config(50.0), None, "x") == "eager"
    for asked in ("eager", "flex_attention", "flash_attention_2"):
        assert attention_implementation(config(50.0), asked, "x") == asked
    for refused in ("sdpa", "paged|sdpa", {"": "sdpa"}):
        with pytest.raises(UserError, match=r"^student\.attention is .*soft cap.*50\); use eager"):
            attention_implementation(config(50.0), refused, "student.attention")
