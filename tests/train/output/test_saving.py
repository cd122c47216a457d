"""A student is saved at the end of a run, whatever comes after; what would keep it from that is
found out before the run.
"""

from __future__ import annotations

import errno
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
)

import logitcask.train.examination
import logitcask.train.output.saving
import logitcask.train.preparation
from logitcask.cache_format.errors import ConfigError, UserError
from logitcask.train.config import AnswersConfig, StudentConfig
from logitcask.train.evaluation.answers import answers
from logitcask.train.model.student import build_student
from logitcask.train.output.run_folder import TRIAL
from logitcask.train.output.saving import (
    mend_generation_config,
    save_merged,
    save_student,
    try_saving,
)
from logitcask.train.run import train as train_student


@pytest.fixture
def sound_cache(write_cache):
    return str(write_cache("sound", shards=1, sequences=20).path)


@pytest.fixture
def student_folder(tiny_llama, tmp_path):
    """``student_folder(**fields)``: the tiny Llama with these fields in its
    generation_config.json.
    """

    def make(**fields):
        folder = tmp_path / "student"
        shutil.copytree(tiny_llama, folder)
        (folder / "generation_config.json").write_text(
            json.dumps({"eos_token_id": [2, 0, 5], **fields})
        )
        return folder

    return make


@pytest.mark.parametrize(
    ("fields", "removed"),
    [
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, {"temperature", "top_p"}),
        ({"temperature": 0.6, "top_k": 20, "min_p": 0.1}, {"temperature", "top_k", "min_p"}),
        ({"pad_token_id": -1}, {"pad_token_id"}),
        (
            {"num_beams": 1, "length_penalty": 0.5, "early_stopping": True},
            {"length_penalty", "early_stopping"},
        ),
        ({"output_scores": True}, {"output_scores"}),
        ({"use_cache": False, "cache_implementation": "static"}, {"cache_implementation"}),
        ({"do_sample": True, "temperature": 0.6, "repetition_penalty": 1.1}, set()),
        ({"num_beams": 3, "num_return_sequences": 2, "length_penalty": 2.0}, set()),
    ],
)
def test_generation_configs_are_mended(student_folder, tmp_path, caplog, fields, removed):
    folder = student_folder(**fields)
    student = AutoModelForCausalLM.from_pretrained(folder)
    if removed:
        with pytest.raises(ValueError, match="invalid"):
            student.save_pretrained(tmp_path / "unmended")
    mend_generation_config(student)
    student.save_pretrained(tmp_path / "saved")
    saved = GenerationConfig.from_pretrained(tmp_path / "saved")
    kept = {name: value for name, value in fields.items() if name not in removed}
    assert {name: getattr(saved, name) for name in kept} == kept
    assert saved.eos_token_id == [2, 0, 5]
    assert all(getattr(saved, name) == getattr(GenerationConfig(), name) for name in removed)
    assert all(f"{name}: {fields[name]}" in caplog.text for name in removed)
    assert bool(caplog.records) == bool(removed)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("early_stopping", "maybe"),
        ("cache_implementation", "none such"),
        ("num_return_sequences", 3),
        ("compile_config", {"mode": "x"}),
        ("assistant_model", "named in it"),
    ],
)
def test_what_makes_transformers_raise_is_mended_too(tiny_llama, name, value):
    student = AutoModelForCausalLM.from_pretrained(tiny_llama)
    setattr(student.generation_config, name, value)
    mend_generation_config(student)
    student.generation_config.validate(strict=True)
    assert student.generation_config.eos_token_id == 2


def test_a_generation_config_beyond_mending_is_one_line(tiny_llama, monkeypatch):
    student = AutoModelForCausalLM.from_pretrained(tiny_llama)

    def refuse(*arguments, **options):
        raise ValueError("\nnothing is right\n here")

    monkeypatch.setattr(student.generation_config, "validate", refuse)
    with pytest.raises(UserError, match="nothing is right here") as caught:
        mend_generation_config(student)
    assert "\n" not in str(caught.value)


def test_a_student_with_sampling_fields_is_trained_and_saved(config, student_folder, caplog):
    """Today's commonest case: temperature without do_sample."""
    folder = student_folder(do_sample=False, temperature=0.6)
    train_student(config(student={"model": str(folder)}, training={"max_steps": 1}))
    assert "temperature: 0.6" in caplog.text
    saved = GenerationConfig.from_pretrained(config().output_dir)
    assert saved.eos_token_id == [2, 0, 5]
    assert saved.temperature is None


def test_answers_are_greedy_whatever_the_student_prefers(tiny_llama):
    student, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tiny_llama),
        AutoTokenizer.from_pretrained(tiny_llama),
    )
    from tests.train.evaluation.test_answers import sequence

    data = [sequence(list(range(3, 30)), [False] * 9 + [True] * 18)]
    (plain,) = answers(student, tokenizer, data, AnswersConfig(max_new_tokens=8))
    adapted = get_peft_model(
        student, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    )
    own = GenerationConfig(
        eos_token_id=[2], num_beams=3, num_return_sequences=2, repetition_penalty=5.0
    )
    student.generation_config = own
    for each in (student, adapted):
        assert answers(each, tokenizer, data, AnswersConfig(max_new_tokens=8)) == [plain]
    assert student.generation_config is own
    assert adapted.get_base_model().generation_config is own


def test_weights_that_cannot_be_saved_are_found_before_the_first_step(
    sound_cache, scratch_config, monkeypatch
):
    built = logitcask.train.preparation.build_student

    def shared(*arguments):
        student = built(*arguments)
        first, second = student.model.layers
        second.mlp.up_proj.weight = first.mlp.up_proj.weight
        return student

    monkeypatch.setattr(logitcask.train.preparation, "build_student", shared)
    config = scratch_config(cache=sound_cache)
    with pytest.raises(
        UserError, match=r"could not be saved after training \(RuntimeError: "
    ) as caught:
        train_student(config)
    assert "\n" not in str(caught.value)
    assert not (config.output_dir / "run.json").exists()
    assert not (config.output_dir / TRIAL).exists()


def test_a_tokenizer_that_cannot_be_saved_is_found_before_the_first_step(config, monkeypatch):
    def refuse(self, *arguments, **options):
        raise NotImplementedError

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", refuse)
    with pytest.raises(UserError, match=r"\(NotImplementedError: NotImplementedError\)"):
        train_student(config())
    assert not (config().output_dir / "run.json").exists()


def test_a_disk_without_room_for_the_student_is_found_before_the_first_step(
    sound_cache, scratch_config, monkeypatch
):
    def full(self, folder, **options):
        raise OSError(errno.ENOSPC, "No space left on device", str(folder))

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    with pytest.raises(UserError, match="No space left on device"):
        train_student(scratch_config(cache=sound_cache))


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": "all-linear", "use_dora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
        {
            "peft_type": "IA3",
            "target_modules": ["k_proj", "down_proj"],
            "feedforward_modules": ["down_proj"],
        },
        {"peft_type": "LN_TUNING", "target_modules": ["input_layernorm"]},
    ],
    ids=lambda fields: "-".join(fields),
)
@pytest.mark.parametrize("tied", [False, True])
def test_adapters_are_saved_by_themselves_and_merged(scratch_student, tmp_path, fields, tied):
    """What is loaded from the output is what was trained, the head and the embedding tied before
    or not.
    """
    folder = scratch_student(tied=tied)
    adapted = build_student(StudentConfig(model=str(folder), peft=fields), seed=0).eval()
    try_saving(adapted, None, tmp_path)
    assert not (tmp_path / TRIAL).exists()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(
                    parameter.shape, generator=torch.Generator().manual_seed(0)
                )
    ids = torch.arange(3, 23)[None]
    expected = adapted(ids).logits
    trainer = SimpleNamespace(
        model=adapted,
        processing_class=None,
        save_model=adapted.save_pretrained,
        accelerator=SimpleNamespace(unwrap_model=lambda model: model),
        args=SimpleNamespace(should_save=True),
    )
    save_student(trainer, tmp_path / "out")
    save_merged(trainer, tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    again = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder), tmp_path / "out" / "adapter"
    ).eval()
    for found in (merged, again):
        torch.testing.assert_close(found(ids).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kept", [None, [1]], ids=["whole", "layers"])
def test_weights_that_the_config_calls_one_are_saved_as_two(
    scratch_student, tmp_path, caplog, kept
):
    """Who reads the saved config, as vLLM does, reads the lm_head too; tied students stay tied."""

    def saved(tied_in_config, folder):
        fields = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(
            json.dumps({**fields, "tie_word_embeddings": tied_in_config})
        )
        origin = (
            {"model": str(folder)}
            if kept is None
            else {"init_from": str(folder), "keep_layers": kept}
        )
        caplog.clear()
        build_student(StudentConfig.model_validate(origin), seed=0).save_pretrained(
            tmp_path / "out"
        )
        assert ("two different weights for them" in caplog.text) == (
            tied_in_config and folder == apart
        )
        return json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]

    apart, one = scratch_student(tied=False), scratch_student(tied=True)
    head = load_file(apart / "model.safetensors")["lm_head.weight"]
    assert saved(True, apart) is False
    assert load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"].equal(head)
    assert saved(False, apart) is False
    assert saved(True, one) is True


def test_merging_that_leaves_the_config_as_it_was(scratch_student, tmp_path):
    """Older versions of peft do; what has become two weights is saved as two."""
    peft = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    adapted = build_student(StudentConfig(model=str(scratch_student(tied=True)), peft=peft), seed=0)
    merge = adapted.merge_and_unload

    def older():
        merged = merge()
        merged.config.tie_word_embeddings = True
        return merged

    trainer = SimpleNamespace(
        model=SimpleNamespace(get_base_model=adapted.get_base_model, merge_and_unload=older),
        processing_class=None,
        accelerator=SimpleNamespace(unwrap_model=lambda model: model),
        args=SimpleNamespace(should_save=True),
    )
    save_merged(trainer, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False


def test_adapters_that_do_not_merge_are_refused(tiny_llama):
    peft = {"peft_type": "POLY", "target_modules": ["q_proj"]}
    with pytest.raises(ConfigError, match="cannot be merged into the student") as caught:
        build_student(StudentConfig(model=str(tiny_llama), peft=peft), seed=0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "peft", [None, {"r": 4, "target_modules": ["q_proj"]}], ids=["whole", "adapters"]
)
def test_an_evaluation_that_fails_loses_no_weights(config, tiny_llama, monkeypatch, peft):
    """Without checkpoints, the saved student is all there is."""
    measure, calls = logitcask.train.examination.evaluate, []

    def fail_after_training(*arguments, **options):
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("out of memory")
        return measure(*arguments, **options)

    monkeypatch.setattr(logitcask.train.examination, "evaluate", fail_after_training)
    changes = {"student": {"model": str(tiny_llama), "peft": peft}}
    with pytest.raises(RuntimeError, match="out of memory"):
        train_student(config(**changes, training={"max_steps": 1, "save_strategy": "no"}))
    saved = config().output_dir / (
        "adapter/adapter_model.safetensors" if peft else "model.safetensors"
    )
    assert saved.stat().st_size > 1000
    assert not (config().output_dir / "metrics.json").exists()


def test_weights_that_are_no_numbers_are_not_saved(config, tiny_llama, monkeypatch):
    run = logitcask.train.preparation.DistillationTrainer.run

    def spoil(self, checkpoint):
        run(self, checkpoint)
        self.model.model.norm.weight.data[3] = float("nan")

    monkeypatch.setattr(logitcask.train.preparation.DistillationTrainer, "run", spoil)
    with pytest.raises(UserError, match=r"diverged: model\.norm\.weight is nan after training"):
        train_student(config(training={"max_steps": 1, "save_strategy": "no"}))
    assert not (config().output_dir / "model.safetensors").exists()


def test_a_trial_that_was_killed_is_in_nobodys_way(tiny_llama, tmp_path):
    (tmp_path / TRIAL / "model.safetensors").mkdir(parents=True)
    try_saving(AutoModelForCausalLM.from_pretrained(tiny_llama), None, tmp_path)
    assert not list(tmp_path.iterdir())
