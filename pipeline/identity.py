"""Identity of data, tokenizer and teacher, to compare with those at the start of a build."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from logitcask.cache_format.differences import describe_difference
from logitcask.cache_format.durable import load_state, write_durably
from logitcask.cache_format.errors import UserError
from logitcask.cache_format.manifest import TeacherIdentity, TokenizerIdentity
from logitcask.cache_format.tokenizer_identity import tokenizer_identity
from logitcask.pipeline.config import BuildConfig
from logitcask.pipeline.teachers.own import has_tokenizer
from logitcask.pipeline.text.chat_template import ChatTemplate
from logitcask.pipeline.text.sources import RowSource


class TextReader(Protocol):
    """A tokenizer with the chat template in force, None if texts are not chats."""

    @property
    def tokenizer(self) -> Any: ...
    @property
    def template(self) -> ChatTemplate | None: ...


def check_unchanged(source: RowSource, stamp: str, config: BuildConfig) -> None:
    """Raises UserError if the data has changed since ``stamp``, from before its first row."""
    try:
        now = source.stamp()
    except OSError:  # a file is gone
        now = ""
    if now != stamp:
        raise UserError(
            f"{config.data.where} has changed while it was read; run the same command again once nothing writes to it"
        )


def tokenizer_of(text: TextReader, config: BuildConfig) -> TokenizerIdentity:
    """The tokenizer and the chat template in force, as a manifest names them. The tokenizer of a
    backend outside this project has the name of the backend.
    """
    template = text.template.text if text.template else None
    teacher = config.teacher
    return TokenizerIdentity(
        name=teacher.backend if has_tokenizer(teacher) else teacher.model,
        **tokenizer_identity(text.tokenizer, template),
    )


def tokenizer_changes(before: TokenizerIdentity, now: TokenizerIdentity) -> str:
    """Differences of two tokenizers, for people; empty if there are none."""
    parts = {
        "vocab_sha256": "its vocabulary",
        "sha256": "how it turns text into ids",
        "chat_template_sha256": "its chat template",
    }
    return ", ".join(
        part for field, part in parts.items() if getattr(before, field) != getattr(now, field)
    )


def check_teacher(build_dir: Path, teacher: TeacherIdentity, *, who: str = "teacher") -> None:
    """Refuses a model other than the one that wrote the answers. The first call records it.

    who: ``teacher``, or ``writer`` for another model that writes.
    """
    file = build_dir / "generations" / f"{who}.json"
    if not file.exists():
        write_durably(file, teacher.model_dump_json(indent=2))
        return
    first = load_state(TeacherIdentity, file)
    before, now = (each.model_dump(mode="json", exclude={"route"}) for each in (first, teacher))
    if before != now:
        raise UserError(
            f"{build_dir.parent} holds answers of another {who}: {describe_difference(before, now)}; "
            "go on with that one, start afresh with --restart, or choose another output"
        )
