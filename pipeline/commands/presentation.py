"""The files beside a pushed cache that people and viewers read: its card and its preview."""

from __future__ import annotations

import logging
import re

from logitcask.cache_format import CacheReader, UserError
from logitcask.cache_format.card import dataset_card, is_unedited
from logitcask.cache_format.export.preview import preview
from logitcask.cache_format.layout import CARD, PREVIEW
from logitcask.cache_format.redact import redacted
from logitcask.cache_format.share.copy import card_of
from logitcask.cache_format.storage.files import open_filesystem
from logitcask.pipeline.commands.sequence_table import exact_text, token_text

log = logging.getLogger(__name__)


def presentation(
    cache: str, url: str, *, licence: str | None, with_preview: bool, tokenizer: str | None
) -> dict[str, bytes]:
    """The card and, if asked for, the preview of ``cache`` for a copy at ``url``, by file name.

    A card that somebody has edited stays as it is. Without the teacher's tokenizer there is no
    preview, and a warning says so. Raises UserError for a name of a licence that is none, and for
    a named tokenizer that cannot be found or has other ids.
    """
    if licence is not None and not re.fullmatch(r"[\w.+-]+", licence):
        raise UserError(
            f"--license {licence} is no identifier of a licence; give one as the Hub names it, such as apache-2.0"
        )
    reader = CacheReader(cache)
    exact = exact_text(reader, tokenizer) if with_preview else None
    files = {}
    if exact is not None:
        files[PREVIEW] = preview(reader, token_text(reader, tokenizer), exact)
    source, root = open_filesystem(cache)
    if is_unedited(card_of(source, root, reader.manifest)):
        text = dataset_card(
            reader.manifest, where=redacted(url), licence=licence, with_preview=PREVIEW in files
        )
        files[CARD] = text.encode()
    elif licence is not None or files:
        log.warning(
            "the card of %s was edited, so it is sent as it is; name the licence and the preview in it",
            cache,
        )
    return files
