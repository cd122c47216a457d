"""A cache of the catalogue, put in a build's output: hard links where the file system has them.

Shards never change, so caches can share them. Every file is hashed first: a damaged cache is not
passed on.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

import fsspec

from logitcask.cache_format import card
from logitcask.cache_format.durable import sync
from logitcask.cache_format.errors import DamagedCacheError
from logitcask.cache_format.layout import CARD, MANIFEST, PRIOR, PULL_DIR, SIGNATURE
from logitcask.cache_format.manifest import CacheFile, Manifest, cache_files
from logitcask.cache_format.share.destinations import Folder
from logitcask.cache_format.share.signature import read_signatures
from logitcask.cache_format.storage.files import (
    OnBytes,
    has_content,
    is_local,
    open_filesystem,
    read_manifest,
)

_MARK = "for-a-build"


class _Links(Folder):
    """A folder whose files are hard links to those of a local cache, or copies."""

    def send(
        self,
        source: fsspec.AbstractFileSystem,
        root: str,
        files: list[CacheFile],
        on_bytes: OnBytes,
    ) -> None:
        for file in files:
            if not (is_local(source) and self._link(Path(root) / file.path, file)):
                super().send(source, root, [file], on_bytes)

    def _link(self, origin: Path, file: CacheFile) -> bool:
        """Links a file that is what the manifest says. Returns False if it cannot be linked."""
        final = self._folder / file.path
        temporary = self._scratch / f"{final.name}.tmp"
        temporary.unlink(missing_ok=True)
        try:
            os.link(os.path.realpath(origin), temporary)  # of a link, the file itself
        except OSError:  # another file system, or one without links
            return False
        if not has_content(temporary, file):
            temporary.unlink()
            raise DamagedCacheError(f"{origin} is damaged or missing; build the cache again")
        os.replace(temporary, final)
        sync(final.parent)
        return True


def place(source: str, manifest: Manifest, output: Path) -> None:
    """Puts the cache at ``source`` (folder or URL) in ``output``, with ``manifest``, which names
    the same files. An interrupted one is resumed.

    Raises DamagedCacheError for a damaged source, CacheError if it cannot be reached, and the
    errors of ``logitcask.cache_format.share.copy.pull`` for an output that takes no cache.
    """
    filesystem, root = open_filesystem(source)
    folder = _Links(output)
    files, text = cache_files(manifest), manifest.to_json().encode()
    beside = {CARD: card.dataset_card(manifest).encode()}
    if read_manifest(filesystem, root, source)[0] == text:  # then its signatures hold, too
        signatures = read_signatures(filesystem, root)
        beside |= {} if signatures is None else {SIGNATURE: signatures}
    with folder.claimed():
        (output / PULL_DIR / _MARK).touch()
        folder.remove(sorted(set(folder.shards()) - {file.path for file in files}))
        missing = [file for file in files if not folder.holds(file, deep=True)]
        folder.send(filesystem, root, missing, lambda _: None)
        folder.finish({**beside, MANIFEST: text})


def discard(output: Path) -> None:
    """Removes what an interrupted ``place`` has left in ``output``, and nothing else."""
    if (output / MANIFEST).exists() or not (output / PULL_DIR / _MARK).exists():
        return
    for name in Folder(output).shards():
        (output / name).unlink(missing_ok=True)
    for name in (PRIOR, CARD, SIGNATURE):
        (output / name).unlink(missing_ok=True)
    with suppress(OSError):
        (output / "data").rmdir()
    shutil.rmtree(output / PULL_DIR, ignore_errors=True)
