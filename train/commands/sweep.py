"""``train-student sweep``: a training for every combination of some values, in one process."""

from __future__ import annotations

import itertools
import json
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
import yaml

from logitcask.cache_format.cli.config_file import load_config
from logitcask.cache_format.cli.result import print_result
from logitcask.cache_format.errors import LogitcaskError, UserError, first_line
from logitcask.train.comparison.seeds import without_seeds

log = logging.getLogger(__name__)

_SHOWN = ("kl", "ce", "top1_agreement", "ece")


class Combination(NamedTuple):
    """A run of a sweep: the name of its folder, and the values of the fields that vary."""

    name: str
    values: dict[str, Any]


def sweep(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="YAML file of the runs, as for training.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE ...]", help="Override fields of CONFIG for all runs."),
    ] = None,
    over: Annotated[
        list[str] | None,
        typer.Option(
            "--over",
            metavar="KEY=[VALUE, ...]",
            help="A field and its values. Repeat it for each field: all combinations are trained.",
        ),
    ] = None,
    list_runs: Annotated[
        bool, typer.Option("--list", help="Only list the runs and their folders.")
    ] = False,
) -> None:
    """Trains CONFIG once for every combination of the values of --over, in folders below
    training.output_dir, and prints a table. Finished runs are reused, and a failed run does not end
    the sweep. Runs that differ in training.seed alone are also summarised by mean and deviation.
    """
    from logitcask.train.config import TrainConfig

    runs = combinations(over or [])
    base = load_config(TrainConfig, config, overrides or [])
    configs = [
        load_config(TrainConfig, config, [*(overrides or []), *_overrides(base.output_dir, run)])
        for run in runs
    ]
    if list_runs:
        print_result(
            {
                "runs": [
                    {**run._asdict(), "output": str(each.output_dir)}
                    for run, each in zip(runs, configs, strict=True)
                ]
            },
            "\n".join(str(each.output_dir) for each in configs),
            summary=False,
        )
        return
    from logitcask.train.identity import finished
    from logitcask.train.run import train

    found: list[dict[str, Any]] = []
    for number, (run, each) in enumerate(zip(runs, configs, strict=True), 1):
        log.info("run %d of %d: %s", number, len(runs), run.name)
        result: dict[str, Any] = {**run._asdict(), "output": str(each.output_dir)}
        try:
            metrics = finished(each) or train(each)[0]
            result |= {"after": metrics["after"], "seconds": metrics["seconds"]}
        except LogitcaskError as error:
            log.error("%s failed: %s", run.name, error)
            result["error"] = first_line(error)
        found.append(result)
    from logitcask.train.distributed import is_main

    groups = without_seeds(found)
    if is_main():
        print_result({"runs": found, "groups": groups}, _tables(found, groups), summary=False)
    failed = [result["name"] for result in found if "error" in result]
    if failed:
        raise UserError(
            f"{len(failed)} of {len(found)} runs failed: {', '.join(failed)}; the lines above say why. The same command "
            "tries them again and reuses the others"
        )


def combinations(over: list[str]) -> list[Combination]:
    """All combinations of the values of ``--over``, the last field fastest.

    Raises UserError for another form than KEY=[VALUE, ...], and for a field or value that occurs
    twice.
    """
    if not over:
        raise UserError(
            "nothing varies; name a field and its values, such as --over training.seed=[0,1,2]"
        )
    fields: dict[str, list[Any]] = {}
    for text in over:
        key, is_set, value = text.partition("=")
        try:
            values = yaml.safe_load(value) if is_set else None
        except yaml.YAMLError as error:
            raise UserError(f"--over {text!r} is not YAML: {first_line(error)}") from error
        if not key or not isinstance(values, list) or not values:
            raise UserError(
                f"--over is {text!r}; expected a field and a list of its values, such as training.seed=[0,1,2] or "
                "'losses=[[{name: forward_kl}], [{name: reverse_kl}]]'"
            )
        if key in fields:
            raise UserError(f"--over names {key} twice; put its values into one list")
        if any(value in values[:at] for at, value in enumerate(values)):
            raise UserError(f"--over {key} has a value twice; each combination is trained once")
        fields[key] = values
    chosen = [
        dict(zip(fields, values, strict=True)) for values in itertools.product(*fields.values())
    ]
    names = [
        "-".join(f"{key.rpartition('.')[2]}={_word(value)}" for key, value in values.items())
        for values in chosen
    ]
    if len(set(names)) < len(names):  # long values that begin alike
        width = len(str(len(names) - 1))
        names = [f"{number:0{width}}-{name}" for number, name in enumerate(names)]
    return [Combination(*each) for each in zip(names, chosen, strict=True)]


def _overrides(output: Path, run: Combination) -> list[str]:
    """The combination as overrides of a config, in YAML of one line."""
    values = {**run.values, "training.output_dir": str(output / run.name)}
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def _word(value: Any) -> str:
    """A value as part of a folder's name."""
    if isinstance(value, list | dict):
        value = "+".join(_leaves(value))
    return re.sub(r"[^\w.+-]+", "_", str(value)).strip("_")[-40:] or "_"


def _leaves(value: Any) -> Iterable[str]:
    if isinstance(value, dict):
        return itertools.chain.from_iterable(map(_leaves, value.values()))
    if isinstance(value, list):
        return itertools.chain.from_iterable(map(_leaves, value))
    return [str(value)]


def _tables(found: list[dict[str, Any]], groups: list[dict[str, Any]]) -> str:
    width = max(len(result["name"]) for result in found)
    lines = [
        "  ".join([f"{'run':{width}}", *(f"{name:>14}" for name in _SHOWN), f"{'seconds':>8}"])
    ]
    for result in found:
        if "error" in result:
            lines.append(f"{result['name']:{width}}  failed: {result['error']}")
            continue
        numbers = [f"{result['after'][name]:14.4f}" for name in _SHOWN]
        lines.append(
            "  ".join([f"{result['name']:{width}}", *numbers, f"{result['seconds']:8.1f}"])
        )
    if groups:
        lines += ["", "over seeds: mean and standard deviation"]
    for group in groups:
        words = "-".join(
            f"{key.rpartition('.')[2]}={_word(value)}" for key, value in group["values"].items()
        )
        numbers = []
        for name in _SHOWN:
            figure = group["after"][name]
            spread = "" if figure["deviation"] is None else f" ±{figure['deviation']:.4f}"
            numbers.append(f"{name} {figure['mean']:.4f}{spread}")
        lines.append(f"{words or 'all'}: {', '.join(numbers)} ({group['runs']} runs)")
    return "\n".join(lines)
