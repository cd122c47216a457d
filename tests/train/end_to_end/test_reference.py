"""Runs that are judged on one reference cache: what a run keeps of it, and that stores become
comparable.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from logitcask.cache_format import CacheReader, UserError
from logitcask.cache_format.derive.derive import DeriveOptions, derive
from logitcask.pipeline.builder.run import build
from logitcask.pipeline.config import BuildConfig
from logitcask.train.cli import summary
from logitcask.train.config import TrainConfig
from logitcask.train.model.compat import warn_of_other_teacher
from logitcask.train.output.report import rewrite_report
from logitcask.train.run import train


@pytest.fixture(scope="module")
def stores(tiny_llama, tmp_path_factory):
    """Three stores of one teacher run, and a reference with draws of some of its texts:
    ``draws``, ``head`` (4 entries and no draws), ``tiny`` (1 entry and no draws), ``reference``.
    """
    folder = tmp_path_factory.mktemp("stores")
    config = BuildConfig.model_validate(
        {
            "teacher": {"model": str(tiny_llama), "backend": "transformers"},
            "data": {"path": "python-docs", "max_length": 64, "max_tokens": 8000},
            "store": {"top_k": 16, "tail_samples": 64, "mass_per_sample": 0.01},
            "output": str(folder / "draws"),
        }
    )
    build(config)
    for name, changes in (
        ("head", {"top_k": 4, "tail_samples": 0, "min_k": 1}),
        ("tiny", {"top_k": 1, "tail_samples": 0, "min_k": 1}),
        ("reference", {"sequences": ":24"}),
    ):
        derive(str(folder / "draws"), folder / name, DeriveOptions(**changes))
    return folder


@pytest.fixture
def run(config, stores, tmp_path):
    """``run(name, cache, **changes)``: metrics of a training from ``cache``, judged on the
    reference.
    """

    def make(name, cache, *, reference="reference", **changes):
        training = {"output_dir": str(tmp_path / name), **changes.pop("training", {})}
        fields = {
            "cache": str(stores / cache),
            "losses": [{"name": "forward_kl"}],
            "ce_weight": 0.0,
            "evaluation": {"cache": str(stores / reference), "max_sequences": None, "k": 4},
            **changes,
        }
        return train(config(**fields, training=training))[0]

    return make


def test_the_ranking_on_a_reference_is_that_of_full_logits(run, stores, tiny_llama, tmp_path):
    """Three students of three stores of one teacher run, against dense float64 KLs of the teacher's
    own logits. Each store's own held-out KL is another quantity for each.
    """
    found = {name: run(name, name) for name in ("draws", "head", "tiny")}
    teacher = AutoModelForCausalLM.from_pretrained(tiny_llama).double()
    reference = list(CacheReader(stores / "reference"))

    def dense(name):
        student = AutoModelForCausalLM.from_pretrained(tmp_path / name).double()
        total = positions = 0
        for sequence in reference:
            ids = torch.from_numpy(sequence.input_ids).long()[None]
            with torch.no_grad():
                p, q = (m(ids).logits[0, :-1].log_softmax(-1) for m in (teacher, student))
            total += (p.exp() * (p - q)).sum().item()
            positions += len(p)
        return total / positions

    truth = {name: dense(name) for name in found}
    judged = {name: metrics["after"]["kl"] for name, metrics in found.items()}
    assert sorted(judged, key=judged.get) == sorted(truth, key=truth.get)
    gaps = np.diff(sorted(truth.values()))
    assert gaps.min() > 0.01, truth  # else a ranking would say nothing
    for name, value in judged.items():
        assert value == pytest.approx(truth[name], abs=gaps.min() / 3), name
        assert found[name]["kinds"]["kl"] == "unbiased"
    # All began with the same student, so they have the same number before; on their own stores
    # they have three, lower ones for worse stores.
    assert len({metrics["before"]["kl"] for metrics in found.values()}) == 1
    own = [
        run(
            f"own-{name}",
            name,
            evaluation={"held_out": 0.3, "k": 1},
            training={"max_steps": 1, "output_dir": str(tmp_path / f"own-{name}")},
        )["before"]["kl"]
        for name in ("draws", "head", "tiny")
    ]
    assert own[0] > own[1] + 0.1 > own[2] + 0.2
    # A run without a reference is identified as in earlier versions.
    kept = json.loads((tmp_path / "own-draws" / "run.json").read_text())
    assert set(kept) == {"config", "cache", "before"}
    assert set(kept["config"]["evaluation"]) == {"held_out", "max_sequences", "k", "answers"}


def test_the_reference_is_part_of_a_run(run, stores, tmp_path, caplog):
    caplog.set_level("INFO")
    metrics = run("a", "head", training={"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1})
    assert (
        f"evaluated on {stores / 'reference'}, where kl is unbiased over the draws" in caplog.text
    )
    reader = CacheReader(stores / "reference")
    fingerprint = reader.manifest.fingerprint
    out = tmp_path / "a"
    kept = json.loads((out / "run.json").read_text())
    assert kept["reference"] == fingerprint
    assert "cache" not in kept["config"]["evaluation"]
    assert metrics["reference"]["fingerprint"] == fingerprint
    assert metrics["reference"]["path"] == str(stores / "reference")
    assert metrics["reference"]["not_learnt_from"] >= len(reader)
    whole = len(CacheReader(stores / "head"))
    assert metrics["train_sequences"] + metrics["reference"]["not_learnt_from"] == whole
    assert metrics["held_out_sequences"] == len(reader)
    history = json.loads((out / "log.json").read_text())
    last = [record["eval_kl"] for record in history if "eval_kl" in record][-1]
    assert last == pytest.approx(metrics["after"]["kl"], abs=1e-6)
    assert fingerprint in (out / "README.md").read_text()
    assert "| kl | " in (out / "README.md").read_text()
    assert "| estimate |" in (out / "README.md").read_text()
    page = (out / "report.html").read_text()
    assert "sequences of the reference cache" in page
    assert "KL to the teacher (estimate)" in page
    assert "estimate; less is better" in page
    table = summary(metrics).splitlines()
    assert table[0].startswith("on the reference")
    assert table[1].startswith("kl ")
    assert table[1].endswith("  estimate")
    assert max(map(len, table)) <= 80

    # Another place of the same reference is the same run; another reference is not.
    with pytest.raises(UserError, match=r"reference.*begin afresh"):
        run("a", "head", reference="draws", training={"max_steps": 2})

    # Runs of versions without kinds
    old = {key: value for key, value in metrics.items() if key not in ("kinds", "reference")}
    (out / "metrics.json").write_text(json.dumps(old))
    rewrite_report(out)
    assert "estimate" not in summary(old)


def test_a_reference_of_another_teacher_is_said(stores, caplog):
    manifest = CacheReader(stores / "draws").manifest
    weights = {"weights_sha256": "1234" * 16}
    other = manifest.model_copy(update={"teacher": manifest.teacher.model_copy(update=weights)})
    warn_of_other_teacher("a", manifest, "r", manifest)
    assert not caplog.records
    warn_of_other_teacher("a", manifest, "r", other)
    assert "the teacher of the reference cache r is" in caplog.text
    assert "(weights 123412341234)" in caplog.text
    caplog.clear()
    hot = {"temperature": 2.0}
    warm = manifest.model_copy(update={"teacher": manifest.teacher.model_copy(update=hot)})
    warn_of_other_teacher("a", warm, "r", manifest)
    assert ", temperature 2" in caplog.text


def test_nothing_to_evaluate_on_is_refused():
    with pytest.raises(ValueError, match="held_out is 0, so there is nothing to evaluate on"):
        TrainConfig.model_validate(
            {
                "cache": "c",
                "student": {"model": "m"},
                "evaluation": {"held_out": 0},
                "training": {"output_dir": "o"},
            }
        )


def test_a_reference_without_enough_heads_is_refused(run):
    with pytest.raises(UserError, match=r"evaluation\.k asks for the teacher's top 4"):
        run("c", "draws", reference="tiny")
