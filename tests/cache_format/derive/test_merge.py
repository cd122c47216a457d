"""Merged caches: every sequence is there, and what does not belong together is refused."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from logitcask.cache_format import CacheReader, UserError, verify
from logitcask.cache_format.derive.merge import merge
from logitcask.cache_format.manifest import GenerationIdentity


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
