"""The routes by which prompt logprobs leave vLLM, and their conversion to the same arrays.

vLLM's engine passes the prompt logprobs of a request to its front end as tensors. The front end
then converts them to Python objects, one per entry. On a GPU this costs more than the model.

raw    ``LogprobsProcessor``, a private class of the front end, keeps the arrays of our requests.
flat   the public ``SamplingParams(flat_logprobs=True)``: Python lists, vLLM's most efficient form.
stock  a dict of ids and ``Logprob`` objects per token, vLLM's default. It merges equal ids, so it
       cannot carry draws.

All give the same numbers. The slow part of the work is done by ``convert``.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from logitcask.pipeline.teachers.rows import Rows

Route = Literal["raw", "flat", "stock"]

RAW = "logitcask_raw"
BESIDE = "logitcask_beside"

# Approximate bytes of memory of an entry that waits for its conversion.
ENTRY_BYTES: dict[Route, int] = {"raw": 8, "flat": 100, "stock": 200}


def sampling(route: Route, beside: Route | None = None) -> dict[str, Any]:
    """Arguments of ``SamplingParams`` by which a request takes ``route``.

    beside: a public route; results of ``raw`` then have its form in their attribute ``public``.
    """
    extra_args = {RAW: True, BESIDE: beside is not None} if route == "raw" else None
    return {"flat_logprobs": (beside or route) != "stock", "extra_args": extra_args}


def capturing(route: Route) -> contextlib.AbstractContextManager[None]:
    """A context for adding requests of ``route`` and for steps of the engine."""
    return raw_capture() if route == "raw" else contextlib.nullcontext()


def convert(route: Route, answer: Any, columns: int) -> Rows:
    """vLLM's prompt logprobs of a request, as arrays.

    Raises TypeError, ValueError or AttributeError if they do not have the form of this route.
    """
    return {"raw": _from_arrays, "flat": _from_flat, "stock": _from_dicts}[route](answer, columns)


class _Captured(list[Any]):
    """Replaces vLLM's list of a request's prompt logprobs: a list of (ids, logprobs, ranks) arrays.

    Because it is a list, another version of vLLM may append anything to it, which is refused after
    the request is finished. An exception inside the engine's loop would make the engine wait
    forever for a lost request.

    public: vLLM's own form of the same arrays, if the request asks for it.
    """

    public: Any = None


@contextlib.contextmanager
def raw_capture() -> Iterator[None]:
    """A context in which requests with ``extra_args[RAW]`` keep their prompt logprobs as arrays.

    Raises AttributeError if vLLM no longer has the two methods of ``LogprobsProcessor`` that this
    replaces.
    """
    from vllm.v1.engine.logprobs import LogprobsProcessor

    # The descriptors themselves, so that leaving restores exactly the old state.
    originals = {
        name: inspect.getattr_static(LogprobsProcessor, name)
        for name in ("from_new_request", "_update_prompt_logprobs")
    }
    from_new_request = LogprobsProcessor.from_new_request
    update: Callable[[Any, Any], None] = LogprobsProcessor._update_prompt_logprobs

    def marked(cls: type, tokenizer: Any, request: Any) -> Any:
        processor = from_new_request(tokenizer, request)
        asked = request.sampling_params.extra_args or {}
        if asked.get(RAW):
            captured = _Captured()
            captured.public = processor.prompt_logprobs if asked.get(BESIDE) else None
            processor.prompt_logprobs = captured
        return processor

    def keep(self: Any, tensors: Any) -> None:
        captured = self.prompt_logprobs
        if not isinstance(captured, _Captured):
            update(self, tensors)
            return
        try:
            if captured.public is not None:
                # vLLM appends to this list, or replaces it.
                self.prompt_logprobs = captured.public
                update(self, tensors)
                captured.public = self.prompt_logprobs
            # Copies: the originals are in the transport's receive buffer, which they would keep in
            # memory.
            ids = tensors.logprob_token_ids.numpy().astype(np.int32)
            logprobs = tensors.logprobs.numpy().astype(np.float32)
            ranks = tensors.selected_token_ranks.numpy().astype(np.int64)
            captured.append((ids, logprobs, ranks))
        except Exception as error:
            captured.append(error)
        self.prompt_logprobs = captured

    LogprobsProcessor.from_new_request = classmethod(marked)
    LogprobsProcessor._update_prompt_logprobs = keep
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(LogprobsProcessor, name, original)


def _from_arrays(captured: Any, columns: int) -> Rows:
    if (
        not isinstance(captured, _Captured)
        or not captured
        or not all(isinstance(part, tuple) for part in captured)
    ):
        raise TypeError(f"expected arrays, found {str(captured[:1] or captured)[:80]}")
    ids, logprobs, ranks = (np.concatenate(parts) for parts in zip(*captured, strict=True))
    return _checked(ids, logprobs, ranks, columns)


def _from_flat(flat: Any, columns: int) -> Rows:
    # Row 0 belongs to the first token, which has no prediction, and is empty. All others have 1 +
    # columns entries.
    ids = np.array(flat.token_ids, dtype=np.int32).reshape(-1, columns + 1)
    logprobs = np.array(flat.logprobs, dtype=np.float32).reshape(-1, columns + 1)
    ranks = np.array(flat.ranks[:: columns + 1], dtype=np.int64)
    return _checked(ids, logprobs, ranks, columns)


def _from_dicts(dicts: Any, columns: int) -> Rows:
    """Arrays from dicts. The target is the first key of a dict, unless the same id among the most
    probable ones has replaced it.

    Its rank is then lost, too, and is computed from the others' logprobs, as vLLM counts it.
    """
    # Entry 0 belongs to the first token, which has no prediction, and is None.
    rows = [list(each.items()) for each in dicts[1:]]
    ids = np.empty((len(rows), columns + 1), np.int32)
    logprobs = np.empty((len(rows), columns + 1), np.float32)
    ranks = np.empty(len(rows), np.int64)
    for row, entries in enumerate(rows):
        target = entries[0]
        top = (
            entries[1:]
            if len(entries) > columns
            else sorted(entries, key=lambda entry: entry[1].rank)
        )
        if len(top) != columns:
            raise ValueError(f"vLLM returned {len(entries)} entries for {columns} columns")
        ids[row] = [target[0], *(each[0] for each in top)]
        logprobs[row] = [target[1].logprob, *(each[1].logprob for each in top)]
        ranks[row] = target[1].rank
    ties = (logprobs[:, 1:] >= logprobs[:, :1]).sum(axis=1)
    inside = (ids[:, 1:] == ids[:, :1]).any(axis=1)
    return _checked(ids, logprobs, np.where(inside, ties, ranks), columns)


def _checked(
    ids: NDArray[np.int32], logprobs: NDArray[np.float32], ranks: NDArray[np.int64], columns: int
) -> Rows:
    if (
        ids.shape != logprobs.shape
        or ids.shape[1:] != (columns + 1,)
        or ranks.shape != ids.shape[:1]
    ):
        raise ValueError(
            f"vLLM returned ids {ids.shape}, logprobs {logprobs.shape}, ranks {ranks.shape} for {columns} columns"
        )
    return ids, logprobs, ranks
