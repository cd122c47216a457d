"""``train-student``: one command from a cache to a student and its report."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from logitcask.cache_format.cli.app import Group, new_app, run
from logitcask.cache_format.cli.config_file import load_config
from logitcask.cache_format.cli.result import print_result
from logitcask.cache_format.runtime.interruption import exit_on_signal
from logitcask.train.commands.compare import compare_runs
from logitcask.train.commands.evaluate import evaluate, number
from logitcask.train.commands.losses import losses
from logitcask.train.commands.read import read
from logitcask.train.commands.sweep import sweep
from logitcask.train.output.metrics_file import RunMetrics, kind_of, of_teacher


class TrainByDefault(Group):
    """The commands of ``train-student``. Without the name of one, ``train`` is meant."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        words = [each for each in args if not each.startswith("-")]
        if words and words[0] not in self.commands:
            args = ["train", *args]
        return super().parse_args(ctx, args)


app = new_app(
    "Trains a student from a cache of teacher distributions, without the teacher, and evaluates "
    "models on a cache. `train-student CONFIG` is short for `train-student train CONFIG`.",
    group=TrainByDefault,
)
app.command("compare")(compare_runs)
app.command("evaluate")(evaluate)
app.command("losses")(losses)
app.command("read")(read)
app.command("sweep")(sweep)


@app.command("train")
def train_student(
    config: Annotated[
        Path,
        typer.Argument(
            metavar="CONFIG", help="YAML file of the run, e.g. train/configs/quickstart.yaml."
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE ...]",
            help="Override fields of CONFIG, e.g. training.max_steps=100.",
        ),
    ] = None,
    restart: Annotated[
        bool,
        typer.Option("--restart", help="Discard the run in the output folder and start again."),
    ] = False,
    watch: Annotated[
        bool,
        typer.Option(
            "--watch",
            help="Write report.html at the start and again at every evaluation (training.eval_strategy), "
            "to look at while the run goes.",
        ),
    ] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Only rewrite the report of a finished run.")
    ] = False,
    print_cache_config: Annotated[
        bool,
        typer.Option(
            "--print-cache-config",
            help="Only print cache_config, the path of the config that builds the cache.",
        ),
    ] = False,
) -> None:
    """Trains the student that CONFIG describes. Resumes an interrupted run."""
    # Torch and transformers take seconds to import, so they are not imported for --help.
    from logitcask.train.config import TrainConfig

    settings = load_config(TrainConfig, config, overrides or [])
    if print_cache_config:
        path = settings.cache_config
        print_result({"cache_config": path}, str(path or ""), summary=False)
        return
    if os.environ.get("RANK", "0") != "0":
        # The first process of a launcher speaks for all.
        logging.getLogger("logitcask").setLevel(logging.ERROR)
    if report:
        from logitcask.train.output.report import rewrite_report

        written = rewrite_report(settings.output_dir)
        print_result({"report": written}, f"report: {written}")
        return
    from logitcask.train.identity import finished

    metrics = None if restart else finished(settings)
    found = metrics is not None
    if metrics is None:
        # transformers and accelerate take seconds to import, so a finished run does without.
        from logitcask.train.distributed import is_main
        from logitcask.train.run import train

        metrics, found = train(settings, restart=restart, watch=watch)
        if not is_main():
            return
    page = settings.output_dir / "report.html"
    again = (
        f"{settings.output_dir} is trained already; --restart trains it again\n" if found else ""
    )
    print_result(
        {
            "student": settings.output_dir,
            "report": page,
            "trained_before": found,
            "metrics": metrics,
        },
        f"{again}{summary(metrics)}\nstudent: {settings.output_dir}\nreport:  {page}",
    )


def summary(metrics: RunMetrics) -> str:
    """The table at the end of the command: held-out metrics before and after the training."""
    after = metrics["after"]
    title = "held out" if "reference" not in metrics else "on the reference"
    lines = [f"{title:16} {'before':>12} {'after':>12} {'teacher':>12}  exactness"]
    for name, before in metrics["before"].items():
        teacher = of_teacher(metrics, name)
        last = "" if teacher is None else number(teacher)
        values = f"{number(before):>12} {number(after[name]):>12} {last:>12}"
        lines.append(f"{name:16} {values}  {kind_of(metrics, name)}".rstrip())
    rouge = metrics["rouge_l"]
    if rouge["after"] is not None:
        lines.append(f"{'rouge-l':16} {rouge['before']:12,.4f} {rouge['after']:12,.4f}")
    elif rouge["answers"]:
        lines.append(
            f"{'rouge-l':16} none: the cached answers have no words (no letters, no digits)"
        )
    return "\n".join(lines)


def main() -> None:
    """Entry point of the console script."""
    try:
        run(app, extra="train")
    except SystemExit as stop:
        if "torch" in sys.modules:
            from logitcask.train.distributed import leave

            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            if code > 128:
                exit_on_signal(code)  # a launcher's, which forwards the first one late
            leave(code)
        raise
