"""What the study of rounds is made of: a teacher with a small vocabulary, texts, and students that
have read other text.

The teacher is SmolLM2-135M-Instruct with the rows of 4,096 of its ids: the letters, and the merges
that are most frequent in the text, with those that they are made of. Its tokenizer has the same
merges, so prompts are texts and answers can be read.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from student import Schedule, hard_labels, train
from teachers import small_llama
from text import PACKAGES, package, reference, standard_library
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

END = "<|endoftext|>"


@dataclass(frozen=True)
class Size:
    """How large everything is.

    vocab: ids. prompt, length: tokens of a prompt, and of a text (prompt and answer together).
    rounds, prompts: of one arm, with ``prompts`` texts that the teacher reads in each round. steps,
    batch: of the optimizer in a round, and texts in a step. held_out: prompts, and documents, that
    the students are judged by. documents: whether docstrings are read beside the language
    reference. student: width and layers.
    """

    vocab: int
    prompt: int
    length: int
    rounds: int
    prompts: int
    steps: int
    batch: int
    lr: float
    held_out: int
    documents: bool
    student: tuple[int, int]
    pretraining: Schedule
    pretraining_texts: int


def make(folder: Path, strong: Path, size: Size) -> None:
    """The teacher and the texts, once: ``teacher/``, ``prompts.jsonl``, ``documents.jsonl``,
    ``held-out.jsonl`` and ``other.npy``.
    """
    with FileLock(folder / "make.lock"):
        if not (folder / "facts.json").exists():
            _make(folder, strong, size)


def _make(folder: Path, strong: Path, size: Size) -> None:
    ours = [*reference(), *(standard_library() if size.documents else [])]
    theirs = [row for name in PACKAGES for row in package(name)] if size.documents else ours
    tokenizer, kept = cut_tokenizer(strong / "tokenizer.json", [text for _, text in ours], size)
    save_teacher(folder / "teacher", strong, tokenizer, kept)
    # Paragraphs that are as long as a text, in the order of a hash, each in one part only.
    texts = sorted(
        {text for _, document in ours for text in paragraphs(document, tokenizer, size.length)},
        key=lambda text: hashlib.sha256(text.encode()).digest(),
    )
    needed = 2 * size.rounds * size.prompts + 2 * size.held_out
    if len(texts) < needed:
        raise SystemExit(f"{len(texts)} paragraphs are long enough; the study needs {needed}")
    parts = iter(texts)
    for name, count, length in (
        ("held-out-prompts", size.held_out, size.prompt),
        ("held-out", size.held_out, size.length),
        ("documents", size.rounds * size.prompts, size.length),
        ("prompts", size.rounds * size.prompts, size.prompt),
    ):
        lines = [start_of(next(parts), tokenizer, length) for _ in range(count)]
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": line}, ensure_ascii=False) + "\n" for line in lines)
        )
    ids = [token for _, text in theirs for token in [*tokenizer.encode(text).ids, 0]]
    rows = min(len(ids) // size.length, size.pretraining_texts)
    np.save(
        folder / "other.npy",
        np.array(ids[: rows * size.length], np.uint16).reshape(rows, size.length),
    )
    facts = {"paragraphs": len(texts), "pretraining_tokens": rows * size.length}
    (folder / "facts.json").write_text(json.dumps(facts))


def cut_tokenizer(file: Path, texts: list[str], size: Size) -> tuple[Tokenizer, list[int]]:
    """A tokenizer with ``size.vocab`` ids, and the id that each has in the tokenizer of ``file``."""
    found = json.loads(file.read_text())
    model = found["model"]
    ids: dict[str, int] = model["vocab"]
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    parts: dict[str, tuple[str, str]] = {}
    for left, right in merges:
        parts.setdefault(left + right, (left, right))
    whole = Tokenizer.from_file(str(file))
    frequent = Counter(t for e in whole.encode_batch(texts) for t in e.tokens)
    kept = {END, *(token for token in ids if len(token) == 1)}
    for token, _ in frequent.most_common():
        new = {token, *made_of(token, parts)} - kept if token in parts else set()
        if len(kept) + len(new) <= size.vocab:
            kept |= new
    order = sorted(kept, key=lambda token: -1 if token == END else ids[token])
    model["vocab"] = {token: index for index, token in enumerate(order)}
    model["merges"] = [
        [left, right] for left, right in merges if {left, right, left + right} <= kept
    ]
    found["added_tokens"] = [
        {**each, "id": 0} for each in found["added_tokens"] if each["content"] == END
    ]
    return Tokenizer.from_str(json.dumps(found)), [ids[token] for token in order]


def made_of(token: str, parts: dict[str, tuple[str, str]]) -> Iterator[str]:
    """The tokens that ``token`` is merged from, and those that these are."""
    for part in parts.get(token, ()):
        yield part
        yield from made_of(part, parts)


def save_teacher(folder: Path, strong: Path, tokenizer: Tokenizer, kept: list[int]) -> None:
    """The model of ``strong`` with the rows ``kept`` of its embeddings, and its tokenizer."""
    model: Any = AutoModelForCausalLM.from_pretrained(strong, dtype=torch.float32)
    rows = model.get_input_embeddings().weight.data[kept].clone()
    model.resize_token_embeddings(len(kept), mean_resizing=False)
    model.get_input_embeddings().weight.data.copy_(rows)
    model.tie_weights()
    for config in (model.config, model.generation_config):
        config.bos_token_id = config.eos_token_id = config.pad_token_id = 0
    model.save_pretrained(folder)
    save_tokenizer(folder, tokenizer)


def save_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, bos_token=END, pad_token=END
    ).save_pretrained(folder)


def paragraphs(document: str, tokenizer: Tokenizer, length: int) -> Iterator[str]:
    """The paragraphs of a document with at least ``length`` tokens, on one line each."""
    for paragraph in document.split("\n\n"):
        text = re.sub(r"\s+", " ", paragraph).strip()
        if len(text) > length and len(tokenizer.encode(text).ids) >= length:
            yield text


def start_of(text: str, tokenizer: Tokenizer, length: int) -> str:
    """The words of ``text`` that are whole within its first ``length`` tokens."""
    start: str = tokenizer.decode(tokenizer.encode(text).ids[:length])
    return start if start == text else start.rsplit(" ", 1)[0] or start


def student(folder: Path, size: Size, seed: int) -> Path:
    """A small Llama that has read ``other``, once."""
    target = folder / f"student-{seed}"
    with FileLock(folder / f"student-{seed}.lock"):
        if not target.exists():
            _pretrain(folder, size, seed, target)
    return target


def _pretrain(folder: Path, size: Size, seed: int, target: Path) -> None:
    other = np.load(folder / "other.npy")
    torch.manual_seed(seed)
    tokenizer = Tokenizer.from_file(str(folder / "teacher" / "tokenizer.json"))
    model = small_llama(tokenizer.get_vocab_size(), *size.student, 2 * size.length)
    for config in (model.config, model.generation_config):
        config.bos_token_id = config.eos_token_id = config.pad_token_id = 0
    seconds = train(
        model,
        hard_labels(other, torch.device("cpu")),
        len(other),
        size.pretraining,
        order=seed,
    )
    print(f"student {seed}: {seconds:.0f} s", flush=True)
    scratch = folder / f"student-{seed}.tmp"
    model.save_pretrained(scratch)
    save_tokenizer(scratch, tokenizer)
    scratch.rename(target)
