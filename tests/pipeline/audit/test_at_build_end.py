"""The audit that ends a build: a sound cache is completed with its figures, an unsound one is
not, and the cause is named.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import logitcask.pipeline.builder.lazy_teacher
import logitcask.pipeline.builder.run
from logitcask.cache_format import CacheReader, DamagedCacheError
from logitcask.cache_format.describe import describe
from logitcask.cache_format.errors import CacheError
from logitcask.pipeline.audit import at_build_end as build_audit
from logitcask.pipeline.audit import reference as audit_reference
from logitcask.pipeline.audit import worker as audit_worker
from logitcask.pipeline.builder.run import build
from logitcask.pipeline.config import BuildConfig
from logitcask.pipeline.teachers.model import empty_model, resolve_model
from logitcask.pipeline.teachers.open import open_teacher
from logitcask.pipeline.teachers.synthetic import SyntheticTeacher


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., BuildConfig]:
    def make(teacher: dict, **changes: object) -> BuildConfig:
        return BuildConfig.model_validate(
            {
                "teacher": teacher,
                "data": {"path": "python-docs", "max_length": 64, "max_tokens": 2_000},
                "store": {"top_k": 8, "shard_tokens": 700},
                "output": str(tmp_path / "cache"),
                **changes,
            }
        )

    return make


SYNTHETIC = {"model": "synthetic", "backend": "synthetic", "vocab_size": 500}


def test_a_sound_cache_says_what_was_compared(config) -> None:
    made = config(SYNTHETIC)
    found = build(made).manifest.audit
    assert found.sequences == 4
    assert found.engine_target <= 1e-6
    assert found.engine_head <= 1e-6
    assert 0 < found.codec_kl < 1e-2 < found.truncation_kl_even
    manifest = CacheReader(made.output).manifest
    assert manifest.audit == found
    assert "4 sequences against synthetic" in describe(manifest, made.output)


def test_the_audit_is_no_part_of_what_a_cache_is(config) -> None:
    made = config(SYNTHETIC)
    audited = build(made).manifest
    plain = build(config(SYNTHETIC, audit={"sequences": 0}), restart=True).manifest
    assert plain.audit is None
    assert (plain.fingerprint, plain.content_sha256) == (
        audited.fingerprint,
        audited.content_sha256,
    )
    assert build(made).reused


@pytest.mark.parametrize("backend", ["vllm", "transformers"])
def test_real_engines_pass(config, tiny_gemma2, backend, monkeypatch) -> None:
    """A model whose attention scores are capped, which transformers' default attention leaves
    out.
    """
    apart = []
    original = audit_worker.audit_apart
    monkeypatch.setattr(
        audit_worker, "audit_apart", lambda *args: apart.append(args) or original(*args)
    )
    found = build(config({"model": str(tiny_gemma2), "backend": backend})).manifest.audit
    assert found.skipped is None
    assert max(found.engine_target, found.engine_head) < 1e-5
    assert len(apart) == (backend == "vllm" and importlib.util.find_spec("vllm") is not None)


SHIFTED = (
    "ids",
    "logprobs",
    "head_size",
    "target_logprob",
    "target_rank",
    "samples",
    "sample_logprobs",
)


def test_a_shifted_engine_is_caught_before_the_cache_counts(config, monkeypatch, rolled) -> None:
    made = config(SYNTHETIC)
    original = SyntheticTeacher.score
    with monkeypatch.context() as patch:
        patch.setattr(
            SyntheticTeacher,
            "score",
            lambda self, s: (rolled(scored, SHIFTED, 1) for scored in original(self, s)),
        )
        with pytest.raises(DamagedCacheError, match="shifted by one"):
            build(made)
    assert not (made.output / "manifest.json").exists()
    with pytest.raises(DamagedCacheError, match="shifted by one"):  # again, from what is committed
        build(made)
    resumed = build(config(SYNTHETIC, audit={"sequences": 0}))
    assert resumed.tokens_scored == 0
    assert resumed.manifest.audit is None


@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_a_shard_damaged_before_the_audit_ends_the_build(config, monkeypatch, how) -> None:
    """It was committed by an earlier start; nothing but the audit reads it again."""
    made = config(SYNTHETIC, audit={"sequences": 100})

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(logitcask.pipeline.builder.run, "audit_build", stop)
        build(made)
    shard = made.output / "data" / "shard-00001.arrow"
    original = logitcask.pipeline.builder.run.audit_build

    def damaged(*arguments: object) -> object:
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 4
        if how == "gone":
            shard.unlink()
        else:
            shard.write_bytes(data if how == "flipped" else data[:-64])
        return original(*arguments)

    monkeypatch.setattr(logitcask.pipeline.builder.run, "audit_build", damaged)
    with pytest.raises(CacheError, match=r"shard-00001\.arrow") as error:
        build(made)
    assert "\n" not in str(error.value)
    if how != "gone":
        assert isinstance(error.value, DamagedCacheError)
        assert error.value.exit_code == 1
        assert "start afresh with --restart" in str(error.value)
    assert not (made.output / "manifest.json").exists()


def test_a_wrong_temperature_is_named(config, tiny_llama, monkeypatch) -> None:
    def warm(*args, **kwargs):
        teacher = open_teacher(*args, **kwargs)
        teacher._lm.lm_head.register_forward_hook(lambda module, inputs, logits: logits / 1.5)
        return teacher

    monkeypatch.setattr(logitcask.pipeline.builder.lazy_teacher, "open_teacher", warm)
    with pytest.raises(DamagedCacheError, match=r"another temperature: its rows fit 1\.5 "):
        build(config({"model": str(tiny_llama), "backend": "transformers"}))


def test_weights_that_changed_under_the_build_are_named(
    config, tiny_llama, tmp_path, monkeypatch
) -> None:
    import torch
    from transformers import LlamaForCausalLM

    folder = tmp_path / "teacher"
    shutil.copytree(tiny_llama, folder)
    made = config({"model": str(folder), "backend": "transformers"})
    original = build_audit.audit

    def swapped(*args, **kwargs):
        other = LlamaForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            other.model.norm.weight += 0.3 * torch.randn_like(other.model.norm.weight)
        other.save_pretrained(folder)
        return original(*args, **kwargs)

    monkeypatch.setattr(build_audit, "audit", swapped)
    with pytest.raises(DamagedCacheError, match="other weights"):
        build(made)


def test_a_teacher_too_large_to_compare_with_is_said(
    config, tiny_llama, monkeypatch, caplog
) -> None:
    needed = 4 * empty_model(resolve_model(str(tiny_llama))).num_parameters()
    monkeypatch.setattr(audit_reference, "free_memory", lambda: (needed, None))
    made = config({"model": str(tiny_llama), "backend": "transformers"})
    manifest = build(made).manifest
    assert "GB are free here" in manifest.audit.skipped
    assert "not audited" in caplog.text
    assert "not audited: its teacher takes" in describe(manifest, made.output)
