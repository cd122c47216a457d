"""The examples of docs/trainers.md, run as they are printed, against ``train-student``: on the same
batches, each of unequal numbers of kept positions, losses and weights are equal but for rounding.

For the comparison alone, the order is the stored one, and the optimizer is SGD: Adam's first steps
are the signs of gradients, also of those that are rounding errors.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import load_dataset, load_from_disk
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from logitcask import LOSSES, CachedDataset, CacheReader, RowDecoder, collate
from logitcask.train.config import TrainConfig
from logitcask.train.data.held_out import read_index
from logitcask.train.run import train

from .conftest import BLOCKS, ROOT, losses_of, replaced

RATE = 0.5
PADDED = {"shuffle": "none"}
PACKED = {"shuffle": "none", "packing": True, "row_tokens": 90}
QUIET = (
    "use_cpu=True, bf16=False, report_to='none', disable_tqdm=True, save_strategy='no',"
    " gradient_checkpointing=False"
)


def example(name, data, *changes):
    """An example with SGD, in stored order, and with ``data`` of the config."""
    return replaced(BLOCKS[name], ("ce_weight=0.5,", f"ce_weight=0.5, data={data!r},"), *changes)


SGD = (
    "AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)",
    f"SGD(model.parameters(), lr={RATE})",
)


def by_train_student(data):
    """(losses of the steps, weights) of a training with the same settings."""
    fields = {
        "cache": "caches/mine",
        "student": {"model": "my-student"},
        **losses_of(BLOCKS["loop.py"]),
        "data": data,
        "training": {
            "output_dir": "runs/own",
            "num_train_epochs": 1,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 4,
            "learning_rate": RATE,
            "lr_scheduler_type": "constant",
            "optim": "sgd",
            "logging_steps": 1,
            "seed": 0,
            "use_cpu": True,
            "disable_tqdm": True,
        },
    }
    train(TrainConfig.model_validate(fields))
    log = json.loads(Path("runs/own/log.json").read_text())
    return [step["loss"] for step in log if "loss" in step], load_file("runs/own/model.safetensors")


def by_loop(data):
    seen = {"losses": []}
    exec(
        example(
            "loop.py",
            data,
            ("shuffle=True", "shuffle=False"),
            SGD,
            ('print(f"loss {total:.4f}")', "losses.append(total)"),
        ),
        seen,
    )
    return seen["losses"], load_file("runs/loop/model.safetensors")


def by_trl(data):
    seen = {"__name__": "example"}
    exec(
        example(
            "trl_sft.py",
            data,
            ("learning_rate=1e-4", f"learning_rate={RATE}, optim='sgd'"),
            (
                "logging_steps=1,",
                f"logging_steps=1, train_sampling_strategy='sequential', {QUIET},",
            ),
        ),
        seen,
    )
    history = seen["trainer"].state.log_history
    assert any("eval_loss" in record for record in history)
    losses = [record["loss"] for record in history if "loss" in record]
    return losses, load_file("runs/trl/model.safetensors")


def by_lightning(data):
    pytest.importorskip("lightning", reason="the package lightning is not installed")
    seen = {"__name__": "example", "losses": []}
    exec(
        example(
            "lightning_module.py",
            data,
            ("shuffle=True", "shuffle=False"),
            (
                "AdamW(self.parameters(), lr=1e-4, weight_decay=0.0)",
                f"SGD(self.parameters(), lr={RATE})",
            ),
            (
                "        optimizer.step()\n",
                "        optimizer.step(); losses.append(total.item())\n",
            ),
            (
                "max_epochs=1,",
                "max_epochs=1, accelerator='cpu', logger=False, enable_checkpointing=False,"
                " enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,",
            ),
        ),
        seen,
    )
    assert "held_out_loss" in seen["trainer"].callback_metrics
    return seen["losses"], load_file("runs/lightning/model.safetensors")


@pytest.mark.parametrize("other", [by_loop, by_trl, by_lightning], ids=["loop", "trl", "lightning"])
@pytest.mark.parametrize("data", [PADDED, PACKED], ids=["padded", "packed"])
def test_same_losses_and_weights_as_train_student(folder, other, data):
    start = load_file("my-student/model.safetensors")
    found, weights = other(data)
    losses, own = by_train_student(data)
    assert len(losses) >= 2
    assert found == pytest.approx(losses, rel=2e-6)
    for name, weight in own.items():
        moved, apart = (weight - start[name]).norm(), (weights[name] - weight).norm()
        assert apart < 1e-4 * moved + 5e-7 * weight.norm(), name
        assert moved > 100 * apart, name


def test_a_step_is_a_mean_over_its_positions(folder):
    """The first step of the loop against each sequence alone, in float64; a mean of the means of
    its micro-batches is another number.
    """
    (first, *_), _ = by_loop(PADDED)
    cache = CacheReader("caches/mine")
    learnt = np.flatnonzero(~read_index(cache, 0.1).held_out)[:16]
    data = CachedDataset(cache, learnt)
    model = AutoModelForCausalLM.from_pretrained("my-student", dtype=torch.float64)
    sums, counts = [], []
    for item in range(16):
        batch = collate([data[item]])
        logits = model(batch["input_ids"]).logits[0][batch["kept"]]
        teacher = data.teacher(batch)
        value = LOSSES["forward_kl"](logits, teacher) + 2 * LOSSES["ranking"](logits, teacher, k=5)
        value = value + 0.5 * LOSSES["ce"](logits, teacher)
        sums.append(value.sum().item())
        counts.append(len(value))
    assert first == pytest.approx(sum(sums) / sum(counts), rel=1e-6)
    means = [sum(sums[at : at + 4]) / sum(counts[at : at + 4]) for at in range(0, 16, 4)]
    assert abs(np.mean(means) - first) > 5e-5 * first


def test_the_page_shows_the_files(folder):
    files = {file.name: file.read_text() for file in (ROOT / "examples/trainers").iterdir()}
    assert files == BLOCKS
    assert max(len(text.splitlines()) for text in files.values()) <= 60


def test_decoded_rows(folder, capsys):
    """Every column of every row is what a reader finds, whichever way ``datasets`` decodes it."""
    seen = {}
    exec(BLOCKS["decoded_rows.py"], seen)
    cache = CacheReader("caches/mine")
    first = cache[0]
    said = f"{first.sequence_id}: after token {first.positions[0]} the teacher expects {first.ids[0, 0]} most\n"
    assert capsys.readouterr().out == said
    lazy = seen["rows"].with_transform(RowDecoder("caches/mine"))
    streamed = load_dataset(
        "arrow", data_files="caches/mine/data/*.arrow", split="train", streaming=True
    ).map(RowDecoder("caches/mine"), batched=True, batch_size=7)
    mapped = seen["decoded"].with_format(None)
    assert len(mapped) == len(lazy) == len(cache)
    for sequence, *rows in zip(cache, mapped, lazy, streamed, strict=True):
        head, drawn = sequence.ids >= 0, sequence.samples.ids >= 0
        for row in rows:
            assert row["sequence_id"] == sequence.sequence_id
            for name in ("input_ids", "loss_mask", "positions", "target_rank"):
                assert row[name] == getattr(sequence, name).tolist()
            for name in ("tail_logprob", "target_logprob", "entropy"):
                np.testing.assert_array_equal(np.float32(row[name]), getattr(sequence, name))
            for at in range(len(sequence.positions)):
                assert row["head_ids"][at] == sequence.ids[at][head[at]].tolist()
                assert row["draws"][at] == sequence.samples.ids[at][drawn[at]].tolist()
                values = np.float32(row["head_logprobs"][at])
                np.testing.assert_array_equal(values, sequence.logprobs[at][head[at]])


def test_the_text_for_llama_factory(folder):
    """The saved folder has what LLaMA-Factory reads: tokens, a mask of ones, labels with -100."""
    exec(BLOCKS["llama_factory.py"], {})
    rows = load_from_disk("tokenized/mine")["train"]
    assert set(rows.column_names) == {"input_ids", "attention_mask", "labels"}
    for row, sequence in zip(rows, CacheReader("caches/mine"), strict=True):
        assert row["input_ids"] == sequence.input_ids.tolist()
        assert row["attention_mask"] == [1] * len(sequence)
        learnt = sequence.loss_mask
        assert row["labels"] == np.where(learnt, sequence.input_ids, -100).tolist()
        assert 0 < learnt.sum() < len(learnt)
