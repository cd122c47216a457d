"""``teacher-cache push``: a copy of a cache, with a card and a preview for the Hub."""

from __future__ import annotations

from typing import Annotated

import typer

from logitcask.cache_format.cli.share_commands import Force, print_copied, progress


def push(
    cache: Annotated[
        str, typer.Argument(metavar="CACHE", help="A finished cache: a folder or an fsspec URL.")
    ],
    url: Annotated[
        str,
        typer.Argument(
            metavar="URL",
            help="Destination: s3://bucket/path, hf://datasets/ORG/NAME, a folder, ...",
        ),
    ],
    force: Force = False,
    preview: Annotated[
        bool | None,
        typer.Option(
            "--preview/--no-preview",
            help="Send a small Parquet file of the first positions as text, which the Hub shows. "
            "Default: on the Hub only.",
            show_default=False,
        ),
    ] = None,
    licence: Annotated[
        str | None,
        typer.Option(
            "--license", help="Licence for the card, as the Hub names it, such as apache-2.0."
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            "--tokenizer",
            help="The tokenizer of the preview, as a folder, a hub name or the teacher's "
            "MODULE:CLASS, if the one in the manifest cannot be loaded.",
        ),
    ] = None,
) -> None:
    """Copies a finished cache to URL and verifies the copy. Resumes an interrupted push."""
    from logitcask.cache_format.share import copy as share
    from logitcask.pipeline.commands.presentation import presentation

    on_hub = url.startswith("hf://")
    beside = (
        presentation(
            cache,
            url,
            licence=licence,
            with_preview=on_hub if preview is None else preview,
            tokenizer=tokenizer,
        )
        if on_hub or preview or licence
        else {}
    )
    with progress("push") as bar:
        copied = share.push(
            cache, url, force=force, beside=beside, on_total=bar.reset, on_bytes=bar.update
        )
    print_copied(copied, url)
