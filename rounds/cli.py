"""``student-rounds``: one command from two configs to a student that has learnt from its own text."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from logitcask.cache_format.cli.app import new_app, run
from logitcask.cache_format.cli.config_file import load_config
from logitcask.cache_format.cli.result import print_result
from logitcask.cache_format.errors import ConfigError
from logitcask.rounds.config import RoundsConfig

app = new_app(
    "Trains a student in rounds: the student writes answers, the teacher scores them once, and the "
    "training goes on. Teacher and student are never in memory together."
)


@app.command()
def student_rounds(
    config: Annotated[
        Path,
        typer.Argument(
            metavar="CONFIG", help="YAML file of the rounds, e.g. rounds/configs/quickstart.yaml."
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE ...]", help="Override fields of CONFIG, e.g. rounds.count=5."
        ),
    ] = None,
    restart: Annotated[
        bool,
        typer.Option("--restart", help="Remove the rounds in the output and begin afresh."),
    ] = False,
    report: Annotated[
        bool,
        typer.Option(
            "--report",
            help="Only write rounds.html and rounds.json of the rounds that are done once more.",
        ),
    ] = False,
) -> None:
    """Runs the rounds that CONFIG describes. Goes on where an interrupted run has ended."""
    from logitcask.rounds.run import report_again, run_rounds

    if report and restart:
        raise ConfigError("--report runs no round, and --restart removes them; choose one of both")
    settings = load_config(RoundsConfig, config, overrides or [])
    if report:
        document, table = report_again(settings)
    else:
        document, table = run_rounds(settings, _options(), restart=restart)
    print_result(document, table)


def _options() -> list[str]:
    """The options of this command that its stages are given, too."""
    level = logging.getLogger("logitcask").level
    if level == logging.DEBUG:
        return ["--debug"]
    return ["--quiet"] if level == logging.ERROR else []


def main() -> None:
    """Entry point of the console script."""
    run(app, extra="train")
