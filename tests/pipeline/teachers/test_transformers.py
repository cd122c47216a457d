"""The transformers teacher against the model's own softmax, in batches and alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from logitcask.cache_format.errors import UserError
from logitcask.pipeline.config import TeacherConfig
from logitcask.pipeline.distribution.capture import Capture
from logitcask.pipeline.teachers.base import Prompt, Sampling
from logitcask.pipeline.teachers.model import check_rope_in_vllm, resolve_model
from logitcask.pipeline.teachers.open import open_teacher, open_tokenizer
from logitcask.pipeline.teachers.transformers import TransformersTeacher
from logitcask.pipeline.types import Sequence

Make = Callable[[str, list[int]], Sequence]
Check = Callable[..., None]

MAX_LENGTH = 96
TEXT = (
    "def wurzel(größe: float) -> float:\n    return größe ** 0.5  # √größe\n\n"
    "東京は日本の首都です。 Москва — столица России. 🗼🧪 e\u0301 naïve café\n"
    "The quick brown fox jumps over the lazy dog, and the lazy dog does not mind at all.\n"
)


@pytest.fixture(scope="module")
def transformers_tiny(tiny_llama: Path) -> Iterator[Any]:
    teacher = open_teacher(
        TeacherConfig(model=str(tiny_llama), backend="transformers", batch_tokens=128),
        max_length=256,
        capture=Capture(8),
    )
    yield teacher
    teacher.close()


@pytest.mark.parametrize(
    ("device", "engine_args", "expected"),
    [
        ("cuda", {}, {"": torch.device("cuda")}),
        ("cuda", {"device_map": "auto"}, "auto"),
        ("cpu", {}, None),
    ],
)
def test_weights_go_to_their_device_without_a_copy_in_host_memory(
    tiny_llama: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    engine_args: dict[str, object],
    expected: object,
) -> None:
    import transformers

    asked: list[dict[str, Any]] = []

    def load(location: str, **arguments: Any) -> None:
        asked.append(arguments)
        raise OSError("there is no GPU here")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    config = TeacherConfig(
        model=str(tiny_llama), backend="transformers", dtype="float32", engine_args=engine_args
    )
    with pytest.raises(UserError, match="there is no GPU here"):
        TransformersTeacher(
            config, resolve_model(str(tiny_llama)), max_length=8, capture=Capture(1), device=device
        )
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
    sequences = [
        as_sequence(str(n), rng.integers(0, 384, n).tolist())
        for n in (2, 256, *rng.integers(2, 256, 4))
    ]
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


def test_transformers_failures_are_one_line(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at most 256 tokens"):
        open_teacher(
            TeacherConfig(model=str(tiny_llama), backend="transformers"),
            max_length=257,
            capture=Capture(1),
        )
    (tmp_path / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    with pytest.raises(UserError, match="cannot load") as caught:
        open_teacher(
            TeacherConfig(model=str(tmp_path), backend="transformers"),
            max_length=8,
            capture=Capture(1),
        )
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="tokenizer"):
        open_tokenizer(TeacherConfig(model=str(tmp_path)))


@pytest.fixture(scope="module")
def long_rope(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random model that reads texts above 32 tokens with other RoPE factors, as
    Phi-3's 128k models do.
    """
    from transformers import Phi3Config, Phi3ForCausalLM

    folder = tmp_path_factory.mktemp("long-rope")
    factors = {"short_factor": [1.0] * 16, "long_factor": [1.0 + 3 * each for each in range(16)]}
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "original_max_position_embeddings": 32,
        **factors,
    }
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
        np.testing.assert_allclose(
            scored.target_logprob, alone[rows, text.input_ids[1:]], atol=1e-4
        )
    teacher.close()


def test_an_answer_does_not_depend_on_the_long_ones_in_its_group(
    long_rope: Path, rng: np.random.Generator
) -> None:
    config = TeacherConfig(model=str(long_rope), backend="transformers", batch_tokens=1000)
    teacher = open_teacher(
        config, max_length=64, capture=Capture(4), sampling=Sampling(0.0, 1.0, ())
    )
    prompts = [Prompt(rng.integers(3, 384, n).astype(np.int32), 4, 0) for n in (20, 50, 27)]
    for together, prompt in zip(teacher.generate(prompts), prompts, strict=True):
        np.testing.assert_array_equal(together, next(teacher.generate([prompt])))
    teacher.close()


def test_vllm_would_read_short_texts_as_long_ones(long_rope: Path) -> None:
    model = resolve_model(str(long_rope))
    check_rope_in_vllm(model, 32)
    with pytest.raises(
        UserError, match=r"texts of up to 32 tokens.*33 tokens.*data.max_length to 31 or less"
    ) as error:
        check_rope_in_vllm(model, 33)
    assert "\n" not in str(error.value)


def test_vllm_is_asked_before_it_starts(long_rope: Path) -> None:
    pytest.importorskip("vllm")
    with pytest.raises(UserError, match=r"data\.max_length to 31 or less"):
        open_teacher(
            TeacherConfig(model=str(long_rope), backend="vllm"), max_length=32, capture=Capture(4)
        )


def test_a_multimodal_model_is_read_as_its_language_model(
    tmp_path: Path, as_sequence: Make
) -> None:
    """transformers has another class for it: Mistral Small 3, Qwen-VL."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    sizes = {"intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 16}
    text = {
        "vocab_size": 300,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        **sizes,
    }
    sight = {
        "hidden_size": 16,
        "num_attention_heads": 1,
        "image_size": 28,
        "patch_size": 14,
        **sizes,
    }
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
        TeacherConfig(model=str(tmp_path), backend="transformers"),
        max_length=20,
        capture=Capture(8),
    )
    sequence = as_sequence("a", list(range(3, 23)))
    ids = torch.from_numpy(sequence.input_ids.astype(np.int64))[None]
    hidden = model.model.language_model(input_ids=ids).last_hidden_state
    expected = model.lm_head(hidden)[0, :-1].log_softmax(-1).detach().numpy()
    np.testing.assert_allclose(teacher.dense_logprobs(sequence.input_ids), expected, atol=1e-5)
    teacher.close()
