"""``teacher-cache serve``: caches, what is kept and the upstream server, opened and served."""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn

from logitcask.cache_format.catalog.home import using
from logitcask.cache_format.errors import UserError
from logitcask.cache_format.growing import GrowingCache, is_growing
from logitcask.cache_format.layout import MANIFEST
from logitcask.cache_format.manifest import Header, TeacherIdentity, TokenizerIdentity
from logitcask.cache_format.reader import CacheReader
from logitcask.pipeline.serve.app import MAX_BODY_BYTES, make_app
from logitcask.pipeline.serve.keeper import Keeper, header_of
from logitcask.pipeline.serve.served import ServedCache, check_one_teacher, plain_name
from logitcask.pipeline.serve.service import Service
from logitcask.pipeline.serve.upstream import Upstream
from logitcask.pipeline.teachers.server.checks import Probe

logger = logging.getLogger(__name__)

TOP_K = 64
"""Entries of kept heads where no cache says it."""

_BACKLOG = 2048

_KEEP_ALIVE_SECONDS = 300
"""For which a connection waits for its next request. A trainer may take a while for a step, and a
connection that closes just as it sends costs it an error.
"""


@dataclass(frozen=True)
class ServeOptions:
    """The options of the command; docs/serve.md explains them."""

    caches: list[str] = field(default_factory=list)
    upstream: str | None = None
    keep: Path | None = None
    teacher: str | None = None
    top_k: int | None = None
    upstream_model: str | None = None
    tolerance: float | None = None
    allow_null: bool = False
    host: str = "127.0.0.1"
    port: int = 8000
    api_key_env: str | None = None
    upstream_key_env: str | None = None
    max_body: int = MAX_BODY_BYTES


def serve(
    options: ServeOptions, *, on_ready: Callable[[uvicorn.Server, str], object] = lambda *_: None
) -> None:
    """Serves until SIGINT or SIGTERM. ``on_ready`` is called with the server and its URL.

    Raises UserError, in one line, for caches, an upstream server or an address that cannot be used.
    """
    _check(options)
    key = _key(options.api_key_env, "--api-key-env")
    with _listening(options.host, options.port) as listening, _service(options) as opened:
        service, engine = opened
        if key is None and not _is_loopback(options.host):
            logger.warning(
                "%s is reached from other machines, and everybody there may ask: set --api-key-env",
                options.host,
            )
        app = make_app(service, engine=engine, key=key, max_body=options.max_body)
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=30,
                timeout_keep_alive=_KEEP_ALIVE_SECONDS,
                backlog=_BACKLOG,
            )
        )
        host, port = listening.getsockname()[:2]
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        logger.info("serving %s at %s (Ctrl-C ends it)", service.model, url)
        on_ready(server, url)
        server.run(sockets=[listening])


def _check(options: ServeOptions) -> None:
    if not options.caches and options.upstream is None and options.keep is None:
        raise UserError("nothing to serve: name one or more caches, or --upstream and --keep")
    if options.keep is not None and options.upstream is None:
        raise UserError(
            "--keep keeps what an upstream server says, and there is none: add --upstream, or serve that cache as CACHE"
        )
    if options.keep is not None and any(
        Path(cache).resolve() == options.keep.resolve() for cache in options.caches
    ):
        raise UserError(f"{options.keep} is CACHE and --keep at once; --keep alone serves it, too")


@contextmanager
def _service(options: ServeOptions) -> Iterator[tuple[Service, str]]:
    """Everything opened and checked, and what ``/version`` says."""
    with ExitStack() as exit_:
        kept_in = [] if options.keep is None else [options.keep]
        exit_.enter_context(using([*options.caches, *kept_in]))
        caches = [ServedCache.open(path) for path in options.caches]
        headers: dict[str, Header] = {
            path: cache.manifest for path, cache in zip(options.caches, caches, strict=True)
        }
        readers = [cache.reader for cache in caches]
        kept = options.keep is not None and (options.keep / MANIFEST).exists()
        if options.keep is not None and kept:
            reader = CacheReader(options.keep)
            if is_growing(reader.manifest):
                readers.append(reader)
                headers[str(options.keep)] = reader.manifest
        dense = None
        if headers:
            check_one_teacher(headers)
            first = next(iter(headers.values()))
            teacher, tokenizer = first.teacher, first.tokenizer
            if options.teacher and plain_name(options.teacher) != plain_name(teacher.model):
                raise UserError(
                    f"--teacher is {options.teacher}, but {next(iter(headers))} is of {teacher.model}; leave --teacher out, or name other caches"
                )
        else:
            teacher, tokenizer, dense = _named_teacher(options)
        upstream, keeper = None, None
        engine = teacher.engine.removeprefix("vllm ")
        if options.upstream is not None:
            upstream = Upstream(
                _url(options.upstream),
                teacher.model,
                teacher.vocab_size,
                _top_k(options, headers, teacher.vocab_size),
                served_as=options.upstream_model,
                key=_key(options.upstream_key_env, "--upstream-key-env"),
            )
            upstream.check(readers, tolerance=options.tolerance, dense=dense)
            engine = upstream.version
        if options.keep is not None and upstream is not None:
            header = header_of(teacher, tokenizer, f"vllm {upstream.version}", upstream.k)
            growing = exit_.enter_context(GrowingCache(options.keep, header))
            keeper = Keeper(growing)
        lengths = [header.data.max_length + 1 for header in headers.values()]
        yield (
            Service(
                model=teacher.model,
                vocab_size=teacher.vocab_size,
                caches=caches,
                keeper=keeper,
                upstream=upstream,
                max_model_len=upstream.max_model_len if upstream else max(lengths),
                nulls=options.allow_null,
            ),
            engine,
        )


def _named_teacher(
    options: ServeOptions,
) -> tuple[TeacherIdentity, TokenizerIdentity, Callable[[Probe, str], None]]:
    """The teacher of ``--teacher``, where no cache says who it is, and its check."""
    if options.teacher is None:
        raise UserError(
            "no cache says who the teacher is: set --teacher to the model that the upstream server runs (a hub name or a folder)"
        )
    from logitcask.cache_format.tokenizer_identity import tokenizer_identity
    from logitcask.pipeline.config import ServerConfig, TeacherConfig
    from logitcask.pipeline.teachers.model import (
        load_tokenizer,
        local_weights,
        resolve_model,
        vocab_size,
    )
    from logitcask.pipeline.teachers.server.checks import check_against_dense

    model = resolve_model(options.teacher)
    local = model.revision is None and bool(local_weights(model))
    teacher = TeacherIdentity(
        model=model.name,
        revision=model.revision,
        weights_sha256=model.weights_sha256() if local else None,
        backend="server",
        engine="vllm",
        dtype="auto",
        route="http",
        vocab_size=vocab_size(model),
    )
    tokenizer = TokenizerIdentity(
        name=model.name, **tokenizer_identity(load_tokenizer(model), None)
    )
    config = TeacherConfig(
        model=options.teacher,
        backend="server",
        server=ServerConfig(url=options.upstream or "", tolerance=options.tolerance),
    )

    def dense(probe: Probe, command: str) -> None:
        check_against_dense(config, model, probe, command)

    return teacher, tokenizer, dense


def _top_k(options: ServeOptions, headers: dict[str, Header], vocab_size: int) -> int:
    """Entries of kept heads: as asked for, or as the kept cache has them, or the largest heads of
    the caches.
    """
    kept = headers.get(str(options.keep))
    if options.top_k is not None:
        return options.top_k
    if kept is not None:
        return kept.store.top_k
    return (
        min(vocab_size, max((header.store.top_k for header in headers.values()), default=TOP_K))
        or 1
    )


def _url(url: str) -> str:
    from logitcask.pipeline.config import ServerConfig

    if "@" in url:
        raise UserError(
            "--upstream holds a user or a password, which messages would show; give the server's key by --upstream-key-env"
        )
    try:
        return ServerConfig(url=url).url
    except ValueError as error:
        said = str(error.errors()[0]["msg"]) if hasattr(error, "errors") else str(error)
        raise UserError(f"--upstream {url}: {said.removeprefix('Value error, ')}") from None


def _key(variable: str | None, option: str) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(
            f"{option} is {variable}, but no such environment variable is set; set it to the key"
        )
    if not (key.isascii() and key.isprintable()):
        raise UserError(
            f"the environment variable {variable} ({option}) holds characters that no HTTP header can; a key is printable ASCII"
        )
    return key


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens, before anything large is opened. Raises UserError if it cannot."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except (OSError, OverflowError) as error:
        said = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"cannot listen at {host}, port {port}: {said}; choose another --host or --port"
        ) from None
    with listening:
        yield listening


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
