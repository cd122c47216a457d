"""``teacher-cache estimate``: forecasts of ``logitcask.pipeline.estimate.run``, page or JSON."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from logitcask.cache_format.cli.config_file import load_config
from logitcask.cache_format.cli.result import print_result
from logitcask.cache_format.errors import ConfigError

if TYPE_CHECKING:
    from logitcask.pipeline.estimate.run import Estimate, Forecast
    from logitcask.pipeline.estimate.size import Range

_MOST_TOKENS = 10**15
_WIDTH = 20


def estimate(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the build.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE ...]", help="Override fields of CONFIG, e.g. store.top_k=8."
        ),
    ] = None,
    tokens: Annotated[
        list[str] | None,
        typer.Option(
            "--tokens",
            help="Tokens of text to score, e.g. 1e9. Repeat it for several forecasts. Default: "
            "all tokens of the data set.",
        ),
    ] = None,
    price: Annotated[
        float | None,
        typer.Option("--price", min=0, help="Price of one GPU for one hour, in any currency."),
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option("--gpus", min=1, help="Number of GPUs in use. Default: those of one engine."),
    ] = None,
    gpu: Annotated[
        str,
        typer.Option("--gpu", help="GPU model for the forecast: h100, a100, l40s, rtx-4090, ..."),
    ] = "h100",
    tokens_per_second: Annotated[
        float | None,
        typer.Option(
            "--tokens-per-second", help="Speed of one engine, if you know it.", show_default=False
        ),
    ] = None,
    probe: Annotated[
        bool,
        typer.Option(
            "--probe",
            help="Start the engine on this machine, and measure speed and bytes for some seconds.",
        ),
    ] = False,
) -> None:
    """Forecasts the build of CONFIG: tokens, bytes, hours and cost, with the assumptions. Builds
    nothing.
    """
    from logitcask.pipeline.config import BuildConfig
    from logitcask.pipeline.estimate.run import estimate as estimate_build

    if tokens_per_second is not None and not 0 < tokens_per_second < float("inf"):
        raise ConfigError(f"--tokens-per-second is {tokens_per_second}; expected a number above 0")
    result = estimate_build(
        load_config(BuildConfig, config, overrides or []),
        tokens=[count_of(text) for text in tokens] if tokens else None,
        price=price,
        gpus=gpus,
        gpu=gpu,
        tokens_per_second=tokens_per_second,
        measure=probe,
    )
    print_result(result, page(result), summary=False)


def count_of(text: str) -> int:
    """The number of tokens in a text such as ``1000000``, ``1_000_000`` or ``1e6``.

    Raises ConfigError for other texts, and for numbers below 1 or above 10^15.
    """
    try:
        count = float(text)
    except ValueError:
        count = 0.0
    if not 1 <= count <= _MOST_TOKENS:
        raise ConfigError(
            f"--tokens is {text!r}; expected a number from 1 to 1e15, such as 1000000 or 1e9"
        )
    return round(count)


def page(result: Estimate) -> str:
    """The page that the command prints: a column for each token count, then the assumptions."""
    currency = (
        "" if result.price_per_gpu_hour is None else f"{result.price_per_gpu_hour:g} a GPU hour"
    )
    lines: list[tuple[str, Callable[[Forecast], str]]] = [
        ("tokens of text", lambda f: _count(f.text_tokens)),
        ("tokens stored", lambda f: _count(f.tokens)),
        ("tokens scored", lambda f: _count(f.scored_tokens)),
        ("kept positions", lambda f: _count(f.kept_positions)),
        ("sequences", lambda f: _count(f.sequences)),
        ("shards", lambda f: _count(f.shards)),
        ("bytes on disk", lambda f: _bytes(f.bytes.likely)),
        ("", lambda f: _between(f.bytes, _bytes)),
        ("bytes per token", lambda f: f"{f.bytes.likely / max(1, f.tokens):.1f}"),
        ("prefill", lambda f: _duration(f.engine_seconds.likely)),
        ("GPU hours", lambda f: _number(f.gpu_seconds.likely / 3600)),
        ("", lambda f: _between(f.gpu_seconds.times(1 / 3600), _number)),
        (
            f"wall, {result.gpus} GPU{'s' * (result.gpus > 1)}",
            lambda f: _duration(f.wall_seconds.likely),
        ),
        (f"cost, {currency}", lambda f: "" if f.cost is None else _number(f.cost.likely)),
        ("", lambda f: "" if f.cost is None else _between(f.cost, _number)),
    ]
    rows = [(name, [cell(forecast) for forecast in result.forecasts]) for name, cell in lines]
    table = [
        f"{name:22}" + "".join(f"{cell:>{_WIDTH}}" for cell in cells)
        for name, cells in rows
        if any(cells)
    ]
    return "\n".join([*table, "", "assumptions", *(f"- {line}" for line in result.assumptions)])


def _between(span: Range, show: Callable[[float], str]) -> str:
    low, high = show(span.low), show(span.high)
    return "" if low == high else f"{low} - {high}"


def _scaled(value: float, units: tuple[str, ...]) -> str:
    """Three digits with the largest unit, a power of 1000, in which ``value`` is at least 1."""
    at = 0
    while at + 1 < len(units) and value >= 999.5:
        value, at = value / 1000, at + 1
    return f"{value:.3g} {units[at]}" if value < 999.5 else f"{value:,.0f} {units[at]}"


def _count(value: float) -> str:
    return f"{value:,.0f}" if value < 1e6 else _scaled(value / 1e6, ("M", "G", "T"))


def _bytes(value: float) -> str:
    return _scaled(value, ("B", "kB", "MB", "GB", "TB", "PB"))


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{_number(seconds / length)} {unit}"
    return f"{_number(seconds)} s"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.2g}" if value < 9.95 else f"{value:.3g}"
