"""The identity of a tokenizer: hashes that both stages compute from a tokenizer object.

A teacher's distribution is over ids, so a student fits a cache if its ids mean the same tokens:
``vocab_sha256`` is equal. Equality of ``sha256`` is stronger: the same text gives the same ids. It
is computed from the tokenizer's rules, not from files, so a model folder and a hub copy of one
tokenizer agree. transformers is not imported: any object with the interface of its tokenizers
works.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

from logitcask.cache_format.errors import UserError
from logitcask.cache_format.manifest import sha256_of_json

_PROBE = "a"


def tokenizer_identity(tokenizer: Any, chat_template: str | None) -> dict[str, Any]:
    """The identity of a tokenizer, as the manifest keeps it.

    sha256:               of everything that maps text to ids: vocabulary, model (merges, scores,
                          flags), normaliser, pre-tokenizer, added tokens, and the special ids put
                          around a text. State that is set per call (truncation, padding) and
                          decoding do not count. Equal hashes mean equal ids; tokenizers that reach
                          the same ids by different rules differ.
    vocab_sha256:         of the token -> id map alone, added tokens included.
    vocab_size:           ``len(tokenizer)``.
    chat_template_sha256: of ``chat_template``, the template in force; None for None.

    ``tokenizer`` needs ``get_vocab()``, ``len()`` and a call on a list of texts that gives
    ``input_ids``. If it has no ``backend_tokenizer`` (it is not "fast"), its class name is hashed
    instead of its rules.
    """
    vocab = tokenizer.get_vocab()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = {
        "vocab": vocab,
        "rules": {"class": type(tokenizer).__name__}
        if backend is None
        else _rules(json.loads(backend.to_str())),
        # Found by a call, because a template, a flag or a subclass may add BOS or EOS.
        "specials": [
            tokenizer([_PROBE], add_special_tokens=add)["input_ids"][0] for add in (False, True)
        ],
    }
    return {
        "sha256": sha256_of_json(content),
        "vocab_sha256": sha256_of_json(vocab),
        "vocab_size": len(tokenizer),
        "chat_template_sha256": None
        if chat_template is None
        else hashlib.sha256(chat_template.encode()).hexdigest(),
    }


def usable_tokenizer(name: str, tokenizer: Any, reload: Callable[[], Any]) -> Any:
    """``tokenizer``, chosen by transformers for the model ``name``; the result of ``reload`` if it
    is Mistral's own.

    If the package mistral-common is installed, transformers uses it to read a model's tekken.json,
    even beside a tokenizer.json. Its tokenizer gives no offsets, and the ids would depend on the
    installed packages. ``reload`` must read the tokenizer.json.

    Raises UserError if there is only a tekken.json: without mistral-common it has no special tokens
    and no chat template.
    """
    if type(tokenizer).__name__ == "MistralCommonBackend":
        tokenizer = reload()
    read = [
        str(getattr(tokenizer, "init_kwargs", {}).get(key) or "")
        for key in ("tokenizer_file", "vocab_file")
    ]
    if not read[0] and read[1].endswith("tekken.json"):
        raise UserError(
            f'{name} has a tekken.json and no tokenizer.json; in a local copy of the model run python -c "from '
            "transformers.integrations.mistral import convert_tekken_tokenizer as convert; "
            "convert('tekken.json').save_pretrained('.')\" and name its folder"
        )
    return tokenizer


def _rules(state: dict[str, Any]) -> dict[str, Any]:
    """The parts of a backend's ``tokenizer.json`` that decide ids, besides the vocabulary."""
    model = state["model"]
    # A Unigram model has a list of tokens with their scores there.
    if isinstance(model.get("vocab"), dict):
        model = {key: value for key, value in model.items() if key != "vocab"}
    ignored = {"special"} if state["normalizer"] else {"special", "normalized"}
    return {
        "model": _without_defaults(model),
        "normalizer": _plain(state["normalizer"]),
        "pre_tokenizer": _plain(state["pre_tokenizer"]),
        "added_tokens": [
            _without_defaults({key: value for key, value in token.items() if key not in ignored})
            for token in sorted(state["added_tokens"], key=lambda token: token["id"])
        ],
    }


def _plain(step: dict[str, Any] | None) -> Any:
    """A normaliser or pre-tokenizer with nested sequences flattened, and without settings that
    change only offsets.
    """
    steps = _flatten(step)
    return [{key: value for key, value in one.items() if key != "trim_offsets"} for one in steps]


def _flatten(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    if step is None:
        return []
    if step["type"] == "Sequence":
        parts = step["normalizers"] if "normalizers" in step else step["pretokenizers"]
        return [one for part in parts for one in _flatten(part)]
    return [step]


def _without_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without null, "" and false: converters write an absent setting as any of them."""
    return {
        key: value
        for key, value in settings.items()
        if value is not None and value is not False and value != ""
    }
