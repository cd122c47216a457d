"""The request of a build: the part of its config that decides the content of the cache.

It is stored with the cache, and compared when a build is resumed or a cache reused.
"""

from __future__ import annotations

import hashlib
import logging
from datetime import date
from typing import Any, cast

from logitcask.cache_format.redact import without_secrets
from logitcask.pipeline.config import BuildConfig
from logitcask.pipeline.identity import TextReader
from logitcask.pipeline.teachers.own import code_of as teacher_code
from logitcask.pipeline.text.own_sources import code_of as source_code

log = logging.getLogger(__name__)

_NOT_CONTENT: dict[str, Any] = {
    "output": True,
    "log": True,
    "audit": True,
    "trusted_keys": True,
    "scale": True,
    "data": {
        "on_bad_rows": True,  # builds that end have the same rows, whichever it is
        "generate": {"writer_engine": {"tensor_parallel_size"}},
    },
    "teacher": {"route", "batch_tokens", "tensor_parallel_size", "server"},
    "store": {"shard_tokens", "compression_level"},
}

_CODE = "code_sha256"
"""The key of the hashes of code outside this project, by the names in the config."""


def request_of(config: BuildConfig) -> dict[str, Any]:
    """The fields of a config that decide the cache's content; a template file by its content, and
    teacher backends and sources outside this project by their code, too.
    """
    request = _fields(config)
    code = {config.teacher.backend: teacher_code(config.teacher)}
    code |= {part.path: source_code(part) for part in config.data.parts()}
    code = {name: sha256 for name, sha256 in code.items() if sha256 is not None}
    return {**request, _CODE: code} if code else request


def _fields(config: BuildConfig) -> dict[str, Any]:
    request = config.model_dump(mode="json", exclude=_NOT_CONTENT)
    generate = request["data"]["generate"]
    engine = None if generate is None else generate["writer_engine"]
    if engine is not None and all(value is None for value in engine.values()):
        generate["writer_engine"] = None
    template = config.data.chat_template
    if template is not None and template.is_file():
        request["data"]["chat_template"] = hashlib.sha256(template.read_bytes()).hexdigest()
    # It is stored in the manifest.
    return cast("dict[str, Any]", without_secrets(request))


def dated(config: BuildConfig, written: dict[str, Any]) -> BuildConfig:
    """The config with the template's date of an earlier request, unless it has its own."""
    day = written.get("data", {}).get("template_date")
    if day is None or config.data.template_date is not None:
        return config
    data = config.data.model_copy(update={"template_date": date.fromisoformat(day)})
    return config.model_copy(update={"data": data})


def as_of_today(request: dict[str, Any], config: BuildConfig) -> dict[str, Any]:
    """An earlier request with the defaults of fields that this version has added, or as it is if
    it no longer parses.
    """
    code = {_CODE: request[_CODE]} if _CODE in request else {}
    if not isinstance(request.get("teacher"), dict):  # not of a build
        return request
    try:
        # The server is not part of a request.
        teacher = {**request["teacher"], "server": config.teacher.server}
        fields = {name: value for name, value in request.items() if name not in code}
        return (
            _fields(
                BuildConfig.model_validate({**fields, "teacher": teacher, "output": config.output})
            )
            | code
        )
    except ValueError:
        return request


def with_date(request: dict[str, Any], text: TextReader) -> dict[str, Any]:
    """The request with the date that the chat template writes, if any, for later runs to use."""
    if text.template is None or text.template.date is None:
        if request["data"].get("template_date") is not None:
            log.warning(
                "data.template_date changes nothing: the chat template writes no date of today"
            )
        return request
    day = text.template.date.isoformat()
    log.info(
        "the chat template writes today's date: it is %s for all of this cache (data.template_date)",
        day,
    )
    return {**request, "data": {**request["data"], "template_date": day}}
