"""Half precision computes, and nothing else is in it: not the weights, not the teacher, not what is logged."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from torch.distributed.fsdp import MixedPrecisionPolicy

from cache_format.errors import ConfigError
from train.precision import shard_without_casts
from train.run import train
from train.selection import Place
from train.trainer import DistillationTrainer


class Stopped(Exception):
    """In the place of the training."""


@pytest.fixture
def trainer(write_cache, scratch_config, monkeypatch):
    """The trainer of a small run of two caches, right before its first step; the losses are taid and ce."""
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
    """As a float32 sum grows its steps do too: 10,000 times 37 positions of 3.33 nats would be logged as another number."""
    values = {"taid": torch.full((37,), 3.33), "ce": torch.linspace(0.1, 2.7, 37), "objective": torch.full((37,), 1.7)}
    expected = {name: value.double().mean().item() for name, value in values.items()}
    batch = {"layout": (Place(0, 40, 17, 17), Place(1, 40, 20, 20))}
    for _ in range(10_000):
        trainer.compute_loss(lambda **_: (torch.tensor(61.6), dict(values)), batch, num_items_in_batch=37)
    means = (trainer._step_sums[:-1] / trainer._step_sums[-1]).tolist()
    assert means == pytest.approx([expected["taid"]], rel=1e-9)
    logs = {"loss": 1.0}
    trainer.log(logs)
    assert logs["positions"] == 370_000
    assert logs["loss_taid"] == pytest.approx(expected["taid"], rel=1e-9)
    assert logs["loss_ce"] == pytest.approx(expected["ce"], rel=1e-9)
    assert [logs["cache_a"], logs["cache_b"]] == pytest.approx(2 * [expected["objective"]], rel=1e-9)


def test_under_fsdp2_only_weights_are_cast():
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    shard_without_casts(plugin)
    assert plugin.mixed_precision_policy is None
    plugin.set_mixed_precision("bf16")
    shard_without_casts(plugin)
    assert plugin.mixed_precision_policy == MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=None, cast_forward_inputs=False
    )


def test_sharding_is_fsdp2():
    with pytest.raises(ConfigError, match=r"sharded by FSDP1; set training\.fsdp_config\.version .* to 2"):
        shard_without_casts(SimpleNamespace(fsdp_version=1, mixed_precision_policy=None))
