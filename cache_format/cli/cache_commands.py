"""Commands that need only caches: ``teacher-cache info``, ``verify``, ``derive``, ``merge``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel

from logitcask.cache_format.catalog.home import register
from logitcask.cache_format.cli.config_file import parse_options
from logitcask.cache_format.cli.result import as_json, print_result
from logitcask.cache_format.derive.derive import DeriveOptions
from logitcask.cache_format.derive.derive import derive as derive_cache
from logitcask.cache_format.derive.merge import merge as merge_caches
from logitcask.cache_format.derive.write import SHARD_TOKENS
from logitcask.cache_format.describe import describe, facts, numbered
from logitcask.cache_format.errors import ConfigError, DamagedCacheError
from logitcask.cache_format.reader import CacheReader
from logitcask.cache_format.redact import redacted
from logitcask.cache_format.runtime.progress import ProgressBar
from logitcask.cache_format.share.signature import check_signed, claimed
from logitcask.cache_format.verify import verify as verify_cache

Output = Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the new cache.")]
ShardTokens = Annotated[int, typer.Option("--shard-tokens", min=1, help="Tokens per shard.")]
Cache = Annotated[
    str, typer.Argument(metavar="CACHE", help="A finished cache: a folder or an fsspec URL.")
]


def info(cache: Cache) -> None:
    """Describes a cache: teacher, data, heads, tails, audit and size."""
    manifest = CacheReader(cache).manifest
    print_result(manifest.to_json(), f"{describe(manifest, cache)}{_signed(cache)}", summary=False)


def _signed(cache: str) -> str:
    """The lines of ``info`` on signatures, which only ``verify --signed`` checks."""
    who = "; ".join(map(str, claimed(cache)))
    return f"\n{'signed by':15} {who} (`verify --signed` checks it)" if who else ""


def verify(
    cache: Cache,
    deep: Annotated[
        bool,
        typer.Option(
            "--deep",
            help="Also decode all shards, and check every number against the rules of SPEC.md.",
        ),
    ] = False,
    signed: Annotated[
        bool,
        typer.Option(
            "--signed", help="Also check that somebody has signed the cache, and say who."
        ),
    ] = False,
    trusted_key: Annotated[
        list[str],
        typer.Option(
            "--trusted-key",
            metavar="KEY",
            help="With --signed: a key, or its .pub file, by one of which it must be signed; repeat.",
        ),
    ] = [],  # noqa: B006  Typer reads it
) -> None:
    """Checks the size and sha256 of every shard, and with --deep the content. Exit code 1 for a
    damaged cache.
    """
    reader = CacheReader(cache)
    shards = len(reader.manifest.shards)
    by = []
    if signed or trusted_key:
        by = [str(each) for each in check_signed(cache, reader.manifest_sha256, trusted_key)]
    with ProgressBar(total=shards, unit="shard", desc="verify", leave=False) as bar:
        problems = verify_cache(cache, deep=deep, on_shard=lambda _: bar.update())
    checked = "every number as the specification asks" if deep else "all as the manifest says"
    found: dict[str, Any] = {
        "cache": redacted(cache),
        "shards": shards,
        "deep": deep,
        "problems": problems,
    }
    if by:
        found["signed_by"] = by
        checked += f"; signed by {'; '.join(by)}"
    if problems:
        if as_json():
            print_result(found, "")
        raise DamagedCacheError("; ".join(problems))
    print_result(found, f"{redacted(cache)}: {numbered(shards, 'shard')}, {checked}")


def derive(
    cache: Cache, out: Output, shard_tokens: ShardTokens = SHARD_TOKENS, **changes: Any
) -> None:
    """Makes a smaller cache from a finished one, without the teacher. Resumes an interrupted run.

    A setting whose option is not given stays unchanged.
    """
    asked = parse_options(
        DeriveOptions, {name: value for name, value in changes.items() if value is not None}
    )
    if not asked.model_fields_set:
        raise ConfigError("nothing is to change; see the options in `teacher-cache derive --help`")
    with _bar("derive", CacheReader(cache).manifest.statistics.tokens) as bar:
        manifest = derive_cache(cache, out, asked, shard_tokens=shard_tokens, on_tokens=bar.update)
    register(out, manifest)
    print_result(facts(manifest, out), describe(manifest, out))


def options_of(model: type[BaseModel]) -> dict[str, Any]:
    """The fields of ``model`` as annotations of Typer options, with the default None."""
    return {
        name: Annotated[field.annotation, typer.Option(help=field.description, show_default=False)]
        for name, field in model.model_fields.items()
    }


def give_options(command: Callable[..., None], options: dict[str, Any]) -> None:
    """Replaces ``**changes`` by these options, in the signature that Typer reads."""
    own = [
        p
        for p in inspect.signature(command, eval_str=True).parameters.values()
        if p.kind is not p.VAR_KEYWORD
    ]
    more = [
        inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=a)
        for n, a in options.items()
    ]
    command.__signature__ = inspect.Signature([*own, *more])  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *more)}


give_options(derive, options_of(DeriveOptions))


def merge(
    out: Output,
    caches: Annotated[
        list[str],
        typer.Argument(metavar="CACHE CACHE ...", help="Finished caches: folders or fsspec URLs."),
    ],
    number_ids: Annotated[
        bool,
        typer.Option(
            "--number-ids",
            help="Put 0/, 1/, ... before the sequence ids of each cache, for caches with equal "
            "ids.",
        ),
    ] = False,
    shard_tokens: ShardTokens = SHARD_TOKENS,
) -> None:
    """Merges caches with the same teacher and tokenizer into one. Resumes an interrupted run."""
    tokens = sum(CacheReader(cache).manifest.statistics.tokens for cache in caches)
    with _bar("merge", tokens) as bar:
        manifest = merge_caches(
            caches, out, number_ids=number_ids, shard_tokens=shard_tokens, on_tokens=bar.update
        )
    register(out, manifest)
    print_result(facts(manifest, out), describe(manifest, out))


@contextmanager
def _bar(name: str, tokens: int) -> Iterator[ProgressBar]:
    with ProgressBar(
        total=tokens, unit="tok", unit_scale=True, desc=name, leave=False, dynamic_ncols=True
    ) as bar:
        yield bar
