"""Rounds in which the teacher answers the same prompts: DistiLLM-2, and DPKD on pairs of texts."""

from __future__ import annotations

import json
import shutil
import signal
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM

from logitcask.cache_format import CacheReader
from logitcask.cache_format.errors import ConfigError, UserError
from logitcask.rounds.page import parts_of
from logitcask.rounds.run import Rounds, run_rounds

from .conftest import COMMANDS, kill_at
from .test_run import same, state_of, weights

DISTILLM_2 = [
    {"name": "skew_kl", "caches": ["teacher-*"]},
    {"name": "skew_reverse_kl", "caches": ["round-*"]},
]
DPKD = [{"name": "dpkd_sequence", "beta": 0.7}]
HALF = {"teacher_text": True, "on_policy_fraction": 0.5}


def caches(config: Any, number: int) -> tuple[CacheReader, CacheReader]:
    """The teacher's answers of a round, and the student's."""
    folder = config.output / f"round-{number:03d}"
    return CacheReader(folder / "teacher"), CacheReader(folder / "cache")


def records(config: Any, number: int) -> list[dict[str, Any]]:
    log = config.output / f"round-{number:03d}" / "student" / "log.json"
    return [each for each in json.loads(log.read_text()) if "loss" in each]


def test_distillm_2_learns_from_both_texts_in_one_batch(rounds):
    config = rounds(student={"losses": DISTILLM_2}, warmup_steps=1, **HALF)
    document, table = run_rounds(config, [])
    programs = ["teacher-cache", "teacher-cache", "train-student"]
    assert [command[0] for command in COMMANDS] == ["train-student", *programs, *programs]
    for number in (1, 2):
        teacher, student = caches(config, number)
        assert teacher.manifest.data.generation.writer is None
        seeds = [f"data.generate.seed={seed + number}" for seed in (1_000_000, 0)]
        assert [seed in COMMANDS[3 * number - 2 + at] for at, seed in enumerate(seeds)] == [
            True
        ] * 2
        assert student.manifest.data.generation.writer.model.endswith(
            f"round-{number - 1:03d}/student"
        )
        asked = {f"train/{n % 10}/0" for n in range(4 * number - 4, 4 * number)}
        assert {s.sequence_id for s in teacher} <= asked
        assert {s.sequence_id for s in student} <= asked
        found = document["rounds"][number]
        assert found["teacher_text"]["fingerprint"] == teacher.manifest.fingerprint
        assert found["teacher_text"]["reverse_kl"] is None
        assert set(found["stages"]) == {"answer", "write", "train"}
        of_stages = (s["seconds"] + s["handover_seconds"] for s in found["stages"].values())
        assert sum(parts_of(found)) == pytest.approx(sum(of_stages))
        assert set(found["passes"]) == {"text", f"teacher-{number}", f"round-{number}"}
        assert found["staleness"] == 0  # skew_reverse_kl: no replay by default
    # Both losses in the same batches; forward KL before the first round.
    last = records(config, 2)
    assert ["loss_forward_kl" in each for each in last] == [True] + 4 * [False]
    for each in last[1:]:
        assert each["cache_teacher-1" if each["step"] < 4 else "cache_teacher-2"] == pytest.approx(
            each["loss_skew_kl"], rel=1e-5
        )
        assert each["loss_skew_reverse_kl"] > 0
    assert len(table.splitlines()[1].split()) == len(table.splitlines()[2].split())
    shares = {each["name"]: each["weight"] for each in Rounds(config, []).mixture(2)}
    assert shares == {"text": 0.0, "teacher-2": 0.5, "round-2": 0.5}


def test_the_teachers_text_is_replayed_with_the_students(rounds):
    config = rounds(
        student={"losses": DPKD},
        teacher_text=True,
        on_policy_fraction=0.5,
        replay=0.2,
        count=3,
    )
    mixture = Rounds(config, []).mixture(3)
    shares = {each["name"]: each["weight"] for each in mixture}
    assert shares == pytest.approx(
        {"text": 0.0}
        | {f"{kind}-{n}": share for n, share in ((1, 0.05), (2, 0.05), (3, 0.4)) for kind in KINDS}
    )
    assert [each.get("preferred") for each in mixture] == [
        *(None, None, "teacher-1"),
        *(None, "teacher-2", None, "teacher-3"),
    ]


KINDS = ("teacher", "round")


def test_dpkd_is_that_of_both_texts(rounds, tiny_llama):
    """The first step of a round: its loss by transformers, of whole texts in float64."""
    config = rounds(count=1, student={"losses": DPKD}, steps_per_round=1, warmup_steps=2, **HALF)
    run_rounds(config, [])
    student = AutoModelForCausalLM.from_pretrained(config.output / "round-000" / "student").double()
    teacher = AutoModelForCausalLM.from_pretrained(tiny_llama).double()

    @torch.no_grad()
    def logprob(model: Any, sequence: Any) -> torch.Tensor:
        ids = torch.from_numpy(sequence.input_ids).long()
        at = torch.from_numpy(sequence.positions).long()
        return model(ids[None]).logits[0, at].log_softmax(1)[torch.arange(len(at)), ids[at + 1]]

    texts = [{s.sequence_id: s for s in cache} for cache in caches(config, 1)]
    losses = []
    for name in texts[0].keys() & texts[1].keys():
        of_student, of_teacher = (
            [logprob(model, each[name]) for each in texts] for model in (student, teacher)
        )
        gap = [(q - p).mean() for q, p in zip(of_student, of_teacher, strict=True)]
        losses.append(-logsigmoid(0.7 * (gap[0] - gap[1])) - 0.5 * of_student[0].mean())
    assert len(losses) == 4  # one batch is the whole round
    last = records(config, 1)[-1]
    # The stored logprobs are rounded to 1/256.
    assert last["loss"] == pytest.approx(np.mean(losses), abs=0.7 / 256)
    assert last["loss_dpkd_sequence"] == pytest.approx(last["loss"], rel=1e-5)
    # Four pairs, and neither text alone.
    drawn = json.loads(
        next(config.output.glob("round-001/student/checkpoint-3/trainer_state.json")).read_text()
    )
    found = drawn["stateful_callbacks"]["PartEnd"]["attributes"]["drawn"]
    of_caches = [each.manifest.fingerprint for each in caches(config, 1)]
    assert [found[each] for each in of_caches] == [4, 4]


@pytest.mark.parametrize("event", [30, 100])
def test_kills(rounds, fork, event):
    """Killed while the teacher or the student writes, a run ends with the same student."""
    fields = {"count": 2, "student": {"losses": DPKD}, "replay": 0.5, **HALF}
    whole = rounds(output="whole", **fields)
    run_rounds(whole, [])
    config = rounds(**fields)

    def work() -> None:
        kill_at(event)
        run_rounds(config, [])

    child = fork(work)
    child.join()
    assert child.exitcode == -signal.SIGKILL
    run_rounds(config, [])
    for number in range(3):
        assert same(weights(config, number), weights(whole, number))
    stages = [done.stage for done in state_of(config).done]
    assert stages == ["text", "start", *(f"{kind}-{n}" for n in (1, 2) for kind in STAGES)]


STAGES = ("answer", "write", "train")


def test_the_teachers_text_exchanged(rounds):
    config = rounds(count=1, student={"losses": DPKD}, **HALF)
    run_rounds(config, [])
    folder = config.output / "round-001"
    known = state_of(config).of("answer-1").fingerprint[:16]
    shutil.rmtree(folder / "teacher")
    shutil.copytree(folder / "cache", folder / "teacher")
    with pytest.raises(UserError, match=f"another cache than answer-1 .* expected {known}"):
        run_rounds(rounds(count=2, student={"losses": DPKD}, **HALF), [])


@pytest.mark.parametrize(
    ("losses", "fields", "said"),
    [
        (DPKD, {"on_policy_fraction": 0.5}, "rounds.teacher_text is false; set it to true"),
        (DPKD, {**HALF, "on_policy_fraction": 0.4}, "on_policy_fraction is 0.4, but dpkd_seq"),
        (DISTILLM_2, {"on_policy_fraction": 0.5}, "skew_kl has caches: teacher-\\*, but the"),
        (DISTILLM_2[:1], HALF, "no loss applies to the cache round-1 of a round"),
        (
            [*DISTILLM_2[:1], {"name": "policy_gradient"}],
            HALF,
            "set it to 1, or give the loss caches: \\[round-\\*\\]",
        ),
    ],
)
def test_losses_without_their_texts_are_said_before_anything_runs(rounds, losses, fields, said):
    with pytest.raises(ConfigError, match=said) as caught:
        run_rounds(rounds(student={"losses": losses}, **fields), [])
    assert "\n" not in str(caught.value)
    assert COMMANDS == []


def test_a_teacher_that_cannot_write_is_said_before_anything_runs(rounds, tiny_llama):
    server = {"model": str(tiny_llama), "backend": "server", "server": {"url": "http://x"}}
    with pytest.raises(ConfigError, match="a server only scores"):
        run_rounds(
            rounds(
                teacher={"teacher": server, "store": {"top_k": 8, "tail_samples": 0}},
                student={"losses": DPKD},
                **HALF,
            ),
            [],
        )
    assert COMMANDS == []


def test_text_of_the_teacher_needs_a_share(rounds):
    with pytest.raises(ValueError, match="on_policy_fraction is 1, which leaves the teacher's"):
        rounds(teacher_text=True)


def test_the_policy_gradient_beside_text_of_the_teacher(rounds):
    losses = [DISTILLM_2[0], {"name": "policy_gradient", "caches": ["round-*"]}]
    document, _ = run_rounds(rounds(count=1, student={"losses": losses}, **HALF), [])
    assert document["rounds_done"] == 1
