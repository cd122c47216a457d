"""``teacher-cache audit``: sound caches pass with the figures a plain computation gives;
whatever is wrong is named.
"""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from typer.testing import CliRunner

from logitcask.cache_format import (
    CacheReader,
    CacheWriter,
    DamagedCacheError,
    TailSamples,
    UserError,
)
from logitcask.cache_format.cli.app import new_app
from logitcask.cache_format.derive.derive import DeriveOptions, derive
from logitcask.cache_format.manifest import (
    DataIdentity,
    Header,
    StoreSettings,
    TeacherIdentity,
    TokenizerIdentity,
)
from logitcask.cache_format.shards.prior import TailPrior
from logitcask.pipeline.audit import reference as audit_reference
from logitcask.pipeline.audit import run as audit_module
from logitcask.pipeline.audit.run import audit, audit_summary, engine_limit
from logitcask.pipeline.audit.sample import sample
from logitcask.pipeline.commands import audit as audit_cli
from logitcask.pipeline.config import StoreConfig, TeacherConfig
from logitcask.pipeline.distribution.capture import Capture
from logitcask.pipeline.distribution.draws import KEY_IDS, draw, no_draws
from logitcask.pipeline.distribution.keep import keep
from logitcask.pipeline.teachers.model import resolve_model
from logitcask.pipeline.teachers.synthetic import SyntheticTeacher
from logitcask.pipeline.types import Scored, Sequence

VOCAB = 400
STORES = {
    "default": {"top_k": 12, "min_k": 4},
    "top k": {"top_k": 12, "min_probability": None, "tail_samples": 0},
    "whole vocabulary": {"top_k": VOCAB, "min_probability": None, "tail_samples": 0},
    "random sampling": {
        "top_k": 0,
        "tail_samples": 50,
        "mass_per_sample": None,
        "draws": "independent",
    },
    "sets": {
        "top_k": 8,
        "min_probability": None,
        "tail_samples": 6,
        "sample_sets": 3,
        "sample_logprobs": True,
    },
}


def summarise(dense, input_ids, capture):
    """What an engine keeps of float[n-1, V] logprobs."""
    dense = dense.astype(np.float32)
    targets = input_ids[1:]
    top = np.argsort(-dense, axis=1, kind="stable")[:, : max(capture.top_k, KEY_IDS)].astype(
        np.int32
    )
    head = np.take_along_axis(dense, top[:, : capture.top_k].astype(np.int64), axis=1)
    draws = draw(dense, top, targets, capture) if capture.samples else no_draws(head, capture)
    target = dense[np.arange(len(dense)), targets]
    return Scored(
        ids=top[:, : capture.top_k],
        logprobs=head,
        target_ids=targets,
        target_logprob=target,
        target_rank=(dense > target[:, None]).sum(axis=1, dtype=np.int32),
        draws=draws,
    )


@dataclasses.dataclass
class Made:
    """A cache, and the float32[n-1, V] distributions its sequences were made from."""

    path: str
    dense: list


@pytest.fixture
def make(tmp_path, rng):
    """``make(teacher)`` writes what ``teacher`` says of random sequences, after ``engine`` and
    ``change`` had their way.

    engine: from (dense, input_ids) to what the engine takes for the distributions.
    change: of each CachedSequence, before it is stored. identity: of fields of the manifest's
    teacher.
    """

    def make(
        teacher,
        store=None,
        *,
        sequences=6,
        length=60,
        engine=None,
        scored=None,
        change=None,
        kept=1.0,
        **identity,
    ):
        config = StoreConfig(**(STORES["default"] if store is None else store))
        path = tmp_path / f"cache-{len(list(tmp_path.iterdir()))}"
        made, all_dense = [], []
        for number in range(sequences):
            input_ids = rng.integers(0, min(teacher.vocab_size, 258), length).astype(np.int32)
            mask = rng.random(length) < kept
            mask[0] = False
            dense = teacher.dense_logprobs(input_ids)
            said = summarise(
                engine(dense, input_ids) if engine else dense, input_ids, config.capture()
            )
            said = scored(said) if scored else said
            kept_of_it = keep(
                Sequence(str(number), input_ids, mask), said, config.settings(teacher.vocab_size)
            )
            made.append(change(kept_of_it) if change else kept_of_it)
            all_dense.append(dense.astype(np.float32))
        settings = config.settings(teacher.vocab_size)
        with CacheWriter(path) as writer:
            header = header_of(teacher.identity().model_copy(update=identity), settings)
            header = writer.begin(header, TailPrior.estimate(made, settings.vocab_size))
            with writer.shard(0) as shard:
                for each in made:
                    shard.append(each)
            writer.finish(header, 1)
        return Made(str(path), all_dense)

    return make


def header_of(teacher: TeacherIdentity, store: StoreSettings) -> Header:
    return Header(
        created_by="tests",
        teacher=teacher,
        tokenizer=TokenizerIdentity(
            name="t", sha256="0" * 64, vocab_sha256="0" * 64, vocab_size=min(258, store.vocab_size)
        ),
        data=DataIdentity(
            source="x",
            split="train",
            kind="documents",
            mask_policy="all",
            max_length=64,
            overlong="split",
            sha256="0",
        ),
        store=store,
    )


@pytest.fixture
def synthetic(rng):
    seed = int(rng.integers(0, 1 << 30))
    return SyntheticTeacher(
        TeacherConfig(model="synthetic", backend="synthetic", vocab_size=VOCAB, seed=seed),
        Capture(1),
    )


def open_llama(folder):
    from logitcask.pipeline.teachers.transformers import TransformersTeacher

    config = TeacherConfig(model=str(folder), backend="transformers", dtype="float32")
    return TransformersTeacher(
        config, resolve_model(str(folder)), max_length=256, capture=Capture(1)
    )


@pytest.fixture
def llama(tiny_llama):
    return open_llama(tiny_llama)


def kl_and_tv(p, q):
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(p > 0, p * np.log(p / q), 0).sum(), np.abs(p - q).sum() / 2


def plain_figures(made):
    """KL and TV of truncation (even, prior) and of the stored heads, position by position in
    float64.
    """
    cache = CacheReader(made.path)
    found = []
    for sequence, dense in zip(cache, made.dense, strict=True):
        for at, position in enumerate(sequence.positions):
            p = np.exp(dense[position].astype(np.float64))
            p /= p.sum()
            ids = sequence.ids[at][sequence.ids[at] >= 0]
            outside = np.ones(len(p), np.bool_)
            outside[ids] = False
            row = []
            for weights in (np.ones(len(p)), cache.prior.probabilities()):
                q = p.copy()
                if outside.any():
                    q[outside] = p[outside].sum() * weights[outside] / weights[outside].sum()
                row += kl_and_tv(p, q)
            stored = np.zeros(len(p))
            stored[ids] = np.exp(sequence.logprobs[at][: len(ids)].astype(np.float64))
            mass = math.exp(sequence.tail_logprob[at])
            exact = np.append(p[~outside], p[outside].sum())
            said = np.append(stored[~outside], mass)
            row += kl_and_tv(exact, said / said.sum())
            found.append(row)
    return np.mean(found, axis=0)


@pytest.mark.parametrize("store", STORES)
def test_a_sound_cache_passes_with_the_figures_of_a_plain_computation(make, synthetic, store):
    made = make(synthetic, STORES[store], kept=0.7)
    result = audit(made.path)
    manifest = CacheReader(made.path).manifest
    assert result.problems == ()
    assert result.cause is None
    assert (result.sequences, result.positions) == (6, manifest.statistics.positions)
    assert result.target.values == result.positions
    assert result.head.values == manifest.shards[0].entries
    for each in (result.target, result.head):
        assert each.engine < 1e-6
        assert each.mean == pytest.approx(each.rounding, abs=1e-6)
        assert each.largest <= each.largest_allowed + 1e-6
    assert result.head.largest_allowed == 1 / 32
    assert (result.ids_outside, result.ranks_wrong, result.ranks_differ) == (0, 0, 0)
    assert result.cached_loss == pytest.approx(manifest.statistics.teacher_ce, abs=2e-3)
    assert result.reference_loss == pytest.approx(result.cached_loss, abs=2e-3)
    even, prior, stored = result.truncation_even, result.truncation_prior, result.stored
    found = [even.kl, even.tv, prior.kl, prior.tv, stored.kl, stored.tv]
    np.testing.assert_allclose(found, plain_figures(made), rtol=1e-3, atol=2e-6)
    # Without an engine's error, what is stored is what rounding makes of the reference.
    np.testing.assert_allclose(
        dataclasses.astuple(result.codec), dataclasses.astuple(stored), rtol=1e-3, atol=1e-7
    )
    assert (
        (result.entropy is not None)
        == (result.draws is not None)
        == (manifest.store.tail_samples > 0)
    )
    if result.draws is not None:
        assert result.draws.in_head == 0
        assert 0 < result.draws.draws <= manifest.shards[0].draws
        assert result.draws.p_value > 1e-6
        assert max(abs(result.draws.z_logprob), abs(result.draws.z_id)) < 5


def test_a_real_model_is_compared_with_transformers(make, llama):
    made = make(llama, sequences=3)
    result = audit(made.path)
    assert result.problems == ()
    assert "transformers" in result.reference
    assert "float32" in result.reference
    assert max(result.target.engine, result.head.engine) < 1e-4
    even = [result.truncation_even.kl, result.truncation_even.tv]
    np.testing.assert_allclose(even, plain_figures(made)[:2], rtol=1e-3)


def test_the_engines_difference_is_told_from_rounding(make, llama, rng):
    """Noise far below the grid of the heads, which nothing but the mean over many shows."""
    noise = 3e-3
    made = make(
        llama,
        {"top_k": 16, "min_probability": None, "tail_samples": 0},
        sequences=6,
        length=200,
        engine=lambda dense, _: dense + rng.normal(0, noise, dense.shape),
    )
    result = audit(made.path)
    expected = noise * math.sqrt(2 / math.pi)
    assert result.target.engine == pytest.approx(expected, rel=0.15)
    assert result.head.engine == pytest.approx(expected, rel=0.2)
    assert result.head.mean == pytest.approx(1 / 64, rel=0.05)
    assert result.cause == "weights"
    assert "other arithmetic" in result.problems[0]
    lenient = audit(made.path, max_engine_difference=0.005)
    assert lenient.problems == ()
    assert lenient.limit == 0.005


@pytest.mark.parametrize("store", ["default", "top k", "random sampling"])
@pytest.mark.parametrize("by", [1, -1])
def test_a_shift_by_one_position_is_named(make, synthetic, rolled, store, by):
    """Row i holds all that belongs in row i + by."""

    def shifted(said):
        there = (name for name, array in said.arrays().items() if array is not None)
        return rolled(said, (name for name in there if name != "target_ids"), -by)

    result = audit(make(synthetic, STORES[store], scored=shifted).path)
    assert result.cause == "shift"
    assert f"the position {'after' if by > 0 else 'before'} theirs" in result.problems[0]


@pytest.mark.parametrize("temperature", [0.7, 1.5])
@pytest.mark.parametrize("store", ["default", "random sampling"])
def test_a_wrong_temperature_is_named(make, synthetic, store, temperature):
    def at_temperature(dense, _):
        scaled = dense / temperature
        return scaled - np.logaddexp.reduce(scaled, axis=1, keepdims=True)

    made = make(synthetic, STORES[store], engine=at_temperature)
    result = audit(made.path)
    assert result.cause == "temperature"
    assert f"its rows fit {temperature} (" in result.problems[0]
    # A cache whose manifest says so is a sound one.
    stated = make(synthetic, STORES[store], engine=at_temperature, temperature=temperature)
    assert audit(stated.path).problems == ()


@pytest.fixture
def other_llama(tiny_llama, tmp_path):
    """The same model with slightly other weights, in a folder of its own."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for parameter in model.parameters():
            parameter.mul_(1 + 0.02 * torch.randn_like(parameter))
    folder = tmp_path / "other"
    model.save_pretrained(folder)
    return folder


def test_other_weights_are_named(make, llama, other_llama):
    made = make(llama, sequences=3)
    result = audit(made.path, teacher=str(other_llama))
    assert result.cause == "weights"
    assert "built with other weights: their sha256" in result.problems[0]
    assert "neither a shift" in result.problems[1]
    # The numbers tell it even where the manifest does not say what the weights were.
    unnamed = make(llama, sequences=3, weights_sha256=None)
    result = audit(unnamed.path, teacher=str(other_llama))
    assert result.cause == "weights"
    assert len(result.problems) == 1
    assert "token ids are in range" in result.problems[0]


def test_the_weights_are_named_though_the_numbers_agree(make, llama):
    result = audit(make(llama, sequences=2, weights_sha256="0" * 64).path)
    assert len(result.problems) == 1
    assert "built with other weights" in result.problems[0]
    assert result.cause is None


def test_permuted_ids_are_named(make, synthetic, rng):
    def permuted(sequence):
        size = (sequence.ids >= 0).sum(axis=1)
        ids = sequence.ids.copy()
        for row, k in enumerate(size):
            ids[row, :k] = np.roll(ids[row, :k], 1 + rng.integers(0, k - 1))
        return dataclasses.replace(sequence, ids=ids)

    result = audit(make(synthetic, change=permuted).path)
    assert result.cause == "ids"
    assert "other ids" in result.problems[0]
    assert result.target.engine < 1e-6


def without_the_most_probable(said):
    return dataclasses.replace(
        said,
        ids=said.ids[:, 1:],
        logprobs=said.logprobs[:, 1:],
        draws=dataclasses.replace(said.draws, head_size=said.draws.head_size - 1),
    )


def ranks_from_one(said):
    return dataclasses.replace(said, target_rank=np.minimum(said.target_rank + 1, VOCAB - 1))


def entropies_off(said):
    less = dataclasses.replace(said.draws, entropy=said.draws.entropy * np.float32(0.97))
    return dataclasses.replace(said, draws=less)


def larger_tails(sequence):
    return dataclasses.replace(sequence, tail_logprob=sequence.tail_logprob - np.float32(0.1))


def draws_from_the_head(sequence):
    ids = sequence.samples.ids.copy()
    ids[0, 0, 0] = sequence.ids[0, 0]
    return dataclasses.replace(sequence, samples=TailSamples(ids))


def uniform_draws(sequence):
    ids = sequence.samples.ids.copy()
    rng = np.random.default_rng(int(sequence.input_ids.sum()))
    for row, head in enumerate(sequence.ids):
        drawn = ids[row] >= 0
        ids[row][drawn] = rng.choice(np.setdiff1d(np.arange(VOCAB), head), int(drawn.sum()))
    return dataclasses.replace(sequence, samples=TailSamples(ids))


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ({"scored": without_the_most_probable}, "not among the reference's most probable"),
        ({"scored": ranks_from_one}, "rank is not the reference's"),
        ({"scored": entropies_off}, "entropies are"),
        ({"change": larger_tails}, "mass outside the head"),
        ({"change": draws_from_the_head}, "lie in the head"),
        ({"change": uniform_draws}, "draws are not from the reference's tails"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_else_is_wrong_is_named(make, synthetic, fault, named):
    store = {"top_k": 6, "min_probability": None, "mass_per_sample": None}
    problems = audit(make(synthetic, store, length=120, **fault).path).problems
    assert any(named in problem for problem in problems), problems


def test_derived_caches_pass(make, llama, tmp_path):
    """What was rounded twice, and drawn from draws, is allowed for."""
    made = make(llama, {"top_k": 12, "logprob_step": 1 / 64}, sequences=4, length=120)
    small = tmp_path / "small"
    derive(made.path, small, DeriveOptions(top_k=5, logprob_step=1 / 8))
    result = audit(str(small))
    assert result.problems == ()
    assert result.head.largest_allowed == 1 / 16 + 1 / 128
    assert result.draws.draws > 100


def test_the_sample_is_of_the_fingerprint_alone(make, synthetic):
    made = make(synthetic, sequences=30, length=20)
    first = audit(made.path, sequences=4)
    assert first == audit(made.path, sequences=4)
    assert (first.sequences, first.sequences_in_cache, first.positions) == (4, 30, 4 * 19)

    reader = CacheReader(made.path)
    names = [each.sequence_id for each in sample(reader, 30, 100)]
    assert sorted(names) == sorted(map(str, range(30)))
    assert names != [str(number) for number in range(30)]
    reader.manifest = reader.manifest.model_copy(update={"fingerprint": "0123456789abcdef" * 4})
    assert [each.sequence_id for each in sample(reader, 30, 100)] != names


def test_of_long_sequences_only_the_beginning_is_scored(make, synthetic, monkeypatch):
    monkeypatch.setattr(audit_reference, "MAX_TOKENS", 20)
    monkeypatch.setattr(audit_module, "_PART_VALUES", 7 * VOCAB)
    result = audit(make(synthetic, sequences=3).path)
    assert result.problems == ()
    assert result.positions == 3 * 19


def test_what_cannot_be_compared_is_the_users_mistake(make, synthetic, llama, tiny_llama, tmp_path):
    with pytest.raises(UserError, match="has a kept position"):
        audit(make(synthetic, kept=0.0).path)
    made = make(synthetic, sequences=1)
    with pytest.raises(UserError, match="predicts 384 ids, the teacher of the cache 400"):
        audit(made.path, teacher=str(tiny_llama))
    with pytest.raises(UserError, match="--teacher"):
        audit(make(synthetic, sequences=1, revision="main").path)
    with pytest.raises(DamagedCacheError, match="temperature 0"):
        audit(make(synthetic, sequences=1, temperature=0.0).path)
    gone = make(llama, sequences=1, model=str(tmp_path / "gone"))
    with pytest.raises(UserError, match="--teacher"):
        audit(gone.path)
    assert audit(gone.path, teacher=str(tiny_llama)).problems == ()


def test_the_limit_is_that_of_the_arithmetic():
    def limit(bits=None, experts=False, **fields):
        given = {
            "model": "m",
            "backend": "vllm",
            "engine": "vllm 1",
            "route": "raw",
            "vocab_size": 10,
            **fields,
        }
        return engine_limit(TeacherIdentity(**given), bits=bits, experts=experts)

    assert limit(dtype="float32") == 1e-3
    assert (
        limit(dtype="bfloat16")
        == limit(dtype="float16")
        == limit(dtype="float32", head_dtype="bfloat16")
        == 0.05
    )
    assert limit(dtype="bfloat16", bits=8) == limit(dtype="float32", bits=8) == 0.3
    assert limit(dtype="bfloat16", bits=4) == 0.7
    assert limit(dtype="bfloat16", bits=16) == 0.05
    assert limit(dtype="float32", experts=True) == 1e-3, (
        "rounding of 24 bits decides no router's choice"
    )
    assert limit(dtype="bfloat16", experts=True) == 0.2
    assert limit(dtype="bfloat16", bits=8, experts=True) == pytest.approx(0.45)


@pytest.mark.parametrize(
    ("host", "device", "words"),
    [
        (1, None, r"its teacher takes \S+ GB in float32, and 0\.0 GB are free here"),
        (10**12, 1, r"takes \S+ GB in float32, and 0\.0 GB of the GPU's memory are free here"),
        (
            1,
            10**12,
            r"passes through the host's memory in pieces of \S+ GB in float32, and 0\.0 GB are free here",
        ),
        (10**12, 10**12, None),
        (10**12, None, None),
    ],
)
def test_memory_is_looked_at_before_anything_is_loaded(
    make, llama, monkeypatch, host, device, words
):
    from logitcask.pipeline.teachers import transformers as teachers

    cache = make(llama, sequences=1)
    monkeypatch.setattr(audit_reference, "free_memory", lambda: (host, device))
    if words is None:
        assert audit(cache.path).problems == ()
        return
    monkeypatch.setattr(teachers, "TransformersTeacher", None)
    with pytest.raises(UserError, match=words):
        audit(cache.path)


def test_the_summary_fits_a_manifest(make, synthetic):
    found = audit_summary(audit(make(synthetic).path))
    assert found.positions == 6 * 59
    assert found.truncation_kl_even > 0
    assert len(found.model_dump_json()) < 1000
    plain = audit_summary(audit(make(synthetic, STORES["top k"]).path))
    assert plain.draws_p_value is None


def test_the_command(make, synthetic):
    app = new_app("A command.")
    app.command()(audit_cli.audit)
    run = CliRunner().invoke
    sound = make(synthetic)
    said = run(app, [sound.path, "--sequences", "2"])
    assert said.exit_code == 0
    assert said.output.strip().endswith("engine and dense agree")
    assert "2 of 6 sequences, 118 positions" in said.output
    figures = json.loads(run(app, [sound.path, "--json"]).stdout)
    assert figures["problems"] == []
    assert figures["target"]["values"] == 6 * 59

    bad = make(synthetic, change=larger_tails)
    said = run(app, [bad.path])
    assert isinstance(said.exception, DamagedCacheError)
    assert "mass outside the head" in str(said.exception)
    assert "truncation" in said.output
    assert "agree" not in said.output
    noisy = make(synthetic, STORES["top k"], engine=lambda dense, _: dense - 0.01)
    assert isinstance(run(app, [noisy.path]).exception, DamagedCacheError)
    assert run(app, [noisy.path, "--max-engine-difference", "0.05"]).exit_code == 0
