"""The index of a cache by its tokens: which sequences begin with given tokens.

A B-tree on disk (SQLite), keyed by the tokens themselves, so that memory stays small however large
the cache is. A key is an exact copy of the text: no hash can mistake one text for another. The file
is private to the process, and the system removes it when the process ends, however it ends.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from logitcask.cache_format.derive.write import Part
from logitcask.cache_format.errors import UserError, one_line
from logitcask.cache_format.reader import CacheReader

_PAGE_BYTES = 1 << 16
"""Of a page: a key of up to a quarter of it, 4,000 tokens, is kept in one piece."""

_MEMORY_KIB = 1 << 15
"""Of pages in memory."""

_CANDIDATES = 8
"""Sequences of one beginning that are offered: they may differ in their heads."""


class PrefixIndex:
    """Tokens to sequence numbers. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # "" is a temporary file without a name, from which SQLite keeps some pages in memory.
        self._db = sqlite3.connect("", check_same_thread=False, isolation_level=None)
        for pragma in (
            f"page_size={_PAGE_BYTES}",
            f"cache_size=-{_MEMORY_KIB}",
            "journal_mode=MEMORY",  # a statement that finds no room on disk leaves the tree whole
            "synchronous=OFF",
        ):
            self._db.execute(f"PRAGMA {pragma}")
        self._db.execute(
            "CREATE TABLE texts (tokens BLOB, sequence INTEGER, kept INTEGER, "
            "PRIMARY KEY (tokens, sequence)) WITHOUT ROWID"
        )

    @classmethod
    def of(cls, cache: CacheReader) -> PrefixIndex:
        """All sequences of ``cache``. Reads its tokens and masks; heads stay compressed. Raises
        UserError if there is no room for the index.
        """
        index = cls()
        try:
            index.add_all((n, ids, leading(mask)) for n, _, ids, mask in Part(cache).chosen())
        except sqlite3.Error as error:
            raise UserError(
                f"the index of {cache.path} cannot be written ({one_line(error)}); it takes four bytes a token in the folder "
                "for temporary files: make room there, or set TMPDIR to another folder"
            ) from error
        return index

    def add(self, sequence: int, ids: NDArray[np.int32], kept: int) -> None:
        """kept: how many positions are stored without a gap, from the first on (``leading``)."""
        with self._lock:
            self._db.execute("INSERT INTO texts VALUES (?, ?, ?)", (_key(ids), sequence, kept))

    def add_all(self, rows: Iterable[tuple[int, NDArray[np.int32], int]]) -> None:
        """The same for many: sorted first (on disk, too), which fills the tree in its order."""
        with self._lock:
            self._db.execute("BEGIN")
            self._db.execute("CREATE TABLE new (tokens BLOB, sequence INTEGER, kept INTEGER)")
            self._db.executemany(
                "INSERT INTO new VALUES (?, ?, ?)",
                ((_key(ids), sequence, kept) for sequence, ids, kept in rows),
            )
            self._db.execute("INSERT INTO texts SELECT * FROM new ORDER BY tokens, sequence")
            self._db.execute("DROP TABLE new")
            self._db.execute("COMMIT")

    def remove_from(self, sequence: int) -> None:
        """Removes this sequence and all of higher numbers."""
        with self._lock:
            self._db.execute("DELETE FROM texts WHERE sequence >= ?", (sequence,))

    def find(self, ids: NDArray[np.int32], kept: int | None = None) -> list[int]:
        """Some sequences that begin with ``ids``: first those that are no longer, then others in the
        order of their tokens.

        kept: only those with at least so many leading positions stored; by default all that the
              tokens have, ``len(ids) - 1``.
        """
        key = _key(ids)
        # No id begins with the byte 255: after the key, it stands behind every text that goes on.
        where = "tokens >= ? AND tokens < ? AND kept >= ?"
        with self._lock:
            found = self._db.execute(
                f"SELECT sequence FROM texts WHERE {where} ORDER BY tokens, sequence LIMIT {_CANDIDATES}",
                (key, key + b"\xff", len(ids) - 1 if kept is None else kept),
            ).fetchall()
        return [sequence for (sequence,) in found]

    def has(self, ids: NDArray[np.int32]) -> bool:
        """Whether exactly these tokens are a sequence."""
        with self._lock:
            found = self._db.execute("SELECT 1 FROM texts WHERE tokens = ? LIMIT 1", (_key(ids),))
            return found.fetchone() is not None

    def close(self) -> None:
        with self._lock:
            self._db.close()


def leading(loss_mask: NDArray[np.bool_]) -> int:
    """How many positions are kept without a gap, from the first on."""
    gaps = np.flatnonzero(~loss_mask[1:])
    return int(gaps[0]) if len(gaps) else len(loss_mask) - 1


def _key(ids: NDArray[np.int32]) -> bytes:
    """The tokens so that bytes compare as ids do."""
    return ids.astype(">u4").tobytes()
