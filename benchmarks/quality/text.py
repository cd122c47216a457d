"""Real text for the quality study, in a small vocabulary that a large teacher still understands.

A student of a million weights spends nearly all its time on the rows of its lm_head, so the study
needs a vocabulary of thousands. Yet the strong teacher must be a real one with the 49,152 ids of
its own. Both are had by keeping the ids that are most frequent in the text: what is not among them
is spelled with the smaller tokens it was merged from, as a BPE tokenizer with fewer merges would.
The teacher's distribution is then taken over the kept ids alone.

Three disjoint parts, by document: ``train`` and ``held_out`` come from what ships with Python (the
language reference and the docstrings of the standard library), in the order of sha256(id);
``other`` is what is left of it and the docstrings of numpy and torch, on which the weak teacher and
the pre-trained student are trained.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from logitcask.pipeline.text.config import DataConfig
from logitcask.pipeline.text.sources import open_source

PACKAGES = ("numpy", "torch")
_NOT_DOCUMENTED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}


@dataclass(frozen=True)
class Text:
    """What the study reads.

    train, held_out, other: uint16[N, T], sequences of T tokens, ids below ``len(vocabulary)``.
    vocabulary:             int32[V], the teacher's own id of each of ours.
    facts:                  where it comes from, for the results.
    """

    train: NDArray[np.uint16]
    held_out: NDArray[np.uint16]
    other: NDArray[np.uint16]
    vocabulary: NDArray[np.int32]
    facts: dict[str, object]


@dataclass(frozen=True)
class TextSize:
    """How much of it.

    vocab: ids. length: tokens of a sequence. train, held_out, other: sequences of each part, at
    most. docstrings: whether the standard library, numpy and torch are read beside the language
    reference (half a minute).
    """

    vocab: int
    length: int
    train: int
    held_out: int
    other: int
    docstrings: bool = True


def load_text(file: Path, tokenizer_json: Path, size: TextSize) -> Text:
    """The text; made once, then read from ``file``."""
    if not file.exists():
        text = _make(tokenizer_json, size)
        file.parent.mkdir(parents=True, exist_ok=True)
        arrays = {
            name: getattr(text, name) for name in ("train", "held_out", "other", "vocabulary")
        }
        scratch = file.with_suffix(".tmp.npz")
        np.savez_compressed(scratch, facts=np.array(json.dumps(text.facts)), **arrays)
        scratch.rename(file)
    with np.load(file) as arrays:
        facts = json.loads(str(arrays["facts"]))
        return Text(*(arrays[name] for name in ("train", "held_out", "other", "vocabulary")), facts)


def native_sequences(tokenizer_json: Path, *, length: int, count: int) -> NDArray[np.int32]:
    """int32[count, length]: the language reference in the tokenizer's own ids."""
    tokenizer = Tokenizer.from_file(str(tokenizer_json))
    documents = (
        encoding.ids for encoding in tokenizer.encode_batch([text for _, text in reference()])
    )
    return _pieces(documents, lambda token: [token], length, count).astype(np.int32)


def _make(tokenizer_json: Path, size: TextSize) -> Text:
    ours = [*reference(), *(standard_library() if size.docstrings else [])]
    ours.sort(key=lambda row: hashlib.sha256(row[0].encode()).digest())
    theirs = [row for name in PACKAGES for row in package(name)] if size.docstrings else []
    tokenizer = Tokenizer.from_file(str(tokenizer_json))
    encoded = [encoding.ids for encoding in tokenizer.encode_batch([text for _, text in ours])]
    frequent = Counter(token for document in encoded for token in document)
    spelling = _Spelling(tokenizer_json, frequent, size.vocab)

    taken = iter(encoded)
    parts = {}
    for name, count in (("held_out", size.held_out), ("train", size.train)):
        parts[name] = _pieces(taken, spelling, size.length, count)
    rest = _chain(taken, (e.ids for e in tokenizer.encode_batch([text for _, text in theirs])))
    parts["other"] = _pieces(rest, spelling, size.length, size.other)
    digest = hashlib.sha256(b"".join(part.tobytes() for part in parts.values())).hexdigest()
    facts = {
        "sources": "python-docs, docstrings of the standard library; other: what is left, docstrings of numpy, torch",
        "characters": {
            "python": sum(len(t) for _, t in ours),
            "packages": sum(len(t) for _, t in theirs),
        },
        "tokens": {name: int(part.size) for name, part in parts.items()},
        "length": size.length,
        "vocabulary": size.vocab,
        "spelled": round(1 - sum(frequent[t] for t in spelling.kept) / sum(frequent.values()), 4),
        "sha256": digest,
    }
    return Text(
        parts["train"], parts["held_out"], parts["other"], np.array(spelling.kept, np.int32), facts
    )


class _Spelling:
    """Ids of the teacher to ids of ours: the most frequent are kept, others are undone into what
    they were merged from.
    """

    def __init__(self, tokenizer_json: Path, frequent: Counter[int], size: int) -> None:
        model = json.loads(tokenizer_json.read_text())["model"]
        ids: dict[str, int] = model["vocab"]
        self._parts: dict[int, tuple[int, int]] = {}
        for merge in model["merges"]:
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            self._parts.setdefault(ids[left + right], (ids[left], ids[right]))
        letters = [
            token for token in ids.values() if token not in self._parts and token in frequent
        ]
        merged = [token for token, _ in frequent.most_common() if token in self._parts]
        # A spelling may need a letter that never stands alone.
        letters += [
            ids[letter] for letter in ids if len(letter) == 1 and ids[letter] not in letters
        ]
        self.kept = sorted([*letters, *merged[: size - len(letters)]])
        self._ours = {token: index for index, token in enumerate(self.kept)}
        self._memory: dict[int, list[int]] = {}

    def __call__(self, token: int) -> list[int]:
        if token not in self._memory:
            index = self._ours.get(token)
            self._memory[token] = (
                [index]
                if index is not None
                else [piece for part in self._parts[token] for piece in self(part)]
            )
        return self._memory[token]


def _pieces(
    documents: Iterator[list[int]], spelling: Callable[[int], list[int]], length: int, count: int
) -> NDArray[np.uint16]:
    """uint16[at most count, length]: whole documents, cut; what is left of each is dropped."""
    pieces: list[list[int]] = []
    while len(pieces) < count and (document := next(documents, None)) is not None:
        ids = [piece for token in document for piece in spelling(token)]
        pieces += [ids[at : at + length] for at in range(0, len(ids) - length + 1, length)]
    return np.array(pieces[:count], np.uint16)


def _chain(*sources: Iterator[list[int]]) -> Iterator[list[int]]:
    for source in sources:
        yield from source


def reference() -> Iterator[tuple[str, str]]:
    for row in open_source(DataConfig(path="python-docs")):
        yield row.row_id, row.text


def standard_library() -> Iterator[tuple[str, str]]:
    yield from _docstrings("stdlib", Path(sysconfig.get_path("stdlib")))


def package(name: str) -> Iterator[tuple[str, str]]:
    origin = importlib.util.find_spec(name)
    assert origin is not None
    assert origin.origin is not None
    yield from _docstrings(name, Path(origin.origin).parent)


def _docstrings(name: str, folder: Path) -> Iterator[tuple[str, str]]:
    """(id, text) per module: its docstrings, one after the other."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for file in sorted(folder.rglob("*.py")):
        where = file.relative_to(folder)
        if _NOT_DOCUMENTED & set(where.parts):
            continue
        try:
            tree = ast.parse(file.read_text("utf-8"))
        except (SyntaxError, UnicodeDecodeError):  # templates and samples of other encodings
            continue
        found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented)]
        text = "\n\n".join(each for each in found if each)
        if text:
            yield f"{name}/{where.as_posix()}", text + "\n"
