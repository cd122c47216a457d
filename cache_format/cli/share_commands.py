"""``teacher-cache pull``, and the progress bar and result of copies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from logitcask.cache_format.catalog.home import register
from logitcask.cache_format.cli.result import print_result
from logitcask.cache_format.reader import CacheReader
from logitcask.cache_format.redact import redacted
from logitcask.cache_format.runtime.progress import ProgressBar
from logitcask.cache_format.share import copy as share

Force = Annotated[
    bool,
    typer.Option(
        "--force", help="Replace another cache at the destination, and check every hash again."
    ),
]


def pull(
    url: Annotated[
        str, typer.Argument(metavar="URL", help="A finished cache: an fsspec URL or a folder.")
    ],
    folder: Annotated[
        Path | None,
        typer.Argument(
            metavar="[FOLDER]", help="Destination. Default: caches/NAME.", show_default=False
        ),
    ] = None,
    force: Force = False,
) -> None:
    """Copies a finished cache into a local folder and verifies every file. Resumes an interrupted
    pull.
    """
    folder = folder or default_folder(url)
    with progress("pull") as bar:
        copied = share.pull(url, folder, force=force, on_total=bar.reset, on_bytes=bar.update)
    register(folder, CacheReader(folder).manifest)
    print_copied(copied, str(folder))


def default_folder(url: str) -> Path:
    """``caches/NAME`` for ``s3://bucket/path/NAME`` or ``hf://datasets/ORG/NAME@REVISION``."""
    return Path("caches") / url.rstrip("/").rsplit("/", 1)[-1].split("@", 1)[0]


def print_copied(copied: share.Copied, place: str) -> None:
    """Prints the result of a push or a pull."""
    place = redacted(place)
    files = copied.files_sent + copied.files_skipped
    print_result(
        {"place": place, "unchanged": copied.unchanged, **asdict(copied)},
        f"{place} holds this very cache already: nothing to copy"
        if copied.unchanged
        else f"{place}: {copied.files_sent} of {files} files copied, {copied.bytes_sent:,} bytes",
    )


@contextmanager
def progress(name: str) -> Iterator[ProgressBar]:
    with ProgressBar(unit="B", unit_scale=True, unit_divisor=1024, desc=name, leave=False) as bar:
        yield bar
