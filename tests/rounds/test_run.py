"""Rounds, stage by stage: what each learns from, what stays on disk, what a killed run ends with."""

from __future__ import annotations

import json
import shutil
import signal
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from logitcask.cache_format import CacheReader
from logitcask.cache_format.cli.config_file import load_config
from logitcask.cache_format.cli.config_model import ConfigModel
from logitcask.cache_format.errors import ConfigError, UserError
from logitcask.rounds.commands import overrides
from logitcask.rounds.figures import repetition
from logitcask.rounds.report import _useful
from logitcask.rounds.run import Rounds, run_rounds
from logitcask.rounds.state import State

from .conftest import COMMANDS, kill_at


def state_of(config: Any) -> State:
    return State.model_validate_json((config.output / "state.json").read_text())


def weights(config: Any, number: int) -> dict[str, torch.Tensor]:
    return load_file(config.output / f"round-{number:03d}" / "student" / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_the_newest_student_writes_and_the_training_goes_on(rounds, tiny_llama):
    config = rounds(on_policy_fraction=0.5, replay=0.5, count=3, warmup_steps=1)
    document, table = run_rounds(config, [])
    assert [command[0] for command in COMMANDS] == [
        "train-student",
        *["teacher-cache", "train-student"] * 3,
    ]
    asked = []
    for number in (1, 2, 3):
        cache = CacheReader(config.output / f"round-{number:03d}" / "cache")
        writer = cache.manifest.data.generation.writer
        folder = config.output / f"round-{number - 1:03d}" / "student"
        assert writer.model == str(folder)
        assert writer.seed == number
        asked += [sequence.sequence_id for sequence in cache]
    # Ten prompts, four a round: the first two come again.
    assert asked == [f"train/{n % 10}/0" for n in range(12)]
    assert [round_["steps"] for round_ in document["rounds"]] == [1, 3, 5, 7]
    for before, after in zip(document["rounds"], document["rounds"][1:], strict=False):
        assert after["held_out_before"] == before["held_out"]
    shares = {each["name"]: each["weight"] for each in Rounds(config, []).mixture(3)}
    assert shares == {"text": 0.5, "round-1": 0.125, "round-2": 0.125, "round-3": 0.25}
    assert document["rounds"][3]["staleness"] > 0
    assert document["rounds"][1]["staleness"] == 0
    lines = table.splitlines()
    assert [line.split()[0] for line in lines[:5]] == ["round", "0", "1", "2", "3"]
    on_disk = json.loads((config.output / "rounds.json").read_text())
    assert on_disk == json.loads(json.dumps(document))
    # Checkpoints of earlier rounds are gone, their students are not.
    left = sorted(each.parts[-3] for each in config.output.glob("round-*/student/checkpoint-*"))
    assert set(left) == {"round-003"}
    assert not same(weights(config, 2), weights(config, 3))


def test_figures_are_those_of_the_caches(rounds):
    config = rounds(count=1)
    document, _ = run_rounds(config, [])
    figures = document["rounds"][1]["cache"]
    cache = CacheReader(config.output / "round-001" / "cache")
    written = np.concatenate([each.writer_logprob for each in cache]).astype(np.float64)
    scored = np.concatenate([each.target_logprob for each in cache]).astype(np.float64)
    assert figures["written_tokens"] == len(written)
    assert figures["reverse_kl"] == pytest.approx((written - scored).mean())
    assert figures["teacher_ce"] == pytest.approx(-scored.mean())
    assert figures["mean_answer_tokens"] == pytest.approx(len(written) / len(cache))


def test_repetition_counts_what_has_occurred_before():
    ids = np.array([1, 2, 3, 4, 1, 2, 3, 4, 5], np.int32)
    grams = [tuple(ids[i : i + 4]) for i in range(6)]
    assert repetition(ids) == pytest.approx(1 - len(set(grams)) / 6)
    assert repetition(ids[:3]) == 0


def test_seconds_of_earlier_starts_are_no_negative_overhead():
    """A training of 100 seconds that was killed after 80 has a last start of 30."""
    assert _useful(30.0, {"training_seconds": 100.0}) == 30.0
    assert _useful(30.0, {"writing_seconds": 4.0, "scoring_seconds": 5.0}) == 9.0


def test_a_finished_run_is_found(rounds):
    config = rounds(count=1)
    first = run_rounds(config, [])
    COMMANDS.clear()
    assert run_rounds(config, []) == first
    assert COMMANDS == []


def test_more_rounds_later(rounds):
    """With the schedule's length given, the same students as if they had been asked for at once."""
    training = {"student": {"training": {"max_steps": 6}}}
    whole = rounds(count=3, output="whole", **training)
    run_rounds(whole, [])
    config = rounds(count=1, **training)
    run_rounds(config, [])
    COMMANDS.clear()
    run_rounds(rounds(count=3, **training), [])
    assert len(COMMANDS) == 4
    for number in range(4):
        assert same(weights(config, number), weights(whole, number))


def test_another_length_of_the_schedule_is_said(rounds, caplog):
    run_rounds(rounds(count=1), [])
    run_rounds(rounds(count=2), [])
    assert "schedule is now 4 steps long; of earlier rounds it was 2" in caplog.text


def test_fewer_rounds_later(rounds):
    run_rounds(rounds(count=2), [])
    with pytest.raises(UserError, match=r"rounds.count is 1, but 2 rounds have begun"):
        run_rounds(rounds(count=1), [])


@pytest.mark.parametrize("name", ["augment", "skd", "teacher_text"])
def test_a_run_of_a_version_without_a_setting_goes_on(rounds, name):
    config = rounds(count=1)
    run_rounds(config, [])
    file = config.output / "state.json"
    state = json.loads(file.read_text())
    state["settings"]["rounds"].pop(name, None)
    file.write_text(json.dumps(state))
    COMMANDS.clear()
    run_rounds(config, [])
    assert COMMANDS == []


def test_other_settings_are_named(rounds):
    run_rounds(rounds(count=1), [])
    with pytest.raises(UserError, match=r"rounds.prompts: 4 -> 5"):
        run_rounds(rounds(count=1, prompts=5), [])
    with pytest.raises(UserError, match=r"student_config.losses"):
        run_rounds(rounds(count=1, student={"losses": [{"name": "jsd"}]}), [])


def test_settings_that_change_no_cache_may_change(rounds, tiny_llama):
    """Such as those that an engine without memory advises to lower."""
    run_rounds(rounds(count=1), [])
    teacher = {"model": str(tiny_llama), "backend": "transformers", "batch_tokens": 64}
    document, _ = run_rounds(rounds(count=2, teacher={"teacher": teacher}), [])
    assert document["rounds_done"] == 2
    with pytest.raises(UserError, match=r"teacher_config\.teacher\.dtype"):
        run_rounds(rounds(count=2, teacher={"teacher": {**teacher, "dtype": "bfloat16"}}), [])


def test_a_cache_removed_or_exchanged(rounds):
    config = rounds(count=2)
    run_rounds(config, [])
    first, second = (config.output / f"round-00{n}" / "cache" for n in (1, 2))
    known = state_of(config).of("write-1").fingerprint[:16]
    aside = first.rename(first.with_name("aside"))
    with pytest.raises(UserError, match=f"write-1.*{known}, cannot be read"):
        run_rounds(config, [])
    shutil.copytree(second, first)
    with pytest.raises(UserError, match=f"another cache than write-1 .* expected {known}"):
        run_rounds(config, [])
    shutil.rmtree(first)
    aside.rename(first)
    run_rounds(config, [])


def test_given_text_exchanged(rounds, text, tmp_path):
    given = shutil.copytree(text[0], tmp_path / "given")
    student = {"cache": str(given)}
    run_rounds(rounds(count=1, student=student), [])
    shutil.rmtree(given)
    shutil.copytree(tmp_path / "run" / "round-001" / "cache", given)
    with pytest.raises(UserError, match="is another cache than text has made"):
        run_rounds(rounds(count=2, student=student), [])


def test_a_checkpoint_exchanged(rounds):
    run_rounds(rounds(count=1), [])
    config = rounds(count=2)
    checkpoint = config.output / "round-001" / "student" / "checkpoint-2"
    stored = checkpoint / "model.safetensors"
    held = load_file(stored)
    name = next(each for each in held if each.endswith("q_proj.weight"))
    save_file({**held, name: torch.zeros(3, 3)}, stored, {"format": "pt"})
    with pytest.raises(UserError, match="a checkpoint of another architecture"):
        run_rounds(config, [])
    state = checkpoint / "trainer_state.json"
    state.write_text(state.read_text().replace('"global_step": 2', '"global_step": 3'))
    with pytest.raises(UserError, match="is not the checkpoint in which train-1 has ended"):
        run_rounds(config, [])
    shutil.rmtree(checkpoint)
    with pytest.raises(UserError, match="is gone or incomplete"):
        run_rounds(config, [])


def test_a_student_exchanged_before_it_writes(rounds):
    run_rounds(rounds(count=1), [])
    config = rounds(count=2)
    stored = config.output / "round-001" / "student" / "model.safetensors"
    held = load_file(stored)
    before = stored.read_bytes()
    name = next(each for each in held if each.endswith("q_proj.weight"))
    save_file({**held, name: torch.zeros_like(held[name])}, stored, {"format": "pt"})
    with pytest.raises(UserError, match="has other weights than those that train-1 has left"):
        run_rounds(config, [])
    stored.write_bytes(before)
    run_rounds(config, [])
    # Nobody writes with an earlier student any more.
    (config.output / "round-000" / "student" / "model.safetensors").unlink()
    run_rounds(config, [])


def test_an_early_stop(rounds):
    """A learning rate of nothing improves nothing."""
    still = {"training": {"learning_rate": 1e-12, "weight_decay": 0.0}}
    config = rounds(count=5, stop={"patience": 2, "min_improvement": 1e-4}, student=still)
    document, _ = run_rounds(config, [])
    assert (document["rounds_done"], document["rounds_asked"]) == (2, 5)


@pytest.mark.parametrize(
    ("losses", "replay"),
    [
        ([{"name": "forward_kl"}], 0.25),
        ([{"name": "jsd", "beta": 0.5}], 0.25),
        ([{"name": "jsd", "beta": 0.9}], 0.0),
        ([{"name": "forward_kl"}, {"name": "reverse_kl"}], 0.0),
    ],
)
def test_old_text_misleads_some_losses(rounds, caplog, losses, replay):
    assert Rounds(rounds(student={"losses": losses}), []).replay == replay
    assert caplog.text == ""
    assert Rounds(rounds(student={"losses": losses}, replay=0.5), []).replay == 0.5
    assert ("misled by text" in caplog.text) == (replay == 0)


def test_a_policy_gradient_learns_from_two_numbers_a_token(rounds):
    """The loss of every step is the mean that the caches alone give, where the student is the
    writer: before its first step.
    """
    store = {"top_k": 1, "min_k": 1, "min_probability": None, "tail_samples": 0}
    student = {"losses": [{"name": "policy_gradient"}]}
    with pytest.raises(ConfigError, match="policy_gradient learns from the students' own text"):
        run_rounds(rounds(student=student, on_policy_fraction=0.5), [])
    # One batch is the whole round.
    student["training"] = {"per_device_train_batch_size": 4}
    config = rounds(
        count=1, steps_per_round=1, warmup_steps=1, teacher={"store": store}, student=student
    )
    document, _ = run_rounds(config, [])
    logged = json.loads((config.output / "round-001" / "student" / "log.json").read_text())
    first = next(record for record in logged if record.get("step") == 2 and "loss" in record)
    assert first["loss"] == pytest.approx(document["rounds"][1]["cache"]["reverse_kl"], abs=5e-3)
    assert document["rounds"][1]["staleness"] == 0
    assert document["rounds"][1]["passes"] == {"text": 0.0, "round-1": 1.0}


def test_bad_input(rounds, tmp_path, tiny_llama):
    with pytest.raises(UserError, match=r"no prompt came out of .* 10 overlong_prompts"):
        run_rounds(rounds(teacher={"data": _overlong(tmp_path)}, output="a"), [])
    with pytest.raises(ConfigError, match=r"training.max_steps .* is 3, but the rounds make 4"):
        run_rounds(rounds(student={"training": {"max_steps": 3}}, output="b"), [])
    with pytest.raises(ConfigError, match="expected the path of one cache"):
        run_rounds(rounds(student={"cache": [{"cache": "x"}]}, output="c"), [])
    with pytest.raises(ConfigError, match=r"has no data.generate"):
        run_rounds(rounds(teacher={"data": {"path": "python-docs"}}, output="d"), [])
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"thesis.txt"):
        run_rounds(rounds(output="taken"), [])


@pytest.mark.parametrize(
    ("which", "change", "said"),
    [
        ("student", {"losses": ["forward_kl"]}, "losses has 'forward_kl'; expected a loss as"),
        ("student", {"losses": {"name": "forward_kl"}}, "expected a list of losses"),
        ("student", {"training": []}, "training is \\[\\]; expected fields"),
        ("student", {"evaluation": "x"}, "evaluation is 'x'; expected fields"),
        ("teacher", {"data": "x"}, "has no data.generate"),
        ("teacher", {"taecher": 1}, "unknown key taecher; did you mean teacher?"),
        ("generate", {"seed": "x"}, "data.generate.seed: .* valid integer"),
        ("generate", {"skip_prompts": None}, "data.generate.skip_prompts: .* valid integer"),
    ],
)
def test_mistakes_in_the_two_configs_are_said_before_anything_runs(
    rounds, tmp_path, which, change, said
):
    config = rounds()
    file = tmp_path / f"{'student' if which == 'student' else 'teacher'}.yaml"
    fields = yaml.safe_load(file.read_text())
    (fields["data"]["generate"] if which == "generate" else fields).update(change)
    file.write_text(yaml.safe_dump(fields))
    with pytest.raises(ConfigError, match=said):
        run_rounds(config, [])
    assert COMMANDS == []


def test_the_options_of_a_loss_are_left_to_the_command(rounds):
    losses = [{"name": "jsd", "beta": None}]
    assert Rounds(rounds(student={"losses": losses}), []).replay == 0.25


class _Folder(ConfigModel):
    folder: str


@pytest.mark.parametrize("name", ["run-😀", "é", 'a"b', "a\\b", "a: b # c", "\u2028"])
def test_paths_of_any_characters_reach_the_commands(tmp_path, name):
    (tmp_path / "config.yaml").write_text("folder: x\n")
    found = load_config(_Folder, tmp_path / "config.yaml", overrides({"folder": name}))
    assert found.folder == name


def _overlong(tmp_path: Any) -> dict[str, Any]:
    generate = {"max_new_tokens": 3}
    path = str(tmp_path / "prompts.jsonl")
    return {"path": path, "prompt_field": "q", "max_length": 8, "generate": generate}


def test_restart(rounds, monkeypatch):
    config = rounds(count=1)
    run_rounds(config, [])
    before = weights(config, 1)
    run_rounds(rounds(count=1, prompts=5), [], restart=True)
    assert state_of(config).settings["rounds"]["prompts"] == 5
    assert not same(before, weights(config, 1))


KILLS = (2, 40, 75, 15)
"""Events at which a run is killed, one after the other: each start goes on from the one before."""


def test_kills(rounds, fork):
    """Killed while it writes, scores, trains and hands over, a run ends with the same student."""
    fields = {"count": 2, "on_policy_fraction": 0.5, "replay": 0.5}
    whole = rounds(output="whole", **fields)
    run_rounds(whole, [])
    config = rounds(**fields)

    def killed(event: int) -> int | None:
        def work() -> None:
            kill_at(event)
            run_rounds(config, [])

        child = fork(work)
        child.join()
        return child.exitcode

    codes = [killed(event) for event in KILLS]
    assert codes == [-signal.SIGKILL] * len(KILLS)
    run_rounds(config, [])
    for number in range(3):
        assert same(weights(config, number), weights(whole, number))
    assert [done.stage for done in state_of(config).done] == [
        done.stage for done in state_of(whole).done
    ]
    # The caches of the rounds were written by other folders, and are the same in content.
    for number in (1, 2):
        one, other = (
            CacheReader(each.output / f"round-00{number}" / "cache").manifest
            for each in (config, whole)
        )
        assert one.content_sha256 == other.content_sha256
        assert one.fingerprint == other.fingerprint
