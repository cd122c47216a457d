"""The compatibility of a student and a cache: a comparison with the manifest before training."""

from __future__ import annotations

import logging

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from logitcask.cache_format import Manifest, UserError
from logitcask.cache_format.tokenizer_identity import tokenizer_identity
from logitcask.train.config import TrainConfig
from logitcask.train.data.dataset import CachedDataset
from logitcask.train.data.vocabulary import MOST_LEFT_OUT, rows_of
from logitcask.train.losses import SPECS

log = logging.getLogger(__name__)

_MEASURED = 64
"""Sequences by which ``check_vocabulary`` judges a cache."""


def check_together(paths: list[str], manifests: list[Manifest]) -> None:
    """Raises UserError unless the caches of a mixture use the same ids for the same tokens.

    Their stored data may differ, and so may the ids that their teachers predict beyond the
    tokenizer's (padding).
    """
    for path, manifest in zip(paths, manifests, strict=True):
        if manifest.tokenizer.vocab_sha256 != manifests[0].tokenizer.vocab_sha256:
            raise UserError(
                f"{path} was made with another tokenizer ({manifest.tokenizer.name}, {manifest.tokenizer.vocab_size:,} tokens) "
                f"than {paths[0]} ({manifests[0].tokenizer.name}, {manifests[0].tokenizer.vocab_size:,}); caches of a mixture "
                "need the same tokens under the same ids: train on one of them"
            )


def check(
    config: TrainConfig,
    number: int,
    manifest: Manifest,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    held_out: bool = True,
) -> None:
    """Raises UserError naming the first mismatch with a cache of the config, by number, from which
    the student learns: the value found, the value expected, and the remedies. ``held_out``: whether
    a part of the cache is evaluated on.
    """
    path = config.caches[number].cache
    check_model(path, manifest, student, tokenizer)
    losses = config.applying(number)
    defaults = {term.name: SPECS[term.name].options for term in losses}
    by_loss = {
        term.name: term.options.get("k", defaults[term.name]["k"])
        for term in losses
        if "k" in defaults[term.name]
    }
    # The student is evaluated on this cache or on others.
    if config.evaluation.cache is None and manifest.store.top_k and held_out:
        by_loss["evaluation.k"] = config.evaluation.k
    asked, wanted = max(by_loss.items(), key=lambda item: item[1], default=("", 0))
    _check_k(asked, wanted, path, manifest)


def check_evaluation(
    path: str,
    manifest: Manifest,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    k: tuple[str, int],
) -> None:
    """Raises UserError, as ``check`` does, for a cache on which a student is only evaluated; ``k``:
    of the metrics, with the name of its option.
    """
    check_model(path, manifest, student, tokenizer)
    # Without heads there are no metrics of them (logitcask.train.evaluation.evaluate)
    if manifest.store.top_k:
        _check_k(*k, path, manifest)


def _check_k(asked: str, wanted: int, path: str, manifest: Manifest) -> None:
    if wanted > manifest.store.top_k:
        raise UserError(
            f"{asked} asks for the teacher's top {wanted}, but {path} holds the top "
            f"{manifest.store.top_k}; lower k, or build a cache with store.top_k >= {wanted}"
        )


def warn_of_other_teacher(path: str, manifest: Manifest, reference: str, judge: Manifest) -> None:
    """Warns if the teacher of a reference cache is not that of the cache at ``path``."""
    ours, theirs = manifest.teacher, judge.teacher
    if ours.weights_sha256 is not None and theirs.weights_sha256 is not None:
        same = ours.weights_sha256 == theirs.weights_sha256
    else:
        same = (ours.model, ours.revision) == (theirs.model, theirs.revision)
    if not same or ours.temperature != theirs.temperature:
        log.warning(
            "the teacher of the reference cache %s is %s, that of %s is %s: the metrics compare the student with the first, "
            "which it does not learn from",
            reference,
            _teacher(judge),
            path,
            _teacher(manifest),
        )


def _teacher(manifest: Manifest) -> str:
    teacher = manifest.teacher
    revision = teacher.revision or (teacher.weights_sha256 and f"weights {teacher.weights_sha256}")
    temperature = f", temperature {teacher.temperature:g}" if teacher.temperature != 1 else ""
    return f"{teacher.model}{f' ({revision[:20]})' if revision else ''}{temperature}"


def check_model(
    path: str,
    manifest: Manifest,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    """Raises UserError if the tokenizer, the ids or the longest sequence of the cache at ``path``
    do not fit the student.
    """
    teacher = manifest.teacher.model
    if tokenizer is not None:
        found = tokenizer_identity(tokenizer, None)
        if found["vocab_sha256"] != manifest.tokenizer.vocab_sha256:
            raise UserError(
                f"the student's tokenizer is not the one that {path} was made with, that of {teacher} "
                f"({found['vocab_size']:,} tokens against {manifest.tokenizer.vocab_size:,}, or other ids for them); use a "
                "student with the teacher's tokenizer, or set student.tokenizer to it for a student from scratch"
            )
        if found["sha256"] != manifest.tokenizer.sha256:
            # Training reads ids and no text, so the same ids for the same tokens are enough.
            log.warning(
                "the student's tokenizer has the teacher's tokens and ids, but cuts some texts otherwise than that of %s; "
                "training is not touched by it",
                teacher,
            )
    rows, predicted = rows_of(student), manifest.store.vocab_size
    # A student without a tokenizer needs as many rows as the teacher has tokens; ids may have gaps.
    used = (
        manifest.tokenizer.vocab_size
        if tokenizer is None
        else max(tokenizer.get_vocab().values()) + 1
    )
    if rows < min(used, predicted):
        raise UserError(
            f"the student predicts {rows:,} ids, but the tokenizer of {path}, that of {teacher}, uses {used:,}; use a "
            "student with at least so many rows in its embeddings (resize_token_embeddings of transformers, or vocab_size in "
            "student.config)"
        )
    longest = getattr(student.config, "max_position_embeddings", None)
    if longest is not None and longest < manifest.data.max_length:
        raise UserError(
            f"the student reads at most {longest} tokens, but {path} has sequences of up to "
            f"{manifest.data.max_length}; use a student with more positions, or a cache with a smaller data.max_length"
        )


def check_vocabulary(data: CachedDataset) -> None:
    """Logs the teacher's mass on ids that the student lacks, on some sequences of ``data``.

    Raises UserError if it is more than padding rows explain.
    """
    path, store = data.cache.path, data.cache.manifest.store
    if data.vocab_size == store.vocab_size:
        return
    chosen = np.unique(np.linspace(0, len(data) - 1, _MEASURED).astype(np.int64)).tolist()
    share = np.concatenate([data.left_out(item) for item in chosen])
    mean, most = float(share.mean()), float(share.max())
    found = f"{mean:.2g} of the teacher's mass (at most {most:.2g} at a position"
    found += f"{'' if store.tail_samples else ', as far as heads tell'}; {len(share):,} positions of {path})"
    if mean > MOST_LEFT_OUT:
        raise UserError(
            f"the student predicts {data.vocab_size:,} ids and the teacher {store.vocab_size:,}, but {found} lies on those "
            f"that the student lacks; expected padding, on which there is at most {MOST_LEFT_OUT}: use a student with all of "
            "the teacher's rows (resize_token_embeddings of transformers, or vocab_size in student.config)"
        )
    log.info(
        "the student predicts %s ids, the teacher %s, their tokenizer has %s: %s lies on ids that the student lacks; it is "
        "left out, and the rest scaled up to 1",
        f"{data.vocab_size:,}",
        f"{store.vocab_size:,}",
        f"{data.cache.manifest.tokenizer.vocab_size:,}",
        found,
    )
