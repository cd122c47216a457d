"""Smaller caches and merged ones: every number still right, estimates still unbiased, what does not fit is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from cache_format import CacheReader, CacheWriter, TailSamples, UserError, verify
from cache_format.derive import DeriveOptions, derive, merge
from cache_format.fidelity import reconstruction_kl
from cache_format.manifest import StoreSettings
from cache_format.narrow import head_sizes, narrow
from cache_format.prior import TailPrior

VOCAB = 300


@pytest.fixture
def write(tmp_path, rng, header, consistent_sequence):
    def make(name, kind="samples", count=8, start=0, **changes):
        sequences = [consistent_sequence(rng, f"s{start + i}", kind=kind, tokens=60) for i in range(count)]
        made = header(1000, kind=kind)
        made = made.model_copy(update={"store": made.store.model_copy(update=changes)})
        with CacheWriter(tmp_path / name) as writer:
            started = writer.begin(made, TailPrior.estimate(sequences, 1000))
            with writer.shard(0) as shard:
                for each in sequences:
                    shard.append(each)
            writer.finish(started, 1)
        return str(tmp_path / name)

    return make


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("samples", {"top_k": 3}),
        ("samples", {"top_k": 0}),
        ("samples", {"min_probability": 0.1}),
        ("samples", {"top_p": 0.5, "min_k": 0}),
        ("samples", {"tail_samples": 0}),
        ("samples", {"tail_samples": 3, "sample_sets": 1}),
        ("samples", {"tail_samples": 9, "draws": "independent", "top_k": 2}),
        ("samples", {"mass_per_sample": 0.2, "top_k": 5}),
        ("samples", {"logprob_step": 0.25}),
        ("sample logprobs", {"top_k": 2}),
        ("sample logprobs", {"top_k": 2, "sample_logprobs": False}),
        ("head", {"top_k": 2}),
        ("ragged", {"min_probability": 0.05}),
        ("random sampling", {"tail_samples": 5}),
    ],
)
def test_what_is_derived_is_a_sound_cache(tmp_path, write, kind, options):
    source = write("source", kind)
    derive(source, tmp_path / "out", DeriveOptions(**options), shard_tokens=150)
    assert verify(str(tmp_path / "out"), deep=True) == []
    before, after = CacheReader(source), CacheReader(tmp_path / "out")
    assert after.manifest.fingerprint != before.manifest.fingerprint
    assert len(after.manifest.shards) > 1
    step = after.manifest.store.logprob_step / 2 + before.manifest.store.logprob_step / 2
    for old, new in zip(before, after, strict=True):
        width = new.ids.shape[1]
        kept = new.ids >= 0
        np.testing.assert_array_equal(new.ids[kept], old.ids[:, :width][kept])
        assert np.abs(new.logprobs[kept] - old.logprobs[:, :width][kept]).max(initial=0) <= step
        np.testing.assert_array_equal(new.target_logprob, old.target_logprob)
        np.testing.assert_array_equal(new.input_ids, old.input_ids)
        if new.samples is not None and not kept.all() and before.manifest.store.sample_sets == 2:
            assert set(new.samples.ids[new.samples.ids >= 0]) <= set(old.ids[old.ids >= 0]) | set(
                old.samples.ids[old.samples.ids >= 0]
            )


def test_sequences_are_chosen_by_slice_and_pattern(tmp_path, write):
    source = write("source", count=12)
    derive(source, tmp_path / "every", DeriveOptions(sequences="1::3"))
    assert [s.sequence_id for s in CacheReader(tmp_path / "every")] == ["s1", "s4", "s7", "s10"]
    derive(source, tmp_path / "matching", DeriveOptions(match="s1*", sequences=":11"))
    assert [s.sequence_id for s in CacheReader(tmp_path / "matching")] == ["s1", "s10"]
    with pytest.raises(UserError, match="no sequence is left"):
        derive(source, tmp_path / "none", DeriveOptions(match="t*"))


def test_draws_of_draws_are_unbiased(rng):
    """Over many first draws and many second ones, every id of the new tail gets its probability; a biased way does not."""
    p = np.sort(rng.dirichlet(np.full(VOCAB, 0.1)))[::-1]
    ids = rng.permutation(VOCAB)
    had = {"vocab_size": VOCAB, "top_k": 12, "capture_k": 12, "logprob_step": 2.0**-16, "tail_samples": 6}
    wide = StoreSettings(**had)
    sums = {"right": np.zeros(VOCAB), "biased": np.zeros(VOCAB)}
    squares = {"right": np.zeros(VOCAB), "biased": np.zeros(VOCAB)}
    rounds, rows = 60, 400
    tail = p[12:].sum()
    template = sequence_of(ids[:12], np.log(p[:12]), np.log(tail), rows)
    for number in range(rounds):
        first = rng.choice(ids[12:], (rows, 1, 6), p=p[12:] / tail).astype(np.int32)
        named = dataclasses.replace(template, sequence_id=f"{number}", samples=TailSamples(first))
        new = narrow(named, wide.model_copy(update={"top_k": 4}))
        for name, share in (("right", np.exp(new.tail_logprob[0])), ("biased", tail)):
            estimate = (
                np.stack([np.bincount(row[row >= 0], minlength=VOCAB) for row in new.samples.ids[:, 0]]) / 6 * share
            )
            sums[name] += estimate.sum(0)
            squares[name] += (estimate**2).sum(0)
    expected = np.zeros(VOCAB)
    expected[ids[4:]] = p[4:]
    for name in sums:
        mean = sums[name] / (rounds * rows)
        error = np.sqrt((squares[name] / (rounds * rows) - mean**2) / (rounds * rows)) + 1e-9
        score = np.abs(mean - expected)[ids[4:12]] / error[ids[4:12]]
        assert (score.max() < 5) == (name == "right"), (name, score)


def sequence_of(ids, logprobs, tail, rows):
    from cache_format import CachedSequence

    mask = np.ones(rows + 1, bool)
    mask[0] = False
    return CachedSequence(
        sequence_id="s",
        input_ids=np.zeros(rows + 1, np.int32),
        loss_mask=mask,
        positions=np.arange(rows, dtype=np.int32),
        ids=np.tile(ids, (rows, 1)).astype(np.int32),
        logprobs=np.tile(logprobs, (rows, 1)).astype(np.float32),
        tail_logprob=np.full(rows, tail, np.float32),
        target_logprob=np.full(rows, -1, np.float32),
        target_rank=np.zeros(rows, np.int32),
    )


def test_reconstruction_kl_is_that_of_the_dense_distributions(rng):
    """With the tail spread evenly it is exact; with a prior, its mean over draws is."""
    p = np.sort(rng.dirichlet(np.full(VOCAB, 0.3)))[::-1]
    ids = rng.permutation(VOCAB)
    prior = TailPrior(rng.integers(0, 20, VOCAB).astype(np.uint8))
    size = np.full(2000, 5)
    made = sequence_of(ids[:9], np.log(p[:9]), np.log(p[9:].sum()), 2000)
    draws = rng.choice(ids[9:], (2000, 1, 8), p=p[9:] / p[9:].sum()).astype(np.int32)
    entropy = np.full(2000, -(p * np.log(p)).sum(), np.float32)
    made = dataclasses.replace(made, samples=TailSamples(draws), entropy=entropy)
    for spread in (None, prior):
        b = np.ones(VOCAB) if spread is None else spread.probabilities()
        q = np.empty(VOCAB)
        q[ids[:5]] = p[:5]
        q[ids[5:]] = p[5:].sum() * b[ids[5:]] / b[ids[5:]].sum()
        true = (p * np.log(p / q[ids])).sum()
        found = reconstruction_kl(made, size, VOCAB, spread)
        if spread is None:
            np.testing.assert_allclose(found, true, atol=1e-5)
        else:
            assert abs(found.mean() - true) < 5 * found.std() / 2000**0.5


@pytest.mark.parametrize("option", [{"max_bytes_per_token": 45.0}, {"max_kl": 1.2}])
def test_a_budget_is_met(tmp_path, write, option):
    source = write("source", count=30)
    manifest = derive(source, tmp_path / "out", DeriveOptions(min_k=1, **option))
    cache = CacheReader(tmp_path / "out")
    if "max_kl" in option:
        kl = np.concatenate(
            [reconstruction_kl(s, head_sizes(s.logprobs, manifest.store), 1000, cache.prior) for s in cache]
        )
        assert 0.7 * option["max_kl"] < kl.mean() < 1.1 * option["max_kl"]
    else:
        size = sum(file.stat().st_size for file in (tmp_path / "out").rglob("*") if file.is_file())
        assert 0.7 < size / manifest.statistics.tokens / option["max_bytes_per_token"] < 1.05, "all files counted"
    assert manifest.store.min_probability is not None
    with pytest.raises(UserError, match="out of reach"):
        derive(source, tmp_path / "no", DeriveOptions(**dict.fromkeys(option, 0.001)))


@pytest.mark.parametrize(
    ("kind", "options", "what"),
    [
        ("samples", {"top_k": 9}, "at most 8"),
        ("head", {"tail_samples": 2}, "no tail samples"),
        ("head", {"top_k": 0}, "nothing would be kept"),
        ("samples", {"sample_sets": 3}, "2 sets"),
        ("samples", {"sample_logprobs": True}, "no logprobs"),
        ("head", {"entropy": True}, "no entropies"),
        ("samples", {"logprob_step": 2.0**-8}, "grid"),
        ("head", {"max_kl": 0.5}, "entropies"),
    ],
)
def test_more_than_there_is_is_refused(tmp_path, write, kind, options, what):
    with pytest.raises(UserError, match=what):
        derive(write("source", kind), tmp_path / "out", DeriveOptions(**options))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [{"sequences": "x"}, {"sequences": "::0"}, {"max_kl": 1, "min_probability": 0.1}])
def test_options_that_make_no_sense(options):
    with pytest.raises(ValueError, match=r"sequences is|set one"):
        DeriveOptions(**options)


def test_an_interrupted_derivation_goes_on(tmp_path, write):
    source = write("source", count=9)
    options = DeriveOptions(top_k=3)
    whole = derive(source, tmp_path / "whole", options, shard_tokens=130)

    class Stop(Exception):
        pass

    done = 0

    def stop(tokens):
        nonlocal done
        done += tokens
        if done > 300:
            raise Stop

    with pytest.raises(Stop):
        derive(source, tmp_path / "again", options, shard_tokens=130, on_tokens=stop)
    resumed = derive(source, tmp_path / "again", options, shard_tokens=130)
    assert resumed.content_sha256 == whole.content_sha256
    with pytest.raises(UserError, match="finished cache"):
        derive(source, tmp_path / "again", options)
    with pytest.raises(UserError, match=r"finished cache|made of"):
        derive(source, tmp_path / "source", options)


def test_merged_caches_hold_all_sequences(tmp_path, write):
    one, two = write("one", count=4), write("two", count=5, start=4)
    manifest = merge([one, two], tmp_path / "both", shard_tokens=130)
    assert verify(str(tmp_path / "both"), deep=True) == []
    merged = CacheReader(tmp_path / "both")
    for old, new in zip([*CacheReader(one), *CacheReader(two)], merged, strict=True):
        assert old.sequence_id == new.sequence_id
        for name in ("ids", "logprobs", "tail_logprob", "entropy", "target_logprob"):
            np.testing.assert_array_equal(getattr(old, name), getattr(new, name))
        for row in range(len(old.positions)):
            for a, b in zip(old.samples.ids[row], new.samples.ids[row], strict=True):
                assert sorted(a[a >= 0]) == sorted(b[b >= 0])
    assert manifest.derived_from.fingerprints == tuple(CacheReader(c).manifest.fingerprint for c in (one, two))


def test_what_does_not_belong_together_is_not_merged(tmp_path, write):
    one = write("one")
    with pytest.raises(UserError, match="'s0' occurs twice"):
        merge([one, write("same")], tmp_path / "out")
    with pytest.raises(UserError, match=r"store\.top_k: 8 -> 5"):
        merge([one, write("narrower", start=50, top_k=5)], tmp_path / "out")
    with pytest.raises(UserError, match="two or more"):
        merge([one], tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()
    merge([one, write("named")], tmp_path / "numbered", number_ids=True)
    assert {s.sequence_id[:2] for s in CacheReader(tmp_path / "numbered")} == {"0/", "1/"}
