"""Caches at the remotes that the home's config names.

A remote is a cache, or a folder of caches: an fsspec URL, or a data set on the Hugging Face Hub.
Manifests are read as a stranger's, with limits, and remembered until their size or time changes.
Whatever a remote says of a cache, its files are verified when they arrive.
"""

from __future__ import annotations

import hashlib
import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from logitcask.cache_format.catalog.home import Entry, Home, load_json
from logitcask.cache_format.durable import write_durably
from logitcask.cache_format.errors import CacheError, ConfigError, UserError, one_line
from logitcask.cache_format.layout import MANIFEST
from logitcask.cache_format.storage.files import (
    open_filesystem,
    reaching,
    read_manifest,
    retrying,
)

log = logging.getLogger(__name__)

CONFIG = "config.yaml"
_FACTS = ("size", "ETag", "etag", "blob_id", "LastModified", "last_modified", "mtime", "created")
_MOST = 10_000
"""Folders of a remote that are looked at."""


class HomeConfig(BaseModel):
    """The file ``config.yaml`` of the home."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    remotes: tuple[str, ...] = Field(
        (),
        description="Places with caches: s3://BUCKET/PATH, hf://datasets/ORG/NAME, a shared folder.",
    )


def remotes_of(home: Home) -> tuple[str, ...]:
    """The remotes of the home. Raises ConfigError for a config that is none."""
    file = home.folder / CONFIG
    try:
        text = file.read_text("utf-8")
    except FileNotFoundError:
        return ()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{file} cannot be read: {one_line(error)}; correct or remove it"
        ) from None
    import yaml

    try:
        return HomeConfig.model_validate(yaml.safe_load(text) or {}).remotes
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not a YAML file: {one_line(error)}; correct it") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(
            f"{file}: {where}: {first['msg']} (found {first['input']!r:.80}); expected "
            "`remotes:` and a list of URLs"
        ) from None


def remote_entries(home: Home) -> list[Entry]:
    """The caches at all remotes. A remote that cannot be reached gives a warning and its caches
    are left out.
    """
    found: list[Entry] = []
    for url in remotes_of(home):
        try:
            found += _at(home, url)
        except UserError as error:
            log.warning("the remote %s is left out: %s", url, one_line(error))
    return found


def _at(home: Home, url: str) -> list[Entry]:
    filesystem, root = open_filesystem(url)
    memory = home.folder / "remotes" / f"{hashlib.sha256(url.encode()).hexdigest()[:32]}.json"
    known = load_json(memory)
    known = known if isinstance(known, dict) else {}
    now: dict[str, Any] = {}
    with reaching(url):
        filesystem.invalidate_cache()
        for name in _folders(filesystem, root):
            place = f"{root}/{name}" if name else root
            where = f"{url.rstrip('/')}/{name}" if name else url
            try:
                info = retrying(partial(filesystem.info, f"{place}/{MANIFEST}"), filesystem)
            except (FileNotFoundError, NotADirectoryError):
                continue
            stamp = json.dumps({key: str(info[key]) for key in _FACTS if info.get(key)})
            entry = _remembered(known.get(where), where, stamp)
            if entry is None:
                try:
                    manifest = read_manifest(filesystem, place, where)[1]
                except CacheError as error:
                    log.warning("%s is left out: %s", where, one_line(error))
                    continue
                if manifest.contradictions():
                    log.warning("%s is left out: its manifest contradicts itself", where)
                    continue
                entry = Entry.of(where, manifest, stamp)
            now[where] = entry.model_dump(mode="json")
    if now != known:
        try:
            memory.parent.mkdir(parents=True, exist_ok=True)
            write_durably(memory, json.dumps(now))
        except OSError as error:
            log.debug("%s is not remembered: %s", url, error)
    return [Entry.model_validate(each) for each in now.values()]


def _folders(filesystem: fsspec.AbstractFileSystem, root: str) -> list[str]:
    """Names of the folders below ``root``, and "" for ``root`` itself."""
    try:
        listed = retrying(lambda: filesystem.ls(root, detail=True), filesystem)
    except (FileNotFoundError, NotADirectoryError):
        raise CacheError("there is no such place; see config.yaml of the home") from None
    names = (
        str(each["name"]).rstrip("/").rsplit("/", 1)[-1]
        for each in listed
        if each["type"] == "directory"
    )
    found = sorted(names)
    if len(found) > _MOST:
        log.warning(
            "%s has %s folders, of which the first %s are looked at; name others as remotes of their own",
            filesystem.unstrip_protocol(root),
            f"{len(found):,}",
            f"{_MOST:,}",
        )
    return ["", *found[:_MOST]]


def _remembered(known: Any, where: str, stamp: str) -> Entry | None:
    """The entry of an earlier listing, if the manifest is still the same file."""
    try:
        entry = Entry.model_validate(known)
    except ValidationError:
        return None
    return entry if entry.stamp == stamp and entry.where == where and stamp != "{}" else None


def config_file(home: Home) -> Path:
    """The file that names the remotes."""
    return home.folder / CONFIG
