"""Start and end of both commands: logging to stderr, and one line for a user's mistake. A traceback
appears only with ``--debug``.
"""

from __future__ import annotations

import logging
import sys

import typer

from logitcask.cache_format.errors import LogitcaskError

_EXTRAS = {
    "datasets": "text",
    "gguf": "text",
    "httpx": "text",
    "msgspec": "text",
    "psutil": "text",
    "zstandard": "text",
    "ray": "scale",
    "accelerate": "train",
    "matplotlib": "train",
    "rouge_score": "train",
    "safetensors": "train",
    "peft": "peft",
}
"""The extra for each package that only one extra brings. For other packages, the command names its
own extra. The packages of file systems are named when the file system is opened."""


def new_app(summary: str) -> typer.Typer:
    """A Typer app with the settings of both commands."""
    return typer.Typer(
        help=summary, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False
    )


def run(app: typer.Typer, extra: str) -> None:
    """Runs ``app`` on ``sys.argv``. Exit codes: 0, 1 for damage, 2 for a user's mistake or an error
    of the operating system, 130 after Ctrl-C.

    ``extra`` is the extra of the package that the command needs.
    """
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if debug:
        logging.getLogger("logitcask.pipeline").setLevel(logging.DEBUG)
    for chatty in (
        "httpx",
        "datasets",
        "fsspec",
        "filelock",
        "transformers",
        "matplotlib",
        "aiobotocore",
        "botocore",
        "s3fs",
    ):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        app()
    except LogitcaskError as error:
        if debug:
            raise
        # The text of an error from a loader's worker process begins with that process's traceback.
        print(
            f"error: {str(error).strip().splitlines()[-1].removeprefix(_name_of(error))}",
            file=sys.stderr,
        )
        sys.exit(error.exit_code)
    except ModuleNotFoundError as error:
        if debug:
            raise
        package = (error.name or "").partition(".")[0]
        extra = _EXTRAS.get(package, extra)
        print(
            f"error: the package {package} is not installed; pip install 'logitcask[{extra}]'",
            file=sys.stderr,
        )
        sys.exit(2)
    except OSError as error:
        if debug:
            raise
        print(f"error: {_refusal(error)}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as stop:
        if stop.code == 130:  # Typer's exit code for Ctrl-C
            print("interrupted; run the same command again to go on", file=sys.stderr)
        raise


def _refusal(error: OSError) -> str:
    """An error of the operating system in one line."""
    said = " ".join((error.strerror or str(error)).split()) or type(error).__name__
    where = "" if error.filename is None else f"{error.filename}: "
    return (
        f"{where}{said}; see that it is there, may be read or written and has room, then run the same command again "
        "(--debug shows where this came up)"
    )


def _name_of(error: Exception) -> str:
    return f"{type(error).__module__}.{type(error).__name__}: "
