"""The synthetic teacher's tokenizer: one token per byte of UTF-8, and two special tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np

_BOS = 256
_EOS = 257
_SPECIALS = {"<|im_start|>": _BOS, "<|im_end|>": _EOS}
_SPLIT_SPECIALS = re.compile("|".join(f"({re.escape(token)})" for token in _SPECIALS))
_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class SyntheticTokenizer:
    """The part of a transformers tokenizer that the pipeline uses, for bytes.

    Ids 0 to 255 are the bytes, 256 is ``<|im_start|>`` (BOS too), 257 is ``<|im_end|>`` (EOS too).
    """

    name_or_path = "synthetic"
    is_fast = True
    chat_template = _CHATML
    bos_token, bos_token_id = "<|im_start|>", _BOS
    eos_token, eos_token_id = "<|im_end|>", _EOS
    all_special_ids = (_BOS, _EOS)
    special_tokens_map = {"bos_token": bos_token, "eos_token": eos_token}  # noqa: RUF012

    def __len__(self) -> int:
        return 256 + len(_SPECIALS)

    @property
    def vocab_size(self) -> int:
        """Ids without the special ones."""
        return 256

    def get_vocab(self) -> dict[str, int]:
        """Token to id; bytes are written like ``<0x41>``."""
        return {
            token: index for index, token in enumerate(self.convert_ids_to_tokens(range(len(self))))
        }

    def convert_ids_to_tokens(self, ids: Seq[int]) -> list[str]:
        """Names of tokens; ids that only the teacher has are written like ``<300>``."""
        specials = {index: token for token, index in _SPECIALS.items()}
        return [
            f"<0x{index:02X}>" if index < 256 else specials.get(index, f"<{index}>")
            for index in map(int, ids)
        ]

    def __call__(
        self,
        text: str | list[str],
        *,
        add_special_tokens: bool = True,
        return_offsets_mapping: bool = False,
        **_: Any,
    ) -> dict[str, Any]:
        """Ids, and the characters [start, end) of each token; BOS in front if requested.

        Lists of lists for a list of texts, plain lists for one text, as in transformers.
        """
        single = isinstance(text, str)
        encoded = [
            _encode(each, add_special_tokens)
            for each in ([text] if isinstance(text, str) else text)
        ]
        result: dict[str, Any] = {"input_ids": [ids for ids, _ in encoded]}
        if return_offsets_mapping:
            result["offset_mapping"] = [offsets for _, offsets in encoded]
        return {key: value[0] for key, value in result.items()} if single else result

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return _encode(text, add_special_tokens)[0]

    def decode(
        self, token_ids: int | Seq[int], *, skip_special_tokens: bool = False, **_: Any
    ) -> str:
        """Text of ids; invalid UTF-8 becomes U+FFFD, unknown ids are written like ``<300>``."""
        ids = np.atleast_1d(np.asarray(token_ids, dtype=np.int64)).tolist()
        if skip_special_tokens:
            ids = [index for index in ids if index not in self.all_special_ids]
        names = self.convert_ids_to_tokens(ids)
        pieces = [
            bytes([index]) if index < 256 else name.encode()
            for index, name in zip(ids, names, strict=True)
        ]
        return b"".join(pieces).decode("utf-8", errors="replace")

    def apply_chat_template(
        self,
        conversation: list[dict[str, Any]],
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        **variables: Any,
    ) -> Any:
        """A chat as text (``tokenize=False``) or ids; ChatML without a template."""
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(
            chat_template or self.chat_template
        )
        variables = self.special_tokens_map | variables
        text = template.render(
            messages=conversation, add_generation_prompt=add_generation_prompt, **variables
        )
        return self.encode(text, add_special_tokens=False) if tokenize else text


def _encode(text: str, add_special_tokens: bool) -> tuple[list[int], list[tuple[int, int]]]:
    ids: list[int] = [_BOS] if add_special_tokens else []
    offsets: list[tuple[int, int]] = [(0, 0)] if add_special_tokens else []
    at = 0
    for piece in filter(None, _SPLIT_SPECIALS.split(text)):
        if piece in _SPECIALS:
            ids.append(_SPECIALS[piece])
            offsets.append((at, at + len(piece)))
        else:
            data = np.frombuffer(piece.encode(), dtype=np.uint8)
            # A byte that does not continue a character begins one.
            starts = at - 1 + np.cumsum((data & 0xC0) != 0x80)
            ids.extend(data.tolist())
            offsets.extend(zip(starts.tolist(), (starts + 1).tolist(), strict=True))
        at += len(piece)
    return ids, offsets
