"""The report of a run that is going on."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from logitcask.cache_format.redact import without_secrets
from logitcask.train.distributed import on_main
from logitcask.train.evaluation.answers import Answer
from logitcask.train.examination import Examination, before_and_now
from logitcask.train.output.held_out_file import held_out_values
from logitcask.train.output.metrics_file import RunMetrics
from logitcask.train.output.report import Running, write_report
from logitcask.train.preparation import Parts


class Watching:
    """The report of a run that is going on.

    described: the content of metrics.json from metrics and answers.
    """

    def __init__(
        self,
        examination: Examination,
        parts: Parts,
        before: dict[str, Any],
        described: Callable[[dict[str, float], list[Answer]], RunMetrics],
        output: Path,
    ) -> None:
        self._examination, self._parts, self._before = examination, parts, before
        self._described, self._output = described, output

    def write(self) -> None:
        """Writes the page of the newest evaluation, or of the student before its first step."""
        measured, state = self._parts.trainer.measured, self._parts.trainer.state
        after = self._before["metrics"] if measured is None else measured.means()
        held_out = None
        if measured is not None:
            held_out = held_out_values(self._parts.held_out, measured, self._before.get("bins"))
        shown = before_and_now(self._before["examples"], self._examination.show())
        metrics = cast(RunMetrics, without_secrets(dict(self._described(after, []))))
        now = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
        running = Running(state.global_step, self._parts.steps, now)
        page = self._output / "report.html"
        on_main(
            lambda: write_report(page, metrics, state.log_history, shown, [], held_out, running)
        )
