"""``teacher-cache model``: fetches a built-in model."""

from __future__ import annotations

from typing import Annotated

import typer

from logitcask.cache_format.cli.result import print_result


def model(
    name: Annotated[str, typer.Argument(help="Name of a built-in model, such as smollm2-135m.")],
) -> None:
    """Fetches a built-in model into the local models folder, and prints its path."""
    from logitcask.pipeline.teachers.model import prepare_model

    path = prepare_model(name, None)
    print_result({"name": name, "path": path}, str(path), summary=False)
