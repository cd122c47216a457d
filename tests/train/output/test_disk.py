"""The space of checkpoints: forecast, said, and compared with what is free."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoModelForCausalLM, TrainingArguments

import logitcask.train.output.disk
from logitcask.train.loop.arguments import check_optimizer
from logitcask.train.output.disk import (
    CheckpointSize,
    checkpoint_size,
    checkpoints,
    say_disk_space,
)
from logitcask.train.run import train


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({"save_steps": 10}, 4),
        ({"save_steps": 10, "save_total_limit": 1}, 2),
        ({"save_steps": 0.5}, 2),
        ({"save_steps": 500}, 1),
        ({"save_strategy": "no"}, 0),
        ({"save_strategy": "epoch", "num_train_epochs": 2.5}, 3),
    ],
)
def test_checkpoints_that_a_run_keeps(tmp_path, fields, count):
    assert (
        checkpoints(TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **fields), 35)
        == count
    )


@pytest.mark.parametrize("free", [4 * 200, 4 * 200 - 1])
def test_a_disk_that_is_too_small_is_said(tmp_path, monkeypatch, caplog, free):
    """The third checkpoint is there before the first one is removed, and at last the student."""
    caplog.set_level(logging.INFO)
    student = SimpleNamespace(parameters=lambda: [SimpleNamespace(nbytes=200)])
    arguments = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, save_steps=10, save_total_limit=2
    )
    monkeypatch.setattr(
        logitcask.train.output.disk.shutil, "disk_usage", lambda _: SimpleNamespace(free=free)
    )
    say_disk_space(CheckpointSize(80, 120), student, arguments, 40, tmp_path)
    first, *warning = caplog.messages
    assert first == (
        f"checkpoints: about 200B (weights 80B, optimizer 120B) each, at most 3 at once; {tmp_path} "
        f"has {free}B free"
    )
    assert [each.partition(";")[0] for each in warning] == (
        [f"{tmp_path} has 799B free, and 3 checkpoint(s) and the student are about 800B"]
        if free == 799
        else []
    )


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor", "adagrad"])
def test_a_checkpoint_has_the_size_that_was_said(write_cache, scratch_config, tmp_path, optim):
    """Compared with the files, of a student large enough that their headers do not matter."""
    small = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}
    config = scratch_config(
        cache=str(write_cache("sound", shards=1, sequences=20).path),
        student={"config": {"model_type": "llama", "max_position_embeddings": 64, **small}},
        training={"optim": optim, "max_steps": 1, "save_steps": 1},
    )
    train(config)
    run = Path(config.output_dir)
    student = AutoModelForCausalLM.from_pretrained(run)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, optim=optim)
    said = checkpoint_size(student, check_optimizer(arguments, student), arguments)
    found = {file.name: file.stat().st_size for file in (run / "checkpoint-1").iterdir()}
    assert said.weights == pytest.approx(found["model.safetensors"], rel=0.01)
    rough = 0.05 * said.weights if optim == "adafactor" else 20_000
    assert said.optimizer == pytest.approx(found["optimizer.pt"], rel=0.01, abs=rough)


def test_states_of_an_optimizer_that_needs_the_model_are_unknown(tiny_llama, tmp_path):
    student = AutoModelForCausalLM.from_pretrained(tiny_llama)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    arguments.optim = SimpleNamespace(value="galore_adamw")
    stand_in = check_optimizer(
        TrainingArguments(output_dir=str(tmp_path), use_cpu=True, optim="sgd"), student
    )
    said = checkpoint_size(student, stand_in, arguments)
    assert said.optimizer is None
    assert said.bytes == sum(each.nbytes for each in student.parameters())
    assert "optimizer unknown" in str(said)
