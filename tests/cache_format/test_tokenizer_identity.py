"""The identity of a tokenizer: equal where the same text becomes the same ids, different where
it does not.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from logitcask.cache_format.tokenizer_identity import tokenizer_identity

SPECIALS = ["<bos>", "<eos>"]


def trained() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(
        ["the cat and the hat and the bat"] * 9,
        trainers.BpeTrainer(vocab_size=290, special_tokens=SPECIALS, show_progress=False),
    )
    return tokenizer


BASE = trained().to_str()


def fast(backend: Tokenizer | str = BASE) -> PreTrainedTokenizerFast:
    backend = Tokenizer.from_str(backend) if isinstance(backend, str) else backend
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>")


def edited(edit: Callable[[dict[str, Any]], None]) -> PreTrainedTokenizerFast:
    state = json.loads(BASE)
    edit(state)
    return fast(json.dumps(state))


def changed(change: Callable[[Tokenizer], object]) -> PreTrainedTokenizerFast:
    backend = Tokenizer.from_str(BASE)
    change(backend)
    return fast(backend)


def setter(name: str, value: object) -> Callable[[Tokenizer], None]:
    return lambda backend: setattr(backend, name, value)


def sequence_of_one(state: dict[str, Any]) -> None:
    state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [state["pre_tokenizer"]]}


def converted(state: dict[str, Any]) -> None:
    """What a converter may write instead: "" for null, another order, offsets kept whole."""
    state["model"].update(continuing_subword_prefix="", end_of_word_suffix="", dropout=None)
    state["model"]["vocab"] = dict(sorted(state["model"]["vocab"].items(), reverse=True))
    state["pre_tokenizer"]["trim_offsets"] = not state["pre_tokenizer"]["trim_offsets"]


def swap_merges(state: dict[str, Any]) -> None:
    state["model"]["merges"][:2] = state["model"]["merges"][1::-1]


def swap_ids(state: dict[str, Any]) -> None:
    vocab = state["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


def test_the_four_facts() -> None:
    identity = tokenizer_identity(fast(), "{{ template }}")
    assert identity.keys() == {"sha256", "vocab_sha256", "vocab_size", "chat_template_sha256"}
    assert identity["vocab_size"] == len(fast())
    assert identity["chat_template_sha256"] == hashlib.sha256(b"{{ template }}").hexdigest()
    assert tokenizer_identity(fast(), None) == {**identity, "chat_template_sha256": None}
    # Pinned: caches on disk carry these.
    vocab = json.dumps(fast().get_vocab(), sort_keys=True, separators=(",", ":"))
    assert identity["vocab_sha256"] == hashlib.sha256(vocab.encode()).hexdigest()


@pytest.mark.parametrize(
    "same",
    [
        lambda: edited(sequence_of_one),
        lambda: edited(converted),
        lambda: changed(setter("decoder", decoders.ByteLevel())),
        lambda: changed(setter("post_processor", processors.ByteLevel(trim_offsets=True))),
        lambda: changed(setter("normalizer", normalizers.Sequence([]))),
        lambda: changed(lambda backend: backend.enable_truncation(2)),
        lambda: changed(lambda backend: backend.enable_padding(pad_token="<eos>", pad_id=1)),
    ],
    ids=[
        "sequence of one",
        "converted",
        "decoder",
        "trimmed offsets",
        "empty normaliser",
        "truncation",
        "padding",
    ],
)
def test_what_changes_no_id_changes_no_hash(same: Callable[[], Any]) -> None:
    assert tokenizer_identity(same(), None) == tokenizer_identity(fast(), None)


def test_it_survives_saving_loading_and_use(tmp_path: Path) -> None:
    tokenizer = fast()
    identity = tokenizer_identity(tokenizer, None)
    tokenizer.pad_token = "<eos>"
    tokenizer(["the cat", "hat"], truncation=True, max_length=1, padding=True)
    assert tokenizer_identity(tokenizer, None) == identity
    tokenizer.save_pretrained(tmp_path / "copy")
    assert tokenizer_identity(AutoTokenizer.from_pretrained(tmp_path / "copy"), None) == identity


@pytest.mark.parametrize(
    ("other", "same_vocabulary"),
    [
        (lambda: edited(swap_merges), True),
        (lambda: changed(setter("normalizer", normalizers.Lowercase())), True),
        (
            lambda: changed(
                setter("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True))
            ),
            True,
        ),
        (
            lambda: changed(
                lambda backend: backend.add_special_tokens([AddedToken("the", lstrip=True)])
            ),
            True,
        ),
        (
            lambda: changed(
                setter(
                    "post_processor",
                    processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)]),
                )
            ),
            True,
        ),
        (lambda: edited(swap_ids), False),
        (lambda: changed(lambda backend: backend.add_tokens(["<new>"])), False),
    ],
    ids=["merges", "normaliser", "pre-tokenizer", "added token", "BOS", "ids", "new token"],
)
def test_what_changes_ids_changes_the_hash(other: Callable[[], Any], same_vocabulary: bool) -> None:
    base, identity = tokenizer_identity(fast(), None), tokenizer_identity(other(), None)
    assert identity["sha256"] != base["sha256"]
    assert (identity["vocab_sha256"] == base["vocab_sha256"]) == same_vocabulary


def test_scores_of_a_unigram_model_count() -> None:
    def unigram(score: float, unk: int | None) -> PreTrainedTokenizerFast:
        return PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(
                models.Unigram([("a", -1.0), ("b", -2.0), ("ab", score)], unk_id=unk)
            )
        )

    identities = [
        tokenizer_identity(unigram(*args), None) for args in ((-2.5, 0), (-9.0, 0), (-2.5, None))
    ]
    assert len({identity["sha256"] for identity in identities}) == 3
    assert len({identity["vocab_sha256"] for identity in identities}) == 1


def test_a_tokenizer_without_a_backend() -> None:
    class Bytes:
        def get_vocab(self) -> dict[str, int]:
            return {f"<{byte}>": byte for byte in range(256)}

        def __len__(self) -> int:
            return 256

        def __call__(
            self, texts: list[str], add_special_tokens: bool
        ) -> dict[str, list[list[int]]]:
            return {"input_ids": [list(text.encode()) for text in texts]}

    class OtherBytes(Bytes):
        pass

    assert tokenizer_identity(Bytes(), None) == tokenizer_identity(Bytes(), None)
    assert tokenizer_identity(Bytes(), None)["vocab_size"] == 256
    assert (
        tokenizer_identity(Bytes(), None)["sha256"]
        != tokenizer_identity(OtherBytes(), None)["sha256"]
    )


def test_it_is_the_same_in_a_process_without_transformers(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(BASE)
    code = """
import sys
from tokenizers import Tokenizer
from logitcask.cache_format.tokenizer_identity import tokenizer_identity

class Surface:
    backend_tokenizer = Tokenizer.from_file(sys.argv[1])
    def get_vocab(self):
        return self.backend_tokenizer.get_vocab()
    def __len__(self):
        return self.backend_tokenizer.get_vocab_size()
    def __call__(self, texts, add_special_tokens):
        return {"input_ids": [e.ids for e in self.backend_tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens)]}

print(tokenizer_identity(Surface(), None)["sha256"])
assert "transformers" not in sys.modules
"""
    command = [sys.executable, "-c", code, str(tmp_path / "tokenizer.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == tokenizer_identity(fast(), None)["sha256"]
