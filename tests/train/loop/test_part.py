"""``part``: trainings cut into parts end as they would have in one piece."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from logitcask.cache_format import CacheReader
from logitcask.cache_format.errors import ConfigError, UserError
from logitcask.train.data.order import PartBatches, PartPlan, single_units
from logitcask.train.loop.callbacks import TellObjective
from logitcask.train.model.student import build_student
from logitcask.train.output.report import curve
from logitcask.train.results import in_json
from logitcask.train.run import train

SEED = 3


@pytest.fixture
def part(scratch_config, tmp_path):
    """``part(name, cache, until, start, **changes)``: trains a part; its folder and metrics."""

    def run(name: str, cache: Any, until: int, start: Any = None, **changes: Any) -> Any:
        folder = tmp_path / name
        training = {
            "max_steps": 8,
            "lr_scheduler_type": "linear",
            "save_steps": 1000,
            "output_dir": str(folder),
            **changes.pop("training", {}),
        }
        config = scratch_config(
            cache=cache,
            part={"until": until, "start": None if start is None else str(start)},
            training=training,
            **changes,
        )
        return folder, train(config)[0]

    return run


def weights(folder: Any) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: Any, other: Any) -> bool:
    ours, theirs = weights(one), weights(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_two_parts_are_one_training(part, write_cache):
    """Optimizer, schedule and the order of a cache go on where the part before ended."""
    cache = write_cache("one", shards=1).path
    whole, _ = part("whole", cache, 8)
    first, before = part("first", cache, 3)
    second, after = part("second", cache, 8, first / "checkpoint-3")
    assert same(second, whole)
    assert not same(first, whole)
    assert after["before"] == before["after"]
    assert (before["steps"], after["steps"]) == (3, 8)
    logged = [json.loads((each / "log.json").read_text()) for each in (second, whole)]
    rates = [[r["learning_rate"] for r in each if "learning_rate" in r] for each in logged]
    assert rates[0] == rates[1]
    assert rates[0][-1] < rates[0][0] / 4


def test_a_longer_schedule_begins_with_the_next_step(part, write_cache):
    """At the end of the shorter schedule the learning rate is 0. The step behind it has that of the
    longer one.
    """
    cache = write_cache("one", shards=1).path
    first, _ = part("first", cache, 2, training={"max_steps": 2})
    second, metrics = part("second", cache, 3, first / "checkpoint-2", training={"max_steps": 4})
    assert metrics["steps"] == 3
    assert not same(first, second)


def test_the_log_and_the_curves_of_a_part(part, write_cache):
    """What was measured before a part stands at its first step, and no number is outside JSON."""
    cache = write_cache("one", shards=1).path
    first, _ = part("first", cache, 3)
    second, metrics = part("second", cache, 5, first / "checkpoint-3")
    assert metrics["first_step"] == 3
    log = json.loads((second / "log.json").read_text())
    assert curve("kl", metrics, log) == ([3, 5], [metrics[n]["kl"] for n in ("before", "after")])
    overflow = {"step": 1, "loss": 1.0, "grad_norm": float("inf")}
    assert json.loads(json.dumps(in_json(overflow))) == {**overflow, "grad_norm": None}


def test_a_part_killed_in_its_middle(part, write_cache, monkeypatch):
    cache = write_cache("one", shards=1).path
    other = write_cache("two", shards=1, kind="ragged").path
    mixture = [{"cache": cache, "weight": 1}, {"cache": other, "weight": 3, "held_out": 0}]
    first, _ = part("first", cache, 3)
    start = first / "checkpoint-3"
    save = {"training": {"save_steps": 1}}
    whole, _ = part("whole", mixture, 8, start, **save)
    end = TellObjective.on_step_end

    def killed(self: Any, args: Any, state: Any, control: Any, **rest: Any) -> None:
        end(self, args, state, control, **rest)
        if state.global_step == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TellObjective, "on_step_end", killed)
        with pytest.raises(KeyboardInterrupt):
            part("second", mixture, 8, start, **save)
    assert not (first.parent / "second" / "metrics.json").exists()
    resumed, _ = part("second", mixture, 8, start, **save)
    assert same(resumed, whole)


def test_a_part_of_no_step_is_the_student_itself(part, write_cache, scratch_config):
    cache = write_cache("one", shards=1).path
    folder, metrics = part("start", cache, 0)
    untrained = build_student(scratch_config(cache=cache).student, 7).state_dict()
    assert all(torch.equal(weights(folder)[name], untrained[name]) for name in weights(folder))
    assert metrics["before"] == metrics["after"]


def test_a_cache_of_weight_0_is_only_evaluated_on(part, write_cache):
    evaluated = write_cache("one", shards=1, kind="ragged").path
    learnt = write_cache("two", shards=1).path
    mixture = [
        {"cache": evaluated, "weight": 0},
        {"cache": learnt, "weight": 1, "held_out": 0},
    ]
    folder, metrics = part("run", mixture, 2)
    state = json.loads((folder / "checkpoint-2" / "trainer_state.json").read_text())
    found = state["stateful_callbacks"]["PartEnd"]["attributes"]
    assert sorted(found["drawn"].values()) == [0, 16]
    # What may be learnt, without what is held out.
    learnable = {name: len(CacheReader(each)) for name, each in (("1", evaluated), ("2", learnt))}
    assert sum(found["units"].values()) == sum(learnable.values()) - metrics["held_out_sequences"]
    assert metrics["held_out_sequences"] > 0


def test_a_checkpoint_of_another_architecture(part, write_cache, tmp_path):
    cache = write_cache("one", shards=1).path
    first, _ = part("first", cache, 1)
    stored = first / "checkpoint-1" / "model.safetensors"
    held = weights(first / "checkpoint-1")
    from safetensors.torch import save_file

    name = next(each for each in held if each.endswith("q_proj.weight"))
    save_file({**held, name: torch.zeros(3, 3)}, stored, {"format": "pt"})
    with pytest.raises(UserError, match=r"another architecture: its .*q_proj.* \(3, 3\)"):
        part("second", cache, 2, first / "checkpoint-1")
    save_file({n: w for n, w in held.items() if n != name}, stored, {"format": "pt"})
    with pytest.raises(UserError, match=r"another architecture: it has no .*q_proj"):
        part("second", cache, 2, first / "checkpoint-1")


def test_what_a_part_cannot_start_from(part, write_cache, scratch_config, tmp_path):
    cache = write_cache("one", shards=1).path
    with pytest.raises(UserError, match="no complete checkpoint"):
        part("second", cache, 2, tmp_path / "nothing")
    first, _ = part("first", cache, 2, training={"save_steps": 1})
    with pytest.raises(UserError, match="which is not the end of a part"):
        part("second", cache, 4, first / "checkpoint-1")
    with pytest.raises(UserError, match="has made 2 steps already"):
        part("second", cache, 1, first / "checkpoint-2")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"part": {"until": 9}}, "part.until is 9 and training.max_steps 8"),
        (
            {"part": {"until": 2}, "training": {"load_best_model_at_end": True}},
            "load_best_model_at_end",
        ),
        ({"cache": [{"cache": "a", "weight": 0}, {"cache": "b", "weight": 1}]}, "weight 0"),
        ({"part": {"until": 2}, "cache": [{"cache": "a", "weight": 0}]}, "nothing to learn from"),
    ],
)
def test_what_does_not_go_together(scratch_config, fields, message):
    training = {"max_steps": 8, **fields.get("training", {})}
    with pytest.raises((ConfigError, ValueError), match=message):
        scratch_config(**{"cache": "a", **fields, "training": training})


def test_streams_go_on_over_parts(rng):
    """Each unit of a cache comes once before any comes twice, whatever the parts mix it with."""
    sizes, parts = [11, 7], [(5, [1.0, 3.0]), (9, [2.0, 1.0]), (4, [0.0, 1.0])]
    caches = [
        single_units(*(np.full(size, 8, np.int64) for _ in range(2)), *(np.zeros(size, int),) * 2)
        for size in sizes
    ]
    read, first, seen = [0, 0], 0, {0: [], 1: []}
    for steps, shares in parts:
        plan = PartPlan(
            caches,
            shares,
            keys=[(1,), (2,)],
            read=read,
            first=first,
            seed=SEED,
            shuffle="all",
            window=1,
        )
        batches = PartBatches(plan, 3, steps=(first, first + steps), per_step=1)
        drawn = [unit for batch in list(batches)[first:] for unit in batch]
        assert len(batches) == first + steps
        assert len(drawn) == 3 * steps
        counts = [0, 0]
        for unit in drawn:
            source, own = plan.locate(unit)
            seen[source].append(own)
            counts[source] += 1
        exact = 3 * steps * np.array(shares) / sum(shares)
        assert np.abs(np.array(counts) - exact).max() < 1
        assert counts == plan.shares(3 * steps)
        read, first = [a + b for a, b in zip(read, counts, strict=True)], first + steps
    for source, size in enumerate(sizes):
        for start in range(0, len(seen[source]), size):
            one_pass = seen[source][start : start + size]
            assert len(set(one_pass)) == len(one_pass)
