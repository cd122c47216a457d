"""Speculative knowledge distillation (arXiv 2410.11325) as passes of a round.

    write-1                   pass 1: the student writes whole answers, the teacher scores them
    splice-1-2, splice-1-3    the first token of each answer that the teacher ranks low is replaced
                              by one of the teacher, the student goes on from there, the teacher
                              scores

A pass is a build with ``data.generate.splice``, from the cache of the pass before. The passes of a
round end when no token is rejected, or at ``rounds.skd.passes``. The cache of the last pass is the
round's. Those before it are removed when it is recorded.

**Rejection rate**: of the tokens that were examined, the share that was rejected. A token is
examined if all before it have been accepted, or spliced. ``examined`` of a cache counts from the
beginning of each answer, so a pass has examined what its cache counts more than the one before.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from logitcask.cache_format import CacheReader
from logitcask.cache_format.errors import ConfigError
from logitcask.rounds.config import SkdConfig
from logitcask.rounds.state import Done, State

_SUMS = ("writing_seconds", "scoring_seconds")


def check(
    losses: list[str],
    *,
    max_tokens: int | None,
    writer_top_k: int | None,
    shortest_head: int,
    teacher_config: Path,
) -> None:
    """Raises ConfigError for a loss or a teacher config that does not go with passes.

    losses: their names. The others are of the build in the file ``teacher_config``.
    """
    if "policy_gradient" in losses:
        raise ConfigError(
            "rounds.skd is set, but policy_gradient learns from tokens of the student alone, and some are the teacher's; use "
            "forward_kl, or remove rounds.skd"
        )
    if max_tokens is not None:
        raise ConfigError(
            f"{teacher_config}: data.max_tokens is {max_tokens}, but with rounds.skd the student goes on with every answer; remove "
            "it: rounds.prompts limits a round"
        )
    if writer_top_k is not None:
        raise ConfigError(
            f"{teacher_config}: data.generate.writer_top_k is {writer_top_k}, but with rounds.skd some tokens were written in an "
            "earlier pass, where the student's most probable ids were not kept; remove one of the two"
        )
    if shortest_head < 1:
        raise ConfigError(
            f"{teacher_config}: store allows positions without a head, from which rounds.skd draws tokens of the teacher; set "
            "store.top_k and store.min_k to at least 1"
        )


def cache_name(pass_number: int) -> str:
    """The name of the cache of a pass, in the folder of its round."""
    return f"cache-{pass_number}" if pass_number > 1 else "cache"


def passes_of(state: State, number: int) -> list[Done]:
    """The finished passes of round ``number``, in order."""
    found = [state.of(f"write-{number}")]
    while found[-1] is not None:
        found.append(state.of(f"splice-{number}-{len(found) + 1}"))
    return [each for each in found if each is not None]


def next_pass(skd: SkdConfig, state: State, number: int) -> int | None:
    """The number of the pass that comes next in a round; None if all are done."""
    done = passes_of(state, number)
    if not done:
        return 1
    if len(done) >= skd.passes or not done[-1].figures["rejected"]:
        return None
    return len(done) + 1


def splice_of(skd: SkdConfig, before: Path) -> dict[str, Any]:
    """``data.generate.splice`` of the pass after the one with the cache ``before``."""
    return {"cache": str(before), **skd.model_dump(exclude={"passes"})}


def remove(caches: list[Path]) -> None:
    """Removes the caches of earlier passes, as far as a killed run has not done so."""
    for each in caches:
        if each.exists():
            shutil.rmtree(each)


def figures_of_ranks(path: str | Path, top_k: int) -> dict[str, Any]:
    """What the ranks in a cache say of its text.

    examined: tokens up to the first rejected one of each answer, and with it.
    rejected: answers with a rejected token: of rank ``top_k`` or more.
    """
    examined = rejected = 0
    for sequence in CacheReader(path):
        at = np.flatnonzero(sequence.target_rank >= top_k)
        examined += int(at[0]) + 1 if len(at) else len(sequence.target_rank)
        rejected += bool(len(at))
    return {"examined": examined, "rejected": rejected}


def as_one(state: State, number: int) -> Done | None:
    """The writing of round ``number``, as one stage; None if it has not begun.

    Its figures are those of the last pass, with the seconds of all of them. The KL on the student's
    own text is that of the first pass, which is all the student's.
    """
    done = passes_of(state, number)
    if not done or "rejected" not in done[0].figures:
        return done[0] if done else None
    last = done[-1]
    figures = {name: value for name, value in last.figures.items() if name != "examined"}
    seconds = {name: sum(each.figures[name] for each in done) for name in _SUMS}
    rejected = sum(each.figures["rejected"] for each in done)
    examined = last.figures["examined"]
    figures |= seconds | {
        **{name: done[0].figures[name] for name in ("reverse_kl", "forward_kl")},
        "rejection_rate": rejected / examined if examined else None,
        "answers_left_with_a_rejected_token": figures.pop("rejected"),
        "passes": [_pass(each, before) for each, before in zip(done, [None, *done], strict=False)],
    }
    return last.model_copy(
        update={
            "figures": figures,
            "seconds": sum(each.seconds for each in done),
            "handover": sum(each.handover for each in done),
            "starts": sum(each.starts for each in done),
            "peak_bytes": max(each.peak_bytes for each in done),
        }
    )


def _pass(done: Done, before: Done | None) -> dict[str, Any]:
    """The figures of one pass."""
    figures = done.figures
    examined = figures["examined"] - (0 if before is None else before.figures["examined"])
    return {
        "fingerprint": done.fingerprint,
        "written_tokens": figures["written_tokens"],
        "examined_tokens": examined,
        "rejected_tokens": figures["rejected"],
        # A teacher whose arithmetic depends on the batch may rank a known token anew.
        "rejection_rate": figures["rejected"] / examined if examined > 0 else None,
        "splices_cut": figures.get("splices_cut", 0),
        **{name: figures[name] for name in _SUMS},
        "seconds": done.seconds,
        "handover_seconds": done.handover,
    }
