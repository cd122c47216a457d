"""Scoring behind and beside the engine: order, bounds, failures on either side, interruptions,
the log.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import weakref

import numpy as np
import pytest
import yaml

from logitcask.cache_format import CacheReader, CacheWriter, UserError, verify
from logitcask.cache_format.shards.shard_writer import ShardWriter
from logitcask.pipeline.builder import run
from logitcask.pipeline.builder import score as scoring
from logitcask.pipeline.builder import writer_thread as behind
from logitcask.pipeline.builder.inputs import Inputs
from logitcask.pipeline.builder.lazy_teacher import LazyTeacher
from logitcask.pipeline.builder.plan import write_sequences
from logitcask.pipeline.builder.planner import make_plan
from logitcask.pipeline.builder.progress import Progress
from logitcask.pipeline.builder.request import request_of
from logitcask.pipeline.builder.run import build
from logitcask.pipeline.config import BuildConfig, StoreConfig, TeacherConfig
from logitcask.pipeline.teachers.base import answers
from logitcask.pipeline.teachers.synthetic import SyntheticTeacher
from logitcask.pipeline.types import PendingScores, Sequence


def config_for(tmp_path, **changes):
    fields = {
        "teacher": {"model": "synthetic", "backend": "synthetic", "vocab_size": 3000},
        "data": {"path": "python-docs", "max_length": 128, "max_tokens": 40_000},
        "store": {"top_k": 8, "shard_tokens": 9_000},
        "output": str(tmp_path / "cache"),
        "audit": {"sequences": 0},
    }
    return BuildConfig.model_validate({**fields, **changes})


@pytest.fixture
def planned(tmp_path, rng):
    """A build directory with one shard: sequences of all lengths, one in four with nothing to
    learn, and those sequences.
    """
    sequences = []
    for i in range(300):
        ids = rng.integers(0, 3000, int(rng.integers(1, 90))).astype(np.int32)
        mask = rng.random(len(ids)) < 0.5
        mask[0] = False
        sequences.append(Sequence(f"s{i}", ids, mask & (rng.random() < 0.75)))
    write_sequences(tmp_path, sequences, 10**9)
    return tmp_path, sequences


class Recording(SyntheticTeacher):
    """Remembers what it was given, in which order."""

    def __init__(self):
        super().__init__(
            TeacherConfig(model="synthetic", vocab_size=3000), StoreConfig(top_k=4).capture()
        )
        self.given = []

    def score(self, sequences):
        def remembered():
            for sequence in sequences:
                self.given.append(sequence.sequence_id)
                yield sequence

        return super().score(remembered())


def test_results_come_in_the_order_of_the_plan(planned, monkeypatch):
    """The teacher gets windows of like lengths, always the same; nothing without a target; each
    answer to its sequence.
    """
    monkeypatch.setattr(scoring, "_WINDOW_TOKENS", 500)
    build_dir, sequences = planned
    teacher, again = Recording(), Recording()
    pairs = list(scoring.score_shard(teacher, build_dir, 0))
    list(scoring.score_shard(again, build_dir, 0))
    assert [sequence.sequence_id for sequence, _ in pairs] == [
        sequence.sequence_id for sequence in sequences
    ]
    assert teacher.given == again.given
    assert sorted(teacher.given) == sorted(s.sequence_id for s in sequences if s.loss_mask.any())
    for sequence, answer in pairs:
        assert (answer is not None) == sequence.loss_mask.any()
        if answer is not None:
            np.testing.assert_array_equal(answer.scored().target_ids, sequence.input_ids[1:])
    lengths = [len(sequences[int(name[1:])].input_ids) for name in teacher.given]
    rises = sum(b > a for a, b in itertools.pairwise(lengths))
    tokens = sum(len(s.input_ids) for s in sequences)
    assert 0 < rises <= tokens / 400, "lengths fall within a window and rise from one to the next"


def test_windows_are_bounded(planned, monkeypatch):
    """No more answers wait for their turn than a window holds."""
    monkeypatch.setattr(scoring, "_WINDOW_TOKENS", 500)
    build_dir, sequences = planned
    teacher, most, emitted = Recording(), 0, 0
    for sequence, answer in scoring.score_shard(teacher, build_dir, 0):
        emitted += len(sequence.input_ids) if answer is not None else 0
        given = sum(len(sequences[int(name[1:])].input_ids) for name in teacher.given)
        most = max(most, given - emitted)
    assert 100 < most <= 500


def test_the_queue_is_bounded_in_bytes(tmp_path, monkeypatch):
    """With a disk that is slower than the engine, no more than QUEUE_BYTES of answers wait,
    beside one more.
    """
    largest, most = 0, 0

    def measured(teacher, sequences):
        nonlocal largest, most
        for answer in answers(teacher, sequences):
            largest = max(largest, answer.nbytes)
            most = max(most, progress.counts.queued_bytes)
            yield answer

    progress = None

    class Kept(Progress):
        def __init__(self, *arguments, **options):
            nonlocal progress
            super().__init__(*arguments, **options)
            progress = self

    append = ShardWriter.append

    def once_the_queue_is_full(self, sequence, **options):
        nonlocal most
        while most <= 100_000 - largest:
            most = max(most, progress.counts.queued_bytes)
            time.sleep(0.001)
        append(self, sequence, **options)

    monkeypatch.setattr(run, "Progress", Kept)
    monkeypatch.setattr(scoring, "answers", measured)
    monkeypatch.setattr(ShardWriter, "append", once_the_queue_is_full)
    monkeypatch.setattr(scoring, "PRIOR_POSITIONS", 1000)
    monkeypatch.setattr(behind, "QUEUE_BYTES", 100_000)
    build(config_for(tmp_path))
    assert 100_000 - largest <= most <= 100_000
    assert progress.counts.queued_bytes == progress.counts.queued_sequences == 0


def test_nothing_is_held_for_longer_than_it_waits(tmp_path, monkeypatch):
    """What the engine has answered is let go: once the prior is known, that is what queue and
    window hold, to the end.
    """
    window, queue, prior = 500, 50_000, 10_000
    alive: list[tuple[weakref.ref, int]] = []
    held: list[int] = []

    def tracked(teacher, sequences):
        for answer in answers(teacher, sequences):
            scored, largest = answer.scored(), answer.nbytes
            alive.append((weakref.ref(scored.ids), answer.nbytes))
            alive[:] = [each for each in alive if each[0]() is not None]
            held.append(sum(nbytes for _, nbytes in alive))
            bytes_per_token = answer.nbytes / len(scored.ids)
            yield PendingScores(answer.nbytes, lambda scored=scored: scored)
            bound.append(queue + 2 * window * bytes_per_token + 2 * largest)

    bound: list[float] = []
    monkeypatch.setattr(scoring, "answers", tracked)
    monkeypatch.setattr(scoring, "_WINDOW_TOKENS", window)
    monkeypatch.setattr(scoring, "PRIOR_POSITIONS", prior)
    monkeypatch.setattr(behind, "QUEUE_BYTES", queue)
    build(config_for(tmp_path, store={"top_k": 8, "shard_tokens": 10**6}))
    assert max(held) > 2 * max(bound), "the prior's positions must stand out"
    assert max(held[len(held) // 2 :]) <= max(bound)


def test_an_answer_larger_than_the_queue_passes(tmp_path, monkeypatch):
    monkeypatch.setattr(behind, "QUEUE_BYTES", 10)
    assert build(config_for(tmp_path)).manifest.statistics.tokens > 30_000


@pytest.mark.parametrize(
    "error", [UserError("cannot write: no room"), OSError(28, "No space left on device")]
)
def test_what_fails_behind_stops_the_engine_at_once(tmp_path, monkeypatch, error):
    scored, failed = 0, threading.Event()

    def counted(teacher, sequences):
        nonlocal scored
        for answer in answers(teacher, sequences):
            scored += 1
            if scored == 20:
                failed.wait()
                for thread in threading.enumerate():
                    if thread.name == "writer":
                        thread.join()
            yield answer

    def fail(self, sequence, **options):
        failed.set()
        raise error

    monkeypatch.setattr(scoring, "answers", counted)
    monkeypatch.setattr(ShardWriter, "append", fail)
    monkeypatch.setattr(scoring, "PRIOR_POSITIONS", 1)
    config = config_for(tmp_path)
    with pytest.raises(UserError, match="cannot write"):
        build(config)
    assert scored < 250, "the engine went on for long"
    assert not list(config.output.rglob("*.tmp"))
    assert not [thread for thread in threading.enumerate() if thread.name == "writer"]
    assert events(config)[-1]["event"] == "failed"
    monkeypatch.undo()
    build(config)
    assert verify(str(config.output), deep=True) == []


def test_what_fails_in_the_engine_leaves_every_whole_shard(tmp_path, monkeypatch):
    """Also those that the writer, which is slow here, has not come to yet."""
    config, shards = config_for(tmp_path), 0
    append = ShardWriter.append

    def dies(teacher, sequences):
        nonlocal shards
        shards += 1
        for count, answer in enumerate(answers(teacher, sequences)):
            if count == 40 and shards == 3:
                raise UserError("the engine is gone")
            yield answer

    def slowly(self, sequence, **options):
        time.sleep(0.002)
        append(self, sequence, **options)

    monkeypatch.setattr(scoring, "answers", dies)
    monkeypatch.setattr(ShardWriter, "append", slowly)
    with pytest.raises(UserError, match="engine is gone"):
        build(config)
    assert len(list((config.output / ".build" / "commits").iterdir())) == 2
    assert not list(config.output.rglob("*.tmp"))
    assert not [thread for thread in threading.enumerate() if thread.name == "writer"]


def test_a_subset_of_shards_is_the_same_in_another_process_or_order(tmp_path):
    """As a worker does it that is given some shards, with a teacher and a writer of its own."""
    whole = build(config_for(tmp_path)).manifest
    config = config_for(tmp_path, output=str(tmp_path / "parts"))
    with CacheWriter(config.output) as writer:
        inputs = Inputs(config)
        plan = make_plan(
            writer.build_dir,
            config,
            request_of(config),
            inputs,
            LazyTeacher(config, inputs, writer.build_dir),
        )
        teacher = SyntheticTeacher(config.teacher, config.store.capture())
        header = plan.header(teacher.identity(), config.store.settings(teacher.vocab_size))
        prior, _ = scoring.estimate_prior(
            scoring.score_shard(teacher, writer.build_dir, 0), header.store
        )
        writer.begin(header, prior)
        indices = list(range(len(plan.shards)))
        for part in (indices[::2], indices[1::2][::-1]):
            scoring.score_shards(teacher, writer, plan, part)
        parts = writer.finish(header.with_fingerprint(), len(plan.shards))
    assert [s.content_sha256 for s in parts.shards] == [s.content_sha256 for s in whole.shards]


def events(config):
    return [json.loads(line) for line in config.log_file().read_text().splitlines()]


def test_the_log_tells_the_whole_story(tmp_path, monkeypatch):
    monkeypatch.setattr("logitcask.pipeline.builder.progress.EVERY_SECONDS", 0.0)
    config = config_for(tmp_path)
    manifest = build(config).manifest
    found = events(config)
    assert config.log_file() == tmp_path / "cache.log.jsonl"
    assert [found[0]["event"], found[-1]["event"]] == ["start", "finish"]
    assert found[0]["teacher"]["route"] == manifest.teacher.route
    shards = [each for each in found if each["event"] == "shard"]
    assert [(each["shard"], each["tokens"], each["bytes"]) for each in shards] == [
        (index, entry.tokens, entry.bytes) for index, entry in enumerate(manifest.shards)
    ]
    progress = [each for each in found if each["event"] == "progress"]
    assert len(progress) > 100
    assert [each["tokens"] for each in progress] == sorted(each["tokens"] for each in progress)
    last, totals = found[-1], manifest.statistics
    assert last["tokens"] == last["tokens_total"] == totals.tokens
    assert last["shards"] == last["shards_total"] == len(manifest.shards)
    assert last["queue_sequences"] == last["queue_bytes"] == 0
    assert last["bytes_per_token"] == round(
        sum(entry.bytes for entry in manifest.shards) / totals.tokens, 2
    )
    assert 0 < last["engine_share"] < 1
    for each in progress:
        assert each["tokens_per_second"] > 0
        assert each["eta_seconds"] >= 0
        assert each["queue_bytes"] >= 0
    assert build(config).reused
    assert len(events(config)) == len(found), "a cache that is there already is no run"


def test_the_log_goes_where_it_is_told(tmp_path):
    build(config_for(tmp_path, log=False))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"]
    elsewhere = config_for(
        tmp_path, log=str(tmp_path / "logs" / "a.jsonl"), output=str(tmp_path / "b")
    )
    build(elsewhere)
    assert events(elsewhere)[-1]["event"] == "finish"
    assert not (tmp_path / "b.log.jsonl").exists()
    with pytest.raises(UserError, match=r"cannot write the log /proc/x/log\.jsonl.*log=false"):
        build(config_for(tmp_path, log="/proc/x/log.jsonl", output=str(tmp_path / "c")))


def test_a_log_that_fails_later_does_not_fail_the_build(tmp_path, caplog):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    config = config_for(tmp_path, log="/dev/full")
    build(config)
    assert verify(str(config.output)) == []
    assert "the log /dev/full ends here: No space left on device" in caplog.text


SLOWLY = """
import time
import logitcask.pipeline.builder.score
answers = logitcask.pipeline.builder.score.answers
def slowly(teacher, sequences):
    for answer in answers(teacher, sequences):
        time.sleep(0.02)
        yield answer
logitcask.pipeline.builder.score.answers = slowly
from logitcask.pipeline.cli import main
main()
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_build_cleanly(tmp_path, how):
    """At once, without a traceback, with what is done kept and a word on how to go on; then it
    does.
    """
    whole = build(config_for(tmp_path, output=str(tmp_path / "whole"))).manifest
    config = config_for(tmp_path)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [sys.executable, "-c", SLOWLY, "build", str(file)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    commits = config.output / ".build" / "commits"
    while not (commits.exists() and list(commits.glob("*.json"))):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(how)
    _, stderr = process.communicate()
    assert process.returncode == 128 + how, stderr
    assert "Traceback" not in stderr
    assert f"of {len(whole.shards)} shards are done and kept" in stderr
    word = "interrupted" if how == signal.SIGINT else "stopped by SIGTERM"
    assert stderr.splitlines()[-1] == f"{word}; run the same command again to go on"
    assert events(config)[-1]["event"] == "interrupted"
    assert not list(config.output.rglob("*.tmp"))
    done = len(list(commits.glob("*.json")))
    assert 1 <= done < len(whole.shards)
    assert build(config).manifest.content_sha256 == whole.content_sha256
    assert events(config)[-1]["event"] == "finish"
    again = [each for each in events(config) if each["event"] == "start"][-1]
    assert again["shards_done"] == done
    assert CacheReader(config.output).manifest.fingerprint == whole.fingerprint


def test_a_real_engine_that_dies_in_the_middle(tiny_llama, tmp_path, monkeypatch):
    """One line with the cause; whole shards are kept, and the next start goes on to what it
    would have been.
    """
    if pytest.importorskip("torch").cuda.is_available():
        pytest.skip(
            "an engine on a GPU is a process of its own, out of reach of what is patched here"
        )
    CPUModelRunner = pytest.importorskip("vllm.v1.worker.cpu_model_runner").CPUModelRunner
    fields = {
        "teacher": {"model": str(tiny_llama), "batch_tokens": 64},
        "data": {"path": "python-docs", "max_length": 60, "max_tokens": 1500},
        "store": {"top_k": 8, "tail_samples": 4, "shard_tokens": 300},
    }
    whole = build(config_for(tmp_path, **fields, output=str(tmp_path / "whole"))).manifest
    execute, steps = CPUModelRunner.execute_model, itertools.count()

    def dies(self, *args, **kwargs):
        if next(steps) == 14:
            raise RuntimeError("the accelerator has caught fire\nand more that nobody reads")
        return execute(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(CPUModelRunner, "execute_model", dies)
        with pytest.raises(
            UserError,
            match=r"^vLLM stopped while scoring: the accelerator has caught fire; the same",
        ):
            build(config_for(tmp_path, **fields))
    resumed = build(config_for(tmp_path, **fields))
    assert 0 < resumed.tokens_scored < whole.statistics.tokens
    assert resumed.manifest.content_sha256 == whole.content_sha256
