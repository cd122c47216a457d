"""The teacher behind HTTP: a running vLLM server, which scores ids sent to ``/v1/completions``.

It is for a model that is already served, or that is on a machine where nothing else may run. The
server may stop and start again: requests are sent again until it answers (``http``), in the order
of the text. Results of a server that has started with another model never enter the cache
(``checks``).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from logitcask.cache_format.errors import UserError
from logitcask.cache_format.manifest import TeacherIdentity
from logitcask.pipeline.config import TeacherConfig
from logitcask.pipeline.distribution.capture import Capture
from logitcask.pipeline.distribution.keep import not_a_number
from logitcask.pipeline.teachers.model import (
    ResolvedModel,
    check_context,
    check_rope_in_vllm,
    local_weights,
    vocab_size,
)
from logitcask.pipeline.teachers.rows import ColumnRequest, Rows, scored_rows
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
from logitcask.pipeline.teachers.server.http import PatientClient, patiently
from logitcask.pipeline.teachers.server.rows import parse_rows
from logitcask.pipeline.types import Scored, Sequence

logger = logging.getLogger(__name__)


class ServerTeacher:
    """A model on a vLLM server; ``teacher.model`` gives its name, tokenizer and vocabulary.

    state: a folder in which the first start stores the server's scores of a probe, for later starts
    to compare.

    Raises UserError, in one line with the command that starts the server, if it serves another
    model or cannot fulfil ``capture``, and if it does not answer for longer than
    ``teacher.server.patience``.
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
        self._config, self._settings, self._model, self._capture = (
            config,
            config.server,
            model,
            capture,
        )
        self._max_length = max(2, max_length)
        self.vocab_size: int = vocab_size(model)
        self._request = ColumnRequest.of(capture, self.vocab_size)
        self._command = start_command(config, model, self._max_length, capture, self.vocab_size)
        self._http = PatientClient(self._settings)
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
        """Keeps ``concurrency`` requests at the server, and at most as many sequences again scored
        or read ahead.

        Before the last result is returned, the probe is sent again, because a proxy may hide a
        restart of the server.
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
        """Cancels open requests and closes the connections."""
        self._http.close()

    def _read(self, answer: Future[Rows]) -> Scored:
        return scored_rows(patiently(answer), self._request)

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
        first, second = (
            Probe.of(long, await self._rows(long)),
            Probe.of(long, await self._rows(long)),
        )
        if (difference := first.difference(second)) > self._config.server_tolerance() / 2:
            raise UserError(
                f"the server at {settings.url} gives other logprobs when it reads the same text again ({difference:.2g} nats on "
                f"average), as prefix caching did in some versions; start it with: {self._command}"
            )
        check_against_dense(self._config, self._model, first, self._command)
        self._probe = (
            probe
            if state is None
            else check_against_state(state, probe, self._config, name, self._command)
        )
        logger.info(
            "the server at %s serves %s with vLLM %s", settings.url, self._served, self._version
        )

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
                # Another server may have answered than before.
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
                "POST",
                "/v1/completions",
                request,
                first_failure=first_failure,
                refused=self._refused,
            )
            rows = parse_rows(body, input_ids, top_k, sequence_id)
            if rows is not None:
                return rows, fresh or first_failure is not None
            # A server that is stopping truncates its answers.
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
        """Sends the probe again, unless that was done after ``since``. Raises UserError for another
        model or version.
        """
        async with self._checking:
            if self._checked_at >= since:
                return
            now = time.monotonic()
            version = await self._ask_version()
            difference = self._probe.difference(
                Probe.of(self._probe_ids, await self._rows(self._probe_ids))
            )
            changed = (
                f"is vLLM {version} now, it was {self._version}"
                if version != self._version
                else None
            )
            if difference > self._config.server_tolerance() / 2:
                changed = f"says something else than when this build began (logprobs differ by {difference:.2g} nats on average)"
            if changed:
                raise UserError(
                    f"the server at {self._settings.url} {changed}: it was restarted with another model or other settings; "
                    f"start it as before, with: {self._command} , and run the same command again: finished shards are kept"
                )
            self._checked_at = now
