"""The caches that a build finds in the catalogue, in place of scoring what was scored before.

Before the plan, a cache with the same request is looked for, and taken if its data has not changed.
After the plan, the tokens are known, so caches are compared by content, whatever their paths:

the same      same teacher, tokenizer, sequences and store: linked or copied to the output.
a part of it  a cache contains the plan's sequences as a slice, and its store contains the build's:
              derived, as ``teacher-cache derive`` does.
some of them  caches of the same teacher and store hold some sequences: their rows are copied
              (``logitcask.pipeline.builder.known``), and the others scored.

A cache that cannot be read, is not what its entry says, or has no signature by one of the config's
``trusted_keys``, is left out with a warning.
"""

from __future__ import annotations

import glob
import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from logitcask.cache_format import CacheReader, Manifest
from logitcask.cache_format.catalog.claims import claimed
from logitcask.cache_format.catalog.home import Entry, Home
from logitcask.cache_format.catalog.narrowing import narrowing
from logitcask.cache_format.catalog.place import discard, place
from logitcask.cache_format.catalog.remotes import remote_entries
from logitcask.cache_format.derive.derive import DeriveOptions, derive
from logitcask.cache_format.derive.write import Answers
from logitcask.cache_format.errors import CacheError, CacheInUseError, UserError, one_line
from logitcask.cache_format.layout import BUILD_DIR
from logitcask.cache_format.manifest import Header, sha256_of_json
from logitcask.cache_format.share.copy import push
from logitcask.cache_format.share.signature import check_signed, trusted_key
from logitcask.cache_format.storage.files import is_local, open_filesystem
from logitcask.cache_format.writer import remove_cache
from logitcask.pipeline.builder.inputs import Inputs
from logitcask.pipeline.builder.known import Known
from logitcask.pipeline.builder.overlap import Rows, Stored, stored_rows, write_known
from logitcask.pipeline.builder.plan import Plan
from logitcask.pipeline.builder.request import request_of
from logitcask.pipeline.builder.reuse import answers_the_same
from logitcask.pipeline.builder.same_teacher import same_teacher, same_weights, teacher_request
from logitcask.pipeline.config import BuildConfig
from logitcask.pipeline.identity import tokenizer_changes

log = logging.getLogger(__name__)

_PROBED_SHARDS = 8
"""Shards of a local cache of which the first record batch is compared with a plan; of a remote one,
whose shards must be fetched, one."""

_MOST_CACHES = 16
"""Caches whose sequences are all compared with a plan."""


@dataclass(frozen=True)
class Taken:
    """The origin of a cache that a build has not scored, or not all of it.

    how:       ``same``, ``derived`` or ``part``.
    where:     the caches.
    sequences: number of sequences that come from them.
    """

    how: Literal["same", "derived", "part"]
    where: tuple[str, ...]
    sequences: int


@dataclass(frozen=True)
class Found:
    """A cache that holds all that a build asks for; ``options``: those of ``derive``, or None."""

    entry: Entry
    reader: CacheReader
    options: dict[str, Any] | None = None


@dataclass(frozen=True)
class Holding:
    """What a cache holds of a plan: sequences of the same text, and how a build would use it."""

    shared: int
    asked: int
    use: str

    def document(self) -> dict[str, Any]:
        return {"shared_sequences": self.shared, "asked_sequences": self.asked, "use": self.use}


class Catalog:
    """The catalogue as one build sees it. Raises UserError for trusted keys that are none."""

    def __init__(self, home: Home, config: BuildConfig, inputs: Inputs) -> None:
        for key in config.trusted_keys:
            trusted_key(key)
        self._home, self._config, self._inputs = home, config, inputs
        self._left_out: set[str] = set()

    def claim_request(self) -> AbstractContextManager[bool]:
        """Holds the claim of builds with this request; waits for another one that runs."""
        request = request_of(self._config)
        here = os.getcwd() if _has_relative_paths(self._config) else ""
        return self._claim(sha256_of_json([request, here]))

    def claim_plan(self, plan: Plan) -> AbstractContextManager[bool]:
        """Holds the claim of builds with the content of this plan."""
        store = self._config.store.model_dump(
            mode="json", exclude={"shard_tokens", "compression_level"}
        )
        teacher = teacher_request(plan.request)
        parts = [plan.data.sha256, plan.data.mask_policy, plan.tokenizer.sha256, store, teacher]
        return self._claim(sha256_of_json(parts))

    def _claim(self, key: str) -> AbstractContextManager[bool]:
        def waits(owner: dict[str, Any]) -> None:
            log.info(
                "the same cache is being built by process %s on %s, for %s; waiting for it (--no-reuse "
                "builds at once)",
                owner.get("pid", "?"),
                owner.get("host", "another machine"),
                owner.get("what", "?"),
            )

        return claimed(self._home.claims_folder, key, str(self._config.output), waits)

    @contextmanager
    def in_use(self, known: Known | None) -> Iterator[None]:
        """Keeps the caches of ``known`` from garbage collection."""
        with ExitStack() as stack:
            for where in () if known is None else known.where:
                stack.enter_context(self._home.in_use(where))
            yield

    def same_request(self) -> Found | None:
        """A cache that a build with the same request has made, of unchanged data: scored, or, if
        there is none, derived.
        """
        key = sha256_of_json(request_of(self._config))
        # A remote's caches come from other machines, whose paths are others.
        relative, local = _has_relative_paths(self._config), bool(_local_paths(self._config))
        for entries, same_place in (
            (self._here, not relative),
            (lambda: self._remote, not local),
        ):
            for entry in sorted(entries(), key=lambda each: each.derived):
                if entry.request == key:
                    reader = self._open(entry)
                    if (
                        reader is not None
                        and reader.manifest.answers_build
                        and self._answers(reader.manifest, entry, same_place=same_place)
                        and self._is_trusted(reader, entry)
                    ):
                        return Found(entry, reader)
        return None

    def _answers(self, manifest: Manifest, entry: Entry, *, same_place: bool) -> bool:
        if not self._same_teacher(manifest, before_plan=True):
            return False
        try:
            return answers_the_same(manifest, self._config, self._inputs, same_place=same_place)
        except UserError as error:
            log.debug("%s: %s", entry.where, error)
            return False

    def match(self, plan: Plan, build_dir: Path) -> Found | None:
        """A cache that holds all that the plan asks for. If there is none, the rows that caches
        hold are written to ``build_dir``.
        """
        wanted = self._config.store.settings(self._inputs.vocab_size)
        candidates = list(self._candidates(plan))
        for entry, reader in candidates:
            if _same_data(reader.manifest, plan) and reader.manifest.store == wanted:
                return Found(entry, reader)
        rows = Rows.of_plan(plan, build_dir)
        overlapping: list[Stored] = []
        for entry, reader in candidates:
            manifest = reader.manifest
            options = narrowing(manifest.store, wanted)
            if options is None:
                continue
            if _same_data(manifest, plan):
                return Found(entry, reader, options)
            if len(overlapping) < _MOST_CACHES:
                stored = self._stored(entry, reader, rows)
                if stored is None:
                    continue
                slice_ = stored.slice_of(rows)
                if slice_ is not None and manifest.data.mask_policy == plan.data.mask_policy:
                    return Found(entry, reader, {**options, "sequences": slice_})
                if not options:
                    overlapping.append(stored)
        write_known(plan, build_dir, rows, overlapping)
        return None

    def holdings(self, plan: Plan, build_dir: Path, entries: list[Entry]) -> dict[str, Holding]:
        """What each of ``entries`` holds of a plan, by its place; those that hold nothing are left
        out.
        """
        wanted = self._config.store.settings(self._inputs.vocab_size)
        rows, found = Rows.of_plan(plan, build_dir), {}
        for entry in entries:
            reader = self._open(entry)
            if (
                reader is None
                or reader.manifest.tokenizer.vocab_sha256 != plan.tokenizer.vocab_sha256
                or not same_weights(self._config, self._inputs, reader.manifest)
            ):
                continue
            stored = self._stored(entry, reader, rows)
            shared = 0 if stored is None else stored.shared(rows)
            if stored is not None and shared:
                options = narrowing(reader.manifest.store, wanted)
                use = (
                    self._use(stored, rows, options, shared)
                    if self._is_trusted(reader, entry)
                    else "no use to a build: no trusted key has signed it"
                )
                found[entry.where] = Holding(shared, len(rows.text), use)
        return found

    def _use(self, stored: Stored, rows: Rows, options: dict[str, Any] | None, shared: int) -> str:
        manifest = stored.reader.manifest
        if not self._same_teacher(manifest):
            return "no use to a build: the teacher's engine or settings are others"
        if manifest.derived_from is not None:
            return "no use to a build: it is derived, and a build wants the teacher's own numbers"
        if options is None:
            return "no use to a build: its store keeps less, or other draws"
        if shared == len(rows.text) == len(stored.rows.text) and not options:
            return "a build reuses it"
        if stored.slice_of(rows) is not None:
            return "a build derives from it"
        return "a build scores the others" if not options else "no use to a build: another store"

    def take(self, found: Found, plan: Plan | None) -> Manifest | None:
        """Puts a found cache in the output; None if it turns out to be of no use.

        plan: of the build, whose request and data the new manifest names; None if the cache has the
              same request.
        """
        output = self._config.output
        local = output if isinstance(output, Path) else self._temporary()
        with self._home.reading(found.entry) as there:
            try:
                if not there:
                    raise CacheError("it is gone")
                manifest = self._put(found, plan, local)
                if not isinstance(output, Path):
                    push(local, output)
            except CacheInUseError:
                raise
            except CacheError as error:
                self._leave_out(found.entry, error)
                discard(local)
                return None
            finally:
                if local != output:
                    shutil.rmtree(local, ignore_errors=True)
        return manifest

    def _put(self, found: Found, plan: Plan | None, folder: Path) -> Manifest:
        if found.options is not None:
            assert plan is not None
            return derive(
                found.reader,
                folder,
                DeriveOptions.model_validate(found.options),
                shard_tokens=self._config.store.shard_tokens,
                answers=Answers(plan.request, plan.data),
            )
        manifest = found.reader.manifest
        if plan is not None:
            manifest = manifest.model_copy(
                update={"config": plan.request, "data": plan.data, "tokenizer": plan.tokenizer}
            )
        place(found.entry.where, manifest, folder)
        return manifest

    def _temporary(self) -> Path:
        return self._home.folder / "temporary" / uuid.uuid4().hex

    def _here(self) -> list[Entry]:
        # The last used first. Some file systems tell times only to some milliseconds.
        entries = sorted(self._home.entries(), key=lambda each: (-each[1], each[0].where))
        return [entry for entry, _ in entries if not entry.removal]

    @cached_property
    def _remote(self) -> list[Entry]:
        return remote_entries(self._home)

    def _open(self, entry: Entry) -> CacheReader | None:
        """The cache, if it is the one of the entry."""
        if entry.where in self._left_out:
            return None
        try:
            reader = CacheReader(entry.where)
        except (CacheError, OSError) as error:
            log.debug("%s: %s", entry.where, error)
            return None
        return reader if reader.manifest.fingerprint == entry.fingerprint else None

    def _is_trusted(self, reader: CacheReader, entry: Entry) -> bool:
        """Whether a trusted key of the config has signed the manifest of ``reader``, if there are
        such keys.
        """
        if not self._config.trusted_keys:
            return True
        try:
            check_signed(reader.path, reader.manifest_sha256, self._config.trusted_keys)
        except UserError as error:
            self._leave_out(entry, error)
            return False
        return True

    def _candidates(self, plan: Plan) -> Iterator[tuple[Entry, CacheReader]]:
        """Builds of this teacher with this tokenizer; those with the plan's data first."""
        entries = [
            entry
            for entry in (*self._here(), *self._remote)
            if entry.tokenizer_sha256 == plan.tokenizer.sha256 and not entry.derived
        ]
        for entry in sorted(entries, key=lambda each: each.data_sha256 != plan.data.sha256):
            reader = self._open(entry)
            if (
                reader is not None
                and reader.manifest.data.generation is None
                and not tokenizer_changes(reader.manifest.tokenizer, plan.tokenizer)
                and self._same_teacher(reader.manifest)
                and self._is_trusted(reader, entry)
            ):
                yield entry, reader

    def _same_teacher(self, manifest: Manifest, *, before_plan: bool = False) -> bool:
        return same_teacher(self._config, self._inputs, manifest, before_plan=before_plan)

    def _stored(self, entry: Entry, reader: CacheReader, rows: Rows) -> Stored | None:
        """The sequences of a cache, if a look at some of them finds any of the plan's."""
        try:
            local = is_local(open_filesystem(entry.where)[0])
            shards = len(reader.manifest.shards)
            some = np.linspace(0, shards - 1, min(shards, _PROBED_SHARDS if local else 1))
            probed = (next(stored_rows(reader, [int(shard)]), None) for shard in some)
            if not any(each is not None and rows.holds_any(each.text) for each in probed):
                return None
            return Stored(reader, Rows.joined(stored_rows(reader)))
        except (CacheError, OSError) as error:
            self._leave_out(entry, error)
            return None

    def _leave_out(self, entry: Entry, error: Exception) -> None:
        self._left_out.add(entry.where)
        log.warning("%s is not used: %s", entry.where, one_line(error))


def _same_data(manifest: Manifest, plan: Plan) -> bool:
    return (manifest.data.sha256, manifest.data.mask_policy) == (
        plan.data.sha256,
        plan.data.mask_policy,
    )


def _local_paths(config: BuildConfig) -> list[str]:
    """The names in the config that are paths here, or have wildcards."""
    names = [config.teacher.model, *(part.path for part in config.data.parts())]
    return [
        name
        for name in names
        if os.path.exists(os.path.expanduser(name)) or ("://" not in name and glob.has_magic(name))
    ]


def _has_relative_paths(config: BuildConfig) -> bool:
    """Whether a name in the config is a path relative to the working directory."""
    return any(not os.path.isabs(os.path.expanduser(name)) for name in _local_paths(config))


def clear(output: Path | str) -> None:
    """Removes what an interrupted ``take`` has left in the output, and nothing else."""
    if not isinstance(output, Path):
        return
    discard(output)
    header = output / BUILD_DIR / "header.json"
    try:
        left = Header.model_validate_json(header.read_bytes())
    except (OSError, ValueError):
        return
    if left.derived_from is not None and left.answers_build:
        remove_cache(output)
