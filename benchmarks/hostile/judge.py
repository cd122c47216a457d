"""What reading a hostile cache came to, and whether SPEC.md allows it."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
from cases import Case, digest
from numpy.typing import NDArray

from logitcask.cache_format import CachedSequence, CacheReader, LogitcaskError, verify
from logitcask.cache_format.manifest import StoreSettings

SPREAD = 2.0**-16  # what sums of fp32 probabilities may be off by
HASH, MANIFEST, DECODER, DEEP = (
    "refused: hash",
    "refused: manifest",
    "refused: decoder",
    "refused: verify --deep",
)
IDENTICAL, VALID, FAILED = "identical", "accepted, valid", "FAILED"
HASH, MANIFEST, DECODER, DEEP = (
    "refused: hash",
    "refused: manifest",
    "refused: decoder",
    "refused: verify --deep",
)
IDENTICAL, VALID, FAILED = "identical", "accepted, valid", "FAILED"
IDENTICAL, VALID, FAILED = "identical", "accepted, valid", "FAILED"
OUTCOMES = (HASH, MANIFEST, DECODER, DEEP, IDENTICAL, VALID, FAILED)


def judge(folder: str, case: Case, forged: bool) -> tuple[str, str]:
    """(outcome, what was wrong) of reading the cache in ``folder`` in every way there is."""
    before, after = case.base.files, case.files
    changed = {
        path for path in before.keys() | after.keys() if before.get(path) is not after.get(path)
    }
    try:
        cache = CacheReader(folder)
    except LogitcaskError as error:
        return refusal(error, changed, forged)
    store, refused = cache.manifest.store, None
    values, small = [], []
    try:
        for sequence in cache:
            if problem := broken(sequence, store, deep=False):
                return FAILED, f"reading gives {problem}"
            values.append(digest(sequence))
            if sequence.ids.nbytes < 1 << 20:
                small.append(sequence)
            del sequence
    except LogitcaskError as error:
        refused = error
    try_the_rest(cache)
    del cache
    problems = deep_problems(folder)
    if refused is not None:
        if not problems:
            return FAILED, f"verify --deep passes what reading refuses: {refused}"
        return refusal(refused, changed, forged)
    if values != case.base.values and not forged:
        return FAILED, "values changed, and reading does not say so"
    if problems:
        return DEEP, problems[0]
    for sequence in small:
        if problem := broken(sequence, store, deep=True):
            return FAILED, f"verify --deep passes {problem}"
    return IDENTICAL if values == case.base.values else VALID, ""


def try_the_rest(cache: CacheReader) -> None:
    """By index and by column; refusals are as good as answers here."""
    for index in (0, 4, -1, len(cache) // 2):
        if -len(cache) <= index < len(cache):
            with suppress(LogitcaskError):
                cache[index]
    for name in ("sequence_id", "input_ids", "loss_mask", "positions"):
        with suppress(LogitcaskError):
            for column in cache.iter_column(name):
                if column.nbytes < 1 << 20:
                    column.to_pylist()


def deep_problems(folder: str) -> list[str]:
    try:
        return verify(folder, deep=True)
    except LogitcaskError as error:
        return [str(error)]


def refusal(error: LogitcaskError, changed: set[str], forged: bool) -> tuple[str, str]:
    """The kind of refusal; a failure where damage is put down to no file, or to another than the
    one that has it.
    """
    message = str(error)
    if "manifest.json" in changed:
        changed = changed | {"data/", "tail_prior.arrow"}  # a number in it may contradict any file
    if len(message) > 10_000:
        return FAILED, f"a message of {len(message)} characters"
    if not forged and not any(path in message for path in changed):
        return FAILED, f"the damage is in {sorted(changed)}, but it says: {message}"
    if "is damaged: " in message or "is missing" in message:
        return HASH, message
    return (MANIFEST if "manifest.json" in message else DECODER), message


def broken(sequence: CachedSequence, store: StoreSettings, *, deep: bool) -> str | None:
    """Which rule of SPEC.md a sequence breaks, if any; ``deep``: also of those that only
    ``verify --deep`` checks.
    """
    n, p, vocab_size = len(sequence.input_ids), len(sequence.positions), store.vocab_size
    ids, logprobs, samples, entropy = (
        sequence.ids,
        sequence.logprobs,
        sequence.samples,
        sequence.entropy,
    )
    stored = ids >= 0
    size = stored.sum(axis=1)
    target, tail, mask = sequence.target_logprob, sequence.tail_logprob, sequence.loss_mask
    rules: dict[str, Any] = {
        "no tokens": n >= 1,
        "another mask than tokens": mask.shape == (n,) and mask.dtype == np.bool_,
        "a token outside the vocabulary": (
            (sequence.input_ids >= 0) & (sequence.input_ids < vocab_size)
        ).all(),
        "a first token that is learnt": not mask[:1].any(),
        "positions that are not the mask's": np.array_equal(
            sequence.positions, np.flatnonzero(mask[1:])
        ),
        "heads of another shape": ids.shape == logprobs.shape
        and len(ids) == p
        and ids.dtype == np.int32,
        "scalars of another shape": target.shape
        == tail.shape
        == sequence.target_rank.shape
        == (p,),
        "a head id outside the vocabulary": (ids >= -1).all() and (ids < vocab_size).all(),
        "padding between entries": (stored[:, 1:] <= stored[:, :-1]).all(),
        "padding that is not -inf": np.isneginf(logprobs[~stored]).all(),
        "a logprob that is not finite": np.isfinite(logprobs[stored]).all(),
        "a logprob above 0": (logprobs <= 0).all(),
        "logprobs that rise": (logprobs[:, 1:] <= logprobs[:, :-1]).all(),
        "an empty head": store.tail_samples > 0 or (size >= 1).all(),
        "a tail that is no logprob": (tail <= 0).all(),
        "a target that is no logprob": np.isfinite(target).all() and (target <= 1e-3).all(),
        "a rank outside the vocabulary": (
            (sequence.target_rank >= 0) & (sequence.target_rank < vocab_size)
        ).all(),
        "entropy where there is none": (entropy is not None) == store.entropy,
        "samples where there are none": (samples is not None) == (store.tail_samples > 0),
    }
    if entropy is not None:
        rules["an entropy that is none"] = (
            entropy.shape == (p,) and np.isfinite(entropy).all() and (entropy >= 0).all()
        )
    if samples is not None:
        drawn, of_draws = samples.ids >= 0, samples.logprobs
        rules |= {
            "samples of another shape": drawn.shape[:2] == (p, store.sample_sets)
            and drawn.shape[2] <= 255,
            "a sample outside the vocabulary": (samples.ids >= -1).all()
            and (samples.ids < vocab_size).all(),
            "padding between samples": (drawn[..., 1:] <= drawn[..., :-1]).all(),
            "logprobs of samples where there are none": (of_draws is not None)
            == store.sample_logprobs,
        }
        if of_draws is not None:
            rules["samples that are no logprobs"] = (
                np.isfinite(of_draws[drawn]).all()
                and (of_draws <= 0).all()
                and np.isneginf(of_draws[~drawn]).all()
                and of_draws.shape == drawn.shape
            )
    wrong = next((what for what, holds in rules.items() if not holds), None)
    return wrong or (broken_deeply(sequence, store, size) if deep else None)


def broken_deeply(
    sequence: CachedSequence, store: StoreSettings, size: NDArray[np.int64]
) -> str | None:
    with np.errstate(over="ignore"):
        mass = np.exp(sequence.logprobs.astype(np.float64)).sum(axis=1) + np.exp(
            sequence.tail_logprob.astype(np.float64)
        )
    if (np.abs(mass - 1) > store.logprob_step + store.scalar_step + SPREAD).any():
        return "masses that do not add up to 1"
    if (np.isneginf(sequence.tail_logprob) != (size == store.vocab_size)).any():
        return "a tail without mass beside a head that is not everything"
    for row, head in enumerate(sequence.ids):
        named = head[head >= 0].tolist()
        if len(set(named)) < len(named):
            return "an id twice in a head"
        if sequence.samples is not None:
            sets = sequence.samples.ids[row]
            if set(named) & set(sets[sets >= 0].tolist()):
                return "a sample that is in the head"
            if len({int((each >= 0).sum()) for each in sets}) > 1:
                return "sets with different numbers of draws"
    return None
