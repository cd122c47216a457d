"""Half precision computes, and nothing else is in it: not the weights, not the teacher, not what
is logged.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import AutoConfig, AutoModelForCausalLM

from logitcask.cache_format.errors import ConfigError
from logitcask.train.data.batch import Place
from logitcask.train.loop.trainer import DistillationTrainer
from logitcask.train.model.precision import (
    check_attention,
    computing_dtype,
    shard_without_casts,
    warn_of_lost_steps,
)
from logitcask.train.run import train

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128}


def student(model_type="llama", **fields):
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SMALL, **fields))


class Stopped(Exception):
    """In the place of the training."""


@pytest.fixture
def trainer(write_cache, scratch_config, monkeypatch):
    """The trainer of a small run of two caches, right before its first step; the losses are taid
    and ce.
    """
    made = []

    def stop(self, checkpoint):
        made.append(self)
        raise Stopped

    monkeypatch.setattr(DistillationTrainer, "run", stop)
    caches = [{"cache": str(write_cache(name, shards=1).path)} for name in ("a", "b")]
    with pytest.raises(Stopped):
        train(scratch_config(cache=caches, losses=[{"name": "taid"}]))
    return made[0]


def test_ten_thousand_micro_batches_are_logged_right(trainer):
    """As a float32 sum grows its steps do too: 10,000 times 37 positions of 3.33 nats would be
    logged as another number.
    """
    values = {
        "taid": torch.full((37,), 3.33),
        "ce": torch.linspace(0.1, 2.7, 37),
        "objective": torch.full((37,), 1.7),
    }
    expected = {name: value.double().mean().item() for name, value in values.items()}
    batch = {"layout": (Place(0, 40, 17, 17), Place(1, 40, 20, 20))}
    for _ in range(10_000):
        trainer.compute_loss(
            lambda **_: (torch.tensor(61.6), dict(values)), batch, num_items_in_batch=37
        )
    means = (trainer._step_totals.sums[:-1] / trainer._step_totals.sums[-1]).tolist()
    assert means == pytest.approx([expected["taid"]], rel=1e-9)
    logs = {"loss": 1.0}
    trainer.log(logs)
    assert logs["positions"] == 370_000
    assert logs["loss_taid"] == pytest.approx(expected["taid"], rel=1e-9)
    assert logs["loss_ce"] == pytest.approx(expected["ce"], rel=1e-9)
    assert [logs["cache_a"], logs["cache_b"]] == pytest.approx(
        2 * [expected["objective"]], rel=1e-9
    )


def test_under_fsdp2_only_weights_are_cast():
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    shard_without_casts(plugin)
    assert plugin.mixed_precision_policy is None
    plugin.set_mixed_precision("bf16")
    shard_without_casts(plugin)
    assert plugin.mixed_precision_policy == MixedPrecisionPolicy(
        param_dtype=torch.bfloat16,
        reduce_dtype=torch.float32,
        output_dtype=None,
        cast_forward_inputs=False,
    )


def test_sharding_is_fsdp2():
    with pytest.raises(
        ConfigError, match=r"sharded by FSDP1; set training\.fsdp_config\.version .* to 2"
    ):
        shard_without_casts(SimpleNamespace(fsdp_version=1, mixed_precision_policy=None))


def test_weights_that_are_trained_in_bfloat16_are_warned_of(caplog):
    wide = student()
    narrow = student().to(torch.bfloat16)
    for each, widened in ((wide, False), (narrow, True)):
        warn_of_lost_steps(each, widened=widened)
    for weight in narrow.parameters():
        weight.requires_grad = False  # under adapters, which are in float32
    warn_of_lost_steps(nn.ModuleList([narrow, nn.Linear(2, 2)]), widened=False)
    assert not caplog.text
    narrow.lm_head.weight.requires_grad = True
    warn_of_lost_steps(narrow, widened=False)
    assert "trained in bfloat16" in caplog.text
    assert "set student.dtype to float32 and training.bf16 to true" in caplog.text


def test_what_the_warning_says_is_so():
    """AdamW at 2e-5, on weights as large as those of a model: most are where they were, in
    float32 none is.
    """
    start = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 0.02
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        weight = nn.Parameter(start.to(dtype))
        before = weight.detach().clone()
        optimizer = torch.optim.AdamW([weight], lr=2e-5, weight_decay=0.0)
        for _ in range(100):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        moved[dtype] = (weight.detach() != before).float().mean().item()
    assert moved[torch.float32] == 1
    assert moved[torch.bfloat16] < 0.5


@pytest.mark.parametrize(
    ("device", "mixed", "dtype"),
    [
        ("cpu", "no", None),
        ("cpu", "bf16", torch.bfloat16),
        ("cpu", "fp16", None),
        ("cuda", "fp16", torch.float16),
    ],
)
def test_flash_attention_needs_half_precision(device, mixed, dtype):
    arguments = SimpleNamespace(device=torch.device(device), mixed_precision=mixed)
    assert computing_dtype(arguments) == dtype
    model = student()
    check_attention(model, arguments)
    model.config._attn_implementation = "flash_attention_2"
    if dtype is None:
        with pytest.raises(
            ConfigError,
            match=r"attention is 'flash_attention_2', which does not .*; set training\.bf16",
        ):
            check_attention(model, arguments)
    else:
        check_attention(model, arguments)
    check_attention(model.to(torch.bfloat16), arguments)
