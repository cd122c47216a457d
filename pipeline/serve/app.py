"""The HTTP server: vLLM's paths and forms of answers over a ``Service``."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib.metadata import version

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from logitcask.cache_format.errors import LogitcaskError, one_line
from logitcask.pipeline.serve.metrics import Metrics
from logitcask.pipeline.serve.request import (
    MAX_ENTRIES,
    RefusedError,
    Request,
    parse_request,
)
from logitcask.pipeline.serve.room import Room
from logitcask.pipeline.serve.service import Service
from logitcask.pipeline.serve.upstream import UpstreamError

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 32 << 20
"""Of a request: four million ids."""

MAX_ENTRIES_AT_ONCE = 2 * MAX_ENTRIES
"""Of the answers to all clients that are being made at one time; other requests wait."""

_LOG_SECONDS = 60.0
_COMMIT_SECONDS = 1.0
_NO_CHATS = (
    "a chat is text, which a template here might render differently from the trainer's; post token ids to /v1/completions, with "
    "max_tokens 1 and prompt_logprobs K"
)
_NAMES = {400: "BadRequestError", 401: "AuthenticationError", 404: "NotFoundError"}

Endpoint = Callable[[HttpRequest], Awaitable[Response]]


def make_app(
    service: Service, *, engine: str, key: str | None = None, max_body: int = MAX_BODY_BYTES
) -> Starlette:
    """The ASGI app.

    engine: what ``/version`` says.
    key:    the API key that requests to ``/v1`` must have, as a bearer token.
    """
    metrics, room = Metrics(service), Room(MAX_ENTRIES_AT_ONCE)

    async def health(request: HttpRequest) -> Response:
        return Response()

    async def version_(request: HttpRequest) -> Response:
        return _json({"version": engine, "logitcask": version("logitcask")})

    async def metrics_(request: HttpRequest) -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(request: HttpRequest) -> Response:
        card = {
            "id": service.model,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "logitcask",
            "root": service.model,
            "parent": None,
            "max_model_len": service.max_model_len,
        }
        return _json({"object": "list", "data": [card]})

    async def completions(request: HttpRequest) -> Response:
        try:
            body = await _body(request, max_body)
            start = time.monotonic()
            asked = parse_request(body, service.vocab_size)
            del body
            async with room.hold(asked.entries):
                response = await _complete(service, metrics, asked)
            metrics.took(time.monotonic() - start)
        except RefusedError as error:
            response = _error(error.status, str(error), error.field)
        except UpstreamError as error:
            logger.warning("%s", error)
            response = _error(error.status, str(error))
        except LogitcaskError as error:
            logger.error("%s", one_line(error))
            response = _error(500, one_line(error))
        except ClientDisconnect:
            response = Response(status_code=499)
        except Exception:
            logger.exception("a request failed; this is an error of logitcask itself")
            response = _error(500, "an error of this server, of which its log says more")
        metrics.requests.labels(response.status_code).inc()
        return response

    async def chats(request: HttpRequest) -> Response:
        metrics.requests.labels(400).inc()
        return _error(400, _NO_CHATS, "messages")

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        if service.upstream is not None:
            service.upstream.open()
        tasks = [
            asyncio.create_task(_every(_COMMIT_SECONDS, service.commit_if_due)),
            asyncio.create_task(_every(_LOG_SECONDS, _in_loop(metrics.log))),
        ]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await service.close()
            metrics.log()

    def guarded(endpoint: Endpoint) -> Endpoint:
        async def checked(request: HttpRequest) -> Response:
            if key is not None and not _has_key(request, key):
                return _error(401, "Unauthorized")
            return await endpoint(request)

        return checked

    return Starlette(
        routes=[
            Route("/health", health),
            Route("/ping", health),
            Route("/version", version_),
            Route("/metrics", metrics_),
            Route("/v1/models", guarded(models)),
            Route("/v1/completions", guarded(completions), methods=["POST"]),
            Route("/v1/chat/completions", guarded(chats), methods=["POST"]),
        ],
        exception_handlers={HTTPException: _http_error},  # type: ignore[dict-item]
        lifespan=lifespan,
    )


async def _complete(service: Service, metrics: Metrics, asked: Request) -> Response:
    if not service.knows(asked.model):
        raise RefusedError(
            404,
            f"The model `{asked.model}` does not exist; this server has {service.model}",
            "model",
        )
    scoring = [asyncio.create_task(service.score(ids, asked.k)) for ids in asked.prompts]
    try:
        scored = await asyncio.gather(*scoring)
    finally:
        for task in scoring:
            task.cancel()
    choices: list[dict[str, object]] = []
    for index, (ids, (rows, source)) in enumerate(zip(asked.prompts, scored, strict=True)):
        metrics.answered(source, len(ids))
        choices.append(
            {
                "index": index,
                "text": "",
                "logprobs": None,
                "finish_reason": "length",
                "stop_reason": None,
                "token_ids": [] if asked.ids else None,
                "prompt_logprobs": msgspec.Raw(rows),
                "prompt_token_ids": ids.tolist() if asked.ids else None,
            }
        )
    tokens = sum(map(len, asked.prompts))
    return _json(
        {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.model,
            "choices": choices,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0},
        }
    )


async def _body(request: HttpRequest, limit: int) -> bytes:
    """The body, of which no more than ``limit`` bytes are read."""
    too_large = RefusedError(
        413, f"the body is larger than {limit:,} bytes; send fewer prompts at once"
    )
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limit:
        raise too_large
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise too_large
        parts.append(part)
    return b"".join(parts)


async def _every(seconds: float, action: Callable[[], Awaitable[None]]) -> None:
    while True:
        await asyncio.sleep(seconds)
        try:
            await action()
        except Exception:  # the next time may go well
            logger.exception("this is an error of logitcask itself")


def _in_loop(action: Callable[[], None]) -> Callable[[], Awaitable[None]]:
    async def run() -> None:
        action()

    return run


def _has_key(request: HttpRequest, key: str) -> bool:
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(
        given.encode("utf-8", "surrogateescape"), key.encode()
    )


async def _http_error(request: HttpRequest, error: HTTPException) -> Response:
    return _error(error.status_code, error.detail)


def _error(status: int, message: str, field: str | None = None) -> Response:
    kind = _NAMES.get(status, "BadRequestError" if status < 500 else "InternalServerError")
    return _json(
        {"error": {"message": message, "type": kind, "param": field, "code": status}}, status
    )


def _json(content: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(content), status, media_type="application/json")
