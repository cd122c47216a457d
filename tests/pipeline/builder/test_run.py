"""``teacher-cache build`` from config to cache: what it writes, what it reuses, what it refuses,
and what a kill costs.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time

import numpy as np
import pytest
import yaml

import logitcask.pipeline.builder.plan
from logitcask.cache_format import CacheReader, UserError, verify
from logitcask.pipeline.builder import lazy_teacher
from logitcask.pipeline.builder.run import build
from logitcask.pipeline.config import BuildConfig
from logitcask.pipeline.teachers.open import open_tokenizer
from logitcask.pipeline.teachers.synthetic import SyntheticTeacher


def synthetic(tmp_path, **changes):
    fields = {
        "teacher": {"model": "synthetic", "backend": "synthetic", "vocab_size": 3000},
        "data": {"path": "python-docs", "max_length": 128, "max_tokens": 40_000},
        "store": {"top_k": 8, "shard_tokens": 5_000},
        "output": str(tmp_path / "cache"),
    }
    for path, value in changes.items():
        part, _, key = path.partition("__")
        if key:
            fields[part][key] = value
        else:
            fields[part] = value
    return BuildConfig.model_validate(fields)


@pytest.fixture
def lines(tmp_path):
    """Writes rows as JSON lines and returns the file."""

    def write(rows, name="data.jsonl"):
        file = tmp_path / name
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(file)

    return write


STORES = {
    "default": {},
    "top k": {"min_probability": None, "tail_samples": 0},
    "top p": {"min_probability": None, "top_p": 0.4, "min_k": 1},
    "fixed": {
        "min_probability": None,
        "mass_per_sample": None,
        "tail_samples": 5,
        "sample_sets": 2,
    },
    "with logprobs": {"sample_logprobs": True, "draws": "independent"},
    "random sampling": {
        "top_k": 0,
        "tail_samples": 50,
        "mass_per_sample": None,
        "draws": "independent",
    },
}


@pytest.mark.parametrize("store", STORES)
def test_a_cache_holds_the_teachers_distributions(tmp_path, store):
    """Every kept position against the synthetic teacher's closed form: head, tail mass, entropy,
    draws.
    """
    config = synthetic(
        tmp_path,
        data__max_tokens=8_000,
        store={"top_k": 12, "shard_tokens": 1_200, **STORES[store]},
    )
    manifest = build(config).manifest
    truth = SyntheticTeacher(config.teacher, config.store.capture())
    cache = CacheReader(config.output)
    assert len(manifest.shards) > 5
    assert verify(str(config.output), deep=True) == []
    scalar, deviations = manifest.store.scalar_step / 2, []
    for sequence in (s for s in cache if len(s.positions)):
        dense = truth.dense_logprobs(sequence.input_ids)[sequence.positions]
        at, head = np.arange(len(dense)), sequence.ids >= 0
        stored = np.take_along_axis(dense, np.maximum(sequence.ids, 0).astype(np.int64), axis=1)
        assert (
            np.abs(stored - sequence.logprobs)[head].max(initial=0)
            <= config.store.logprob_step / 2 + 1e-5
        )
        expected = (np.sort(dense, axis=1)[:, ::-1][:, : head.shape[1]] * head).sum(axis=1)
        np.testing.assert_allclose(
            np.where(head, stored, 0).sum(axis=1), expected, err_msg="not the most probable ids"
        )
        outside = np.exp(dense)
        rows, columns = np.nonzero(head)
        outside[rows, sequence.ids[rows, columns]] = 0
        tail = outside.sum(axis=1)
        assert np.abs(np.log(tail) - sequence.tail_logprob).max() <= scalar + 1e-4
        target = dense[at, sequence.target_ids]
        assert np.abs(target - sequence.target_logprob).max() <= scalar + 1e-5
        np.testing.assert_array_equal((dense > target[:, None]).sum(axis=1), sequence.target_rank)
        if sequence.samples is None:
            assert sequence.entropy is None
            continue
        assert np.abs(sequence.entropy + (np.exp(dense) * dense).sum(axis=1)).max() <= scalar + 1e-4
        drawn = sequence.samples.ids
        p = np.where(drawn >= 0, outside[at[:, None, None], drawn], np.nan)
        assert np.nanmin(p) > 0, "a draw from the head"
        if sequence.samples.logprobs is not None:
            assert (
                np.nanmax(np.abs(np.log(p) - sequence.samples.logprobs))
                <= config.store.logprob_step / 2 + 1e-4
            )
        # An unbiased estimate of the tail's mean of any function of the id, such as the parity of
        # the id.
        odd = np.where(drawn >= 0, drawn % 2, 0).sum(axis=(1, 2)) / (drawn >= 0).sum(axis=(1, 2))
        deviations += list(odd - (outside * (np.arange(outside.shape[1]) % 2)).sum(axis=1) / tail)
    if deviations:
        # Positions with the same last tokens share their draws, so far fewer than all are
        # independent.
        assert abs(np.mean(deviations)) < 0.03


def test_the_text_comes_back(tmp_path, lines):
    rows = [{"text": t} for t in ("Grüße aus Köln", "日本語", "x", "🙂" * 3)]
    config = synthetic(tmp_path, data={"path": lines(rows), "max_length": 64})
    build(config)
    tokenizer = open_tokenizer(config.teacher)
    cache = CacheReader(config.output)
    assert [tokenizer.decode(s.input_ids.tolist(), skip_special_tokens=True) for s in cache] == [
        r["text"] for r in rows
    ]


def test_a_finished_cache_is_reused(tmp_path):
    config = synthetic(tmp_path)
    first = build(config)
    stat = (config.output / "manifest.json").stat()
    again = build(config)
    assert again.reused
    assert not first.reused
    assert (config.output / "manifest.json").stat().st_mtime_ns == stat.st_mtime_ns


def test_what_changes_no_number_changes_no_cache(tmp_path):
    first = build(synthetic(tmp_path)).manifest
    other = build(
        synthetic(tmp_path, store__shard_tokens=9_000, output=str(tmp_path / "other"))
    ).manifest
    assert len(other.shards) < len(first.shards)
    assert other.fingerprint == first.fingerprint
    for a, b in zip(CacheReader(tmp_path / "cache"), CacheReader(tmp_path / "other"), strict=True):
        assert a.sequence_id == b.sequence_id
        np.testing.assert_array_equal(a.logprobs, b.logprobs)


def test_more_shards_than_a_manifest_can_list(tmp_path, monkeypatch):
    monkeypatch.setattr(logitcask.pipeline.builder.plan, "MAX_SHARDS", 5)
    with pytest.raises(UserError, match=r"set a larger store\.shard_tokens"):
        build(synthetic(tmp_path))
    assert build(synthetic(tmp_path, store__shard_tokens=10_000), restart=True).manifest.shards


def test_other_settings_need_another_place(tmp_path):
    build(synthetic(tmp_path))
    with pytest.raises(UserError, match=r"store.top_k: 8 -> 4; choose another output"):
        build(synthetic(tmp_path, store__top_k=4))
    assert build(synthetic(tmp_path, store__top_k=4), restart=True).manifest.store.top_k == 4


def test_a_restart_that_cannot_work_removes_nothing(tmp_path):
    build(synthetic(tmp_path))
    for broken in ({"data__path": "./nope.jsonl"}, {"store__top_k": 3001}):
        with pytest.raises(UserError):
            build(synthetic(tmp_path, **broken), restart=True)
        assert build(synthetic(tmp_path)).reused


def test_another_model_in_the_same_folder_is_noticed(tmp_path, tiny_llama):
    """Other weights, or the same weights under another config."""
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    teacher = {"model": str(model), "backend": "transformers"}
    config = synthetic(
        tmp_path, teacher=teacher, data={"path": "python-docs", "max_length": 32, "max_tokens": 500}
    )
    build(config)
    assert build(config).reused
    fields = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**fields, "rms_norm_eps": 0.5}))
    with pytest.raises(UserError, match="has changed since"):
        build(config)


def test_changed_data_is_noticed(tmp_path, lines):
    config = synthetic(tmp_path, data={"path": lines([{"text": "one"}]), "max_length": 64})
    build(config)
    lines([{"text": "one"}])
    os.utime(config.data.path, (1, 1))
    assert build(config).reused, "the same rows, only touched"
    lines([{"text": "two"}])
    with pytest.raises(UserError, match="has changed since"):
        build(config)


def test_sequences_without_targets_keep_their_place(tmp_path, lines):
    """One token predicts nothing; the sequence is stored, never scored, and shifts no other."""
    rows = [{"text": "a"}, {"text": "bc"}, {"text": "d"}]
    config = synthetic(
        tmp_path, data={"path": lines(rows), "max_length": 64, "add_special_tokens": False}
    )
    build(config)
    assert [(len(s), len(s.positions)) for s in CacheReader(config.output)] == [
        (1, 0),
        (2, 1),
        (1, 0),
    ]


def test_overlong_documents_are_counted(tmp_path, lines):
    path = lines([{"text": "x" * 100}, {"text": "y" * 10}])
    for policy, lengths in {
        "split": [32, 32, 32, 4, 10],
        "truncate": [32, 10],
        "drop": [10],
    }.items():
        data = {"path": path, "max_length": 32, "overlong": policy, "add_special_tokens": False}
        config = synthetic(tmp_path, data=data, output=str(tmp_path / policy))
        counters = build(config).manifest.data.counters
        assert [len(s) for s in CacheReader(config.output)] == lengths
        assert (
            sum(
                counters.get(name, 0)
                for name in ("split_documents", "truncated", "dropped_overlong")
            )
            == 1
        ), counters


def test_only_the_assistants_tokens_are_kept(tmp_path, lines):
    chat = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "four"}]
    config = synthetic(
        tmp_path,
        data={
            "path": lines([{"messages": chat * 2}]),
            "messages_field": "messages",
            "max_length": 200,
        },
    )
    manifest = build(config).manifest
    assert manifest.data.mask_policy == "assistant"
    (sequence,) = CacheReader(config.output)
    kept = open_tokenizer(config.teacher).decode(
        sequence.target_ids.tolist(), skip_special_tokens=False
    )
    assert kept == "four<|im_end|>" * 2


BAD = {
    "unknown key": ({"data": {"path": "python-docs", "max_lenght": 3}}, "did you mean max_length"),
    "missing model": (
        {"teacher": {"model": "no/such-model-anywhere", "backend": "transformers"}},
        "no model",
    ),
    "missing data": ({"data": {"path": "./nothing.jsonl"}}, "no data at"),
    "missing field": ({"data": {"path": "python-docs", "text_field": "body"}}, "body"),
    "top_k above the vocabulary": ({"store": {"top_k": 3001}}, "top_k is 3001"),
    "a step that is no power of two": ({"store": {"logprob_step": 0.1}}, "power of two"),
    "documents and chats": (
        {"data": {"path": "python-docs", "text_field": "a", "messages_field": "b"}},
        "set one",
    ),
    "nowhere to write": ({"output": "/proc/cache"}, "cannot write to"),
    "a value that does not parse": ({"store": {"top_k": "many"}}, "store.top_k"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_line_and_exit_2(tmp_path, teacher_cache, monkeypatch, what):
    changes, message = BAD[what]
    fields = {
        "teacher": {"model": "synthetic", "backend": "synthetic", "vocab_size": 3000},
        "data": {"path": "python-docs", "max_tokens": 2000},
        "output": str(tmp_path / "cache"),
    }
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({**fields, **changes}))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    done = teacher_cache("build", config)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    error = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert "Traceback" not in done.stderr


def test_an_empty_data_set(tmp_path, lines):
    with pytest.raises(UserError, match="empty data set"):
        build(synthetic(tmp_path, data={"path": lines([{"text": None}, {"text": ""}])}))


def test_damage_is_exit_1_and_named(tmp_path, teacher_cache):
    config = synthetic(tmp_path)
    build(config)
    shard = config.output / "data" / "shard-00002.arrow"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 4
    shard.write_bytes(data)
    done = teacher_cache("verify", config.output)
    assert done.returncode == 1
    assert "data/shard-00002.arrow is damaged" in done.stderr
    assert "Traceback" not in done.stderr


def test_killed_ten_times_the_cache_is_the_same(tmp_path, rng, fork, teacher_cache):
    """``kill -9`` at random moments, the same build again each time, until one gets through; the
    last is the command.
    """
    config_file = tmp_path / "config.yaml"
    whole = synthetic(tmp_path, output=str(tmp_path / "whole"), data__max_tokens=200_000)
    expected = build(whole).manifest
    killed = whole.model_copy(update={"output": tmp_path / "killed"})
    config_file.write_text(yaml.safe_dump(killed.model_dump(mode="json")))
    work = tmp_path / "killed" / ".build"
    kills = 0
    # The first is killed while it plans, the others at some shard, a random moment later.
    for shards in (0, *rng.integers(0, len(expected.shards) - 1, 9)):
        process = fork(lambda: build(killed))
        while process.is_alive() and not (
            work.exists() and len(list(work.glob("commits/*.json"))) >= shards
        ):
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.2) if kills else 0)
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
    last = teacher_cache("build", config_file)
    assert last.returncode == 0, last.stderr
    found = CacheReader(tmp_path / "killed").manifest
    assert kills > 0
    assert found.content_sha256 == expected.content_sha256
    assert [s.content_sha256 for s in found.shards] == [s.content_sha256 for s in expected.shards]
    assert verify(str(tmp_path / "killed"), deep=True) == []
    left = sorted(str(p.relative_to(tmp_path / "killed")) for p in (tmp_path / "killed").iterdir())
    assert left == ["README.md", "data", "manifest.json", "tail_prior.arrow"]


def test_an_unfinished_build_keeps_its_settings(tmp_path, fork, monkeypatch):
    config = synthetic(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(lazy_teacher, "open_teacher", lambda *_, **__: os._exit(9))
        process = fork(lambda: build(config))
        process.join()
        assert process.exitcode == 9
    with pytest.raises(
        UserError, match=r"unfinished build with other settings: data\.max_length: 128 -> 64"
    ):
        build(synthetic(tmp_path, data__max_length=64))
    assert not build(config).reused


def test_inspect_shows_text_and_probabilities(tmp_path, lines, teacher_cache):
    config = synthetic(tmp_path, data={"path": lines([{"text": "Grüße"}]), "max_length": 64})
    build(config)
    done = teacher_cache("inspect", config.output, "--top", "2", env={"COLUMNS": "200"})
    assert done.returncode == 0, done.stderr
    assert "7 kept positions" in done.stdout
    (sequence,) = CacheReader(config.output)
    assert f"{np.exp(sequence.tail_logprob[0]):.1%}" in done.stdout
    assert teacher_cache("inspect", config.output, "--sequence", "1").returncode == 2
