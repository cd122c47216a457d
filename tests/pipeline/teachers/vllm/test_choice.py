"""Ids of our choice in vLLM: the contract of ``prompt_logprob_token_ids``, on a fake engine that
keeps it, and on a real one where there is a GPU: only model runner V2 scores them.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from logitcask.cache_format.errors import UserError
from logitcask.pipeline.config import TeacherConfig
from logitcask.pipeline.distribution.capture import Capture
from logitcask.pipeline.teachers.model import resolve_model
from logitcask.pipeline.teachers.rows import ColumnRequest
from logitcask.pipeline.teachers.vllm import choice, engine
from logitcask.pipeline.teachers.vllm.engine import VllmTeacher
from logitcask.pipeline.teachers.vllm.writing import _answer
from logitcask.pipeline.types import Sequence

VOCAB, COLUMNS, CHOSEN = 30, 4, 3


class Params:
    """Of a request, as vLLM takes them: the fields that are given."""

    def __init__(
        self, *, prompt_logprob_token_ids: Any = None, prompt_logprobs: int = 0, **others: Any
    ) -> None:
        assert "skip_reading_prefix_cache" not in others
        self.ids, self.columns = prompt_logprob_token_ids, prompt_logprobs


def module(**changes: Any) -> SimpleNamespace:
    """What is used of the module ``vllm``."""
    platform = SimpleNamespace(is_cpu=lambda: changes.get("cpu", False))
    return SimpleNamespace(
        __version__="0.32.0",
        SamplingParams=changes.get("params", Params),
        platforms=SimpleNamespace(current_platform=platform),
        envs=SimpleNamespace(VLLM_USE_V2_MODEL_RUNNER=changes.get("runner")),
        sampling_params=SimpleNamespace(RequestOutputKind=SimpleNamespace(FINAL_ONLY=1)),
        inputs=SimpleNamespace(tokens_input=list),
    )


def dense(prompt: list[int]) -> np.ndarray:
    """float32[n-1, V]: the logprobs of a model that knows the last token only."""
    logits = np.random.default_rng(0).normal(size=(VOCAB, VOCAB))[prompt[:-1]]
    return (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))).astype(np.float32)


class Engine:
    """Keeps the contract: int[n-1, C] with -1 as padding, float32[n-1, C] with -inf there. A step
    finishes the newest request, so that answers come in another order.
    """

    wrong = 0.0

    def __init__(self) -> None:
        self.waiting: list[tuple[str, list[int], Params]] = []

    def add_request(self, name: str, prompt: list[int], params: Params) -> None:
        if params.ids is not None:
            assert params.ids.shape == (len(prompt) - 1, CHOSEN)
            assert params.ids.dtype.kind == "i"
            assert params.ids.min() >= -1
        self.waiting.append((name, prompt, params))

    def step(self) -> list[SimpleNamespace]:
        name, prompt, params = self.waiting.pop()
        logprobs = dense(prompt)
        top = np.argsort(-logprobs, axis=1)[:, : params.columns]
        ids = np.concatenate([np.array(prompt[1:])[:, None], top], axis=1)
        flat = np.take_along_axis(logprobs, ids, axis=1)
        ranks = (logprobs >= flat[:, :1]).sum(axis=1)
        scores = None
        if params.ids is not None:
            scores = np.take_along_axis(logprobs, np.maximum(params.ids, 0), axis=1) + self.wrong
            scores = np.where(params.ids < 0, -np.inf, scores).astype(np.float32)
        return [
            SimpleNamespace(
                request_id=name,
                prompt_token_id_logprobs=scores,
                prompt_logprobs=SimpleNamespace(
                    token_ids=ids.ravel().tolist(),
                    logprobs=flat.ravel().tolist(),
                    ranks=np.repeat(ranks, COLUMNS + 1).tolist(),
                ),
            )
        ]

    def abort_request(self, names: list[str]) -> None:
        self.waiting = [each for each in self.waiting if each[0] not in names]


@pytest.fixture
def teacher() -> VllmTeacher:
    """A teacher whose engine is the fake one, on the flat route."""
    found = object.__new__(VllmTeacher)
    capture = Capture(top_k=COLUMNS, chosen=CHOSEN)
    found.__dict__.update(
        _vllm=module(),
        _llm=SimpleNamespace(llm_engine=Engine()),
        _model=SimpleNamespace(name="m"),
        _request=ColumnRequest.of(capture, VOCAB),
        _on_cpu=False,
        _runner_v2=True,
        _step_tokens=64,
        _requests=iter(range(1000)),
        _starting=False,
        _finished={},
        _chosen={},
        _engine_log=SimpleNamespace(printed=lambda: 0, harmless=0),
        route="flat",
        vocab_size=VOCAB,
    )
    return found


def sequences(rng: np.random.Generator, vocab_size: int = VOCAB) -> list[Sequence]:
    made = []
    for number in range(9):
        n = int(rng.integers(2, 20))
        mask = rng.random(n) < 0.6
        mask[0], mask[-1] = False, True
        ids = np.argsort(rng.random((int(mask.sum()), vocab_size)), axis=1)[:, :CHOSEN]
        ids = ids.astype(np.int32)
        ids[::3, -1] = -1
        made.append(
            Sequence(f"{number}", rng.integers(0, vocab_size, n).astype(np.int32), mask, None, ids)
        )
    return made


@pytest.mark.parametrize("all_rows", [False, True])
def test_each_sequence_gets_the_scores_of_its_own_ids(
    teacher: VllmTeacher, rng: np.random.Generator, all_rows: bool
) -> None:
    given = sequences(rng)
    found = (
        list(teacher.score(given))
        if all_rows
        else [answer.scored() for answer in teacher.answers(given)]
    )
    for sequence, scored in zip(given, found, strict=True):
        logprobs = dense(sequence.input_ids.tolist())[sequence.positions()]
        ids = sequence.chosen_ids
        expected = np.take_along_axis(logprobs, np.maximum(ids, 0), axis=1)
        expected = np.where(ids < 0, -np.inf, expected)
        np.testing.assert_array_equal(scored.chosen_logprobs, expected.astype(np.float32))
        assert np.array_equal(scored.target_ids, sequence.input_ids[1:])
    assert not teacher._finished
    assert not teacher._chosen


@pytest.mark.gpu
def test_a_real_engine(rng: np.random.Generator, tiny_llama: Path) -> None:
    """Against the whole distributions of transformers."""
    if find_spec("vllm") is None or not pytest.importorskip("torch").cuda.is_available():
        pytest.skip("needs an NVIDIA GPU and vLLM")
    from logitcask.pipeline.teachers.transformers import TransformersTeacher

    config, model = (
        TeacherConfig(model=str(tiny_llama), dtype="float32"),
        resolve_model(str(tiny_llama)),
    )
    options: dict[str, Any] = {"max_length": 32, "capture": Capture(top_k=8, chosen=CHOSEN)}
    reference = TransformersTeacher(config, model, **options)
    given = sequences(rng, reference.vocab_size)
    expected = list(reference.score(given))
    reference.close()
    engine = VllmTeacher(config, model, **options)
    try:
        for found, right in zip(engine.score(given), expected, strict=True):
            np.testing.assert_allclose(found.chosen_logprobs, right.chosen_logprobs, atol=1e-3)
    finally:
        engine.close()


def test_the_check_at_the_start(teacher: VllmTeacher) -> None:
    """The scores of the next tokens are those that the engine gives for the text itself."""
    teacher.check_chosen(16)
    teacher._llm.llm_engine.wrong = 0.01
    with pytest.raises(UserError, match=r"other logprobs for them, by 0.01 nats; set teacher"):
        teacher.check_chosen(16)
    teacher._runner_v2 = False
    with pytest.raises(UserError, match="runs m by its model runner V1, which cannot"):
        teacher.check_chosen(16)


@pytest.mark.parametrize("scores", [None, np.zeros((3, 2), np.float32)])
def test_an_answer_without_its_scores(scores: Any) -> None:
    rows = choice.with_next_token([1, 2, 3], 2)
    assert rows.tolist() == [[2, -1], [3, -1]]
    output = SimpleNamespace(prompt_token_id_logprobs=scores)
    with pytest.raises(UserError, match=r"returned scores of shape .* for ids of \(2, 2\)"):
        choice.scores_of(output, rows)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"params": lambda prompt_logprobs=0: None}, "cannot score them .0.32 and later can"),
        ({"cpu": True}, "vLLM 0.32.0 scores them on GPUs only"),
        ({"runner": False}, "VLLM_USE_V2_MODEL_RUNNER=0 selects"),
    ],
)
def test_engines_that_cannot(changes: dict[str, Any], match: str) -> None:
    choice.check_vllm(module(), 8)
    with pytest.raises(UserError, match=f"writer_top_k is 8, .*{match}") as refused:
        choice.check_vllm(module(**changes), 8)
    assert str(refused.value).endswith("set teacher.backend=transformers, or remove writer_top_k")


def test_the_writers_most_probable_ids() -> None:
    """A dict has the sampled token and the most probable ones, of which it may be one."""

    def step(**logprobs: float) -> dict[int, Any]:
        return {int(n[1:]): SimpleNamespace(logprob=p) for n, p in logprobs.items()}

    steps = [step(i7=-0.5, i3=-0.9, i1=-2.0), step(i9=-5.0, i4=-0.1, i6=-3.0, i2=-4.0)]
    output = SimpleNamespace(token_ids=[7, 9], logprobs=steps)
    found = _answer(output, 3)
    assert found.top_ids.tolist() == [[7, 3, 1], [4, 6, 2]]
    np.testing.assert_allclose(found.logprobs, [-0.5, -5.0])
    assert _answer(output, 0).top_ids is None
    assert np.isnan(_answer(output, None).logprobs).all()
    steps[1].pop(2), steps[1].pop(6)
    with pytest.raises(UserError, match="does not say the logprobs"):
        _answer(output, 3)


def test_this_vllm_is_asked_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The build stops in one line, without a tokenised text and without an engine."""
    from logitcask.pipeline.builder import inputs
    from logitcask.pipeline.teachers import open as opening
    from tests.pipeline.generate.test_writer import config_of

    config = config_of(tmp_path, "small", {"model": "big"}, writer_top_k=2)
    monkeypatch.setattr(opening.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(
        "logitcask.pipeline.teachers.vllm.process.import_vllm", lambda: module(cpu=True)
    )
    given = SimpleNamespace(vocab_size=VOCAB * 10)
    with pytest.raises(UserError, match="GPUs only"):
        inputs.check_top_k(config, given)
    with_ray = config.model_copy(update={"scale": object()})
    inputs.check_top_k(with_ray, given)
    assert engine.check_vllm is choice.check_vllm
