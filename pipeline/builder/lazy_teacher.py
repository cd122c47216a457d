"""The teacher of a build, or the writer of its text. Its engine starts at the first use."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Self

from logitcask.pipeline.builder.inputs import Inputs
from logitcask.pipeline.config import BuildConfig
from logitcask.pipeline.teachers.base import Sampling, Teacher
from logitcask.pipeline.teachers.open import open_teacher

log = logging.getLogger(__name__)


class LazyTeacher:
    """The teacher, started at its first use. The same engine writes answers and scores them.

    writing_seconds: time in which the build's answers were written, by whichever model.
    """

    def __init__(
        self, config: BuildConfig, inputs: Inputs, build_dir: Path, *, who: str = "teacher"
    ) -> None:
        self._config, self._inputs, self._build_dir, self._who = config, inputs, build_dir, who
        self._teacher: Teacher | None = None
        self.writing_seconds = 0.0

    def start(self, sampling: Sampling | None = None) -> Teacher:
        """The started teacher. If this call starts it with ``sampling``, it can also write text."""
        if self._teacher is None:
            config = self._config
            log.info(
                "starting the %s: %s with %s",
                self._who,
                config.teacher.model if self._who == "teacher" else config.writer,
                config.teacher.backend,
            )
            self._teacher = open_teacher(
                config.teacher,
                self._inputs.model,
                max_length=config.data.max_length,
                capture=config.capture(),
                sampling=sampling,
                state=self._build_dir,
            )
        return self._teacher

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the teacher's memory and devices for later steps."""
        if self._teacher is not None:
            self._teacher.close()
            self._teacher = None
