"""The vLLM server behind: it is asked for what no cache holds, once it is known to be the teacher.

A name does not prove the identity of a model. At the start, the server's scores of texts of the
caches are compared with what the caches hold. Its scores of a probe are compared again over each
new connection, behind which another server may stand.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
import time
from collections.abc import Callable
from typing import Any

import httpx
import msgspec
import numpy as np
from numpy.typing import NDArray

from logitcask.cache_format.errors import LogitcaskError, UserError, one_line
from logitcask.cache_format.manifest import StoreSettings
from logitcask.cache_format.reader import CacheReader
from logitcask.cache_format.sequence import CachedSequence
from logitcask.pipeline.distribution.capture import Capture
from logitcask.pipeline.distribution.keep import keep
from logitcask.pipeline.serve.request import RefusedError
from logitcask.pipeline.serve.served import plain_name
from logitcask.pipeline.teachers.rows import ColumnRequest, Rows, scored_rows
from logitcask.pipeline.teachers.server.checks import (
    Probe,
    check_distributions,
    long_probe_ids,
    probe_ids,
)
from logitcask.pipeline.teachers.server.http import message_of
from logitcask.pipeline.teachers.server.rows import parse_rows
from logitcask.pipeline.types import Sequence

logger = logging.getLogger(__name__)

_CONNECT_SECONDS = 10.0
_ANSWER_SECONDS = 300.0
_ATTEMPTS = 4
_FIRST_DELAY = 0.25
_COMPARED_SEQUENCES = 4
_COMPARED_TOKENS = 32
_COMPARED_ENTRIES = 4
# Largest accepted mean difference from the caches, in nats, beside what they round.
_TOLERANCE_FLOAT32 = 0.01
_TOLERANCE_16_BITS = 0.05


class UpstreamError(Exception):
    """No answer of the server behind: 502 for a wrong one, 503 for none; one line."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Upstream:
    """A vLLM server at ``url``.

    model:      the teacher's name, by which the served model is found; ``served_as``: its name
                there, if it is another one.
    vocab_size: ids of the teacher.
    k:          entries that kept heads have; the server must give as many.
    key:        the server's API key.
    """

    def __init__(
        self,
        url: str,
        model: str,
        vocab_size: int,
        k: int,
        *,
        served_as: str | None = None,
        key: str | None = None,
        concurrency: int = 32,
    ) -> None:
        self.url = url
        self.vocab_size, self.k = vocab_size, k
        self._model, self._served_as = model, served_as
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._concurrency = concurrency
        self.served = ""
        self.version = ""
        self.max_model_len: int | None = None
        self.asked = 0
        """Requests sent since the start-up checks."""
        self._probe: Probe | None = None
        self._tolerance = _TOLERANCE_16_BITS

    # Start: one request after another, errors for the person who starts the server.

    def check(
        self,
        caches: list[CacheReader],
        *,
        tolerance: float | None = None,
        dense: Callable[[Probe, str], None] | None = None,
    ) -> None:
        """Raises UserError, in one line, unless the server is up and says what ``caches`` hold.

        dense: the check of a probe where no cache has texts to compare, with the command that
               starts a right server.
        """
        self.max_model_len = self._find_model()
        try:
            self.version = str(msgspec.json.decode(self._get("/version"))["version"])
        except (msgspec.DecodeError, KeyError, TypeError):
            raise UserError(
                f"{self.url} does not say which vLLM it is; expected a vLLM server, started with: {self.command}"
            ) from None
        dtypes = {cache.manifest.teacher.dtype for cache in caches}
        exact = dtypes == {"float32"}
        default = _TOLERANCE_FLOAT32 if exact else _TOLERANCE_16_BITS
        self._tolerance = default if tolerance is None else tolerance
        length = max(2, (self.max_model_len or 257) - 1)
        self._probe = self._ask_probe(probe_ids(self.vocab_size, length))
        check_distributions(self._probe, self.vocab_size, self.url, self.command)
        long = long_probe_ids(self.vocab_size, length)
        first = self._ask_probe(long)
        if (difference := first.difference(self._ask_probe(long))) > self._tolerance / 2:
            raise UserError(
                f"{self.url} gives other logprobs when it reads the same text again ({difference:.2g} nats on average), as "
                f"prefix caching did in some versions; start it with: {self.command}"
            )
        compared = [self._compare(cache, self._tolerance, length) for cache in caches]
        if not any(compared) and dense is not None:
            dense(first, self.command)
        logger.info(
            "upstream: %s serves %s with vLLM %s%s",
            self.url,
            self.served,
            self.version,
            f", {sum(compared):,} positions of the caches compared" if any(compared) else "",
        )

    @property
    def command(self) -> str:
        """The command that starts a server as it is wanted."""
        return (
            f"vllm serve {self._model} --max-logprobs {self.k} --logprobs-mode raw_logprobs "
            "--no-enable-prefix-caching --skip-tokenizer-init"
        )

    def _find_model(self) -> int | None:
        listed = self._get("/v1/models")
        try:
            cards = msgspec.json.decode(listed)["data"]
            found = [
                card
                for card in cards
                if (
                    card["id"] == self._served_as
                    if self._served_as is not None
                    else plain_name(self._model)
                    in (plain_name(card["id"]), plain_name(card.get("root") or card["id"]))
                )
            ]
            if found:
                self.served = str(found[0]["id"])
                length = found[0].get("max_model_len")
                return None if length is None else int(length)
            there = ", ".join(str(card["id"]) for card in cards) or "nothing"
        except (msgspec.DecodeError, KeyError, TypeError, AttributeError, ValueError):
            raise UserError(
                f"{self.url}/v1/models is not a list of models; expected a vLLM server with the OpenAI API"
            ) from None
        raise UserError(
            f"{self.url} serves {there}, not {self._served_as or self._model}; start it with: {self.command} , or set "
            f"--upstream-model to the name under which it serves {self._model}"
        )

    def _get(self, path: str) -> bytes:
        return self._at_start("GET", path, None)

    def _at_start(self, method: str, path: str, content: object) -> bytes:
        try:
            answer = httpx.request(
                method,
                f"{self.url}{path}",
                content=None if content is None else msgspec.json.encode(content),
                headers={**self._headers, "Content-Type": "application/json"},
                timeout=httpx.Timeout(_ANSWER_SECONDS, connect=_CONNECT_SECONDS),
            )
        except httpx.HTTPError as error:
            raise UserError(
                f"the upstream server at {self.url} does not answer ({one_line(error)}); start it with: {self.command}"
            ) from None
        if answer.status_code in (401, 403):
            raise UserError(
                f"the upstream server at {self.url} wants another API key ({answer.status_code}); set --upstream-key-env to "
                "the environment variable with its key"
            )
        if answer.status_code != 200:
            raise UserError(
                f"{self.url}{path} answers {answer.status_code}: {message_of(answer)}; start it with: {self.command}"
            )
        return answer.content

    def _ask_probe(self, ids: NDArray[np.int32]) -> Probe:
        return Probe.of(ids, self._rows_at_start(ids, self.k))

    def _rows_at_start(self, ids: NDArray[np.int32], k: int) -> Rows:
        body = self._at_start("POST", "/v1/completions", self._request(ids, k))
        rows = parse_rows(body, ids, k, "probe")
        if rows is None:
            raise UserError(f"the upstream server at {self.url} aborted a request; start it again")
        return rows

    def _request(self, ids: NDArray[np.int32], k: int) -> dict[str, Any]:
        return {
            "model": self.served,
            "prompt": ids.tolist(),
            "prompt_logprobs": k,
            "max_tokens": 1,
            "temperature": 0,
            "add_special_tokens": False,
        }

    def _compare(self, cache: CacheReader, tolerance: float, length: int) -> int:
        """Compares some texts of ``cache``, up to their first kept positions. Returns how many
        positions were compared. Raises UserError if the server says something else.
        """
        differences: list[float] = []
        positions = 0
        for number in np.linspace(0, len(cache) - 1, _COMPARED_SEQUENCES).astype(int).tolist():
            sequence = cache[number]
            if not len(sequence.positions):
                continue
            tokens = min(len(sequence), int(sequence.positions[0]) + 1 + _COMPARED_TOKENS, length)
            kept = sequence.positions < tokens - 1
            if not kept.any():
                continue
            ids = sequence.input_ids[:tokens]
            rows = self._rows_at_start(ids, self.k)
            differences += _differences(sequence.at(np.flatnonzero(kept)), rows)
            positions += int(kept.sum())
        store = cache.manifest.store
        allowed = tolerance + store.rounding + store.scalar_step
        if differences and not (mean := float(np.mean(differences))) <= allowed:
            raise UserError(
                f"the upstream server at {self.url} does not say what {cache.path} holds (logprobs differ by {mean:.2g} nats on "
                f"average, {allowed:.2g} at most expected): it serves another model, revision or quantisation than "
                f"{cache.manifest.teacher.model}; start it with: {self.command} , or set --tolerance higher where this is meant"
            )
        return positions

    # Serving: many requests at once, errors for the clients.

    def open(self) -> None:
        """Opens the connections; call it in the event loop that asks."""
        limits = httpx.Limits(
            max_connections=self._concurrency, max_keepalive_connections=self._concurrency
        )
        self._client = httpx.AsyncClient(
            base_url=self.url,
            headers={**self._headers, "Content-Type": "application/json"},
            timeout=httpx.Timeout(_ANSWER_SECONDS, connect=_CONNECT_SECONDS, pool=None),
            limits=limits,
        )
        self._checking, self._checked_at = asyncio.Lock(), time.monotonic()

    async def close(self) -> None:
        await self._client.aclose()

    async def score(self, ids: NDArray[np.int32], k: int) -> CachedSequence:
        """All rows of ``ids`` with heads of ``k`` entries, not rounded.

        Raises UpstreamError, and RefusedError where the server refuses this text or ``k``.
        """
        rows, fresh = await self._ask(ids, k)
        if fresh:
            await self._check_again(time.monotonic())
        return sequence_of(ids, rows, k, self.vocab_size)

    async def _ask(self, ids: NDArray[np.int32], k: int) -> tuple[Rows, bool]:
        """The rows, and whether they came over a new connection."""
        fresh = False

        async def trace(event: str, info: Any) -> None:
            nonlocal fresh
            fresh = fresh or event == "connection.connect_tcp.complete"

        content = msgspec.json.encode(self._request(ids, k))
        for attempt in range(_ATTEMPTS):
            if attempt:
                fresh = True
                await asyncio.sleep(_FIRST_DELAY * 2**attempt * random.uniform(0.5, 1.5))
            self.asked += 1
            try:
                answer = await self._client.post(
                    "/v1/completions", content=content, extensions={"trace": trace}
                )
            except httpx.HTTPError as error:
                failure = UpstreamError(
                    503, f"the upstream server at {self.url} does not answer ({one_line(error)})"
                )
                continue
            if answer.status_code == 200:
                try:
                    rows = parse_rows(answer.content, ids, k, "a request")
                except LogitcaskError as error:
                    raise UpstreamError(502, f"{self.url}: {one_line(error)}") from None
                if rows is not None:
                    return rows, fresh
                failure = UpstreamError(503, f"the upstream server at {self.url} aborts requests")
                continue
            said = f"the upstream server at {self.url} answers {answer.status_code}: {message_of(answer)}"
            if answer.status_code >= 500 or answer.status_code in (408, 429):
                failure = UpstreamError(503 if answer.status_code in (408, 429, 503) else 502, said)
                continue
            if answer.status_code in (400, 413, 422):
                raise RefusedError(400, said)
            raise UpstreamError(502, said)
        raise failure

    async def _check_again(self, since: float) -> None:
        """Sends the probe, unless that was done after ``since``."""
        async with self._checking:
            if self._checked_at >= since:
                return
            now = time.monotonic()
            assert self._probe is not None
            ids = np.array(self._probe.input_ids, np.int32)
            rows, _ = await self._ask(ids, self.k)
            difference = self._probe.difference(Probe.of(ids, rows))
            if difference > self._tolerance / 2:
                message = (
                    f"the upstream server at {self.url} says something else than at the start (logprobs differ by "
                    f"{difference:.2g} nats on average): it was restarted with another model or other settings"
                )
                logger.error("%s; start it as before, with: %s", message, self.command)
                raise UpstreamError(502, message)
            self._checked_at = now


def _differences(sequence: CachedSequence, rows: Rows) -> list[float]:
    """|cached - said| of the targets and of the heads' first entries. An id that the server does
    not list counts with the smallest logprob there, its upper limit.
    """
    ids, logprobs, _ = rows
    found: list[float] = []
    for row, position in enumerate(sequence.positions.tolist()):
        said = dict(zip(ids[position].tolist(), logprobs[position].tolist(), strict=True))
        least = min(said.values())
        found.append(abs(float(sequence.target_logprob[row]) - float(logprobs[position, 0])))
        head = zip(sequence.ids[row].tolist(), sequence.logprobs[row].tolist(), strict=True)
        found += [abs(x - said.get(i, least)) for i, x in list(head)[:_COMPARED_ENTRIES] if i >= 0]
    return found


def sequence_of(ids: NDArray[np.int32], rows: Rows, k: int, vocab_size: int) -> CachedSequence:
    """A server's rows as a sequence with every position kept."""
    mask = np.ones(len(ids), bool)
    mask[0] = False
    sequence = Sequence(name_of(ids), ids, mask)
    store = StoreSettings(
        vocab_size=vocab_size, top_k=max(k, 1), capture_k=max(k, 1), logprob_step=2.0**-8
    )
    return keep(sequence, scored_rows(rows, ColumnRequest(Capture(k), k)), store)


def name_of(ids: NDArray[np.int32]) -> str:
    """A sequence id that depends on the tokens alone."""
    return hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest()[:32]
