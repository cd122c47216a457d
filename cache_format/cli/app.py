"""Start and end of both commands: the options that all commands have, logging to stderr, exit
codes, and one line for a user's mistake. A traceback appears only with ``--debug``, or if the
program itself is wrong.
"""

from __future__ import annotations

import errno
import functools
import inspect
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from logitcask.cache_format.cli.result import results
from logitcask.cache_format.errors import ConfigError, LogitcaskError
from logitcask.cache_format.redact import redacted
from logitcask.cache_format.runtime.interruption import Stopped, sigterm_at_once

EXIT_CODES = {
    0: "done",
    1: "a cache is damaged, or does not have its teacher's numbers",
    2: "wrong or impossible request; one line says why, and what to do",
    3: "an error of logitcask itself, with a traceback",
    130: "interrupted by Ctrl-C (SIGINT); the same command goes on",
    141: "nobody reads stdout any more (SIGPIPE)",
    143: "stopped by SIGTERM; the same command goes on",
}
"""The exit codes of all commands."""

_WRONG, _UNREAD = 3, 141

_EXTRAS = {
    "datasets": "text",
    "gguf": "text",
    "httpx": "text",
    "msgspec": "text",
    "psutil": "text",
    "zstandard": "text",
    "ray": "scale",
    "prometheus_client": "serve",
    "starlette": "serve",
    "uvicorn": "serve",
    "accelerate": "train",
    "rouge_score": "train",
    "safetensors": "train",
    "peft": "peft",
}
"""The extra for each package that only one extra brings. For other packages, the command names its
own extra. The packages of file systems are named when the file system is opened."""

_LIBRARIES = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "PYTHONWARNINGS": "ignore",
}
"""Environment variables by which libraries log errors only, here and in child processes."""
_BARS = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
"""Environment variables by which libraries draw no progress bars."""

_OURS = "logitcask"
"""The logger above all loggers of this project."""

_OUTPUT = "Output"
_debug = False
_quiet = False


def _print_version(asked: bool) -> None:
    if asked:
        print(f"logitcask {version('logitcask')}")
        raise typer.Exit


Debug = Annotated[
    bool,
    typer.Option(
        "--debug",
        help="Log everything, also of libraries, and show the traceback of an error.",
        rich_help_panel=_OUTPUT,
    ),
]
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet",
        help="Print nothing but errors and what --json asks for.",
        rich_help_panel=_OUTPUT,
    ),
]
Json = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print the result as one JSON document (docs/scripts.md lists the keys).",
        rich_help_panel=_OUTPUT,
    ),
]
Version = Annotated[
    bool,
    typer.Option(
        "--version",
        help="Print the version and exit.",
        callback=_print_version,
        is_eager=True,
        rich_help_panel=_OUTPUT,
    ),
]


Group = TyperGroup
"""The class of the commands of a program that has several."""


class App(typer.Typer):
    """A Typer app whose commands have the options ``--json``, ``--quiet`` and ``--debug``. Its help
    ends with the exit codes.
    """

    def command(self, name: str | None = None, **options: Any) -> Callable[[Any], Any]:
        alone = self.registered_callback is None  # its help is that of the program
        if alone:
            options = {"epilog": _exit_codes(), **options}
        register = super().command(name, **options)

        def add(function: Any) -> Any:
            register(_with_options(function, version=alone))
            return function

        return add


def new_app(summary: str, *, group: type[Group] | None = None) -> App:
    """A Typer app with the settings of both programs; ``group``: the class of several commands."""
    app = App(
        cls=group,
        help=summary,
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        epilog=_exit_codes(),
    )

    if group is not None:

        @app.callback()
        def start(version: Version = False, quiet: Quiet = False, debug: Debug = False) -> None:
            global _debug, _quiet
            _debug, _quiet = debug, quiet

    return app


def _exit_codes() -> str:
    lines = [f"{code:5}  {meaning}" for code, meaning in EXIT_CODES.items()]
    return "\n".join(["\b", "Exit codes:", *lines])  # \b: Typer keeps the lines


def _with_options(command: Callable[..., None], *, version: bool) -> Callable[..., None]:
    """``command`` with the options of all commands in the signature that Typer reads."""
    common: dict[str, Any] = {"as_json": Json, "quiet": Quiet, "debug": Debug}
    common |= {"version": Version} if version else {}

    @functools.wraps(command)
    def start(
        *, as_json: bool, quiet: bool, debug: bool, version: bool = False, **arguments: Any
    ) -> None:
        global _debug, _quiet
        _debug, _quiet = _debug or debug, _quiet or quiet
        try:
            if _debug and _quiet:
                raise ConfigError("--quiet and --debug contradict each other; leave out one")
            with _logging(), results(as_json=as_json, quiet=_quiet):
                command(**arguments)
        finally:
            _quiet = False

    own = inspect.signature(command, eval_str=True)
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
        for name, kind in common.items()
    ]
    parameters = [*own.parameters.values(), *more]
    start.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    start.__annotations__ = {each.name: each.annotation for each in parameters}
    return start


@contextmanager
def _logging() -> Iterator[None]:
    """A context in which only this project's messages are logged, except for errors of libraries.
    With ``--debug`` everything is logged.
    """
    root, ours = logging.getLogger(), logging.getLogger(_OURS)
    levels = root.level, ours.level
    show = warnings.showwarning
    with ExitStack() as undo:
        undo.callback(ours.setLevel, levels[1])
        if _debug:
            ours.setLevel(logging.DEBUG)
        else:
            ours.setLevel(logging.ERROR if _quiet else logging.INFO)
            undo.callback(root.setLevel, levels[0])
            root.setLevel(logging.ERROR)
            undo.callback(setattr, warnings, "showwarning", show)
            warnings.showwarning = lambda *args, **kwargs: None
            bars = {} if sys.stderr.isatty() and not _quiet else _BARS
            for name, value in {**_LIBRARIES, **bars}.items():
                if name not in os.environ:
                    os.environ[name] = value
                    undo.callback(os.environ.pop, name, None)
        yield


class _Redacted(logging.Formatter):
    """Messages of every library, without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


def run(app: typer.Typer, extra: str) -> None:
    """Runs ``app`` on ``sys.argv``, and ends with one of ``EXIT_CODES``.

    ``extra`` is the extra of the package that the command needs.
    """
    global _debug
    _debug = False
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Redacted("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    try:
        with sigterm_at_once():
            app()
    except LogitcaskError as error:
        # The text of an error from a loader's worker process begins with that process's traceback.
        last = str(error).strip().splitlines()[-1].removeprefix(_name_of(error))
        _fail(last, error.exit_code)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        extra = _EXTRAS.get(package, extra)
        _fail(f"the package {package} is not installed; pip install 'logitcask[{extra}]'", 2)
    except OSError as error:
        _fail(_refusal(error), 2)
    except SystemExit as stop:
        # Typer turns Ctrl-C, SIGTERM and a closed pipe into exit codes of its own.
        causes = list(_causes(stop))
        stopped = next((each for each in causes if isinstance(each, Stopped)), None)
        code = stopped.exit_code if stopped else stop.code
        if code == 1 and any(
            isinstance(each, OSError) and each.errno == errno.EPIPE for each in causes
        ):
            code = _UNREAD
        if code in (130, 143):
            how = "interrupted" if code == 130 else "stopped by SIGTERM"
            print(f"{how}; run the same command again to go on", file=sys.stderr)
        sys.exit(code)
    except Exception:
        print(redacted(traceback.format_exc()), end="", file=sys.stderr)
        print(
            "error: this is an error of logitcask itself; please report it with the lines above",
            file=sys.stderr,
        )
        sys.exit(_WRONG)


def _fail(message: str, code: int) -> None:
    if _debug:
        print(redacted(traceback.format_exc()), end="", file=sys.stderr)
    print(f"error: {redacted(message)}", file=sys.stderr)
    sys.exit(code)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


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
