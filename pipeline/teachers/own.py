"""Teacher backends outside this project: loaded by the name in ``teacher.backend``, opened, checked,
and named in the manifest.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from inspect import Parameter, signature
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from logitcask.cache_format.errors import ConfigError, UserError
from logitcask.cache_format.manifest import TeacherIdentity
from logitcask.cache_format.runtime.extensions import TEACHER, called, code_sha256, load, yielded
from logitcask.pipeline.config import TeacherConfig
from logitcask.pipeline.distribution.capture import Capture
from logitcask.pipeline.teachers.base import Prompt, Sampling
from logitcask.pipeline.teachers.model import ResolvedModel
from logitcask.pipeline.types import Scored, Sequence

_GIVEN = ("max_length", "capture", "sampling")
_PARTS = ("vocab_size", "identity", "score", "close")
# For the config and the tokenizer of ``teacher.model``, whatever the backend.
_TRUST = "trust_remote_code"
_T = TypeVar("_T")


def backend_of(config: TeacherConfig) -> Any:
    """The class that ``teacher.backend`` names (``logitcask.pipeline.teachers.base.Backend``).
    Imports its module.

    Raises ConfigError, in one line, if it cannot be imported.
    """
    return load(TEACHER, config.backend)


def has_tokenizer(config: TeacherConfig) -> bool:
    """Whether the backend of ``config`` brings its own tokenizer, so that ``teacher.model`` need
    not be a model of transformers.
    """
    return config.has_own_backend and hasattr(backend_of(config), "open_tokenizer")


def tokenizer_of(config: TeacherConfig) -> Any:
    """The backend's own tokenizer. Raises UserError if it cannot be opened."""
    return _called(config, "open_tokenizer", lambda: backend_of(config).open_tokenizer(config))


def code_of(config: TeacherConfig) -> str | None:
    """The sha256 of the file of a backend outside this project; None for other backends, or for
    code without a file.
    """
    return code_sha256(backend_of(config)) if config.has_own_backend else None


class OwnTeacher:
    """The teacher of a backend outside this project.

    Its errors become one line, its scores are checked for number and shape, and its identity in the
    manifest has the backend's name in the config and the hash of its code.

    model: of ``teacher.model``; None for a backend with its own tokenizer.

    Raises UserError, in one line, for an option in ``engine_args`` that the backend does not have,
    if it cannot write the answers that ``sampling`` asks for, if it fails to start, and if its
    result is not a teacher.
    """

    def __init__(
        self,
        config: TeacherConfig,
        model: ResolvedModel | None,
        *,
        max_length: int,
        capture: Capture,
        sampling: Sampling | None = None,
    ) -> None:
        self._config, self._capture = config, capture
        backend, name = backend_of(config), config.backend
        options = {key: value for key, value in config.engine_args.items() if key != _TRUST}
        _check_options(name, backend, options)
        given = {"max_length": max_length, "capture": capture, **options}
        if sampling is not None:
            if not hasattr(backend, "generate"):
                raise UserError(
                    f"{name} only scores: it has no method generate; for data.generate use another teacher.backend"
                )
            given["sampling"] = sampling
        self._teacher = _called(config, "the start", lambda: backend(config, model, **given))
        missing = [part for part in _PARTS if not hasattr(self._teacher, part)]
        if missing:
            raise UserError(
                f"{name} is no teacher: it has no {', '.join(missing)}; see docs/extending.md"
            )
        self.vocab_size: int = self._teacher.vocab_size
        if has_tokenizer(config) and self.vocab_size < (ids := len(tokenizer_of(config))):
            raise UserError(
                f"{name} predicts {self.vocab_size} ids (vocab_size), but its tokenizer has {ids}; expected as many or more"
            )

    def identity(self) -> TeacherIdentity:
        name = self._config.backend
        identity = _called(self._config, "identity", self._teacher.identity)
        if not isinstance(identity, TeacherIdentity) or identity.vocab_size != self.vocab_size:
            raise UserError(
                f"{name}: identity returned {identity!r}; expected a TeacherIdentity with vocab_size {self.vocab_size}"
            )
        code = code_of(self._config)
        engine = identity.engine if code is None else f"{identity.engine}, code {code[:16]}"
        return identity.model_copy(update={"backend": name, "engine": engine})

    def score(self, sequences: Iterable[Sequence]) -> Iterator[Scored]:
        name, ahead = self._config.backend, deque[Sequence]()

        def read() -> Iterator[Sequence]:
            for sequence in sequences:
                ahead.append(sequence)
                yield sequence

        given = read()
        for scored in self._yielded("score", lambda: self._teacher.score(given)):
            if not ahead:
                raise UserError(
                    f"{name}: score yields a result before it has read a sequence for it; expected one for each, in order"
                )
            self._check(scored, ahead.popleft())
            yield scored
        if ahead or next(given, None) is not None:
            raise UserError(
                f"{name}: score ended without a result for sequence {ahead[0].sequence_id!r}; expected one for each, in order"
            )

    def generate(self, prompts: Iterable[Prompt]) -> Iterator[NDArray[np.int32]]:
        return self._yielded("generate", lambda: self._teacher.generate(prompts))

    def close(self) -> None:
        _called(self._config, "close", self._teacher.close)

    def _yielded(self, what: str, start: Callable[[], Iterable[_T]]) -> Iterator[_T]:
        return yielded(self._config.backend, what, backend_of(self._config), start)

    def _check(self, scored: Any, sequence: Sequence) -> None:
        """Raises UserError unless all arrays have the shapes that ``Scored`` and the capture ask
        for.
        """
        name, n = self._config.backend, len(sequence.input_ids)
        if not isinstance(scored, Scored):
            raise UserError(f"{name}: score yields {type(scored).__name__}; expected Scored")
        rows = n - 1 if scored.positions is None else len(scored.positions)
        capture, draws = self._capture, scored.draws
        drawn = (rows, capture.sets, capture.samples) if capture.samples else None
        expected: dict[str, tuple[int, ...] | None] = {
            "ids": (rows, capture.top_k),
            "logprobs": (rows, capture.top_k),
            "target_ids": (n - 1,),
            "target_logprob": (rows,),
            "target_rank": (rows,),
            "head_size": (rows,),
            "samples": drawn,
            "sample_logprobs": drawn,
            "entropy": (rows,) if drawn else None,
        }
        arrays = scored.arrays()
        for part, shape in expected.items():
            found = np.shape(arrays[part])
            if shape is not None and found != shape:
                raise UserError(
                    f"{name}: {part} of sequence {sequence.sequence_id!r} has shape {found}; expected {shape}"
                )
        if (
            draws.head_size.size
            and not 0 <= draws.head_size.min() <= draws.head_size.max() <= capture.top_k
        ):
            raise UserError(
                f"{name}: head_size of sequence {sequence.sequence_id!r} is not between 0 and {capture.top_k}"
            )


def _check_options(name: str, backend: Any, options: dict[str, object]) -> None:
    """Raises ConfigError for an option that is no keyword-only argument of ``backend``."""
    arguments = signature(backend).parameters.values()
    if any(each.kind is Parameter.VAR_KEYWORD for each in arguments):
        return
    known = [each.name for each in arguments if each.kind is Parameter.KEYWORD_ONLY]
    known = [each for each in known if each not in _GIVEN]
    for option in options:
        if option not in known:
            raise ConfigError(
                f"teacher.engine_args: {name} has no option {option!r}; it has {', '.join(known) or 'none'}"
            )


def _called(config: TeacherConfig, what: str, call: Callable[[], _T]) -> _T:
    return called(config.backend, what, backend_of(config), call)
