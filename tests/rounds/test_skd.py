"""SKD in rounds: passes over the students' answers, what stays of them, and their figures."""

from __future__ import annotations

import json
import shutil
import signal
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from logitcask.cache_format import CacheReader
from logitcask.cache_format.errors import ConfigError, UserError
from logitcask.rounds.run import Rounds, run_rounds
from logitcask.rounds.state import State

from .conftest import COMMANDS, kill_at

SKD = {"top_k": 60, "passes": 3}


def state_of(config: Any) -> State:
    return State.model_validate_json((config.output / "state.json").read_text())


def weights(config: Any, number: int) -> dict[str, torch.Tensor]:
    return load_file(config.output / f"round-{number:03d}" / "student" / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def splice_of(command: list[str]) -> dict[str, Any] | None:
    """``data.generate.splice`` of a command."""
    found = [each for each in command if each.startswith("data.generate.splice=")]
    return json.loads(found[0].partition("=")[2]) if found else None


def test_passes_of_a_round(rounds, monkeypatch, caplog):
    """Each goes on from the one before. The last cache stays, and is learnt from."""
    kept: dict[str, list[np.ndarray]] = {}
    removed = Rounds._train

    def read_before_training(self: Rounds, state: State, number: int, name: str) -> None:
        if number:
            cache = CacheReader(self.cache(number))
            kept[cache.path] = [each.target_rank for each in cache]
        removed(self, state, number, name)

    monkeypatch.setattr(Rounds, "_train", read_before_training)
    caplog.set_level("INFO")
    config = rounds(count=2, skd=SKD)
    document, table = run_rounds(config, [])
    builds = [command for command in COMMANDS if command[0] == "teacher-cache"]
    assert len(builds) == 6
    for number in (1, 2):
        folder = config.output / f"round-{number:03d}"
        first, second, third = builds[3 * number - 3 : 3 * number]
        assert splice_of(first) is None
        expected = {"top_k": 60, "temperature": 0.2, "top_p": 0.5}
        assert splice_of(second) == {"cache": str(folder / "cache"), **expected}
        assert splice_of(third) == {"cache": str(folder / "cache-2"), **expected}
        # One student writes in all passes, and its draws are other ones in each round.
        for each in (first, second, third):
            assert f'data.generate.writer="{config.output}/round-{number - 1:03d}/student"' in each
            assert f"data.generate.seed={number}" in each
        assert sorted(each.name for each in folder.iterdir() if each.is_dir()) == [
            "cache-3",
            "student",
        ]
        manifest = CacheReader(folder / "cache-3").manifest
        assert manifest.data.generation.splice.number == 3
        trained = [each for each in COMMANDS if each[0] == "train-student"][number]
        assert str(folder / "cache-3") in next(each for each in trained if "cache=" in each)
    stages = [done.stage for done in state_of(config).done if done.content_sha256]
    assert stages == [
        "text",
        *("write-1", "splice-1-2", "splice-1-3"),
        *("write-2", "splice-2-2", "splice-2-3"),
    ]
    for number, round_ in enumerate(document["rounds"][1:], 1):
        figures, passes = round_["cache"], round_["cache"]["passes"]
        ranks = kept[str(config.output / f"round-{number:03d}" / "cache-3")]
        ends = [np.flatnonzero(each >= 60) for each in ranks]
        examined = sum(
            len(each) if not len(at) else at[0] + 1 for each, at in zip(ranks, ends, strict=True)
        )
        assert sum(each["examined_tokens"] for each in passes) == examined
        rejected = sum(each["rejected_tokens"] for each in passes)
        assert figures["rejection_rate"] == rejected / examined
        assert figures["answers_left_with_a_rejected_token"] == sum(len(at) > 0 for at in ends)
        for each in passes:
            rate = each["rejected_tokens"] / each["examined_tokens"]
            assert each["rejection_rate"] == pytest.approx(rate)
        assert figures["reverse_kl"] is not None
        assert figures["forward_kl"] is not None
        assert figures["folder"] == f"round-{number:03d}/cache-3"
        for name in ("writing_seconds", "scoring_seconds"):
            assert figures[name] == sum(each[name] for each in passes)
    assert table.splitlines()[0].split()[6] == "rejected"
    rate = document["rounds"][2]["cache"]["rejection_rate"]
    assert table.splitlines()[3].split()[5] == f"{rate:.1%}"
    assert "rejected: share of" in table
    left = document["rounds"][1]["cache"]["answers_left_with_a_rejected_token"]
    assert left > 0
    assert f"round 1: after the last pass {left} answers have a token to reject" in caplog.text
    page = (config.output / "rounds.html").read_text()
    assert "Acceptance" in page
    texts = page[page.index('id="written"') :]
    assert all(f"round {number}" in texts for number in (1, 2))


def test_passes_end_when_nothing_is_rejected(rounds):
    """The vocabulary has 384 ids, so no rank is 384."""
    config = rounds(count=1, skd={"top_k": 384, "passes": 4})
    document, _ = run_rounds(config, [])
    assert [command[0] for command in COMMANDS].count("teacher-cache") == 1
    assert document["rounds"][1]["cache"]["rejection_rate"] == 0
    assert CacheReader(config.output / "round-001" / "cache").manifest.store.writer_logprobs


def test_a_round_without_skd_says_nothing_of_rejections(rounds):
    document, table = run_rounds(rounds(count=1), [])
    assert "rejection_rate" not in document["rounds"][1]["cache"]
    assert "rejected" not in table


def test_rounds_go_on_from_their_last_pass(rounds):
    config = rounds(count=1, skd=SKD)
    first = run_rounds(config, [])
    COMMANDS.clear()
    assert run_rounds(config, []) == first
    assert COMMANDS == []
    document, _ = run_rounds(rounds(count=2, skd=SKD), [])
    assert document["rounds_done"] == 2
    shutil.rmtree(config.output / "round-001" / "cache-3")
    with pytest.raises(UserError, match=r"the cache of splice-1-3, .*cache-3.* cannot be read"):
        run_rounds(rounds(count=2, skd=SKD), [])


KILLS = (2, 70, 40, 25, 30, 20, 15)
"""Events at which a run is killed, one after the other: each start goes on from the one before."""


def test_kills(rounds, fork):
    """Killed while it writes, splices, scores, removes and trains, a run ends with the same student."""
    whole = rounds(count=1, skd=SKD, output="whole")
    run_rounds(whole, [])
    config = rounds(count=1, skd=SKD)

    def killed(event: int) -> int | None:
        def work() -> None:
            kill_at(event)
            run_rounds(config, [])

        child = fork(work)
        child.join()
        return child.exitcode

    codes, reached = [], []
    for event in KILLS:
        codes.append(killed(event))
        reached.append(
            state_of(config).done[-1].stage if (config.output / "state.json").exists() else ""
        )
    assert any(stage.startswith("splice") for stage in reached)
    assert codes == [-signal.SIGKILL] * len(KILLS)
    run_rounds(config, [])
    assert same(weights(config, 1), weights(whole, 1))
    one, other = (
        CacheReader(each.output / "round-001" / "cache-3").manifest for each in (config, whole)
    )
    assert one.content_sha256 == other.content_sha256
    assert one.fingerprint == other.fingerprint
    assert one.data.counters == other.data.counters
    stages = [[done.stage for done in state_of(each).done] for each in (config, whole)]
    assert stages[0] == stages[1]


def test_mistakes_are_said_before_anything_runs(rounds, tmp_path):
    def refused(said: str, **options: Any) -> None:
        with pytest.raises(ConfigError, match=said) as error:
            Rounds(rounds(skd=SKD, **options), [])
        assert len(str(error.value).splitlines()) == 1

    refused("some are the teacher's", student={"losses": [{"name": "policy_gradient"}]})
    refused("positions without a head", teacher={"store": {"min_k": 0}})
    splice = {"cache": "x"}
    refused(r"data\.generate\.splice is of a single build", generate={"splice": splice})
    fields = {"path": str(tmp_path / "prompts.jsonl"), "prompt_field": "q", "max_length": 48}
    data = {**fields, "max_tokens": 900, "generate": {"max_new_tokens": 10}}
    refused(r"data\.max_tokens is 900", teacher={"data": data})
    for wrong in ({"passes": 1}, {"top_k": 0}, {"top_p": 0}, {"temperature": -0.1}):
        with pytest.raises(ValueError, match=r"rounds\.skd|skd"):
            rounds(skd={**SKD, **wrong})


def test_other_passes_are_other_rounds(rounds):
    run_rounds(rounds(count=1, skd=SKD), [])
    with pytest.raises(UserError, match=r"rounds\.skd\.top_k: 60 -> 50"):
        run_rounds(rounds(count=1, skd={**SKD, "top_k": 50}), [])
