"""``teacher-cache estimate`` against real builds, measured caches and arithmetic done by hand."""

from __future__ import annotations

import gzip
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from logitcask.cache_format import UserError
from logitcask.cache_format.cli.app import new_app
from logitcask.cache_format.manifest import MAX_MANIFEST_BYTES, ShardEntry
from logitcask.pipeline.builder.run import build
from logitcask.pipeline.commands import estimate as estimate_cli
from logitcask.pipeline.config import BuildConfig
from logitcask.pipeline.estimate import run as estimates
from logitcask.pipeline.estimate import speed as estimate_speed
from logitcask.pipeline.estimate.run import Estimate, estimate
from logitcask.pipeline.text import row_count


def config_of(tmp_path, data=None, **parts):
    fields = {
        "teacher": {"model": "synthetic", "backend": "synthetic", "vocab_size": 3000},
        "data": {"path": "python-docs", "max_length": 256} | (data or {}),
        "output": str(tmp_path / "cache"),
    }
    return BuildConfig.model_validate(fields | parts)


def write_chats(file, count, rng):
    """Chats of which the assistant says between a tenth and all but one word."""
    with open(file, "w", encoding="utf-8") as out:
        for _ in range(count):
            user, answer = (" ".join(["word"] * int(n)) for n in rng.integers(1, 40, 2))
            chat = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
            out.write(json.dumps({"messages": chat}) + "\n")


# --- tokens ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlong", ["split", "truncate", "drop"])
def test_tokens_are_those_of_a_build(tmp_path, rng, overlong):
    max_length = int(rng.integers(200, 3000))
    config = config_of(
        tmp_path,
        {"max_length": max_length, "overlong": overlong},
        store={"top_k": 4, "min_k": 1, "shard_tokens": 20_000},
    )
    built = build(config).manifest
    (found,) = estimate(config).forecasts
    totals = built.statistics
    assert (found.tokens, found.sequences, found.kept_positions) == (
        totals.tokens,
        totals.sequences,
        totals.positions,
    )
    assert found.shards == pytest.approx(len(built.shards), rel=0.15, abs=1)
    everything = estimate(config_of(tmp_path, {"max_length": 10**6})).sample
    assert found.text_tokens == everything.tokens
    assert (found.tokens < found.text_tokens) == (overlong != "split")


def test_chats_keep_the_assistants_tokens(tmp_path, rng):
    file = tmp_path / "chats.jsonl"
    write_chats(file, 60, rng)
    config = config_of(
        tmp_path, {"path": str(file), "messages_field": "messages", "max_length": 150}
    )
    totals = build(config).manifest.statistics
    (found,) = estimate(config).forecasts
    assert (found.tokens, found.sequences, found.kept_positions) == (
        totals.tokens,
        totals.sequences,
        totals.positions,
    )
    assert found.kept_positions < 0.9 * found.tokens


def test_what_nobody_learns_is_not_scored(tmp_path):
    file = tmp_path / "one.txt"
    file.write_text("x" * 34 + "\n")  # pieces of 33 tokens and of one
    data = {"path": str(file), "max_length": 33, "add_special_tokens": False}
    found = estimate(config_of(tmp_path, data)).forecasts[0]
    assert (found.tokens, found.scored_tokens, found.kept_positions, found.sequences) == (
        34,
        33,
        32,
        2,
    )


def _as_jsonl(folder, rows):
    (folder / "d.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))


def _as_gzip(folder, rows):
    with gzip.open(folder / "d.jsonl.gz", "wt") as out:
        out.writelines(json.dumps({"text": row}) + "\n" for row in rows)


def _as_csv(folder, rows):
    (folder / "d.csv").write_text("text\n" + "".join(f'"{row}\nand a line"\n' for row in rows))


def _as_two_parquets(folder, rows):
    for part in (0, 1):
        pq.write_table(pa.table({"text": rows[part::2]}), folder / f"train-{part}.parquet")


def _as_saved(folder, rows):
    from datasets import Dataset

    Dataset.from_dict({"text": rows}).save_to_disk(folder)


@pytest.mark.parametrize("write", [_as_jsonl, _as_gzip, _as_csv, _as_two_parquets, _as_saved])
def test_all_of_the_data_is_told_from_sizes(tmp_path, rng, monkeypatch, write):
    folder = tmp_path / "data"
    folder.mkdir()
    # Random letters, so that a compressed file is of one density.
    letters = [chr(code) for code in range(97, 123)]
    rows = ["".join(rng.choice(letters, 1000)) for _ in range(600)]
    write(folder, rows)
    config = config_of(tmp_path, {"path": str(folder)})
    exact = estimate(config)
    assert exact.sample.whole
    monkeypatch.setattr(estimates, "_ROWS", 50)
    monkeypatch.setattr(row_count, "_HEAD_BYTES", 400_000)
    told = estimate(config)
    assert (told.sample.whole, told.sample.rows) == (False, 50)
    assert told.total_text_tokens == pytest.approx(exact.sample.text_tokens, rel=0.1)
    assert told.forecasts[0].kept_positions == pytest.approx(
        exact.forecasts[0].kept_positions, rel=0.1
    )
    limited = estimate(
        config.model_copy(update={"data": config.data.model_copy(update={"max_tokens": 77_777})})
    )
    assert limited.forecasts[0].tokens == 77_777


def test_a_table_where_the_size_is_unknown(tmp_path, monkeypatch):
    file = tmp_path / "array.json"
    file.write_text(json.dumps([{"text": "some words"}] * 100, indent=1))
    monkeypatch.setattr(estimates, "_ROWS", 10)
    found = estimate(config_of(tmp_path, {"path": str(file)}))
    assert found.total_text_tokens is None
    assert [forecast.text_tokens for forecast in found.forecasts] == [
        10**power for power in range(6, 13)
    ]
    (only,) = estimate(config_of(tmp_path, {"path": str(file), "max_tokens": 5000})).forecasts
    assert only.tokens == pytest.approx(5000, abs=1)


# --- bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "store",
    [
        {},
        {"min_probability": None, "mass_per_sample": None, "top_k": 16, "tail_samples": 0},
        {"sample_logprobs": True},
    ],
)
def test_a_probe_measures_the_bytes_of_a_build(tmp_path, store, monkeypatch):
    monkeypatch.setattr(estimate_speed, "_LONG_ENOUGH", 0.5)
    config = config_of(tmp_path, {"max_tokens": 100_000, "max_length": 100}, store=store)
    built = build(config).manifest.statistics
    found = estimate(config, measure=True)
    assert (found.size.source, found.speed.source) == ("probe", "probe")
    assert found.forecasts[0].bytes.likely == pytest.approx(built.bytes, rel=0.1)
    assert found.size.heads == pytest.approx(built.mean_head_size, rel=0.05)
    assert found.forecasts[0].tokens == 100_000


def test_a_manifest_that_would_be_too_large_is_foretold(tmp_path):
    few, many = (estimate(config_of(tmp_path), tokens=[count]) for count in (10**9, 10**12))
    assert not any("too many" in line for line in few.assumptions)
    (warning,) = (line for line in many.assumptions if "too many" in line)
    enough = int(re.search(r"shard_tokens to ([\d,]+)", warning)[1].replace(",", ""))
    mended = estimate(config_of(tmp_path, store={"shard_tokens": enough}), tokens=[10**12])
    assert not any("too many" in line for line in mended.assumptions)
    entry = ShardEntry(
        path="data/shard-0123456.arrow",
        bytes=40_000_000,
        sha256="0" * 64,
        content_sha256="0" * 64,
        sequences=3000,
        sequences_per_batch=30,
        tokens=10**6,
        positions=10**6,
        entries=10**7,
        draws=10**7,
        head_mass_sum=776580.5831806612,
        target_nll_sum=2667860.816393498,
    )
    indented = len(entry.model_dump_json(indent=2)) + 4 * 14
    assert MAX_MANIFEST_BYTES // indented == pytest.approx(few.size.most_shards, rel=0.03)


# --- time and money -------------------------------------------------------------------------------


def test_a_trillion_tokens(tmp_path):
    # Else each piece of a document begins with BOS.
    config = config_of(tmp_path, {"add_special_tokens": False})
    found = estimate(config, tokens=[10**12, 1], price=2.5, gpus=64, tokens_per_second=50_000.0)
    large, small = found.forecasts
    assert large.text_tokens == large.tokens == 10**12
    assert large.scored_tokens == pytest.approx(10**12, rel=1e-4)
    assert large.engine_seconds.likely == large.scored_tokens / 50_000
    assert large.wall_seconds.likely == pytest.approx(large.scored_tokens / 50_000 / 64)
    assert large.cost.likely == pytest.approx(large.scored_tokens / 50_000 / 3600 * 2.5)
    assert large.bytes.likely == pytest.approx(40e12, rel=0.1)
    assert (small.sequences, small.shards) == (1, 1)
    assert small.bytes.likely > 0


@pytest.fixture
def real(tmp_path, tiny_llama):
    """Estimates for a real model of four GPUs, of whatever length its sequences are."""

    def run(max_length=128, teacher=None, **options):
        fields = {"model": str(tiny_llama), "tensor_parallel_size": 4} | (teacher or {})
        return estimate(config_of(tmp_path, {"max_length": max_length}, teacher=fields), **options)

    return run


def test_an_engine_of_several_gpus(tmp_path, real):
    found = real(gpus=8)
    (forecast,) = found.forecasts
    assert forecast.gpu_seconds.likely == pytest.approx(4 * forecast.engine_seconds.likely)
    assert forecast.wall_seconds.likely == pytest.approx(forecast.engine_seconds.likely / 2)
    assert real().gpus == 4
    with pytest.raises(UserError, match="6 GPUs do not make up engines of 4"):
        real(gpus=6)
    # The synthetic teacher has no use for GPUs.
    teacher = {"model": "synthetic", "vocab_size": 3000, "tensor_parallel_size": 4}
    assert estimate(config_of(tmp_path, teacher=teacher)).gpus == 1


def test_time_follows_from_the_models_shape(real, monkeypatch):
    # The tiny Llama by hand: two layers of q, k, v, o, three matrices of the MLP and two norms; a
    # last norm.
    layer = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128 + 2 * 64
    weights, attention, head = 2 * layer + 64, 2 * 2 * 32, 384 * 64
    monkeypatch.setattr(estimate_speed, "writing_seconds", lambda entries: 0.0)
    found = real(gpu="a100")
    context = found.sample.context
    # 40 % of 312 TFLOP/s, 2.04 TB/s, and 65 % of 300 GB/s, of which a GPU of four uses three parts
    # in four.
    layers = (2 * weights + 4 * attention * context) / (0.4 * 312e12)
    sums = 2 * 2 * 0.75 * 2 * (2 * 64) / (0.65 * 300e9)
    product = 2 * head / (0.4 * 312e12)
    gathered, passes = 0.75 * 4 * 384 / (0.65 * 300e9), 20 * 4 * 384 / 2.04e12
    expected = 1 / (layers / 4 + sums + product / 4 + gathered + passes)
    assert found.speed.tokens_per_second.likely == pytest.approx(expected)

    narrow = real(gpu="a100", teacher={"engine_args": {"hf_overrides": {"head_dtype": "bfloat16"}}})
    expected = 1 / (layers / 4 + sums + product / 4 + gathered / 2 + passes)
    assert narrow.speed.tokens_per_second.likely == pytest.approx(expected)

    # Of a pipeline the last stage has the head and the vocabulary to itself.
    piped = real(gpu="a100", gpus=8, teacher={"engine_args": {"pipeline_parallel_size": 2}})
    assert piped.speed.gpus_per_engine == 8
    expected = 1 / ((layers / 4 + sums) / 2 + product / 4 + gathered + passes)
    assert piped.speed.tokens_per_second.likely == pytest.approx(expected)

    alone = real(gpu="a100", teacher={"tensor_parallel_size": 1})
    assert alone.speed.tokens_per_second.likely == pytest.approx(1 / (layers + product + passes))
    lengths = found.sample.tokens / found.sample.sequences
    assert 0.4 * lengths < context < 64
    assert real(max_length=16).sample.context < context


def test_writing_counts_where_it_takes_longer_than_the_engine(real, monkeypatch):
    assert 3e-6 < estimate_speed.writing_seconds(26) < 6e-6
    with monkeypatch.context() as patch:
        patch.setattr(estimate_speed, "writing_seconds", lambda entries: 0.0)
        free = real().speed.tokens_per_second
    entries = []
    monkeypatch.setattr(
        estimate_speed, "writing_seconds", lambda count: entries.append(count) or 1 / free.likely
    )
    found = real()
    bound = found.speed.tokens_per_second
    assert (bound.low, bound.likely, bound.high) == pytest.approx(
        (free.low, free.likely, free.likely)
    )
    assert entries == [found.size.heads + found.size.draws]


def test_weights_that_do_not_fit_are_named(real, monkeypatch):
    assert not any("will not fit" in line for line in real().assumptions)
    small = estimate_speed.Gpu("toy", 1e12, 1e12, 1e12, 1e9, 1e9, 40_000)
    monkeypatch.setitem(estimate_speed.GPUS, "toy", small)
    assert any(
        "0 GB of 16-bit weights will not fit" in line for line in real(gpu="toy").assumptions
    )


def test_no_engine_starts_unless_it_is_asked_for(real, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("an engine was started")

    monkeypatch.setattr(estimate_speed, "open_teacher", refuse)
    assert real().speed.source == "hardware"
    assert real(tokens_per_second=10.0).speed.source == "given"
    with pytest.raises(AssertionError, match="an engine was started"):
        real(measure=True)


def test_a_probe_of_a_real_model(tmp_path, tiny_llama, monkeypatch):
    monkeypatch.setattr(estimate_speed, "_LONG_ENOUGH", 0.5)
    teacher = {"model": str(tiny_llama), "backend": "transformers"}
    config = config_of(
        tmp_path, {"max_tokens": 4000, "max_length": 64}, teacher=teacher, audit={"sequences": 0}
    )
    found = estimate(config, measure=True)
    assert found.speed.tokens_per_second.low < found.speed.tokens_per_second.likely
    assert "measured here with transformers" in found.speed.notes[0]
    assert found.forecasts[0].bytes.likely == pytest.approx(
        build(config).manifest.statistics.bytes, rel=0.1
    )


# --- mistakes, and the command --------------------------------------------------------------------


def test_mistakes(tmp_path, real):
    with pytest.raises(UserError, match="no figures for a GPU 'abacus'; expected b200"):
        real(gpu="abacus")
    with pytest.raises(
        UserError, match=r"store\.top_k is 4000, but synthetic can predict 3000 ids"
    ):
        estimate(config_of(tmp_path, store={"top_k": 4000}))
    with pytest.raises(UserError, match="no data at"):
        estimate(config_of(tmp_path, {"path": "./nowhere.jsonl"}))
    with pytest.raises(UserError, match="no sequence came out"):
        estimate(
            config_of(tmp_path, {"max_length": 1, "overlong": "drop", "add_special_tokens": False})
        )


@pytest.fixture
def command(tmp_path):
    """Runs the command on a config of the synthetic teacher."""
    app = new_app("A command.")
    app.command()(estimate_cli.estimate)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config_of(tmp_path).model_dump(mode="json")))
    return lambda *arguments: CliRunner().invoke(app, [str(file), *arguments])


def test_the_page(command):
    result = command(
        "--tokens",
        "1e6",
        "--tokens",
        "1e12",
        "--price",
        "2",
        "--gpus",
        "8",
        "--tokens-per-second",
        "1000",
    )
    assert result.exit_code == 0, result.output
    table, _, assumptions = result.output.partition("\nassumptions\n")
    cells = {line[:22].strip(): line[22:].split("  ") for line in table.splitlines()}
    last = {name: row[-1].strip() for name, row in cells.items() if name}
    assert last["tokens of text"] == "1 T"
    hours = 278_811  # 10^9 seconds and 0.4 % for the BOS of each piece
    assert last["GPU hours"] == f"{hours:,}"
    assert float(last["cost, 2 a GPU hour"].replace(",", "")) == pytest.approx(2 * hours, abs=2)
    assert last["wall, 8 GPUs"] == f"{round(hours / 8 / 24):,} days"
    assert last["bytes on disk"].endswith(" TB")
    assert all(line.startswith("- ") for line in assumptions.splitlines())
    assert "1,000 tokens/s for each engine, as given" in assumptions
    assert "SmolLM2" in assumptions


def test_json_is_the_same(command, tmp_path):
    result = command("store.top_k=16", "--json", "--tokens", "1e9")
    assert Estimate.model_validate_json(result.stdout) == estimate(
        config_of(tmp_path, store={"top_k": 16}), tokens=[10**9]
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--tokens-per-second", "0"], "--tokens-per-second is 0.0; expected a number above 0"),
        (["--tokens-per-second", "nan"], "--tokens-per-second is nan"),
        (["--tokens", "many"], "--tokens is 'many'"),
        (["store.top_q=1"], "unknown key store.top_q"),
    ],
)
def test_mistakes_on_the_command_line(command, arguments, expected):
    error = command(*arguments).exception
    assert isinstance(error, UserError)
    assert error.exit_code == 2
    assert expected in str(error)


def test_the_synthetic_teacher_takes_seconds(tmp_path):
    """It scores some hundred thousand tokens a second on any machine."""
    (forecast,) = estimate(config_of(tmp_path), tokens=[10**6]).forecasts
    assert 0.3 < forecast.engine_seconds.likely < 60
