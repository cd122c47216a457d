"""``train-student``: one command from a cache to a student and its report."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from logitcask.cache_format.cli.app import new_app, run
from logitcask.cache_format.cli.config_file import load_config
from logitcask.train.commands.evaluate import evaluate, number
from logitcask.train.output.metrics_file import RunMetrics, kind_of, of_teacher


class TrainByDefault(TyperGroup):
    """The commands of ``train-student``. Without the name of one, ``train`` is meant."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "--help"):
            args = ["train", *args]
        return super().parse_args(ctx, args)


app = new_app(
    "Trains a student from a cache of teacher distributions, without the teacher, and evaluates "
    "models on a cache. `train-student CONFIG` is short for `train-student train CONFIG`."
)


@app.callback(cls=TrainByDefault)
def commands() -> None:
    pass


app.command("evaluate")(evaluate)


@app.command("losses")
def losses() -> None:
    """Lists all losses: where each comes from, its options and their defaults."""
    from logitcask.train.losses.others import listing

    print(listing())


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
        print(settings.cache_config or "")
        return
    from logitcask.train.run import rewrite_report, train

    if report:
        print(f"report: {rewrite_report(settings.output_dir)}")
        return
    metrics, found = train(settings, restart=restart)
    if found:
        print(f"{settings.output_dir} is trained already; --restart trains it again")
    print(summary(metrics))
    print(f"student: {settings.output_dir}\nreport:  {settings.output_dir / 'report.html'}")


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

            leave(stop.code if isinstance(stop.code, int) else int(stop.code is not None))
        raise
