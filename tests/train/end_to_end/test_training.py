"""From a cache to a student: what comes out, that nothing interrupts it for good, and that the
teacher stays away.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from logitcask.cache_format import CacheReader, UserError
from logitcask.cache_format.cli.config_file import load_config
from logitcask.pipeline.builder.run import build
from logitcask.pipeline.config import BuildConfig
from logitcask.train.cli import main
from logitcask.train.config import TrainConfig
from logitcask.train.data.held_out import read_index, row_of
from logitcask.train.identity import finished
from logitcask.train.loop.trainer import DistillationTrainer
from logitcask.train.output.report import rewrite_report
from logitcask.train.run import train

STEPS = 12  # what the fixture `config` trains for


def test_a_student_comes_closer_to_its_teacher(config, tiny_llama):
    metrics, found = train(config())
    output = config().output_dir
    assert not found
    assert (
        set(metrics["before"])
        == set(metrics["after"])
        == {
            "kl",
            "reverse_kl",
            "ce",
            "perplexity",
            "top1_agreement",
            "mor@5",
            "cr@5",
            "spearman@5",
            "ece",
        }
    )
    assert metrics["after"]["kl"] < 0.9 * metrics["before"]["kl"]
    assert metrics["after"]["mor@5"] > metrics["before"]["mor@5"]
    assert metrics == json.loads((output / "metrics.json").read_text())
    student = AutoModelForCausalLM.from_pretrained(output)
    assert student.config.num_hidden_layers == 1
    page = (output / "report.html").read_text()
    assert page.count('<figure class="chart">') == 10
    assert "http" not in page.replace("http-equiv", "")
    assert f"{metrics['after']['kl']:.3f} nats" in page
    assert f"forward_kl ({metrics['exactness']['forward_kl']})" in page
    assert "library_name: transformers" in (output / "README.md").read_text()

    again, found = train(config())
    assert found
    assert again == metrics
    with pytest.raises(UserError, match=r"ce_weight: 0.5 -> 0.0; begin afresh"):
        train(config(ce_weight=0.0))
    before = (output / "report.html").stat().st_mtime_ns
    rewrite_report(output)
    assert (output / "report.html").stat().st_mtime_ns > before


def test_the_saved_student_is_the_evaluated_one(config, cache):
    """CE from the saved folder, by transformers' own loss on one sequence at a time, is the one
    in metrics.json.
    """
    metrics, _ = train(config(training={"max_steps": 2}))
    student = AutoModelForCausalLM.from_pretrained(config().output_dir)
    reader = CacheReader(cache)
    held_out = np.flatnonzero(read_index(reader, config().evaluation.held_out).held_out)
    total = positions = 0
    for index in held_out[: config().evaluation.max_sequences]:
        ids = torch.from_numpy(reader[index].input_ids).long()[None]
        with torch.no_grad():
            total += student(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        positions += ids.shape[1] - 1
    assert total / positions == pytest.approx(metrics["after"]["ce"], abs=1e-4)


@pytest.fixture(scope="session")
def uneven_cache(tiny_llama, tmp_path_factory):
    """Documents of 2 to 120 characters; short ones all of one letter, so that loss and length go
    together.
    """
    folder = tmp_path_factory.mktemp("uneven")
    texts = [
        "zz"
        if i % 2
        else f"{i}: it was the {i}th of its kind, and not the last one that they would see. " * 2
        for i in range(60)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = BuildConfig.model_validate(
        {
            "teacher": {"model": str(tiny_llama), "backend": "transformers"},
            "data": {"path": str(folder / "data.jsonl"), "max_length": 120},
            "output": str(folder / "cache"),
        }
    )
    build(config)
    return config.output


def test_accumulated_batches_equal_one_batch(config, tmp_path, uneven_cache):
    """1 x 8 sequences and 8 x 1: the loss is a mean over the positions of the whole batch, however
    it is cut up.

    The sequences are of very different lengths, so that a mean of means would differ by far more
    than the tolerance.
    """
    logs = []
    for batch, accumulate in ((8, 1), (1, 8), (2, 4)):
        training = {
            "output_dir": str(tmp_path / f"run-{batch}"),
            "max_steps": 3,
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": accumulate,
        }
        train(config(training=training, cache=str(uneven_cache), evaluation={"held_out": 0.2}))
        history = json.loads((tmp_path / f"run-{batch}" / "log.json").read_text())
        logs.append([record["loss"] for record in history if "loss" in record])
    assert logs[1] == pytest.approx(logs[0], abs=2e-4)
    assert logs[2] == pytest.approx(logs[0], abs=2e-4)


def test_chunks_of_logits_change_nothing(config, tmp_path):
    whole, _ = train(config(training={"max_steps": 3, "output_dir": str(tmp_path / "a")}))
    pieces, _ = train(
        config(training={"max_steps": 3, "output_dir": str(tmp_path / "b")}, logits_chunk=7)
    )
    assert pieces["final_loss"] == pytest.approx(whole["final_loss"], abs=1e-4)


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_dynamic_form_weighs_the_kl_by_the_overlap(config, dynamic):
    losses = [{"name": "forward_kl"}, {"name": "ranking", "weight": 2.0, "dynamic": dynamic}]
    train(config(losses=losses, ce_weight=0.0, training={"max_steps": 1}))
    first = json.loads((config().output_dir / "log.json").read_text())[0]
    static = first["loss_forward_kl"] + 2 * first["loss_ranking"]
    if dynamic:
        assert 2 * first["loss_ranking"] < first["loss"] < static - 0.05
    else:
        assert first["loss"] == pytest.approx(static, abs=1e-3)


def config_file(config, tmp_path):
    file = tmp_path / "student.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return file


def test_logs_seldom_written_say_the_same_after_a_resume(config, tmp_path):
    """logging_steps that do not divide save_steps: the totals and the last loss do not depend on
    an interruption.
    """
    training = {"max_steps": 11, "save_steps": 4, "logging_steps": 5, "save_total_limit": 3}
    expected, _ = train(config(training={**training, "output_dir": str(tmp_path / "whole")}))
    train(config(training=training))
    run = config().output_dir
    (run / "metrics.json").unlink()
    for step in (8, 11):
        shutil.rmtree(run / f"checkpoint-{step}", ignore_errors=True)
    found, was_there = train(config(training=training))
    assert not was_there
    assert found["positions_trained"] == expected["positions_trained"] > 0
    assert found["final_loss"] == pytest.approx(expected["final_loss"], abs=1e-5)
    rare, _ = train(
        config(
            training={"max_steps": 3, "logging_steps": 500, "output_dir": str(tmp_path / "rare")}
        )
    )
    assert rare["positions_trained"] > 0
    assert rare["final_loss"] > 0


DIVERGED = r"the student has diverged: loss_\w+ is (nan|inf) at step \d+; lower training\."


def diverging(config, **training):
    settings = {
        "learning_rate": 1e30,
        "max_grad_norm": 0,
        "lr_scheduler_type": "constant",
        "max_steps": 20,
    }
    return config(training={**settings, "save_steps": 10, **training})


def test_a_student_that_diverges_is_noticed_before_it_is_saved(config):
    with pytest.raises(UserError, match=DIVERGED):
        train(diverging(config, logging_steps=1))
    assert not list(config().output_dir.glob("checkpoint-*"))


def test_a_student_that_diverges_between_two_logs_is_noticed_too(config, tmp_path, command):
    settings = diverging(config, logging_steps=50, disable_tqdm=False)
    done = command(main, config_file(settings, tmp_path))
    assert done.returncode == 2, done.stderr
    last = done.stderr.replace("\r", "\n").splitlines()[-1]  # after the bar's
    assert re.match(f"error: {DIVERGED}", last)
    assert not list(config().output_dir.glob("checkpoint-*"))


def test_a_restart_that_cannot_work_removes_nothing(config):
    train(config(training={"max_steps": 2}))
    with pytest.raises(UserError, match="holds no cache"):
        train(config(cache="caches/typo", training={"max_steps": 2}), restart=True)
    assert train(config(training={"max_steps": 2}))[1]


@pytest.mark.parametrize("restart", [False, True])
def test_files_that_are_not_a_runs_are_left_alone(config, restart):
    """Foreign checkpoints are not gone on from, and a README or a model that lies there is not
    replaced.
    """
    output = config().output_dir
    output.mkdir()
    for name in ("README.md", "config.json", "checkpoint-4"):
        (output / name).write_text("mine")
        with pytest.raises(UserError, match=f"has {name} of its own"):
            train(config(), restart=restart)
        assert (output / name).read_text() == "mine"
        (output / name).unlink()


def test_options_that_fail_late_are_refused_before_anything_is_written(config):
    with pytest.raises(UserError, match="temperature is 2"):
        train(config(losses=[{"name": "forward_kl", "temperature": 2.0}]))
    assert not (config().output_dir / "run.json").exists()


def test_killed_and_resumed_it_ends_the_same(config, tmp_path, rng, fork, monkeypatch):
    """``kill -9`` at random moments of training; same last step, same loss, same metrics."""
    expected, _ = train(config(training={"output_dir": str(tmp_path / "whole"), "max_steps": 40}))
    settings = config(training={"max_steps": 40})
    run = config().output_dir
    kills = 0
    with monkeypatch.context() as patch:
        end_step = DistillationTrainer.end_step
        patch.setattr(
            DistillationTrainer, "end_step", lambda self: (time.sleep(0.05), end_step(self))
        )
        for _ in range(3):
            seen = {p.name for p in run.glob("checkpoint-*")}
            process = fork(lambda: train(settings))
            # Wait until it saves something new, so that each run gets further, then a random
            # moment more.
            while process.is_alive() and {p.name for p in run.glob("checkpoint-*")} <= seen:
                time.sleep(0.02)
            time.sleep(rng.uniform(0, 0.3))
            process.kill()
            process.join()
            kills += process.exitcode == -signal.SIGKILL
    found, was_there = train(settings)
    assert not was_there
    assert kills > 0
    assert found["steps"] == expected["steps"] == 40
    assert found["final_loss"] == pytest.approx(expected["final_loss"], abs=1e-4)
    assert found["after"] == pytest.approx(expected["after"], abs=1e-4)
    assert found["positions_trained"] == expected["positions_trained"]


@pytest.mark.parametrize("name", ["[ab]", "a?*::b"])
def test_every_path_of_a_run_is_taken_literally(config, cache, tiny_llama, tmp_path, name):
    here = tmp_path / name
    shutil.copytree(cache, here / "cache")
    shutil.copytree(tiny_llama, here / "model")
    settings = config(
        cache=str(here / "cache"),
        student={"init_from": str(here / "model"), "keep_layers": [1]},
        training={
            "output_dir": str(here / "run"),
            "max_steps": 4,
            "save_steps": 2,
            "save_total_limit": 2,
        },
    )
    metrics, _ = train(settings)
    assert AutoModelForCausalLM.from_pretrained(here / "run").config.num_hidden_layers == 1
    assert train(settings) == (metrics, True)
    for file in ("metrics.json", "model.safetensors"):  # stopped after its last checkpoint
        (here / "run" / file).unlink()
    again, found = train(settings)
    assert not found
    assert again["after"] == metrics["after"]
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_checkpoint_cut_short_is_not_resumed_from(config):
    train(config())
    run = config().output_dir
    (run / "metrics.json").unlink()
    broken = run / "checkpoint-99"
    shutil.copytree(run / f"checkpoint-{STEPS}", broken)
    (broken / "trainer_state.json").write_text('{"global_step": 9')
    metrics, found = train(config())
    assert not found
    assert metrics["steps"] == STEPS
    assert not broken.exists()


def test_the_teacher_stays_away(config, cache, tiny_llama, tmp_path):
    """In a fresh process, with the teacher's folder gone: no engine is imported, and nothing of
    the teacher is needed. Nor is nltk, which takes seconds to load, without answers to judge.
    """
    student = tmp_path / "student"
    shutil.copytree(tiny_llama, student)
    moved = tiny_llama.rename(tiny_llama.with_name("elsewhere"))
    try:
        settings = config(student={"model": str(student)}, training={"max_steps": 2})
        file = config_file(settings, tmp_path)
        code = (
            "import sys; sys.argv = ['train-student', sys.argv[1]]\n"
            "from logitcask.train.cli import main\n"
            "try:\n    main()\nexcept SystemExit as e:\n    assert not e.code, e.code\n"
            "engines = ('vllm', 'logitcask.pipeline')\n"
            "assert 'logitcask.train.loop.trainer' in sys.modules\n"
            "assert not [name for name in sys.modules if name.startswith(engines)]\n"
            "assert not {'nltk', 'rouge_score'} & set(sys.modules)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(file)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    finally:
        moved.rename(tiny_llama)


def test_a_finished_run_is_found_without_transformers(config, tmp_path):
    """By the command in a fresh process; another run in that place is refused there too."""
    settings = config(training={"max_steps": 2})
    metrics, _ = train(settings)
    assert finished(settings) == metrics
    assert finished(config(training={"max_steps": 2, "output_dir": str(tmp_path / "new")})) is None
    with pytest.raises(UserError, match="holds a run with other settings"):
        finished(config(training={"max_steps": 3}))
    code = (
        "import sys\n"
        "from logitcask.train.cli import app\n"
        "app(sys.argv[1:], standalone_mode=False)\n"
        "assert not {'transformers', 'accelerate'} & set(sys.modules)\n"
    )
    file = config_file(settings, tmp_path)
    done = subprocess.run([sys.executable, "-c", code, file], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "is trained already" in done.stdout
    assert f"student: {settings.output_dir}" in done.stdout


def test_held_out_sequences_are_a_matter_of_their_rows(cache):
    reader = CacheReader(cache)
    held_out = read_index(reader, 0.2).held_out
    assert 0.05 < held_out.mean() < 0.4
    assert (read_index(reader, 0.4).held_out >= held_out).all()
    rows = [row_of(reader[index].sequence_id, reader.manifest.data) for index in range(len(reader))]
    assert len(rows) > 2 * len(set(rows))  # documents in pieces
    assert not {rows[index] for index in np.flatnonzero(held_out)} & {
        rows[index] for index in np.flatnonzero(~held_out)
    }


@pytest.mark.parametrize(
    ("sequence_id", "row", "made"),
    [
        ("train/12", "train/12", {}),
        ("train/12/0", "train/12", {}),
        ("1/train/12", "1/train/12", {}),  # numbered by a merge
        ("1/train/12/3", "1/train/12", {}),
        ("topics/a/b#3", "topics/a/b#3", {}),
        ("topics/a/b#3/1", "topics/a/b#3", {}),
        ("c4/00012/345", "c4/00012/345", {}),  # ids of the data's own
        ("wiki/12", "wiki/12", {}),
        ("test/12/0", "test/12/0", {}),
        ("test/12/0", "test/12", {"split": "test"}),
        ("test/12/0", "test/12", {"split": "mixed"}),
        ("train/12/0", "train/12", {"mask_policy": "generated"}),
        ("a question/3", "a question", {"mask_policy": "generated"}),
    ],
)
def test_the_row_of_a_sequence(cache, sequence_id, row, made):
    assert row_of(sequence_id, CacheReader(cache).manifest.data.model_copy(update=made)) == row


# --- what does not fit is refused, in one line ----------------------------------------------------


def refused(config, match):
    with pytest.raises(UserError, match=match) as caught:
        train(config)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_another_tokenizer(config, tiny_llama, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_llama, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    a, b = list(vocabulary)[10:12]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(config(student={"model": str(other)}), "tokenizer is not the one")


def scratch(**fields):
    small = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    small |= {"num_key_value_heads": 1, "vocab_size": 384, "max_position_embeddings": 128}
    return {"config": {"model_type": "llama", **small, **fields}}


def test_a_student_from_scratch(config, tiny_llama):
    metrics, _ = train(config(student=scratch(), training={"max_steps": 3}))
    assert metrics["student"]["parameters"] < 50_000
    with pytest.raises(UserError, match="--restart"):
        train(
            config(student={**scratch(), "tokenizer": str(tiny_llama)}, training={"max_steps": 3})
        )
    metrics, _ = train(
        config(student={**scratch(), "tokenizer": str(tiny_llama)}, training={"max_steps": 3}),
        restart=True,
    )
    assert (config().output_dir / "tokenizer.json").exists()


def test_a_smaller_vocabulary(config):
    refused(
        config(student=scratch(vocab_size=300)),
        "predicts 300 ids, but the tokenizer of .* uses 384",
    )


def test_too_few_positions(config):
    refused(config(student=scratch(max_position_embeddings=32)), "reads at most 32 tokens")


def test_a_ranking_deeper_than_the_head(config):
    refused(config(losses=[{"name": "ranking", "k": 17}]), "top 17.*holds the top 16")


def test_no_cache_or_half_a_cache(config, tmp_path, cache):
    refused(config(cache=str(tmp_path / "nowhere")), "holds no cache")
    half = tmp_path / "half"
    shutil.copytree(cache, half)
    (half / "manifest.json").unlink()
    (half / ".build").mkdir()
    refused(config(cache=str(half)), "unfinished cache")


def test_a_newer_cache(config, tmp_path, cache):
    newer = tmp_path / "newer"
    shutil.copytree(cache, newer)
    manifest = json.loads((newer / "manifest.json").read_text())
    (newer / "manifest.json").write_text(json.dumps({**manifest, "format_version": 2}))
    refused(config(cache=str(newer)), "upgrade logitcask")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"student": {"model": "no/such-model-anywhere"}}, "there is no model"),
        ({"student": {"init_from": "x", "model": "y"}}, "exactly one of"),
        ({"losses": [{"name": "forward_k"}]}, "no loss is called"),
        ({"losses": [{"name": "ranking", "kk": 3}]}, "kk"),
        ({"losses": [{"name": "ranking", "k": 0}]}, "k is 0"),
        ({"losses": [{"name": "forward_kl"}, {"name": "forward_kl"}]}, "once"),
        (
            {"student": {"config": {"model_type": "llama", "num_hiden_layers": 1}}},
            "num_hidden_layers",
        ),
        ({"training": {"save_only_model": True}}, "save_only_model"),
        ({"training": {"ignore_data_skip": True}}, "ignore_data_skip"),
        ({"training": {"max_stepz": 3}}, "max_stepz"),
        ({"training": {"output_dir": "/proc/run"}}, "cannot write to"),
        ({"student": {"config": {"model_type": "unheard-of"}}}, "unheard-of"),
        ({"evaluation": {"held_out": 1e-9}}, "both need some"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(config, tmp_path, changes, match, monkeypatch, capsys):
    base = config().model_dump(mode="json")
    fields = {**base, **changes, "training": {**base["training"], **changes.get("training", {})}}
    file = tmp_path / "student.yaml"
    file.write_text(yaml.safe_dump(fields))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(sys, "argv", ["train-student", str(file)])
    with pytest.raises(SystemExit) as stop:
        main()
    said = capsys.readouterr().err
    assert stop.value.code == 2, said
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, said
    assert match in errors[0]
    assert "Traceback" not in said


def test_keep_layers_takes_those_layers(tiny_llama):
    from logitcask.train.config import StudentConfig
    from logitcask.train.model.student import build_student

    teacher = AutoModelForCausalLM.from_pretrained(tiny_llama).state_dict()
    student = build_student(
        StudentConfig(init_from=str(tiny_llama), keep_layers=[1]), seed=0
    ).state_dict()
    for name, value in student.items():
        assert torch.equal(value, teacher[name.replace("layers.0.", "layers.1.")]), name
    with pytest.raises(UserError, match="keep_layers is"):
        build_student(StudentConfig(init_from=str(tiny_llama), keep_layers=[2]), seed=0)


def test_every_config_that_comes_along_is_valid():
    for file in sorted((Path(__file__).parents[3] / "train" / "configs").glob("*.yaml")):
        load_config(TrainConfig, file, [])


def test_losses_that_move(config, tmp_path):
    """Schedules and TAID's t over a kill and a resume: the run that was stopped is the run that
    was not.
    """
    losses = [
        {"name": "taid", "alpha": 0.3},
        {"name": "ranking", "weight": {"start": 0, "end": 2}, "k": 3},
    ]
    states = []
    for name in ("whole", "stopped"):
        training = {
            "max_steps": 4,
            "save_steps": 2,
            "output_dir": str(tmp_path / name),
            "save_total_limit": None,
        }
        train(config(losses=losses, training=training))
        if name == "stopped":
            shutil.rmtree(tmp_path / name / "checkpoint-4")
            for written in ("metrics.json", "log.json"):
                (tmp_path / name / written).unlink()
            train(config(losses=losses, training=training))
        states.append(
            json.loads((tmp_path / name / "checkpoint-4" / "trainer_state.json").read_text())
        )
    whole, stopped = states
    assert whole["stateful_callbacks"]["objective"]["taid"]["t"] > 0.5
    assert whole["stateful_callbacks"]["objective"] == stopped["stateful_callbacks"]["objective"]
    for one, other in zip(whole["log_history"], stopped["log_history"], strict=True):
        for key in ("loss", "loss_taid", "loss_ranking"):
            assert one.get(key) == other.get(key)
