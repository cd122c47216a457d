"""The teacher behind HTTP: a running vLLM server with the OpenAI API, which scores token ids sent to ``/v1/completions``.

For a model that is served already, or lies on a machine that builds nothing else. The server may go away and come back:
requests are sent again until it answers, in the order of the text, and nothing of a server that has come back with
another model gets into the cache. What it is asked at the start and after every new connection is in ``server_checks``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import threading
import time
from collections import deque
from collections.abc import Coroutine, Iterable, Iterator
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, TypeVar

import httpx
import msgspec
import numpy as np
from numpy.typing import NDArray

from logitcask.cache_format.errors import UserError, one_line
from logitcask.cache_format.manifest import TeacherIdentity
from logitcask.pipeline.config import ServerConfig, TeacherConfig
from logitcask.pipeline.distribution.capture import Capture
from logitcask.pipeline.distribution.keep import not_a_number
from logitcask.pipeline.interruption import safe_point
from logitcask.pipeline.teachers.model import (
    ResolvedModel,
    check_context,
    check_rope_in_vllm,
    local_weights,
    vocab_size,
)
from logitcask.pipeline.teachers.server.checks import (
    Probe,
    check_against_dense,
    check_against_state,
    check_distributions,
    long_probe_ids,
    probe_ids,
    served_model,
    start_command,
)
from logitcask.pipeline.teachers.server.rows import parse_rows
from logitcask.pipeline.teachers.vllm.plugin import Request
from logitcask.pipeline.teachers.vllm.routes import Rows, scored_rows
from logitcask.pipeline.types import Scored, Sequence

logger = logging.getLogger(__name__)

_FIRST_DELAY = 0.5
_LONGEST_DELAY = 20.0
_CONNECT_SECONDS = 10.0
_SIGNALS_SECONDS = 0.25
_Result = TypeVar("_Result")


class ServerTeacher:
    """A model on a vLLM server. ``teacher.model`` says which, and gives the tokenizer and the size of the vocabulary.

    state: a folder where the first start writes down what the server says of a probe, and later ones compare.

    Raises UserError, in one line that says how to start the server, where it serves another model or cannot answer what
    ``capture`` asks for; and where it stays away for longer than ``teacher.server.patience``.
    """

    def __init__(
        self,
        config: TeacherConfig,
        model: ResolvedModel,
        *,
        max_length: int,
        capture: Capture,
        state: Path | None = None,
    ) -> None:
        assert config.server is not None
        check_context(model, max_length)
        self._config, self._settings, self._model, self._capture = config, config.server, model, capture
        self._max_length = max(2, max_length)
        self.vocab_size: int = vocab_size(model)
        self._request = Request.of(capture, self.vocab_size)
        self._command = start_command(config, model, self._max_length, capture, self.vocab_size)
        self._http = _Http(self._settings)
        try:
            self._http.run(self._open(state))
        except BaseException:
            self.close()
            raise

    def identity(self) -> TeacherIdentity:
        local = self._model.revision is None and bool(local_weights(self._model))
        return TeacherIdentity(
            model=self._model.name,
            revision=self._model.revision,
            weights_sha256=self._model.weights_sha256() if local else None,
            backend="server",
            engine=f"vllm {self._version}",
            dtype=self._config.dtype,
            route="http",
            vocab_size=self.vocab_size,
        )

    def score(self, sequences: Iterable[Sequence]) -> Iterator[Scored]:
        """Keeps ``concurrency`` requests with the server, and at most as many sequences again scored or read ahead.

        Before the last one is handed out the server is asked its probe once more: a proxy may hide that it was restarted.
        """
        ahead: deque[Future[Rows]] = deque()
        try:
            for sequence in sequences:
                ahead.append(self._http.submit(self._score(sequence)))
                if len(ahead) >= 2 * self._settings.concurrency:
                    yield self._read(ahead.popleft())
            while ahead:
                scored = self._read(ahead.popleft())
                if not ahead:
                    self._http.run(self._check(time.monotonic()))
                yield scored
        finally:
            for waiting in ahead:
                waiting.cancel()

    def close(self) -> None:
        """Gives up what is still being asked and closes the connections."""
        self._http.close()

    def _read(self, answer: Future[Rows]) -> Scored:
        return scored_rows(_patiently(answer), self._request)

    async def _open(self, state: Path | None) -> None:
        settings, name = self._settings, self._model.name
        self._checking, self._checked_at = asyncio.Lock(), time.monotonic()
        self._probe_ids = probe_ids(self.vocab_size, self._max_length)
        listed, _ = await self._http.ask("GET", "/v1/models")
        self._served, max_model_len = served_model(listed, self._model, settings, self._command)
        if max_model_len is not None and max_model_len < self._max_length + 1:
            raise UserError(
                f"the server at {settings.url} takes {max_model_len} tokens, data.max_length is {self._max_length} and the "
                f"engine needs room for one more; lower data.max_length, or start it with: {self._command}"
            )
        check_rope_in_vllm(self._model, max_model_len or self._max_length + 1)
        self._version = await self._ask_version()
        probe = Probe.of(self._probe_ids, await self._rows(self._probe_ids))
        check_distributions(probe, self.vocab_size, settings.url, self._command)
        long = long_probe_ids(self.vocab_size, self._max_length)
        first, second = Probe.of(long, await self._rows(long)), Probe.of(long, await self._rows(long))
        if (difference := first.difference(second)) > self._config.server_tolerance() / 2:
            raise UserError(
                f"the server at {settings.url} gives other logprobs when it reads the same text again ({difference:.2g} nats on "
                f"average), as prefix caching did in some versions; start it with: {self._command}"
            )
        check_against_dense(self._config, self._model, first, self._command)
        self._probe = probe if state is None else check_against_state(state, probe, self._config, name, self._command)
        logger.info("the server at %s serves %s with vLLM %s", settings.url, self._served, self._version)

    async def _ask_version(self) -> str:
        body, _ = await self._http.ask("GET", "/version")
        try:
            return str(msgspec.json.decode(body)["version"])
        except (msgspec.DecodeError, KeyError, TypeError):
            raise UserError(
                f"the server at {self._settings.url} does not say which vLLM it is; expected a vLLM server, started with: "
                f"{self._command}"
            ) from None

    async def _score(self, sequence: Sequence) -> Rows:
        async with self._http.slots:
            rows, fresh = await self._ask_rows(sequence.input_ids, sequence.sequence_id)
            if fresh:
                # Whoever answered may not be who answered before.
                await self._check(time.monotonic())
            return rows

    async def _rows(self, input_ids: NDArray[np.int32]) -> Rows:
        return (await self._ask_rows(input_ids, "probe"))[0]

    async def _ask_rows(self, input_ids: NDArray[np.int32], sequence_id: str) -> tuple[Rows, bool]:
        top_k = self._capture.top_k
        request = {
            "model": self._served,
            "prompt": input_ids.tolist(),
            "prompt_logprobs": top_k,
            "max_tokens": 1,
            "temperature": 0,
            "add_special_tokens": False,
        }
        first_failure: float | None = None
        while True:
            body, fresh = await self._http.ask(
                "POST", "/v1/completions", request, first_failure=first_failure, refused=self._refused
            )
            rows = parse_rows(body, input_ids, top_k, sequence_id)
            if rows is not None:
                return rows, fresh or first_failure is not None
            # A server that is being stopped cuts its answers short.
            first_failure = first_failure or time.monotonic()
            await self._http.wait("it aborted a request", first_failure, 0)

    def _refused(self, status: int, message: str) -> UserError:
        if status == 404:
            return UserError(
                f"the server at {self._settings.url} no longer serves {self._served} ({message.rstrip('.')}): it was restarted "
                f"with another model; start it as before, with: {self._command} , and run the same command again: finished "
                "shards are kept"
            )
        if "not JSON compliant" in message:
            return not_a_number(f"on the server at {self._settings.url}")
        if "max allowed" in message:
            message += f" (store.top_k is {self._capture.top_k})"
        return UserError(
            f"the server at {self._settings.url} refuses to score ({status}): {message.rstrip('.')}; "
            f"start it with: {self._command}"
        )

    async def _check(self, since: float) -> None:
        """Asks the probe again, unless that has been done after ``since``. Raises UserError for another model or version."""
        async with self._checking:
            if self._checked_at >= since:
                return
            now = time.monotonic()
            version = await self._ask_version()
            difference = self._probe.difference(Probe.of(self._probe_ids, await self._rows(self._probe_ids)))
            changed = f"is vLLM {version} now, it was {self._version}" if version != self._version else None
            if difference > self._config.server_tolerance() / 2:
                changed = f"says something else than when this build began (logprobs differ by {difference:.2g} nats on average)"
            if changed:
                raise UserError(
                    f"the server at {self._settings.url} {changed}: it was restarted with another model or other settings; "
                    f"start it as before, with: {self._command} , and run the same command again: finished shards are kept"
                )
            self._checked_at = now


class _Http:
    """Requests that outlast a server's absence. They run in an event loop of their own, in a thread beside the caller's."""

    def __init__(self, settings: ServerConfig) -> None:
        self._settings = settings
        headers = {}
        if settings.api_key_env is not None:
            key = os.environ.get(settings.api_key_env, "").strip()  # a key read from a file may end with its newline
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
            return _patiently(future)
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
        refused: Any = None,
    ) -> tuple[bytes, bool]:
        """The body of the answer, and whether it came over a new connection or after a failure.

        No connection, a broken one, no answer in time, 5xx, 408 and 429 are waited out. Any other status is final:
        ``refused(status, message)`` makes the error. Raises UserError.
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
                seconds = _CONNECT_SECONDS if isinstance(error, httpx.ConnectTimeout) else self._settings.timeout
                reason = f"no answer in {seconds:g} s"
            except httpx.TransportError as error:
                reason = one_line(error)
            else:
                if answer.status_code == 200:
                    self._is_back()
                    return answer.content, fresh
                reason = _message_of(answer)
                if answer.status_code < 500 and answer.status_code not in (408, 429):
                    raise self._final(path, answer.status_code, reason, refused)
                reason = f"{answer.status_code} {reason}"
            fresh = True
            first_failure = first_failure or time.monotonic()
            await self.wait(reason, first_failure, attempt)
            attempt += 1

    async def wait(self, reason: str, first_failure: float, attempt: int) -> None:
        """Sleeps before the next attempt. Raises UserError where the server has been away for too long."""
        url, patience = self._settings.url, self._settings.patience
        if time.monotonic() - first_failure > patience:
            raise UserError(
                f"the server at {url} has not answered for {patience:g} s ({reason}); start it and run the same command again: "
                "finished shards are kept (teacher.server.patience says how long to wait)"
            )
        if self._away_since is None:
            self._away_since = first_failure
            logger.warning("waiting for the server at %s (%s), for %g s at most", url, reason, patience)
        delay = min(_LONGEST_DELAY, _FIRST_DELAY * 2 ** min(attempt, 10)) * random.uniform(0.5, 1.5)
        await asyncio.sleep(min(delay, patience))

    def _is_back(self) -> None:
        if self._away_since is not None:
            logger.info("the server answers again, after %.0f s", time.monotonic() - self._away_since)
            self._away_since = None

    def _final(self, path: str, status: int, message: str, refused: Any) -> UserError:
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
            error: UserError = refused(status, message)
            return error
        return UserError(
            f"{url}{path} answers {status}: {message}; expected a vLLM server with the OpenAI API, teacher.server.url without /v1"
        )


def _patiently(future: Future[_Result]) -> _Result:
    """The result, whenever it comes, unless a signal asks for the end first (``logitcask.pipeline.interruption``)."""
    while not future.done():
        wait([future], timeout=_SIGNALS_SECONDS)
        safe_point()
    return future.result()


def _message_of(answer: httpx.Response) -> str:
    """The server's own words, in one line."""
    text: object = answer.text or answer.reason_phrase
    with contextlib.suppress(msgspec.DecodeError, KeyError, TypeError):
        text = msgspec.json.decode(answer.content)["error"]["message"]
    if answer.is_redirect:
        text = f"moved to {answer.headers.get('location')}"
    return " ".join(str(text).split())[:300]
