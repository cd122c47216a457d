"""Prompts to scores: from the caches, from what was kept, or from the upstream server.

Equal requests that arrive together share one look-up and one upstream request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from logitcask.cache_format.sequence import CachedSequence
from logitcask.pipeline.serve.answer import prompt_logprobs
from logitcask.pipeline.serve.keeper import Keeper
from logitcask.pipeline.serve.request import RefusedError
from logitcask.pipeline.serve.served import NOT_THERE, UNMASKED, Missing, ServedCache, plain_name
from logitcask.pipeline.serve.upstream import Upstream

CACHE, KEPT, UPSTREAM = "cache", "kept", "upstream"
"""Where an answer comes from."""

_THREADS = 4
_Result = TypeVar("_Result")
_NO_FIRST = b"[null]"
"""The answer for one token, which nothing predicts."""


@dataclass
class Service:
    """The teacher behind the HTTP server.

    model:      its name, as ``/v1/models`` lists it.
    vocab_size: its ids.
    max_model_len: tokens of a prompt and the one that vLLM samples after it, at most.
    nulls:      whether rows that a cache does not store are answered by null.
    """

    model: str
    vocab_size: int
    caches: list[ServedCache]
    keeper: Keeper | None = None
    upstream: Upstream | None = None
    max_model_len: int | None = None
    nulls: bool = False
    _running: dict[tuple[bytes, int], asyncio.Task[tuple[CachedSequence, str]]] = field(
        default_factory=dict
    )
    # Look-ups and JSON in some threads, so that the event loop stays free; writing in one.
    _readers: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(_THREADS, "look-up")
    )
    _writer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "keep"))

    def knows(self, model: str | None) -> bool:
        """Whether a request's ``model`` is this teacher."""
        names = {plain_name(self.model)}
        if self.upstream is not None:
            names.add(plain_name(self.upstream.served))
        return model is None or plain_name(model) in names

    async def score(self, ids: NDArray[np.int32], k: int) -> tuple[bytes, str]:
        """JSON of the prompt logprobs of ``ids``, and where they come from.

        Raises RefusedError if nobody has them, UpstreamError if the upstream server fails.
        """
        if len(ids) == 1:
            return _NO_FIRST, CACHE
        key = (ids.tobytes(), k)
        task = self._running.get(key)
        if task is None:
            task = asyncio.create_task(self._find(ids, k))
            self._running[key] = task
            task.add_done_callback(lambda done: self._finished(key, done))
        # A client that goes away takes nothing from the others, nor from what is kept.
        sequence, source = await asyncio.shield(task)
        return await self._in_thread(prompt_logprobs, sequence, k), source

    def _finished(
        self, key: tuple[bytes, int], task: asyncio.Task[tuple[CachedSequence, str]]
    ) -> None:
        del self._running[key]
        if not task.cancelled():
            task.exception()  # looked at, also where every client has gone

    async def _find(self, ids: NDArray[np.int32], k: int) -> tuple[CachedSequence, str]:
        found = await self._in_thread(self._look_up, ids, k)
        if not isinstance(found, Missing):
            return found
        if self.upstream is None:
            raise RefusedError(400, _explain(found, len(ids)), "prompt")
        limit = self.upstream.max_model_len
        if limit is not None and len(ids) >= limit:
            raise RefusedError(
                400,
                f"a prompt has {len(ids):,} tokens and is in none of the caches; the upstream server takes at most {limit - 1:,}",
                "prompt",
            )
        kept = self.keeper is not None and k <= self.keeper.top_k
        asked = self.keeper.top_k if kept and self.keeper else k
        sequence = await self.upstream.score(ids, asked)
        if kept and self.keeper is not None:
            sequence = await asyncio.get_running_loop().run_in_executor(
                self._writer, self.keeper.add, sequence
            )
        return sequence, UPSTREAM

    def _look_up(self, ids: NDArray[np.int32], k: int) -> tuple[CachedSequence, str] | Missing:
        """In the caches in their order, then in what was kept: the first that can answer does."""
        nearest = NOT_THERE
        sources = [(cache.find, CACHE) for cache in self.caches]
        if self.keeper is not None:
            sources.append((self.keeper.find, KEPT))
        for find, source in sources:
            found = find(ids, k, nulls=self.nulls)
            if not isinstance(found, Missing):
                return found, source
            nearest = max(nearest, found, key=lambda each: each.nearness)
        return nearest

    async def commit_if_due(self) -> None:
        if self.keeper is not None and self.keeper.due:
            await asyncio.get_running_loop().run_in_executor(self._writer, self.keeper.commit)

    async def close(self) -> None:
        """Commits what was kept."""
        for task in list(self._running.values()):
            task.cancel()
        if self.upstream is not None:
            await self.upstream.close()
        if self.keeper is not None:
            await asyncio.get_running_loop().run_in_executor(self._writer, self.keeper.close)
        self._writer.shutdown()
        self._readers.shutdown()

    async def _in_thread(self, function: Callable[..., _Result], *arguments: Any) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(self._readers, function, *arguments)


def _explain(missing: Missing, tokens: int) -> str:
    what = f"a prompt of {tokens:,} tokens is in none of the caches: {missing.reason}"
    if missing.nearness == 2:
        return f"{what}; ask for fewer prompt_logprobs, or start the server with --upstream"
    allow = ", or with --allow-null" if missing is UNMASKED else ""
    return f"{what}; start the server with --upstream to have it scored{allow}"
