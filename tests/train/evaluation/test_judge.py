"""``train-student evaluate``: the numbers of a run again, dense truth, paired differences, refusals."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from transformers import AutoModelForCausalLM

from logitcask.cache_format import CacheReader
from logitcask.cache_format.derive.derive import DeriveOptions, derive
from logitcask.cache_format.errors import UserError
from logitcask.pipeline.builder.run import build
from logitcask.pipeline.config import BuildConfig
from logitcask.train.cli import main
from logitcask.train.commands.evaluate import number, tables
from logitcask.train.data.held_out import read_index
from logitcask.train.evaluation.judge import Settings, judge
from logitcask.train.run import train

K = 5


@pytest.fixture(scope="module")
def whole(tiny_llama, tmp_path_factory):
    """A cache that holds everything: all 384 logprobs at every position."""
    config = BuildConfig.model_validate(
        {
            "teacher": {"model": str(tiny_llama), "backend": "transformers"},
            "data": {"path": "python-docs", "max_length": 48, "max_tokens": 700},
            "store": {
                "top_k": 384,
                "min_probability": None,
                "tail_samples": 0,
                "mass_per_sample": None,
                "logprob_step": 2**-13,
            },
            "output": str(tmp_path_factory.mktemp("judge") / "whole"),
        }
    )
    build(config)
    return config.output


@pytest.fixture
def student(scratch_student):
    """A random student with a tokenizer."""
    torch.manual_seed(5)
    return scratch_student(tied=False)


def dense(folder, teacher_folder, cache):
    """The metrics in float64 from both models' own logits: metric -> [N] means of sequences, and
    [N] positions.
    """
    teacher, model = (
        AutoModelForCausalLM.from_pretrained(f).double() for f in (teacher_folder, folder)
    )
    found, positions = {}, []
    for sequence in CacheReader(cache):
        ids = torch.from_numpy(sequence.input_ids).long()
        with torch.no_grad():
            p, q = (m(ids[None]).logits[0, :-1].log_softmax(-1) for m in (teacher, model))
        tops = [logits.topk(K).indices.tolist() for logits in (p, q)]
        union = [sorted({*a, *b}) for a, b in zip(*tops, strict=True)]
        values = {
            "kl": (p.exp() * (p - q)).sum(1),
            "reverse_kl": (q.exp() * (q - p)).sum(1),
            "ce": -q.gather(1, ids[1:, None])[:, 0],
            "top1_agreement": (p.argmax(1) == q.argmax(1)).double(),
            f"mor@{K}": torch.tensor(
                [len({*a} & {*b}) / K for a, b in zip(*tops, strict=True)], dtype=torch.float64
            ),
            f"cr@{K}": torch.tensor([float(a == b) for a, b in zip(*tops, strict=True)]),
            f"spearman@{K}": torch.tensor(
                [spearmanr(p[i, u], q[i, u]).statistic for i, u in enumerate(union)]
            ),
        }
        positions.append(len(p))
        for name, value in values.items():
            found.setdefault(name, []).append(value.double().mean().item())
    return {name: np.array(each) for name, each in found.items()}, np.array(positions)


def test_the_numbers_are_those_of_whole_distributions(student, tiny_llama, whole):
    truth, positions = dense(student, tiny_llama, whole)
    found = judge(str(student), str(whole), None, Settings(k=K))
    assert found["sequences"] == len(positions)
    assert found["positions"] == positions.sum()
    for name, values in truth.items():
        figure = found["metrics"][name]
        assert figure["exactness"] == "exact"
        # Logprobs are rounded to 2^-13, on which close ranks depend.
        assert figure["mean"] == pytest.approx(
            (values * positions).sum() / positions.sum(), abs=2e-3
        ), name
        assert figure["deviation"] == pytest.approx(values.std(ddof=1), abs=5e-3), name
        assert figure["low"] <= figure["mean"] <= figure["high"]
    assert found["metrics"]["perplexity"]["mean"] == pytest.approx(
        np.exp(found["metrics"]["ce"]["mean"])
    )
    assert found["metrics"]["ece"]["low"] is None


def test_differences_are_paired_by_sequence(student, tiny_llama, whole):
    """The teacher as the model and a student as the baseline: intervals by hand, from dense truth."""
    found = judge(str(student), str(whole), str(tiny_llama), Settings(k=K, seed=4, resamples=200))
    truth, positions = dense(student, tiny_llama, whole)
    assert found["baseline"]["kl"]["mean"] == pytest.approx(0, abs=1e-3)
    assert found["baseline"]["mor@5"]["mean"] > 0.99
    difference = found["difference"]["kl"]
    rng, means = np.random.default_rng(4), []
    for _ in range(200):
        drawn = rng.integers(0, len(positions), len(positions))
        means.append((truth["kl"] * positions)[drawn].sum() / positions[drawn].sum())
    low, high = np.quantile(means, [0.025, 0.975])
    assert difference["mean"] == pytest.approx(found["metrics"]["kl"]["mean"], abs=1e-3)
    assert (difference["low"], difference["high"]) == pytest.approx((low, high), abs=2e-3)
    assert difference["deviation"] == pytest.approx(truth["kl"].std(ddof=1), abs=5e-3)
    same = judge(str(student), str(whole), str(student), Settings(k=K))["difference"]
    for name, figure in same.items():
        assert (figure["mean"], figure["low"], figure["high"]) in ((0, 0, 0), (0, None, None)), name


def test_a_run_has_the_same_numbers(config, cache, tmp_path, caplog):
    """Of the sequences that it held out, by the same cache."""
    metrics, _ = train(config(training={"max_steps": 3}))
    run = str(config().output_dir)
    found = judge(run, str(cache), None, Settings(held_out_of=run, max_sequences=64))
    means = {name: figure["mean"] for name, figure in found["metrics"].items()}
    assert means == pytest.approx(metrics["after"], rel=1e-4, abs=1e-6)
    assert {n: f["exactness"] for n, f in found["metrics"].items()} == metrics["kinds"]
    assert found["teacher"]["ce"] == pytest.approx(metrics["teacher"]["ce"])
    held_out = int(read_index(CacheReader(cache), 0.2).held_out.sum())
    assert found["sequences"] == min(64, held_out)
    assert not [r for r in caplog.records if "trained on" in r.message]
    assert max(map(len, tables(found).splitlines()[4:])) <= 80

    everything = judge(run, str(cache), None, Settings())
    assert everything["sequences"] == len(CacheReader(cache))
    assert "was trained on sequences of" in caplog.text
    # Another cache of the same rows: said, and chosen by their names.
    derive(str(cache), tmp_path / "some", DeriveOptions(top_k=8))
    other = judge(run, str(tmp_path / "some"), None, Settings(held_out_of=run))
    assert "was not trained on" in caplog.text
    assert other["sequences"] == held_out


def test_bounds_and_estimates_are_called_so(student, cache, tmp_path):
    derive(str(cache), tmp_path / "heads", DeriveOptions(tail_samples=0, top_k=3, min_k=1))
    settings = Settings(k=3, max_sequences=8)
    wide, narrow = (
        judge(str(student), str(place), str(student), settings)
        for place in (cache, tmp_path / "heads")
    )

    def kinds(judgement, table):
        return {name: figure["exactness"] for name, figure in judgement[table].items()}

    text = {"ce": "exact", "perplexity": "exact", "ece": "exact"}
    ranks = {"top1_agreement": "exact", "mor@3": "exact", "cr@3": "exact", "spearman@3": "biased"}
    store = CacheReader(cache).manifest.store
    assert store.min_k >= 3
    assert kinds(wide, "metrics") == text | ranks | {"kl": "unbiased", "reverse_kl": "lower"}
    lower = dict.fromkeys(("kl", "reverse_kl", "mor@3", "cr@3"), "lower")
    assert kinds(narrow, "metrics") == text | ranks | lower
    assert narrow["metrics"]["kl"]["mean"] < wide["metrics"]["kl"]["mean"]
    # The difference of two bounds is neither above nor below that of the whole distributions.
    assert kinds(wide, "difference")["kl"] == "unbiased"
    assert kinds(narrow, "difference")["kl"] == "biased"
    assert kinds(narrow, "difference")["ce"] == "exact"
    shown = tables(narrow)
    assert re.search(r"^kl .*  lower bound$", shown, re.MULTILINE)
    assert re.search(r"^kl .*  approximation$", shown, re.MULTILINE)
    assert re.search(r"^kl .*  estimate$", tables(wide), re.MULTILINE)


def test_adapters_as_a_run_saves_them(config, cache):
    """The merged student, its adapters alone, and a checkpoint: the numbers of the run."""
    peft = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    settings = config(
        student={**config().model_dump()["student"], "peft": peft},
        training={"max_steps": 2, "save_steps": 2},
    )
    metrics, _ = train(settings)
    run = settings.output_dir
    chosen = Settings(held_out_of=str(run), max_sequences=64)
    for place in (run, run / "adapter", run / "checkpoint-2"):
        found = judge(str(place), str(cache), None, chosen)
        means = {name: figure["mean"] for name, figure in found["metrics"].items()}
        assert means == pytest.approx(metrics["after"], rel=1e-3, abs=1e-4), place


def test_a_run_that_was_judged_on_a_reference(config, cache, tmp_path):
    derive(str(cache), tmp_path / "reference", DeriveOptions(sequences=":20"))
    settings = config(
        evaluation={"cache": str(tmp_path / "reference"), "max_sequences": None},
        training={"max_steps": 2},
    )
    metrics, _ = train(settings)
    run = str(settings.output_dir)
    found = judge(run, str(tmp_path / "reference"), None, Settings(held_out_of=run))
    assert found["sequences"] == 20
    assert found["metrics"]["kl"]["mean"] == pytest.approx(metrics["after"]["kl"], rel=1e-4)
    with pytest.raises(UserError, match="held out the texts of the reference cache"):
        judge(run, str(cache), None, Settings(held_out_of=run))


def command(monkeypatch, capsys, *arguments):
    """(exit code, stdout, stderr) of ``train-student`` with these arguments, in this process."""
    monkeypatch.setattr(sys, "argv", ["train-student", *map(str, arguments)])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capsys.readouterr()
    return stop.value.code or 0, out, err


def test_the_command(student, tiny_llama, whole, tmp_path, monkeypatch, capsys):
    options = ["evaluate", student, "--cache", whole, "--max-sequences", 4, "--resamples", 100]
    code, out, _ = command(monkeypatch, capsys, *options, "--out", tmp_path / "found.json")
    assert code == 0
    kept = json.loads((tmp_path / "found.json").read_text())
    assert tables(kept) + "\n" == out
    assert kept["sequences"] == 4
    assert kept["seed"] == 0
    code, out, _ = command(monkeypatch, capsys, *options, "--json", "--baseline", tiny_llama)
    assert code == 0
    again = json.loads(out)
    assert again["metrics"] == kept["metrics"]
    assert again["baseline_model"] == str(tiny_llama)
    assert max(map(len, tables(again).splitlines()[4:])) <= 80
    code, out, _ = command(monkeypatch, capsys, *options, "--json", "--seed", 1)
    assert json.loads(out)["metrics"]["kl"]["mean"] == kept["metrics"]["kl"]["mean"]
    assert json.loads(out)["metrics"]["kl"]["low"] != kept["metrics"]["kl"]["low"]
    code, out, _ = command(monkeypatch, capsys, "evaluate", student, "--cache", whole, "--bf16")
    assert code == 0

    code, out, _ = command(monkeypatch, capsys, "--help")
    assert "evaluate" in out
    assert "train-student CONFIG" in " ".join(out.split())
    code, out, _ = command(monkeypatch, capsys, "train", "--help")
    assert "--print-cache-config" in out


def test_numbers_fit_their_column():
    shown = [number(value) for value in (None, 0.0, -1.5, 99_999.99994, 1e5, -99_999.0, 1.8e11)]
    assert max(map(len, shown)) <= 11
    assert shown == ["-", "0.0000", "-1.5000", "99,999.9999", "1e+05", "-1e+05", "1.8e+11"]


def test_commands_start_without_torch():
    code = "import sys, logitcask.train.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["no/such-model"], "there is no model 'no/such-model'"),
        (["{student}", "--k", "400"], "--k asks for the teacher's top 400"),
        (["{student}", "--held-out-of", "{tmp}"], "holds no run of train-student"),
        (["{student}", "--out", "{tmp}/nowhere/a.json"], "expected a file in a folder that exists"),
        (["{student}", "--out", "{tmp}"], "expected a file in a folder that exists"),
        (["{student}", "--baseline", "{tmp}/none"], "there is no model"),
        (["{unfinished}"], "is the folder of a run that is not finished"),
        (["{diverged}"], "its weights or its logits are not finite"),
        (["{other}"], "the student's tokenizer is not the one that"),
        (["{adapters}"], "holds adapters and does not name their model"),
        (["{student}", "--cache", "{tmp}"], "holds no cache"),
    ],
)
def test_refusals_are_one_line(options, match, student, whole, tmp_path, monkeypatch, capsys):
    places = {"student": student, "tmp": tmp_path}
    for name in ("unfinished", "diverged", "other", "adapters"):
        places[name] = tmp_path / name
        places[name].mkdir()
    (tmp_path / "unfinished" / "run.json").write_text("{}")
    (tmp_path / "adapters" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    if "{diverged}" in options:
        model = AutoModelForCausalLM.from_pretrained(student)
        torch.nn.init.constant_(model.model.norm.weight, torch.nan)
        model.save_pretrained(tmp_path / "diverged")
        # The check of the halves would refuse logits that are nan.
        monkeypatch.setattr("logitcask.train.head.lm_head.LogitsHead._check", lambda *_: None)
    if "{other}" in options:
        shutil.copytree(student, tmp_path / "other", dirs_exist_ok=True)
        file = tmp_path / "other" / "tokenizer.json"
        file.write_text(file.read_text().replace("<|im_start|>", "<|im_begin|>"))
    given = [option.format(**places) for option in options]
    if "--cache" not in given:
        given += ["--cache", str(whole)]
    code, out, err = command(monkeypatch, capsys, "evaluate", *given)
    assert code == 2, err
    assert out == ""
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert match in errors[0]
    assert "Traceback" not in err
