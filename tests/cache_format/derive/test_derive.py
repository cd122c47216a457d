"""Smaller caches and merged ones: every number still right, estimates still unbiased, what does
not fit is refused.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from logitcask.cache_format import CacheReader, CacheWriter, TailSamples, UserError, verify
from logitcask.cache_format.derive.derive import DeriveOptions, derive
from logitcask.cache_format.derive.fidelity import reconstruction_kl
from logitcask.cache_format.derive.merge import merge
from logitcask.cache_format.derive.narrow import head_sizes, narrow
from logitcask.cache_format.manifest import GenerationIdentity, StoreSettings
from logitcask.cache_format.shards.prior import TailPrior

VOCAB = 300


@pytest.fixture
def write(tmp_path, rng, header, consistent_sequence):
    def make(name, kind="samples", count=8, start=0, empty=0, data=None, **changes):
        """The first ``empty`` sequences have no kept position; ``data`` and ``changes`` go into
        the header.
        """
        sequences = [
            consistent_sequence(rng, f"s{start + i}", kind=kind, tokens=60, kept=float(i >= empty))
            for i in range(count)
        ]
        made = header(1000, kind=kind)
        made = made.model_copy(
            update={
                "store": made.store.model_copy(update=changes),
                "data": made.data.model_copy(update=data or {}),
            }
        )
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
    """Over many first draws and many second ones, every id of the new tail gets its probability;
    a biased way does not.
    """
    p = np.sort(rng.dirichlet(np.full(VOCAB, 0.1)))[::-1]
    ids = rng.permutation(VOCAB)
    had = {
        "vocab_size": VOCAB,
        "top_k": 12,
        "capture_k": 12,
        "logprob_step": 2.0**-16,
        "tail_samples": 6,
    }
    wide = StoreSettings(**had)
    sums = {"right": np.zeros(VOCAB), "biased": np.zeros(VOCAB)}
    squares = {"right": np.zeros(VOCAB), "biased": np.zeros(VOCAB)}
    rounds, rows = 60, 400
    tail = p[12:].sum()
    template = sequence_of(ids[:12], np.log(p[:12]), np.log(tail), rows)
    for number in range(rounds):
        first = rng.choice(ids[12:], (rows, 1, 6), p=p[12:] / tail).astype(np.int32)
        named = dataclasses.replace(template, sequence_id=f"{number}", samples=TailSamples(first))
        new = narrow(named, wide.model_copy(update={"top_k": 4}), "source")
        for name, share in (("right", np.exp(new.tail_logprob[0])), ("biased", tail)):
            estimate = (
                np.stack(
                    [np.bincount(row[row >= 0], minlength=VOCAB) for row in new.samples.ids[:, 0]]
                )
                / 6
                * share
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


@pytest.mark.parametrize("draws", ["systematic", "independent"])
def test_draws_of_draws_of_draws_are_unbiased(rng, draws):
    """Of 16 first draws as stored, by rising id, each gets into the last 4 equally often; with
    the same points twice not.
    """
    had = {
        "vocab_size": VOCAB,
        "top_k": 4,
        "capture_k": 4,
        "logprob_step": 2.0**-16,
        "draws": draws,
    }
    steps = [StoreSettings(**had, tail_samples=count) for count in (8, 4)]
    first = np.arange(100, 116)
    rounds, rows = 60, 400
    template = sequence_of(np.arange(4), np.log([0.4, 0.2, 0.1, 0.1]), np.log(0.2), rows)
    template = dataclasses.replace(
        template, samples=TailSamples(np.tile(first, (rows, 1, 1)).astype(np.int32))
    )
    cases = [(("one", "two"), True)]
    if draws == "systematic":  # one point a row, the same for both
        cases.append((("one", "one"), False))
    for sources, right in cases:
        sums, squares = np.zeros(16), np.zeros(16)
        for _ in range(rounds):
            new = dataclasses.replace(template, sequence_id=f"{rng.integers(2**60)}")
            for settings, source in zip(steps, sources, strict=True):
                new = narrow(new, settings, source)
                new = dataclasses.replace(
                    new, samples=TailSamples(np.sort(new.samples.ids, axis=2))
                )
            counts = (new.samples.ids[:, 0, :, None] == first).sum(axis=1)
            sums += counts.sum(0)
            squares += (counts**2).sum(0)
        mean = sums / (rounds * rows)
        error = np.sqrt((squares / (rounds * rows) - mean**2) / (rounds * rows)) + 1e-9
        score = np.abs(mean - 4 / 16) / error
        assert (score.max() < 5.5) == right, (sources, score)


def test_each_derivation_has_draws_of_its_own(tmp_path, write):
    """What is derived from a derived cache is drawn at other points than the source's draws
    were.
    """
    source = write("source", "random sampling")
    derive(source, tmp_path / "once", DeriveOptions(tail_samples=20))
    derive(str(tmp_path / "once"), tmp_path / "twice", DeriveOptions(tail_samples=10))
    once, twice = CacheReader(tmp_path / "once"), CacheReader(tmp_path / "twice")
    store = twice.manifest.store

    def draws(sequence):
        return np.sort(sequence.samples.ids, axis=2)

    for old, new in zip(once, twice, strict=True):
        np.testing.assert_array_equal(
            draws(narrow(old, store, once.manifest.fingerprint)), draws(new)
        )
    others = [draws(narrow(old, store, CacheReader(source).manifest.fingerprint)) for old in once]
    assert any((other != draws(new)).any() for other, new in zip(others, twice, strict=True))


NARROWER = {
    "head": {"top_k": 3},
    "ragged": {"min_probability": 0.1},
    "samples": {"top_k": 3, "tail_samples": 3},
    "sample logprobs": {"top_k": 3, "tail_samples": 3},
    "random sampling": {"tail_samples": 3},
}


@pytest.mark.parametrize("kind", NARROWER)
@pytest.mark.parametrize("all_empty", [True, False])
def test_sequences_without_kept_positions(tmp_path, write, kind, all_empty):
    source = write("source", kind, empty=8 if all_empty else 3)
    derive(source, tmp_path / "out", DeriveOptions(**NARROWER[kind]), shard_tokens=150)
    assert verify(str(tmp_path / "out"), deep=True) == []
    cache = CacheReader(tmp_path / "out")
    empty = [sequence for sequence in cache if not len(sequence.positions)]
    assert len(empty) == (8 if all_empty else 3)
    store = cache.manifest.store
    for sequence in empty:
        assert sequence.ids.shape == (0, 0)
        if store.tail_samples:
            assert sequence.samples.ids.shape == (0, store.sample_sets, 0)
            assert (sequence.samples.logprobs is None) == (not store.sample_logprobs)
    if kind == "samples" and not all_empty:
        derive(source, tmp_path / "budget", DeriveOptions(max_kl=5.0))
        assert verify(str(tmp_path / "budget"), deep=True) == []


def sequence_of(ids, logprobs, tail, rows):
    from logitcask.cache_format import CachedSequence

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
            [
                reconstruction_kl(s, head_sizes(s.logprobs, manifest.store), 1000, cache.prior)
                for s in cache
            ]
        )
        assert 0.7 * option["max_kl"] < kl.mean() < 1.1 * option["max_kl"]
    else:
        size = sum(file.stat().st_size for file in (tmp_path / "out").rglob("*") if file.is_file())
        assert 0.7 < size / manifest.statistics.tokens / option["max_bytes_per_token"] < 1.05, (
            "all files counted"
        )
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
        ("samples", {"min_probability": 0.001}, r"end by min_probability 0\.01, not 0\.001"),
        ("samples", {"min_k": 3}, "at least 1 entries a head, not 3"),
    ],
)
def test_more_than_there_is_is_refused(tmp_path, write, kind, options, what):
    with pytest.raises(UserError, match=what):
        derive(write("source", kind), tmp_path / "out", DeriveOptions(**options))
    assert not (tmp_path / "out").exists()


def test_heads_that_ended_are_not_said_to_go_on(tmp_path, write):
    source = write("nucleus", top_p=0.9, min_probability=None, min_k=2)
    for options, what in (
        ({"top_p": 0.95}, r"top_p 0\.9, not 0\.95"),
        ({"min_k": 3}, "at least 2 entries"),
    ):
        with pytest.raises(UserError, match=what):
            derive(source, tmp_path / "out", DeriveOptions(**options))
    # Fewer than 3 are left in any case, and whole heads have as many as one likes.
    assert derive(source, tmp_path / "two", DeriveOptions(top_k=2, min_k=3)).store.min_k == 2
    whole = write("whole", "head", min_k=1)
    assert (
        derive(whole, tmp_path / "three", DeriveOptions(min_probability=0.1, min_k=3)).store.min_k
        == 3
    )


@pytest.mark.parametrize("bound", [0.01, 0.0123456, 0.6])
def test_a_budget_beyond_the_source_keeps_its_bound(tmp_path, write, bound):
    source = write("source", min_probability=bound)
    manifest = derive(source, tmp_path / "out", DeriveOptions(max_bytes_per_token=10_000))
    assert manifest.store.min_probability == bound


@pytest.mark.parametrize(
    "options", [{"sequences": "x"}, {"sequences": "::0"}, {"max_kl": 1, "min_probability": 0.1}]
)
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


def test_an_unfinished_derivation_is_begun_afresh_without_its_folder(tmp_path, write):
    """``derive`` has no --restart: what to do is to remove the folder."""
    source, out = write("source"), tmp_path / "out"

    def stop(_):
        raise RuntimeError

    with pytest.raises(RuntimeError):
        derive(source, out, DeriveOptions(top_k=3), on_tokens=stop)
    with pytest.raises(
        UserError, match=rf"go on with the old settings, remove {out} to start afresh, or"
    ) as caught:
        derive(source, out, DeriveOptions(top_k=2))
    assert "--restart" not in str(caught.value)
    prior = (out / "tail_prior.arrow").read_bytes()
    (out / "tail_prior.arrow").write_bytes(b"?")
    with pytest.raises(
        UserError, match=rf"not the file the build wrote; remove {out} to start afresh$"
    ):
        derive(source, out, DeriveOptions(top_k=3))
    (out / "tail_prior.arrow").write_bytes(prior)
    (out / ".build" / "header.json").write_text("{}")
    with pytest.raises(
        UserError, match=rf"this version of logitcask; remove {out} to start afresh$"
    ):
        derive(source, out, DeriveOptions(top_k=3))


@pytest.mark.parametrize(
    "output", ["s3://bucket/x", "file:///tmp/x", "hf://datasets/a/b", "simplecache::s3://bucket/x"]
)
def test_a_url_as_output_is_refused(tmp_path, write, output, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, two = write("one"), write("two", start=50)
    for make in (
        lambda: derive(one, Path(output), DeriveOptions(top_k=3)),
        lambda: merge([one, two], Path(output)),
    ):
        with pytest.raises(
            UserError, match=r"is a URL, but has to be a local folder; .*teacher-cache push"
        ):
            make()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_more_shards_than_a_manifest_lists(tmp_path, write, monkeypatch):
    monkeypatch.setattr("logitcask.cache_format.derive.write.MAX_SHARDS", 1)
    one, two = write("one", count=2), write("two", start=50, count=2)
    for make in (
        lambda: derive(one, tmp_path / "out", DeriveOptions(top_k=3), shard_tokens=1),
        lambda: merge([one, two], tmp_path / "out", shard_tokens=60),
    ):
        with pytest.raises(UserError, match=r"can list 1; set a larger --shard-tokens"):
            make()
        assert not (tmp_path / "out").exists()
    monkeypatch.setattr("logitcask.cache_format.derive.write.MAX_SHARDS", 4)
    assert len(merge([one, two], tmp_path / "out", shard_tokens=60).shards) == 4


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
    assert manifest.derived_from.fingerprints == tuple(
        CacheReader(c).manifest.fingerprint for c in (one, two)
    )


def test_what_does_not_belong_together_is_not_merged(tmp_path, write):
    one = write("one")
    with pytest.raises(UserError, match="'s0' occurs twice"):
        merge([one, write("same")], tmp_path / "out")
    with pytest.raises(UserError, match=r"store\.top_k: 8 -> 5"):
        merge([one, write("narrower", start=50, top_k=5)], tmp_path / "out")
    with pytest.raises(UserError, match="two or more"):
        merge([one], tmp_path / "out")
    for policy in ("all", "mixed"):
        with pytest.raises(
            UserError, match=rf"data\.mask_policy: {policy} -> generated; do not merge"
        ):
            merge(
                [
                    write(policy, data={"mask_policy": policy}),
                    write("written", start=50, data={"mask_policy": "generated"}),
                ],
                tmp_path / "out",
            )
        shutil.rmtree(tmp_path / "written")
    assert not (tmp_path / "out" / "manifest.json").exists()
    merge([one, write("named")], tmp_path / "numbered", number_ids=True)
    assert {s.sequence_id[:2] for s in CacheReader(tmp_path / "numbered")} == {"0/", "1/"}


def test_what_all_parts_agree_on_is_kept(tmp_path, write):
    written = GenerationIdentity(prompts_sha256="1", end_tokens=(2, 3), max_new_tokens=100)
    other = written.model_copy(update={"max_new_tokens": 50})
    caches = [
        write(f"{i}", start=10 * i, data={"mask_policy": "generated", "generation": each})
        for i, each in enumerate((written, written, other))
    ]
    merged = merge(caches[:2], tmp_path / "same").data
    assert (merged.mask_policy, merged.generation) == ("generated", written)
    merged = merge(caches, tmp_path / "different").data
    assert (merged.mask_policy, merged.generation) == ("generated", None)
    assistant = write("assistant", start=50, data={"mask_policy": "assistant"})
    merged = merge([write("all", start=60), assistant], tmp_path / "mixed").data
    assert (merged.mask_policy, merged.generation) == ("mixed", None)
