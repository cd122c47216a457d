"""What each process that ``test_distributed`` starts does: the trainings of a list, one after
another.

It is the program that torchrun starts, and what forked processes of the tests call. Starting Python
and torch takes longer than the trainings do. A job is a config and how it goes: ``restart``;
``killed``, the step after which the last process kills itself; ``interrupted``, the step after
which all of them stop and the next job begins.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from logitcask.cache_format import CacheReader
from logitcask.train.config import TrainConfig
from logitcask.train.distributed import gathered, is_main, leave, processes
from logitcask.train.loop.trainer import DistillationTrainer
from logitcask.train.run import train


class Interrupted(Exception):
    """Stands for whatever ends a process."""


end_step = DistillationTrainer.end_step
compute_loss = DistillationTrainer.compute_loss
check_shard = CacheReader.check_shard
checked: list[int] = []


def counted(self: CacheReader, shard: int) -> None:
    checked.append(shard)
    check_shard(self, shard)


def shard_on_cpus() -> None:
    """Has accelerate use FSDP without GPUs. That condition apart, its code and torch's are the
    same on a CPU.
    """
    begin = PartialState.__init__

    def pretend(self: PartialState, *args: Any, **kwargs: Any) -> None:
        fresh = not PartialState._shared_state
        begin(self, *args, **kwargs)
        if fresh:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = pretend


def exact(
    self: DistillationTrainer, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any
) -> Any:
    """Computes the loss, and looks whether what the student is given and returns is in float32."""

    def watched(**inputs: Any) -> Any:
        objective, values = model(**inputs)
        assert {each.dtype for each in (objective, *values.values())} == {torch.float32}
        return objective, values

    return compute_loss(self, watched, inputs, *args, **kwargs)


def watch(
    *,
    sharded: bool,
    unused: bool = False,
    killed: int | None = None,
    interrupted: int | None = None,
) -> None:
    """After every step: whether parameters are sharded, all or none, and whether to stop here."""

    def end(self: DistillationTrainer) -> None:
        end_step(self)
        assert all(isinstance(weight, DTensor) == sharded for weight in self.model.parameters())
        assert all(weight.dtype == torch.float32 for weight in self.model.parameters())
        assert sharded or self.model_wrapped.find_unused_parameters == unused
        rank, count = processes()
        if self.state.global_step == killed and rank == count - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.state.global_step == interrupted:
            raise Interrupted

    DistillationTrainer.end_step = end
    DistillationTrainer.compute_loss = exact


def _caches(given: str | list[dict[str, Any]]) -> list[str]:
    """The folders of a config's caches."""
    return [given] if isinstance(given, str) else [each["cache"] for each in given]


def main(file: Path) -> None:
    work = json.loads(file.read_text())
    CacheReader.check_shard = counted
    if work["fsdp"]:
        shard_on_cpus()
    found = []
    for job in work["jobs"]:
        unused = job["config"]["training"].get("ddp_find_unused_parameters", False)
        watch(
            sharded=work["fsdp"],
            unused=unused,
            killed=job.get("killed"),
            interrupted=job.get("interrupted"),
        )
        try:
            found.append(
                train(TrainConfig.model_validate(job["config"]), restart=job.get("restart", False))[
                    1
                ]
            )
        except Interrupted:
            found.append(None)
    # In each training that took place, each shard by one process of the two.
    shards = [
        sum(len(CacheReader(cache).manifest.shards) for cache in _caches(job["config"]["cache"]))
        for job, finished in zip(work["jobs"], found, strict=True)
        if not finished
    ]
    assert sum(map(len, gathered(checked))) == sum(shards)
    if is_main():
        file.with_suffix(".found").write_text(json.dumps(found))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
