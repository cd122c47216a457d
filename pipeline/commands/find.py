"""``teacher-cache find``: the caches that hold a model's distributions on some text."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from logitcask.cache_format.catalog.listing import Listed, listing, matching, table
from logitcask.cache_format.catalog.remotes import remote_entries
from logitcask.cache_format.cli.catalog_commands import this_home
from logitcask.cache_format.cli.config_file import load_config
from logitcask.cache_format.cli.result import print_result
from logitcask.cache_format.errors import ConfigError, UserError, one_line

if TYPE_CHECKING:
    from logitcask.pipeline.builder.from_catalog import Holding

log = logging.getLogger(__name__)


def find(
    config: Annotated[
        Path | None,
        typer.Argument(
            metavar="[CONFIG]",
            help="YAML file of a build: which caches hold its teacher on its documents?",
            show_default=False,
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE ...]", help="Override fields of CONFIG, e.g. data.path=other.jsonl."
        ),
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Only caches of this teacher; part of a name, or wildcards.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Only caches of this tokenizer: its name, or its sha256.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Only caches of this data.")] = None,
    text: Annotated[
        str | None,
        typer.Option(help="Only caches with a sequence in which this text occurs; reads them."),
    ] = None,
    remotes: Annotated[
        bool, typer.Option("--remotes", help="Also search the remotes of the home.")
    ] = False,
) -> None:
    """Finds caches in the catalogue by teacher, tokenizer and text. With CONFIG: how many of its
    sequences each cache holds, and what a build would do with it. No teacher runs.
    """
    if all(each is None for each in (config, teacher, tokenizer, data, text)):
        raise ConfigError(
            "nothing is searched for; give CONFIG, --teacher, --tokenizer, --data or --text"
        )
    home = this_home()
    lines = [line for line in listing(home) if not line.gone]
    if remotes:
        lines += [Listed(entry, None) for entry in remote_entries(home)]
    lines = matching(lines, teacher=teacher, tokenizer=tokenizer, data=data)
    holdings: dict[str, Holding] | None = None
    if config is not None:
        holdings = _holdings(config, overrides or [], lines)
        lines = [line for line in lines if line.entry.where in holdings]
        lines.sort(key=lambda line: -holdings[line.entry.where].shared)
    sequences: dict[str, int] = {}
    if text is not None:
        sequences = {line.entry.where: _holding_text(line, text) for line in lines}
        lines = [line for line in lines if sequences[line.entry.where]]
    found = [
        {
            **line.document(),
            **({} if holdings is None else holdings[line.entry.where].document()),
            **({} if text is None else {"sequences_with_text": sequences[line.entry.where]}),
        }
        for line in lines
    ]
    print_result({"home": home.folder, "caches": found}, _page(lines, found), summary=False)


def _page(lines: list[Listed], found: list[dict[str, Any]]) -> str:
    if not lines:
        return "no such cache"
    shown, *rest = table(lines).splitlines()
    page = [shown]
    for line, each in zip(rest, found, strict=True):
        page.append(line)
        if "shared_sequences" in each:
            page.append(
                f"    {each['shared_sequences']:,} of {each['asked_sequences']:,} sequences; {each['use']}"
            )
        if "sequences_with_text" in each:
            page.append(f"    the text is in {each['sequences_with_text']:,} sequences")
    return "\n".join(page)


def _holdings(config: Path, overrides: list[str], lines: list[Listed]) -> dict[str, Holding]:
    from logitcask.pipeline.builder.from_catalog import Catalog
    from logitcask.pipeline.builder.inputs import Inputs
    from logitcask.pipeline.builder.planner import plan_only
    from logitcask.pipeline.config import BuildConfig

    settings = load_config(BuildConfig, config, overrides)
    if settings.data.generate is not None:
        raise UserError(
            "the teacher writes the texts of this config (data.generate), so nothing is known of them before; "
            "search by --teacher or --data"
        )
    inputs = Inputs(settings)
    with tempfile.TemporaryDirectory(prefix="logitcask-find-") as folder:
        plan = plan_only(Path(folder), settings, inputs)
        catalog = Catalog(this_home(), settings, inputs)
        return catalog.holdings(plan, Path(folder), [line.entry for line in lines])


def _holding_text(line: Listed, text: str) -> int:
    """The number of sequences in which ``text`` occurs; 0, with a warning, in a cache that cannot be
    searched.
    """
    from logitcask.cache_format import CacheReader
    from logitcask.pipeline.commands.sequence_table import texts

    try:
        return sum(text in each for each in texts(CacheReader(line.entry.where)))
    except UserError as error:
        log.warning("%s is not searched: %s", line.entry.where, one_line(error))
        return 0
