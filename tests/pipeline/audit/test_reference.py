"""The arithmetic that a reference knows its teacher to have used."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from logitcask.pipeline.audit import reference as audit_reference
from logitcask.pipeline.teachers.model import has_experts, resolve_model


@pytest.mark.parametrize(
    ("engine_args", "bits"),
    [
        ({}, None),
        ({"quantization": "fp8"}, 8),
        ({"kv_cache_dtype": "fp8_e4m3"}, 8),
        ({"kv_cache_dtype": "auto", "quantization": None}, None),
        ({"quantization": "bitsandbytes"}, None),
    ],
)
def test_an_engine_that_rounds_to_eight_bits_is_known_by_its_options(tiny_llama, engine_args, bits):
    manifest = SimpleNamespace(config={"teacher": {"engine_args": engine_args}})
    assert audit_reference._bits(manifest, resolve_model(str(tiny_llama))) == bits


def test_experts_and_eight_bits_are_read_off_the_model(tiny_llama, tmp_path, monkeypatch):
    from transformers import MixtralConfig

    assert not has_experts(resolve_model(str(tiny_llama)))
    MixtralConfig(num_local_experts=8).save_pretrained(tmp_path)
    assert has_experts(resolve_model(str(tmp_path)))
    manifest = SimpleNamespace(config={})
    monkeypatch.setattr(audit_reference, "activation_bits", lambda model: 4)
    assert audit_reference._bits(manifest, resolve_model(str(tmp_path))) == 4
