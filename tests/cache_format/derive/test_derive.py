"""Smaller caches: every number is still right, and what does not fit is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from logitcask.cache_format import CacheReader, UserError, verify
from logitcask.cache_format.derive.derive import DeriveOptions, derive
from logitcask.cache_format.derive.fidelity import reconstruction_kl
from logitcask.cache_format.derive.merge import merge
from logitcask.cache_format.derive.narrow import head_sizes, narrow


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
