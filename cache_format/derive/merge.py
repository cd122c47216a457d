"""``merge``: one cache from several of the same teacher."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from logitcask.cache_format.derive.write import PUSH_IT, SHARD_TOKENS, OnTokens, Part, write
from logitcask.cache_format.differences import describe_difference
from logitcask.cache_format.errors import UserError
from logitcask.cache_format.manifest import DataIdentity, DerivedFrom, Manifest
from logitcask.cache_format.reader import CacheReader
from logitcask.cache_format.storage.files import local_folder


def merge(
    sources: list[str],
    output: Path,
    *,
    number_ids: bool = False,
    shard_tokens: int = SHARD_TOKENS,
    on_tokens: OnTokens = lambda _: None,
) -> Manifest:
    """Writes one cache with the sequences of several, in order; resumes an interrupted run.

    ``number_ids`` puts "0/" before the sequence ids of the first cache, "1/" before those of the
    second, and so on. Raises UserError if teacher, tokenizer or store settings differ, naming the
    difference; if only some caches hold texts written by the teacher; for an id that occurs twice;
    and for a URL as output.
    """
    output = local_folder(output, PUSH_IT)
    if len(sources) < 2:
        raise UserError(f"merge makes one cache of two or more; {len(sources)} given")
    caches = [CacheReader(source) for source in sources]
    for source, cache in zip(sources[1:], caches[1:], strict=True):
        ours, theirs = _common_ground(caches[0].manifest), _common_ground(cache.manifest)
        if ours != theirs:
            raise UserError(
                f"{sources[0]} and {source} do not belong together: {describe_difference(ours, theirs)}; merge caches of one "
                "teacher and tokenizer, and bring different store settings together with `teacher-cache derive` first"
            )
        policies = [each.manifest.data.mask_policy for each in (caches[0], cache)]
        if policies[0] != policies[1] and "generated" in policies:
            # It decides which sequences are held out together.
            raise UserError(
                f"{sources[0]} and {source} do not belong together: data.mask_policy: {' -> '.join(policies)}; do not merge "
                "what the teacher wrote with other text, but list both caches where you train"
            )
    parts = [
        Part(cache, rename=(lambda name, n=n: f"{n}/{name}") if number_ids else lambda name: name)  # type: ignore[misc]
        for n, cache in enumerate(caches)
    ]
    made_of = DerivedFrom(
        command="merge",
        fingerprints=tuple(cache.manifest.fingerprint for cache in caches),
        options={"number_ids": True} if number_ids else {},
    )
    data = _merged_data([cache.manifest.data for cache in caches])
    return write(output, parts, caches[0].manifest.store, data, made_of, shard_tokens, on_tokens)


def _common_ground(manifest: Manifest) -> dict[str, Any]:
    """The part of the headers that must be equal for a merge."""
    identity = manifest.content_identity()
    return {
        "teacher": identity["teacher"],
        "tokenizer": manifest.tokenizer.sha256,
        "store": identity["store"],
    }


def _merged_data(parts: list[DataIdentity]) -> DataIdentity:
    def common(values: Iterable[str]) -> str:
        distinct = list(dict.fromkeys(values))
        return distinct[0] if len(distinct) == 1 else "mixed"

    counters: dict[str, int] = {}
    generation = parts[0].generation
    for part in parts:
        for name, count in part.counters.items():
            counters[name] = counters.get(name, 0) + count
    return DataIdentity(
        source=" + ".join(dict.fromkeys(part.source for part in parts)),
        split=common(part.split for part in parts),
        kind=common(part.kind for part in parts),
        mask_policy=common(part.mask_policy for part in parts),
        max_length=max(part.max_length for part in parts),
        overlong=common(part.overlong for part in parts),
        sha256="",
        generation=generation if all(part.generation == generation for part in parts) else None,
        counters=counters,
    )
