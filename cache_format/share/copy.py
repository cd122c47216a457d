"""``push`` and ``pull``: copies of a finished cache to or from any fsspec place, checked by hash.

Both copy the missing shards, then the card and signatures, then the manifest, so an incomplete copy never counts
as a cache. They differ only in the destination: a local folder, a store that takes files, or a data
set on the Hugging Face Hub.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import fsspec

from logitcask.cache_format import card
from logitcask.cache_format.errors import (
    CacheInUseError,
    DamagedCacheError,
    UnsupportedCacheError,
    UserError,
)
from logitcask.cache_format.layout import (
    CARD,
    MANIFEST,
    OWNER,
    PREVIEW,
    PUSH_MARK,
    SIGNATURE,
)
from logitcask.cache_format.manifest import MAX_MANIFEST_BYTES, Manifest, cache_files
from logitcask.cache_format.share.destinations import (
    MAX_CARD_BYTES,
    MAX_MARK_BYTES,
    Folder,
    Store,
    ignore,
    place_at,
)
from logitcask.cache_format.share.signature import MAX_SIGNATURE_BYTES, read_signatures
from logitcask.cache_format.storage.files import (
    OnBytes,
    local_folder,
    open_filesystem,
    reaching,
    read_manifest,
    read_small,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Copied:
    """Result of a push or a pull. ``unchanged``: the place had the same cache already."""

    files_sent: int
    files_skipped: int
    bytes_sent: int
    unchanged: bool = False


def push(
    cache: str | Path,
    url: str,
    *,
    force: bool = False,
    beside: Mapping[str, bytes] | None = None,
    on_total: OnBytes = ignore,
    on_bytes: OnBytes = ignore,
) -> Copied:
    """Copies the finished cache at ``cache`` (folder or URL) to ``url``; resumes an earlier push.

    ``beside`` has small files by name, for people and viewers, such as another card than that of
    the cache. If the place holds the same cache already, only missing ones are sent, or with
    ``force`` those that differ, since people edit cards. An edited card stays there without
    ``force``, whatever else of the cache is sent.

    Files already there with the right size and sha256 are not sent again. If the place holds the
    same cache, only sizes are checked. ``force`` replaces another cache, an unfinished build (its
    builder then stops), and shards or a card that belong to no cache. ``on_total`` gets the bytes
    of all files. ``on_bytes`` gets the bytes done since its last call, or a negative number before
    an attempt is repeated.

    On the hub (``hf://datasets/ORG/NAME[@BRANCH]``) a missing repository is created, private. This
    part is tested only against a stand-in for the hub.

    Raises UserError for a place that takes no files or holds other files, DamagedCacheError naming
    a damaged source file, CacheError if a place cannot be reached, and the errors of
    ``storage.read_manifest``.
    """
    return _copy(str(cache), place_at(url), force, on_total, on_bytes, beside or {})


def pull(
    url: str | Path,
    folder: str | Path,
    *,
    force: bool = False,
    on_total: OnBytes = ignore,
    on_bytes: OnBytes = ignore,
) -> Copied:
    """Copies the finished cache at ``url`` into the local ``folder``; resumes an earlier pull.

    Every file is hashed, either during the copy or in the folder if it is already there, so a
    damaged file of the same cache is replaced. ``force`` replaces another cache, but never files
    that do not belong to a cache. Raises CacheInUseError while another process copies into the
    folder, UserError if the folder holds other files, is a URL or cannot be written, and the errors
    of ``push``.
    """
    place = Folder(local_folder(folder, "copy from one place to another with `teacher-cache push`"))
    return _copy(str(url), place, force, on_total, on_bytes)


def _copy(
    cache: str,
    place: Folder | Store,
    force: bool,
    on_total: OnBytes,
    on_bytes: OnBytes,
    given: Mapping[str, bytes] = MappingProxyType({}),
) -> Copied:
    source, root = open_filesystem(cache)
    if open_filesystem(place.where) == (source, root):
        raise UserError(f"{cache} is where it would be copied to; choose another place")
    text, manifest = read_manifest(source, root, cache)
    readme, signature = card_of(source, root, manifest), read_signatures(source, root)
    if isinstance(place, Folder) and card.is_unedited(readme):
        readme = card.dataset_card(manifest).encode()  # names no preview, which is not copied
    beside = {CARD: readme, **given}
    mark = f"{manifest.fingerprint} {manifest.content_sha256}\n".encode()
    files = cache_files(manifest)
    on_total(sum(file.bytes for file in files))
    with reaching(place.where), place.claimed():
        found_text = place.read(MANIFEST, MAX_MANIFEST_BYTES)
        found = _parse(found_text, place.where, force)
        if found is not None and not force:
            _refuse_another(found, manifest, place.where)
        found_files = [] if found is None else cache_files(found)
        stale = sorted(
            {*place.shards(), *(file.path for file in found_files)} - {file.path for file in files}
        )
        if place.read(OWNER, MAX_MARK_BYTES) is not None:
            if force:
                stale.append(OWNER)  # its builder notices this before it sends another shard
            elif found_text is None:
                raise CacheInUseError(
                    f"{place.where} holds an unfinished build; finish it, choose another place, or replace it with --force"
                )
        begun = place.read(PUSH_MARK, MAX_MARK_BYTES) == mark
        missing = []
        for file in files:
            if place.holds(file, deep=force or found_files != files):
                on_bytes(file.bytes)
            else:
                missing.append(file)
        if found_text is None and not force and not begun:
            place.refuse_strangers([*stale, *(file.path for file in missing)], beside[CARD])
        signed = place.read(SIGNATURE, MAX_SIGNATURE_BYTES)
        if signed is not None and signature is None and found_text != text:
            stale.append(SIGNATURE)  # of another manifest
        if found is not None and not force and _is_edited(place.read(CARD, MAX_CARD_BYTES), beside):
            del beside[CARD]
            log.info("%s/%s was edited there and stays; --force replaces it", place.where, CARD)
        same = found_text == text and (signature is None or signed == signature)
        if not missing and not stale and same:
            if begun:
                place.remove([PUSH_MARK])
            added = _to_add(place, given, force)
            if added:
                place.finish(added)
            return Copied(0, len(files), 0, unchanged=not added)
        if missing or stale:
            if not begun:
                begun = place.mark(mark)
            # From here on, the place has no manifest until every file has arrived.
            old = [name for name in (PREVIEW,) if name not in beside]
            place.remove([*stale, *old] if found_text is None else [MANIFEST, *stale, *old])
        place.send(source, root, missing, on_bytes)
        signatures = {} if signature is None else {SIGNATURE: signature}
        place.finish({**beside, **signatures, MANIFEST: text})
        if begun:
            place.remove([PUSH_MARK])
    return Copied(len(missing), len(files) - len(missing), sum(file.bytes for file in missing))


def _to_add(place: Folder | Store, given: Mapping[str, bytes], force: bool) -> dict[str, bytes]:
    """The files of ``given`` that a place with the same cache lacks, or, with ``force``, has with
    other content.
    """
    added = {}
    for name, content in given.items():
        there = place.read(name, MAX_CARD_BYTES)
        if there is None or (force and there != content):
            added[name] = content
        elif there != content:
            log.warning("%s/%s is another one; --force replaces it", place.where, name)
    return added


def _is_edited(there: bytes | None, beside: Mapping[str, bytes]) -> bool:
    """Whether people have written the card ``there``, and it is another one than that of ``beside``."""
    return there is not None and there != beside[CARD] and not card.is_unedited(there)


def card_of(source: fsspec.AbstractFileSystem, root: str, manifest: Manifest) -> bytes:
    with reaching(source.unstrip_protocol(root)):
        try:
            return read_small(source, f"{root}/{CARD}", MAX_CARD_BYTES)
        except FileNotFoundError:
            return card.dataset_card(manifest).encode()


def _parse(text: bytes | None, where: str, force: bool) -> Manifest | None:
    try:
        return None if text is None else Manifest.from_json(text, f"{where}/{MANIFEST}")
    except (DamagedCacheError, UnsupportedCacheError):
        if force:
            return None
        raise


def _refuse_another(found: Manifest, manifest: Manifest, where: str) -> None:
    for name in ("fingerprint", "content_sha256"):
        there, here = getattr(found, name), getattr(manifest, name)
        if there != here:
            raise UserError(
                f"{where} holds another cache ({name} {there[:12]}..., this one has {here[:12]}...); "
                "choose another place, or replace it with --force"
            )
