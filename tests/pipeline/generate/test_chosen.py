"""``data.generate.writer_top_k``: the writer's most probable ids at each token, with the teacher's
logprobs of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from logitcask.cache_format import CachedSequence, CacheReader, UserError, verify
from logitcask.cache_format.derive.derive import DeriveOptions, derive
from logitcask.cache_format.derive.merge import merge
from logitcask.pipeline.builder.plan import read_sequences, write_sequences
from logitcask.pipeline.builder.run import build
from logitcask.pipeline.config import BuildConfig, TeacherConfig
from logitcask.pipeline.distribution.capture import Capture
from logitcask.pipeline.distribution.keep import MisalignedScoresError, keep
from logitcask.pipeline.generate import answers as generation
from logitcask.pipeline.teachers.synthetic import SyntheticTeacher
from logitcask.pipeline.types import Sequence
from tests.pipeline.generate.test_writer import (
    ROUNDING,
    VOCAB,
    config_of,
    other_weights,
    synthetic,
    tiny,
)

K = 6
STEP = 1 / 64


def small(config: BuildConfig, **store: Any) -> BuildConfig:
    """``config`` with heads so small that they lack most of what another model chooses."""
    fields = {"top_k": 8, "min_k": 8, "min_probability": None, "logprob_step": STEP, **store}
    store_config = config.store.model_copy(update=fields)
    return config.model_copy(update={"store": store_config})


def check(
    sequence: CachedSequence, written: np.ndarray, scored: np.ndarray, slack: float = 1e-6
) -> int:
    """Compares the chosen ids with the dense logprobs of writer and teacher, float[n-1, V]. Returns
    how many are outside the heads.
    """
    written, scored = written[sequence.positions], scored[sequence.positions]
    chosen = sequence.chosen
    assert chosen.ids.shape == (len(sequence.positions), K)
    least = np.sort(written, axis=1)[:, -K]
    found = np.take_along_axis(written, chosen.ids.astype(np.int64), axis=1)
    assert (found >= least[:, None] - slack).all()
    assert all(len(set(row)) == K for row in chosen.ids.tolist())
    expected = np.take_along_axis(scored, chosen.ids.astype(np.int64), axis=1)
    assert np.abs(chosen.logprobs - expected).max() <= STEP / 2 + slack
    return int((chosen.places_in(sequence.ids) < 0).sum())


def model_of(seed: int) -> SyntheticTeacher:
    config = TeacherConfig(model="synthetic", backend="synthetic", vocab_size=VOCAB, seed=seed)
    return SyntheticTeacher(config, Capture(top_k=1, samples=0))


@pytest.mark.parametrize("store", [{}, {"tail_samples": 5, "sample_logprobs": True}])
def test_the_teachers_logprobs_of_the_writers_top(tmp_path: Path, store: dict[str, Any]) -> None:
    config = small(synthetic(tmp_path, writer_top_k=K, temperature=0.7, top_p=0.9), **store)
    build(config)
    cache = CacheReader(tmp_path / "cache")
    writer, teacher = model_of(5), model_of(1)
    outside = sum(
        check(each, writer.dense_logprobs(each.input_ids), teacher.dense_logprobs(each.input_ids))
        for each in cache
    )
    assert outside > 0.9 * K * cache.manifest.statistics.positions
    assert verify(str(tmp_path / "cache"), deep=True) == []
    assert cache.manifest.required_features == ("writer_logprobs", "chosen_ids")
    assert cache.manifest.store.chosen_ids == K
    assert build(config).reused


@pytest.mark.parametrize("batch_tokens", [48, 4096])
def test_real_models_against_dense_logits(
    tmp_path: Path, tiny_llama: Path, batch_tokens: int
) -> None:
    """In batches of one and of many, with stop strings and several answers."""
    from transformers import AutoModelForCausalLM

    writer = other_weights(tiny_llama, tmp_path / "writer")
    config = small(tiny(tmp_path, writer, tiny_llama, writer_top_k=K, samples=2, stop=["e"]))
    teacher = config.teacher.model_copy(update={"batch_tokens": batch_tokens})
    build(config.model_copy(update={"teacher": teacher}))
    models = [AutoModelForCausalLM.from_pretrained(each) for each in (writer, tiny_llama)]
    outside = 0
    for sequence in CacheReader(tmp_path / "cache"):
        with torch.no_grad():
            dense = [
                model(torch.from_numpy(sequence.input_ids)[None].long())
                .logits[0, :-1]
                .double()
                .log_softmax(1)
                .numpy()
                for model in models
            ]
        outside += check(sequence, *dense, slack=1e-4)
    assert outside > 0
    assert verify(str(tmp_path / "cache"), deep=True) == []


def test_a_build_killed_between_its_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While answers are written, and while they are scored: the same cache in the end."""
    monkeypatch.setattr(generation, "_UNIT_ANSWERS", 2)
    (tmp_path / "whole").mkdir()

    def config(folder: Path) -> BuildConfig:
        return small(synthetic(folder, writer_top_k=K), shard_tokens=60)

    build(config(tmp_path / "whole"))
    for name, owner, after in (
        ("_commit", generation.Generations, 2),
        ("score", SyntheticTeacher, 1),
    ):
        method, count = getattr(owner, name), 0

        def killed(self: Any, *args: Any, method: Any = method, after: int = after) -> Any:
            nonlocal count
            count += 1
            if count > after:
                raise RuntimeError("killed")
            return method(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, killed)
            with pytest.raises(RuntimeError, match="killed"):
                build(config(tmp_path))
    build(config(tmp_path))
    whole, resumed = (CacheReader(each / "cache") for each in (tmp_path / "whole", tmp_path))
    assert len(whole.manifest.shards) > 1
    assert resumed.manifest.content_sha256 == whole.manifest.content_sha256


def test_derived_and_merged_caches_keep_them(tmp_path: Path) -> None:
    """Ids that leave a head stay chosen, with the logprobs that they had."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        prompts = {"skip_prompts": 0 if name == "a" else 3, "max_prompts": 3}
        build(small(synthetic(tmp_path / name, "synthetic:1", writer_top_k=K, **prompts)))
    caches = [str(tmp_path / name / "cache") for name in ("a", "b")]
    derive(caches[0], tmp_path / "less", DeriveOptions(top_k=2))
    merge(caches, tmp_path / "both")
    whole, less, both = (
        CacheReader(each) for each in (caches[0], tmp_path / "less", tmp_path / "both")
    )
    for derived in (less, both):
        assert derived.manifest.required_features == ("writer_logprobs", "chosen_ids")
        assert verify(derived.path, deep=True) == []
        for found, expected in zip(derived, whole, strict=False):
            for ids, logprobs, true_ids, true_logprobs in zip(
                found.chosen.ids,
                found.chosen.logprobs,
                expected.chosen.ids,
                expected.chosen.logprobs,
                strict=True,
            ):
                assert dict(zip(ids, logprobs, strict=True)) == dict(
                    zip(true_ids, true_logprobs, strict=True)
                )
    # The writer is the teacher, so they were all in the heads.
    assert all((each.chosen.places_in(each.ids) >= 0).all() for each in whole)
    assert all((each.chosen.places_in(each.ids) < 0).sum(axis=1).max() == K - 2 for each in less)
    assert len(both) == 6


def test_ids_that_the_teacher_lacks_or_never_predicts(tmp_path: Path) -> None:
    """They are left out, and the others move up."""
    ids = np.array([[7, 90, 3], [91, 90, 1]], np.int32)
    assert generation._below(ids, 90).tolist() == [[7, 3, -1], [1, -1, -1]]
    teacher = model_of(1)
    config = small(synthetic(tmp_path, writer_top_k=2))
    sequence = Sequence(
        "s", np.array([1, 2, 3], np.int32), np.array([False, True, True]), np.zeros(2, np.float32)
    )
    sequence = Sequence(
        *(sequence.sequence_id, sequence.input_ids, sequence.loss_mask, sequence.writer_logprob),
        np.array([[5, 6], [7, -1]], np.int32),
    )
    (scored,) = SyntheticTeacher(config.teacher, config.capture()).score([sequence])
    dense = teacher.dense_logprobs(sequence.input_ids)
    np.testing.assert_allclose(
        scored.chosen_logprobs, [dense[0, [5, 6]], [dense[1, 7], -np.inf]], atol=1e-6
    )
    scored.chosen_logprobs[0, 0] = -np.inf
    kept = keep(sequence, scored, config.store_settings(VOCAB)).chosen
    assert kept.ids.tolist() == [[6, -1], [7, -1]]
    assert np.isneginf(kept.logprobs).tolist() == [[False, True], [False, True]]


def test_an_engine_that_does_not_score_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(synthetic(tmp_path, writer_top_k=2))
    sequence = Sequence(
        *("s", np.array([1, 2], np.int32), np.array([False, True]), np.zeros(1, np.float32)),
        np.array([[5, 6]], np.int32),
    )
    plain = Sequence(sequence.sequence_id, sequence.input_ids, sequence.loss_mask)
    (scored,) = SyntheticTeacher(config.teacher, config.capture()).score([plain])
    with pytest.raises(MisalignedScoresError, match=r"shape \(1, 2\).*scores of shape None"):
        keep(sequence, scored, config.store_settings(VOCAB))


def test_a_plan_holds_them(tmp_path: Path) -> None:
    """With a sequence of no kept position, and with one that has none."""
    ids, mask = np.arange(4, dtype=np.int32), np.array([False, True, False, True])
    chosen = np.array([[5, 6, 7], [8, 9, -1]], np.int32)
    given = [
        Sequence("a", ids, mask, np.zeros(2, np.float32), chosen),
        Sequence("b", ids, np.zeros(4, bool), np.zeros(0, np.float32), chosen[:0]),
        Sequence("c", ids, mask),
    ]
    write_sequences(tmp_path, given, 1000)
    first, second, third = read_sequences(tmp_path, 0)
    assert first.chosen_ids.tolist() == chosen.tolist()
    assert second.chosen_ids is None
    assert third.chosen_ids is None


SPLICE = {"cache": "earlier", "top_k": 5}


@pytest.mark.parametrize(
    ("writer", "teacher", "generate", "match"),
    [
        (None, {}, {}, "writer_top_k is 6, but there is no writer"),
        ("synthetic:5", {}, {"splice": SPLICE}, "writer_top_k is 6, but with splice"),
        (
            "small",
            {"model": "big", "backend": "server", "server": {"url": "http://h:1"}},
            {},
            "writer_top_k is 6, but a teacher.backend of 'server'",
        ),
        ("small", {"model": "big", "backend": "mine:Backend"}, {}, "backend of 'mine:Backend'"),
    ],
)
def test_configs_that_cannot_have_them(
    tmp_path: Path,
    writer: str | None,
    teacher: dict[str, Any],
    generate: dict[str, Any],
    match: str,
) -> None:
    model = {"model": "synthetic", "backend": "synthetic", **teacher}
    with pytest.raises(ValueError, match=match):
        config_of(tmp_path, writer, model, writer_top_k=K, **generate)


def test_more_ids_than_there_are(tmp_path: Path) -> None:
    config = synthetic(tmp_path, writer_top_k=255)
    teacher = config.teacher.model_copy(update={"vocab_size": 254})
    config = small(config.model_copy(update={"teacher": teacher}))
    with pytest.raises(UserError, match="writer_top_k is 255, but synthetic can predict 254 ids"):
        build(config)
    assert not (tmp_path / "cache" / "manifest.json").exists()


def test_without_them_nothing_changes(tmp_path: Path) -> None:
    build(synthetic(tmp_path))
    cache = CacheReader(tmp_path / "cache")
    assert b"chosen_ids" not in (tmp_path / "cache" / "manifest.json").read_bytes()
    assert cache.manifest.required_features == ("writer_logprobs",)
    assert all(sequence.chosen is None for sequence in cache)
    assert abs(cache[0].writer_logprob[0]) > ROUNDING
