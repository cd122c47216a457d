"""``teacher-cache prompts``: the prompts that a build would answer, as rows of a JSON file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from logitcask.cache_format.cli.config_file import load_config


def prompts(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the build.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE ...]",
            help="Override fields of CONFIG, e.g. data.generate.max_prompts=8.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="File to write. Default: standard output.")
    ] = None,
) -> None:
    """Exports the prompts that CONFIG answers (data.generate) as JSON lines: id, and messages of a
    chat with its tools, or text. No model is loaded. With --json they are one list, or with --out
    their number.
    """
    from logitcask.cache_format.errors import ConfigError
    from logitcask.pipeline.builder.inputs import Inputs
    from logitcask.pipeline.commands.json_lines import write_lines
    from logitcask.pipeline.config import BuildConfig
    from logitcask.pipeline.generate.prompts import as_rows

    settings = load_config(BuildConfig, config, overrides or [])
    if settings.data.generate is None:
        raise ConfigError(
            f"{config} has no data.generate, so its build answers no prompts; name them there: prompt_field, messages_field or "
            "text_field, with generate"
        )
    inputs = Inputs(settings)
    write_lines(as_rows(inputs.prompts(settings.data), inputs.source), out, "prompts")
