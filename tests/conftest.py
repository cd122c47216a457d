"""Real models for every folder of tests, and the one way to compare what two engines say about the same text."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.sequence import Scored, Sequence

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def rng() -> np.random.Generator:
    """Fresh randomness in every run; a failing test prints the seed that repeats it."""
    seed = np.random.SeedSequence().entropy
    print("seed", seed)
    return np.random.default_rng(seed)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random two-layer Llama with 384 ids, 256 positions and its own byte-level BPE tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-llama")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(
        [time.__doc__ or "", os.__doc__ or "", "the teacher reads what the student will read " * 20], trainer
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|endoftext|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=256,
        initializer_range=0.25,  # as sharp as a trained model: at the usual 0.02 all ids are nearly tied
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Iterator[Path]:
    """Folder of the built-in model, prepared once into the repository's models folder (or $LOGITCASK_MODELS)."""
    from pipeline.models import prepare_model

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(
            "LOGITCASK_MODELS", os.environ.get("LOGITCASK_MODELS") or str(Path(__file__).parents[1] / "models")
        )
        yield Path(prepare_model("smollm2-135m"))


@pytest.fixture(scope="session")
def as_sequence() -> Callable[[str, list[int]], Sequence]:
    """Makes a sequence out of ids, all of it to be learnt."""

    def make(name: str, ids: list[int]) -> Sequence:
        mask = np.ones(len(ids), dtype=np.bool_)
        mask[0] = False
        return Sequence(name, np.array(ids, dtype=np.int32), mask)

    return make


@pytest.fixture(scope="session")
def assert_same_scores() -> Callable[..., None]:
    """``assert_same_scores(found, dense, input_ids, tolerance=2e-3)``: is ``found`` what ``dense`` says of this text?

    dense: float[n-1, V], another engine's whole distribution. Engines round differently, so logprobs agree within
    ``tolerance`` nats, and ids closer to each other than that may come in any order and fall on either side of the cut.
    """

    def check(
        found: Scored, dense: NDArray[np.floating], input_ids: NDArray[np.int32], tolerance: float = 2e-3
    ) -> None:
        rows, top_k = len(input_ids) - 1, found.ids.shape[1]
        assert dense.shape[0] == rows
        assert found.ids.shape == found.logprobs.shape == (rows, top_k)
        assert found.ids.dtype == found.target_ids.dtype == found.target_rank.dtype == np.int32
        assert found.logprobs.dtype == found.target_logprob.dtype == np.float32

        np.testing.assert_array_equal(
            found.target_ids, input_ids[1:], err_msg="target_ids are not the text, shifted by one"
        )
        target = np.take_along_axis(dense, found.target_ids[:, None].astype(np.int64), axis=1)
        np.testing.assert_allclose(found.target_logprob, target[:, 0], atol=tolerance, rtol=0, err_msg="target_logprob")
        surely_higher = (dense > target + 2 * tolerance).sum(axis=1)
        perhaps_higher = (dense > target - 2 * tolerance).sum(axis=1) - 1
        assert (surely_higher <= found.target_rank).all(), "target_rank is too low"
        assert (found.target_rank <= perhaps_higher).all(), "target_rank is too high"

        assert (np.diff(found.logprobs, axis=1) <= 0).all(), "logprobs do not fall"
        assert all(len(set(row)) == top_k for row in found.ids.tolist()), "an id occurs twice in a head"
        named = np.take_along_axis(dense, found.ids.astype(np.int64), axis=1)
        np.testing.assert_allclose(found.logprobs, named, atol=tolerance, rtol=0, err_msg="logprobs of the named ids")
        cut = np.partition(dense, -top_k, axis=1)[:, -top_k, None]
        assert (named >= cut - 2 * tolerance).all(), "an id is in the head that does not belong there"
        belongs = (dense > cut + 2 * tolerance).sum(axis=1)
        present = (named > cut + 2 * tolerance).sum(axis=1)
        np.testing.assert_array_equal(present, belongs, err_msg="an id that belongs in the head is missing")

    return check
