"""The checks of a server before its results are used, and the command that starts a suitable one.

A name does not prove the identity of a model. The server's scores of a probe are therefore
compared: at the first start with transformers' forward pass, if the weights are on this machine,
and later with the scores of that start.
"""

from __future__ import annotations

import json
import logging
import shlex
from pathlib import Path
from typing import Any, Self

import msgspec
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from logitcask.cache_format.durable import load_state, write_durably, writing_to
from logitcask.cache_format.errors import UserError
from logitcask.pipeline.config import ServerConfig, TeacherConfig
from logitcask.pipeline.distribution.capture import Capture
from logitcask.pipeline.teachers.model import (
    ResolvedModel,
    context_limit,
    is_quantised,
    local_weights,
)
from logitcask.pipeline.teachers.rows import Rows

logger = logging.getLogger(__name__)

PROBE_FILE = "probe.json"
_PROBE_TOKENS = 32
# Longer than a block of any engine's prefix cache (128 tokens on a CPU).
_LONG_PROBE_TOKENS = 192
_STRIDE = 7919
_LARGEST_TO_COMPARE = 2 << 30
_LEAST_LOGPROB = -100.0


class Probe(BaseModel):
    """A short text and a server's scores of it, small enough for a build's state."""

    model_config = ConfigDict(frozen=True)

    input_ids: list[int]
    target_logprob: list[float]
    ids: list[list[int]]
    logprobs: list[list[float]]

    @classmethod
    def of(cls, input_ids: NDArray[np.int32], rows: Rows) -> Self:
        """``rows`` with logprobs in thousandths of a nat."""

        def rounded(values: NDArray[np.float32]) -> Any:
            return np.maximum(values, _LEAST_LOGPROB).astype(np.float64).round(3).tolist()

        ids, logprobs, _ = rows
        return cls(
            input_ids=input_ids.tolist(),
            target_logprob=rounded(logprobs[:, 0]),
            ids=ids[:, 1:].tolist(),
            logprobs=rounded(logprobs[:, 1:]),
        )

    def difference(self, other: Probe) -> float:
        """Mean distance of the logprobs in nats, over targets and heads; infinite for another text.

        An id that the other head lacks counts with the smallest logprob there, its upper limit.
        """
        if self.input_ids != other.input_ids:
            return float("inf")
        distances = np.abs(np.subtract(self.target_logprob, other.target_logprob)).tolist()
        for ids, logprobs, theirs, their_logprobs in zip(
            self.ids, self.logprobs, other.ids, other.logprobs, strict=True
        ):
            known = dict(zip(theirs, their_logprobs, strict=True))
            distances += [
                abs(x - known.get(i, min(their_logprobs)))
                for i, x in zip(ids, logprobs, strict=True)
            ]
        return float(np.mean(distances))

    def difference_from_dense(self, dense: NDArray[np.float32]) -> float:
        """The same, from whole distributions: float32[n-1, V], nats."""
        dense = np.maximum(dense, _LEAST_LOGPROB)
        columns = np.column_stack([np.array(self.input_ids[1:]), np.array(self.ids)])
        said = np.column_stack([np.array(self.target_logprob), np.array(self.logprobs)])
        return float(np.abs(np.take_along_axis(dense, columns, axis=1) - said).mean())


def probe_ids(vocab_size: int, max_length: int) -> NDArray[np.int32]:
    """int32[n]: ids from all over the vocabulary."""
    return (np.arange(min(_PROBE_TOKENS, max_length)) * _STRIDE % vocab_size).astype(np.int32)


def long_probe_ids(vocab_size: int, max_length: int) -> NDArray[np.int32]:
    """int32[n]: other ids, enough for a block of a prefix cache if the server accepts so many."""
    return ((1 + np.arange(min(_LONG_PROBE_TOKENS, max_length))) * _STRIDE % vocab_size).astype(
        np.int32
    )


def start_command(
    config: TeacherConfig, model: ResolvedModel, max_length: int, capture: Capture, vocab_size: int
) -> str:
    """The command that starts a server which can score ``max_length`` tokens for ``capture``."""
    room = max_length + 1
    command = ["vllm", "serve", model.location]
    if model.revision is not None:
        command += ["--revision", model.revision]
    if model.trust_remote_code:
        command += ["--trust-remote-code"]
    if config.server is not None and config.server.model is not None:
        command += ["--served-model-name", config.server.model]
    command += ["--dtype", config.dtype, "--max-model-len", str(room)]
    command += [
        "--max-logprobs",
        str(min(capture.top_k, vocab_size)),
        "--logprobs-mode",
        "raw_logprobs",
    ]
    command += ["--no-enable-prefix-caching", "--skip-tokenizer-init"]
    overrides: dict[str, Any] = {}
    if context_limit(model) == max_length:
        # The sampled token is never read, so a prompt may fill the model's context. This field
        # allows it.
        overrides["model_max_length"] = room
    if config.dtype != "float32" and not is_quantised(model):
        overrides["head_dtype"] = "float32"
    if overrides:
        command += ["--hf-overrides", json.dumps(overrides)]
    return shlex.join(command)


class _Card(msgspec.Struct):
    id: str
    root: str | None = None
    max_model_len: int | None = None


class _Cards(msgspec.Struct):
    data: list[_Card]


def served_model(
    listed: bytes, model: ResolvedModel, settings: ServerConfig, command: str
) -> tuple[str, int | None]:
    """The server's name for the model, and its largest number of tokens, from ``/v1/models``.

    Without ``teacher.server.model`` the name, or the path that the server has loaded, must be
    ``teacher.model``'s.
    """
    try:
        cards = msgspec.json.decode(listed, type=_Cards).data
    except (msgspec.DecodeError, msgspec.ValidationError):
        raise UserError(
            f"{settings.url}/v1/models is not a list of models; expected a vLLM server with the OpenAI API"
        ) from None
    if settings.model is not None:
        found = [card for card in cards if card.id == settings.model]
    else:
        names = {_plain(model.name), _plain(model.location)}
        found = [card for card in cards if names & {_plain(card.id), _plain(card.root or card.id)}]
    if not found:
        there = ", ".join(card.id for card in cards) or "nothing"
        wanted = settings.model or model.name
        raise UserError(
            f"the server at {settings.url} serves {there}, not {wanted}; start it with: {command} , or set "
            f"teacher.server.model to the name under which it serves {model.name}"
        )
    return found[0].id, found[0].max_model_len


def _plain(name: str) -> str:
    """The last part of a hub name or a path, which does not depend on the model's place."""
    return name.rstrip("/").rsplit("/", 1)[-1].lower()


def check_distributions(probe: Probe, vocab_size: int, url: str, command: str) -> None:
    """Raises UserError if the rows cannot be heads of distributions over ``vocab_size`` ids.

    The mass of a head is at most 1. No id outside the head is more probable than its last entry, so
    its mass is at least 1 - (V - k) p_k. Logits, and logprobs after temperature or truncation, fail
    one of these checks.
    """
    heads = np.exp(np.minimum(np.array(probe.logprobs), 50.0))
    mass = heads.sum(axis=1)
    most = mass + (vocab_size - heads.shape[1]) * heads[:, -1]
    if (mass > 1.01).any() or (most < 0.99).any():
        raise UserError(
            f"the server at {url} does not send logprobs of whole distributions (a head has mass {mass.max():.3g}); "
            f"start it with: {command}"
        )


def check_against_dense(
    config: TeacherConfig, model: ResolvedModel, probe: Probe, command: str
) -> None:
    """Compares with transformers' forward pass of ``teacher.model`` on this machine's CPU, if
    ``teacher.server.compare`` asks for it.

    Raises UserError if they differ by more than ``teacher.server.tolerance``, or if required
    weights are missing.
    """
    settings = config.server
    assert settings is not None
    if settings.compare == "never":
        return
    files = local_weights(model)
    size = sum(file.stat().st_size for file in files)
    if settings.compare == "auto" and (not files or size > _LARGEST_TO_COMPARE):
        why = f"they take {size / 1e9:.0f} GB" if files else "they are not on this machine"
        logger.info(
            "what the server says is not compared with the weights of %s: %s", model.name, why
        )
        return
    if not files:
        raise UserError(
            f"teacher.server.compare is always, but the weights of {model.name} are not on this machine; set auto or never"
        )
    from logitcask.pipeline.teachers.transformers import TransformersTeacher

    local = TeacherConfig(model=config.model, backend="transformers", dtype="float32")
    dense = TransformersTeacher(
        local, model, max_length=len(probe.input_ids), capture=Capture(1), device="cpu"
    )
    try:
        difference = probe.difference_from_dense(
            dense.dense_logprobs(np.array(probe.input_ids, np.int32))
        )
    finally:
        dense.close()
    if not difference <= config.server_tolerance():
        raise UserError(
            f"the server at {settings.url} does not say what {model.name} says (logprobs differ by {difference:.2g} nats on "
            f"average, {config.server_tolerance():g} at most expected): it serves another model, revision or quantisation; "
            f"start it with: {command} , or set teacher.server.tolerance higher where this is meant"
        )


def check_against_state(
    state: Path, probe: Probe, config: TeacherConfig, name: str, command: str
) -> Probe:
    """The probe that an earlier start of this build has written to ``state``, or this probe, which
    is then written.

    Raises UserError if they differ.
    """
    file = state / PROBE_FILE
    if not file.exists():
        with writing_to(state):
            write_durably(file, probe.model_dump_json())
        return probe
    first = load_state(Probe, file)
    difference = first.difference(probe)
    if difference > config.server_tolerance() / 2:
        assert config.server is not None
        raise UserError(
            f"the server at {config.server.url} says something else than when this build began (logprobs differ by "
            f"{difference:.2g} nats on average): it serves another model than {name} did then, or with other settings; "
            f"start it as before, with: {command} , or begin afresh with --restart"
        )
    return first
