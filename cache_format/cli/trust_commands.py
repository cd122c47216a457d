"""``teacher-cache keygen`` and ``sign``: ``cache_format/share/signature.py``."""

from __future__ import annotations

import getpass
from pathlib import Path
from typing import Annotated

import typer

from logitcask.cache_format.cli.result import print_result


def keygen(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="The new private key; FILE.pub gets the public.")
    ],
    name: Annotated[
        str | None,
        typer.Option("--name", help="Your name in signatures. Default: your user name."),
    ] = None,
) -> None:
    """Makes a key pair for signatures (Ed25519). Keep FILE to yourself, and give FILE.pub to those
    who trust you.
    """
    from logitcask.cache_format.share import signature

    key = signature.keygen(file, _user() if name is None else name)
    print_result({"key": key, "private": file, "public": f"{file}.pub"}, key)


def sign(
    cache: Annotated[str, typer.Argument(metavar="CACHE", help="The folder of a finished cache.")],
    key: Annotated[Path, typer.Option("--key", metavar="FILE", help="Your private key.")],
) -> None:
    """Signs a finished cache: its manifest, and through its hashes every shard."""
    from logitcask.cache_format.share import signature

    signed = signature.sign(cache, key)
    print_result({"cache": cache, **signed._asdict()}, f"{cache}: signed by {signed}")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without names
        return "unnamed"
