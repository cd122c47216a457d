"""Commands on the catalogue: ``teacher-cache ls``, ``rm`` and ``gc``."""

from __future__ import annotations

import re
import sys
import time
from typing import Annotated, Any

import typer
from pydantic import ByteSize, TypeAdapter, ValidationError

from logitcask.cache_format.catalog.home import Home
from logitcask.cache_format.catalog.home import home as find_home
from logitcask.cache_format.catalog.listing import (
    Listed,
    chosen,
    listing,
    matching,
    span,
    table,
    totals,
)
from logitcask.cache_format.catalog.remotes import remote_entries
from logitcask.cache_format.catalog.removal import garbage, remove, tidy
from logitcask.cache_format.cli.result import as_json, print_result
from logitcask.cache_format.errors import CacheInUseError, CacheNotFoundError, UserError

Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")]
_UNITS = {"min": 60, "h": 3_600, "d": 86_400, "w": 604_800}


def ls(
    remotes: Annotated[
        bool, typer.Option("--remotes", help="Also list the caches at the remotes of the home.")
    ] = False,
    teacher: Annotated[
        str | None, typer.Option(help="Only caches of this teacher; part of a name, or wildcards.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Only caches of this data.")] = None,
) -> None:
    """Lists the caches of this user, wherever they are: the latest use first."""
    home = this_home()
    lines = matching(listing(home), teacher=teacher, data=data)
    gone = [line for line in lines if line.gone]
    shown = [line for line in lines if not line.gone]
    if remotes:
        found = [Listed(entry, None) for entry in remote_entries(home)]
        shown += matching(found, teacher=teacher, data=data)
    document = {
        "home": home.folder,
        "caches": [line.document() for line in (*shown, *gone)],
    }
    print_result(document, "\n".join(_listed(home, shown, gone)), summary=False)


def _listed(home: Home, shown: list[Listed], gone: list[Listed]) -> list[str]:
    text = [table(shown), totals(shown)] if shown else [f"no caches in {home.folder}"]
    if gone:
        places = ", ".join(line.entry.where for line in gone[:3])
        more = f" and {len(gone) - 3} more" if len(gone) > 3 else ""
        text.append(f"no longer there: {places}{more}; `teacher-cache gc` forgets them")
    return text


def rm(
    caches: Annotated[
        list[str],
        typer.Argument(
            metavar="CACHE ...", help="Folders, or beginnings of fingerprints, as `ls --json` has."
        ),
    ],
    yes: Yes = False,
    dry_run: DryRun = False,
) -> None:
    """Removes caches from the disk and from the catalogue; asks first. Never one in use."""
    home = this_home()
    known = listing(home)
    lines: list[Listed] = []
    for name in caches:
        found = chosen(known, name)
        if not found:
            raise CacheNotFoundError(
                f"no cache {name} in {home.folder}; `teacher-cache ls` lists them. Caches of stores are removed with the "
                "store's own tools"
            )
        if len(found) > 1:
            places = ", ".join(line.entry.where for line in found)
            raise UserError(f"{name} is {len(found)} caches ({places}); name a folder")
        lines += [line for line in found if line not in lines]
    _remove(home, lines, known, yes=yes, dry_run=dry_run)


def gc(
    max_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Remove until all caches take at most this: 200GB, 1TiB."
        ),
    ] = None,
    unused_for: Annotated[
        str | None,
        typer.Option(metavar="AGE", help="Remove what was not used for so long: 12h, 30d, 8w."),
    ] = None,
    yes: Yes = False,
    dry_run: DryRun = False,
) -> None:
    """Frees space: removes the caches that were not used for longest; asks first. Never one in use.

    Without options it completes interrupted removals, and forgets caches that were removed by hand.
    """
    home = this_home()
    size = None if max_size is None else _bytes(max_size)
    age = None if unused_for is None else _seconds(unused_for)
    lines = listing(home)
    found = garbage(lines, max_bytes=size, unused_for=age)
    _remove(home, found.lines, lines, yes=yes, dry_run=dry_run, freed=found.freed)
    if size is not None and found.total - found.freed > size:
        raise CacheInUseError(
            f"{found.total - found.freed:,} bytes are left, more than {size:,}: the other caches are in use, or "
            "others outside this home share their shards; run it again when they are not"
        )


def _remove(
    home: Home,
    lines: list[Listed],
    known: list[Listed],
    *,
    yes: bool,
    dry_run: bool,
    freed: int | None = None,
) -> None:
    """Shows, asks, removes, and tidies the home."""
    busy = [line for line in lines if line.in_use]
    if busy and freed is None:
        raise CacheInUseError(
            f"{busy[0].entry.where} is in use; wait for the training, build or server that reads it (a killed one counts "
            "for two minutes)"
        )
    size = sum(line.entry.bytes for line in lines) if freed is None else freed
    if lines and not dry_run and not yes:
        print(table(lines), file=sys.stderr)
        if as_json() or not sys.stdin.isatty():
            raise UserError(
                f"{totals(lines)} would be removed, and nobody can be asked; give --yes, or --dry-run to see only"
            )
        if not typer.confirm(f"Remove {totals(lines)}?", err=True):
            raise UserError("nothing was removed")
    removed, skipped = [], []
    for line in lines:
        if dry_run or remove(home, line.entry):
            removed.append(line)
        else:
            skipped.append(line)
    forgotten = 0 if dry_run else tidy(home, known)
    document: dict[str, Any] = {
        "removed": [line.entry.where for line in removed],
        "in_use": [line.entry.where for line in skipped],
        "bytes": size,
        "forgotten": forgotten,
        "dry_run": dry_run,
    }
    text = [f"{line.entry.where} ({_use(line)})" for line in removed]
    text += [f"{line.entry.where} is in use now: kept" for line in skipped]
    if removed:
        text.append(f"{'would remove' if dry_run else 'removed'} {totals(removed)}")
        if freed is not None:
            text[-1] += f", which {'would free' if dry_run else 'freed'} {size:,} bytes"
    elif not skipped:
        text.append("nothing to remove")
    if forgotten:
        text.append(f"forgot {forgotten:,} that {'was' if forgotten == 1 else 'were'} gone")
    print_result(document, "\n".join(text), summary=not dry_run)


def _use(line: Listed) -> str:
    return f"last use {span(time.time() - (line.last_use or 0))}"


def this_home() -> Home:
    """The home. Raises UserError for a user without one."""
    found = find_home()
    if found is None:
        raise UserError("this user has no home folder; set LOGITCASK_HOME to a folder")
    return found


def _bytes(text: str) -> int:
    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        raise UserError(f"--max-size is {text!r}; expected a size such as 200GB or 1TiB") from None


def _seconds(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(min|h|d|w)", text.strip())
    if found is None:
        raise UserError(f"--unused-for is {text!r}; expected an age such as 12h, 30d or 8w")
    return float(found[1]) * _UNITS[found[2]]
