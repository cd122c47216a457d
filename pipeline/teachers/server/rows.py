"""From the JSON of ``/v1/completions`` to arrays. Every answer is checked: a row per token with its
target and k entries by rank.

The JSON has an object per entry. It is decoded directly into small typed objects, which is several
times faster than dictionaries. Fields that are not needed (decoded tokens) are skipped.
"""

from __future__ import annotations

import re
from itertools import chain
from operator import attrgetter

import msgspec
import numpy as np
from numpy.typing import NDArray

from logitcask.pipeline.distribution.keep import MisalignedScoresError, not_a_number
from logitcask.pipeline.teachers.rows import Rows

# vLLM's replacement for -inf, which JSON does not have.
_MINUS_INFINITY = -9999.0
# JSON has no NaN either; encoders write one of these.
_NOT_A_NUMBER = re.compile(rb'"logprob":\s*(?:NaN|null)')


# gc=False: millions of these exist for a short time, and none refers to other objects.
class _Entry(msgspec.Struct, gc=False):
    logprob: float
    rank: int


class _Choice(msgspec.Struct):
    prompt_logprobs: list[dict[int, _Entry] | None] | None = None
    finish_reason: str | None = None


class _Completion(msgspec.Struct):
    choices: list[_Choice]


_decoder = msgspec.json.Decoder(_Completion)
_logprob, _rank = attrgetter("logprob"), attrgetter("rank")


def parse_rows(
    body: bytes, input_ids: NDArray[np.int32], top_k: int, sequence_id: str
) -> Rows | None:
    """The rows of ``input_ids`` (int32[n]) in ``body``, targets before heads; None if the server
    has aborted the request.

    Raises UserError if a logprob is NaN, and MisalignedScoresError if the answer does not consist
    of n - 1 rows, each with its target and ``top_k`` ids of ranks 1, 2, ...
    """

    def wrong(what: str) -> MisalignedScoresError:
        return MisalignedScoresError(
            f"the server's answer for sequence {sequence_id[:100]!r} of {len(input_ids)} tokens {what}. "
            "This is a fault of the server or of its settings: please report it with vLLM's version"
        )

    try:
        (choice,) = _decoder.decode(body).choices
    except (msgspec.DecodeError, ValueError) as error:
        if _NOT_A_NUMBER.search(body):
            raise not_a_number(f"in sequence {sequence_id[:100]!r}") from error
        raise wrong(
            f"is not what a vLLM server says ({' '.join(str(error).split())[:200]})"
        ) from error
    if choice.finish_reason == "abort":
        return None
    answer = choice.prompt_logprobs or []
    # The first entry belongs to the first token, which has no prediction.
    rows = [row for row in answer[1:] if row is not None]
    if len(answer) != len(input_ids) or len(rows) != len(input_ids) - 1:
        raise wrong(f"has {len(rows)} rows; expected {len(input_ids) - 1}")
    targets = input_ids[1:].astype(np.int32)
    counts = np.fromiter(map(len, rows), np.int64, len(rows))
    # A target outside the top_k is an additional entry.
    if ((counts != top_k) & (counts != top_k + 1)).any():
        found = counts[np.flatnonzero((counts != top_k) & (counts != top_k + 1))[0]]
        raise wrong(f"has a row of {found} entries; expected {top_k}, and the target")
    entries = list(chain.from_iterable(row.values() for row in rows))
    ids = np.fromiter(chain.from_iterable(rows), np.int64, len(entries))
    logprobs = np.fromiter(map(_logprob, entries), np.float32, len(entries))
    logprobs[logprobs <= _MINUS_INFINITY] = -np.inf
    ranks = np.fromiter(map(_rank, entries), np.int64, len(entries))
    row_of = np.repeat(np.arange(len(rows)), counts)
    is_target = ids == targets[row_of]
    if not np.array_equal(row_of[is_target], np.arange(len(rows))):
        at = int(np.flatnonzero(np.bincount(row_of[is_target], minlength=len(rows)) != 1)[0])
        raise wrong(
            f"does not say in row {at} how likely token {targets[at]} is, which follows there"
        )
    head = np.flatnonzero(~is_target | (counts == top_k)[row_of])
    head = head[np.lexsort((ranks[head], row_of[head]))].reshape(len(rows), top_k)
    if not np.array_equal(ranks[head], np.broadcast_to(np.arange(1, top_k + 1), head.shape)):
        raise wrong(f"does not have the {top_k} most probable ids by rank")
    if (np.diff(logprobs[head], axis=1) > 0).any():
        raise wrong("has ranks that do not follow the logprobs")
    columns = np.column_stack([np.flatnonzero(is_target), head])
    return ids[columns].astype(np.int32), logprobs[columns], ranks[is_target]
