"""HTTP to a server that may stop and start again: requests are sent again until it answers.

The limit of the wait is ``teacher.server.patience``. Errors name the server and the remedy.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, wait
from typing import Any, TypeVar

import httpx
import msgspec

from logitcask.cache_format.errors import UserError, one_line
from logitcask.cache_format.runtime.interruption import safe_point
from logitcask.pipeline.config import ServerConfig

logger = logging.getLogger(__name__)

_FIRST_DELAY = 0.5
_LONGEST_DELAY = 20.0
_CONNECT_SECONDS = 10.0
_SIGNALS_SECONDS = 0.25
_Result = TypeVar("_Result")
Refused = Callable[[int, str], UserError]
"""From the status and the message of an answer that is final to the error that it means."""


class PatientClient:
    """Requests that wait for an absent server.

    They run in their own event loop, in a thread beside the caller's.
    """

    def __init__(self, settings: ServerConfig) -> None:
        self._settings = settings
        headers = {}
        if settings.api_key_env is not None:
            # A key read from a file may end with its newline.
            key = os.environ.get(settings.api_key_env, "").strip()
            if not key:
                raise UserError(
                    f"teacher.server.api_key_env is {settings.api_key_env}, but no such environment variable is set; "
                    "set it to the server's key"
                )
            if not (key.isascii() and key.isprintable()):
                raise UserError(
                    f"the environment variable {settings.api_key_env} (teacher.server.api_key_env) holds characters that no "
                    "HTTP header can; a key is printable ASCII: set it to the server's key"
                )
            headers["Authorization"] = f"Bearer {key}"
        connections = settings.concurrency + 1
        self._client = httpx.AsyncClient(
            base_url=settings.url,
            headers=headers,
            timeout=httpx.Timeout(settings.timeout, connect=_CONNECT_SECONDS, pool=None),
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
        )
        self.slots = asyncio.Semaphore(settings.concurrency)
        self._away_since: float | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="server", daemon=True)
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, _Result]) -> Future[_Result]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        future = self.submit(work)
        try:
            return patiently(future)
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        if self._loop.is_closed():
            return

        async def stop() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            await self._client.aclose()

        with contextlib.suppress(Exception):
            self.submit(stop()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def ask(
        self,
        method: str,
        path: str,
        content: object = None,
        *,
        first_failure: float | None = None,
        refused: Refused | None = None,
    ) -> tuple[bytes, bool]:
        """The body of the answer, and whether it came over a new connection or after a failure.

        After no connection, a broken one, no answer in time, 5xx, 408 and 429, the request is sent
        again. Any other status is final: ``refused(status, message)`` makes the error. Raises
        UserError.
        """
        fresh = first_failure is not None

        async def trace(event: str, info: Any) -> None:
            nonlocal fresh
            fresh = fresh or event == "connection.connect_tcp.complete"

        attempt = 0
        while True:
            try:
                answer = await self._client.request(
                    method,
                    path,
                    content=None if content is None else msgspec.json.encode(content),
                    headers=None if content is None else {"Content-Type": "application/json"},
                    extensions={"trace": trace},
                )
            except httpx.TimeoutException as error:
                seconds = (
                    _CONNECT_SECONDS
                    if isinstance(error, httpx.ConnectTimeout)
                    else self._settings.timeout
                )
                reason = f"no answer in {seconds:g} s"
            except httpx.TransportError as error:
                reason = one_line(error)
            else:
                if answer.status_code == 200:
                    self._is_back()
                    return answer.content, fresh
                reason = message_of(answer)
                if answer.status_code < 500 and answer.status_code not in (408, 429):
                    raise self._final(path, answer.status_code, reason, refused)
                reason = f"{answer.status_code} {reason}"
            fresh = True
            first_failure = first_failure or time.monotonic()
            await self.wait(reason, first_failure, attempt)
            attempt += 1

    async def wait(self, reason: str, first_failure: float, attempt: int) -> None:
        """Sleeps before the next attempt. Raises UserError if the server was absent too long."""
        url, patience = self._settings.url, self._settings.patience
        if time.monotonic() - first_failure > patience:
            raise UserError(
                f"the server at {url} has not answered for {patience:g} s ({reason}); start it and run the same command again: "
                "finished shards are kept (teacher.server.patience says how long to wait)"
            )
        if self._away_since is None:
            self._away_since = first_failure
            logger.warning(
                "waiting for the server at %s (%s), for %g s at most", url, reason, patience
            )
        delay = min(_LONGEST_DELAY, _FIRST_DELAY * 2 ** min(attempt, 10)) * random.uniform(0.5, 1.5)
        await asyncio.sleep(min(delay, patience))

    def _is_back(self) -> None:
        if self._away_since is not None:
            logger.info(
                "the server answers again, after %.0f s", time.monotonic() - self._away_since
            )
            self._away_since = None

    def _final(self, path: str, status: int, message: str, refused: Refused | None) -> UserError:
        url = self._settings.url
        if status in (401, 403):
            has = self._settings.api_key_env
            what = (
                f"the key in {has} is not its key"
                if has
                else "set teacher.server.api_key_env to the variable with its key"
            )
            return UserError(f"the server at {url} wants another API key ({status}); {what}")
        if refused is not None:
            return refused(status, message)
        return UserError(
            f"{url}{path} answers {status}: {message}; expected a vLLM server with the OpenAI API, teacher.server.url without /v1"
        )


def patiently(future: Future[_Result]) -> _Result:
    """Waits for the result without a time limit, unless a signal arrives (``interruption``)."""
    while not future.done():
        wait([future], timeout=_SIGNALS_SECONDS)
        safe_point()
    return future.result()


def message_of(answer: httpx.Response) -> str:
    """The server's own words, in one line."""
    text: object = answer.text or answer.reason_phrase
    with contextlib.suppress(msgspec.DecodeError, KeyError, TypeError):
        text = msgspec.json.decode(answer.content)["error"]["message"]
    if answer.is_redirect:
        text = f"moved to {answer.headers.get('location')}"
    return " ".join(str(text).split())[:300]
