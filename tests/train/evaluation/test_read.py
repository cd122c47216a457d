"""``train-student read``: the numbers of a dense float64 computation, and its refusals."""

from __future__ import annotations

import json
import logging
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from logitcask.cache_format import CacheReader
from logitcask.cache_format.errors import UserError
from logitcask.cache_format.readings import read_readings
from logitcask.pipeline.builder.run import build
from logitcask.pipeline.config import BuildConfig
from logitcask.train.cli import main
from logitcask.train.data.vocabulary import restricted
from logitcask.train.evaluation.read import _at_stored, read_cache

DOCS = Path(__file__).parents[3] / "docs" / "scripts.md"


@pytest.fixture(scope="module")
def make_cache(tiny_llama, tmp_path_factory):
    """``make_cache(top_k)``: a cache of the tiny Llama's distributions."""
    folder = tmp_path_factory.mktemp("read")

    def make(top_k):
        whole = {"tail_samples": 0, "mass_per_sample": None} if top_k == 384 else {}
        config = BuildConfig.model_validate(
            {
                "teacher": {"model": str(tiny_llama), "backend": "transformers"},
                "data": {"path": "python-docs", "max_length": 48, "max_tokens": 900},
                "store": {"top_k": top_k, "min_probability": None, **whole},
                "audit": {"sequences": 0},
                "output": str(folder / f"top{top_k}"),
            }
        )
        build(config)
        return CacheReader(config.output)

    return make


@pytest.fixture
def student(scratch_student):
    torch.manual_seed(5)
    return scratch_student(tied=False)


def dense(folder, sequence, rows=384):
    """float64[P, V] logprobs at the kept positions, of the model's own float32 logits; one sequence
    at a time, without padding.
    """
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits = model(torch.from_numpy(sequence.input_ids).long()[None]).logits[0]
    return logits[sequence.positions].double().log_softmax(-1).numpy()[:, :rows]


def cells(sequence, log_q):
    """KL(teacher || student) over the head's entries and everything else as one cell, float64, from
    the cache's stored values: [P].
    """
    kl = []
    for row, q in enumerate(log_q):
        ids = sequence.ids[row][sequence.ids[row] >= 0]
        log_p = sequence.logprobs[row][: len(ids)].astype(np.float64)
        outside = np.delete(np.exp(q), ids).sum()
        tail = float(sequence.tail_logprob[row])
        rest = np.exp(tail) * (tail - np.log(outside)) if np.isfinite(tail) else 0.0
        kl.append((np.exp(log_p) * (log_p - q[ids])).sum() + rest)
    return np.array(kl)


@pytest.mark.parametrize("top_k", [8, 384])
def test_the_values_are_those_of_dense_float64(student, make_cache, tmp_path, top_k):
    reader = make_cache(top_k)
    found = read_cache(str(student), reader.path, tmp_path / "r.npz", None, 3)
    assert found.exactness == ("exact" if top_k == 384 else "lower")
    readings = read_readings(tmp_path / "r.npz", reader.path, reader.manifest)
    assert readings.indices == [*range(len(reader))]
    means = []
    for index, sequence in enumerate(reader):
        reading = readings.reading(index, sequence)
        q = dense(student, sequence)
        kl = cells(sequence, q)
        means.append(kl)
        # Logits of a padded batch differ from those of one sequence by float32's rounding.
        assert reading.kl == pytest.approx(kl, abs=2e-5)
        assert reading.log_target == pytest.approx(
            q[np.arange(len(q)), sequence.target_ids], abs=2e-5
        )
        inside = sequence.ids >= 0
        entries = np.take_along_axis(q, np.maximum(sequence.ids, 0), 1)[inside]
        assert reading.log_head == pytest.approx(entries, abs=2e-5)
        if top_k < 384:
            outside = [np.log(np.delete(np.exp(row), ids[ids >= 0]).sum()) for row, ids in zip(q, sequence.ids, strict=True)]  # fmt: skip
            assert reading.log_tail == pytest.approx(np.array(outside), abs=2e-5)
        else:
            assert np.isneginf(reading.log_tail).all()
    assert found.kl == pytest.approx(np.concatenate(means).mean(), abs=1e-5)
    assert found.positions == len(np.concatenate(means))


def test_the_bound_is_below_the_whole_kl(student, tiny_llama, make_cache, tmp_path):
    """Over one cell for everything outside the head the KL is at most that over all ids."""
    reader = make_cache(8)
    read_cache(str(student), reader.path, tmp_path / "r.npz", [0, 1], 2)
    readings = read_readings(tmp_path / "r.npz", reader.path, reader.manifest)
    for index in (0, 1):
        sequence = reader[index]
        p, q = dense(tiny_llama, sequence), dense(student, sequence)
        whole = (np.exp(p) * (p - q)).sum(axis=1)
        kl = readings.reading(index, sequence).kl
        # The stored logprobs are rounded: each by at most the step of the store, in nats.
        assert (kl <= whole + 2 * reader.manifest.store.rounding).all()
        assert kl.mean() < whole.mean()


def test_ids_that_the_student_lacks_have_no_probability(write_cache, rng):
    """The model's columns are of the entries that it has; the others are -inf in their places."""
    sequence, rows = write_cache("all", shards=1, sequences=1, tokens=(30, 31))[0], 40
    seen = restricted(sequence, rows, 60)
    assert (sequence.ids >= rows).any()
    table = rng.normal(size=(len(sequence.positions), rows)).astype(np.float32)
    log_head = np.take_along_axis(table, np.maximum(seen.ids, 0), 1)
    log_head = np.pad(log_head, ((0, 0), (0, 3)))  # of a batch with longer heads
    found, at = _at_stored(log_head, seen, sequence, rows), 0
    for row, ids in enumerate(sequence.ids):
        for token in ids[ids >= 0]:
            assert found[at] == (table[row, token] if token < rows else -np.inf)
            at += 1
    assert at == len(found)


def test_a_choice_of_sequences(student, make_cache, tmp_path):
    reader = make_cache(8)
    found = read_cache(str(student), reader.path, tmp_path / "r.npz", [4, 1], 8)
    readings = read_readings(tmp_path / "r.npz", reader.path, reader.manifest)
    assert (found.sequences, readings.indices) == (2, [1, 4])
    assert readings.reading(0, reader[0]) is None
    with pytest.raises(UserError, match=r"other positions or heads of sequence 1"):
        readings.reading(1, make_cache(4)[1])


def test_refusals(student, make_cache, tmp_path, write_cache):
    reader = make_cache(8)
    with pytest.raises(UserError, match=rf"has sequences 0 to {len(reader) - 1}; 999 was asked"):
        read_cache(str(student), reader.path, tmp_path / "r.npz", [0, 999], 8)
    other = write_cache("other", shards=1, sequences=4)
    with pytest.raises(UserError, match="the student's tokenizer is not the one"):
        read_cache(str(student), other.path, tmp_path / "r.npz", None, 8)
    with pytest.raises(UserError, match="holds no readings"):
        read_readings(DOCS, reader.path, reader.manifest)
    np.savez(tmp_path / "x.npz", meta=np.array("{}"))
    with pytest.raises(UserError, match="holds no readings"):
        read_readings(tmp_path / "x.npz", reader.path, reader.manifest)
    read_cache(str(student), reader.path, tmp_path / "r.npz", [0], 8)
    with pytest.raises(UserError, match=r"is of the cache with the fingerprint .* read this cache"):
        read_readings(tmp_path / "r.npz", other.path, other.manifest)
    with np.load(tmp_path / "r.npz") as file:
        columns = dict(file)
    columns["kl"] = columns["kl"][:-1]
    np.savez(tmp_path / "short.npz", **columns)
    with pytest.raises(UserError, match="its columns do not belong together"):
        read_readings(tmp_path / "short.npz", reader.path, reader.manifest)


def test_a_model_without_finite_logits_leaves_the_file_alone(student, make_cache, tmp_path):
    reader, out = make_cache(8), tmp_path / "r.npz"
    read_cache(str(student), reader.path, out, [0], 1)
    before = out.read_bytes()
    model = AutoModelForCausalLM.from_pretrained(student)
    model.get_input_embeddings().weight.data[int(reader[0].input_ids[5])] = float("nan")
    model.save_pretrained(student)
    with pytest.raises(UserError, match="its KL is not a number at"):
        read_cache(str(student), reader.path, out, [0], 1)
    assert out.read_bytes() == before


def test_the_command(student, make_cache, tmp_path, monkeypatch, capfd):
    reader = make_cache(8)

    def run(*arguments):
        monkeypatch.setattr(logging.root, "handlers", [])
        monkeypatch.setattr(
            sys, "argv", ["train-student", "read", str(student), "--cache", reader.path, *arguments]
        )
        with pytest.raises(SystemExit) as stop:
            main()
        logging.root.handlers.clear()
        return int(stop.value.code or 0), *capfd.readouterr()

    out = str(tmp_path / "r.npz")
    code, stdout, _ = run("--out", out, "--sequences", "0:3", "--json")
    found = json.loads(stdout)
    (keys,) = re.findall(r"^\| `train-student read` \| (.*) \|$", DOCS.read_text(), re.MULTILINE)
    assert (code, list(found)) == (0, re.findall(r"`(\w+)`", re.sub(r"\(.*?\)", "", keys)))
    assert found["sequences"] == 3
    (tmp_path / "i.json").write_text("[0, 2]")
    code, stdout, _ = run("--out", out, "--indices", str(tmp_path / "i.json"))
    assert (code, "2 sequences" in stdout) == (0, True)
    (tmp_path / "i.json").write_text('["a"]')
    for options, said in [
        (("--indices", str(tmp_path / "i.json")), "expected a JSON list"),
        (("--indices", str(tmp_path / "none.json")), "cannot be read"),
        (("--sequences", "a:b"), "--sequences"),
        (("--sequences", "0:2", "--indices", "x"), "give one of them"),
    ]:
        code, stdout, err = run("--out", out, *options)
        assert (code, stdout, len(err.strip().splitlines())) == (2, "", 1)
        assert said in err
