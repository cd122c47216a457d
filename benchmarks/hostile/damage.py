"""Damage: files change, and the manifest does not; or the manifest alone."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cases import Case, Content


def damage_bits(case: Case) -> None:
    path = case.pick(sorted(case.files))
    case.files[path] = flip_bits(case, case.base.files[path])


def flip_bits(case: Case, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(case.pick([1, 1, 1, 2, 8])):
        changed[int(case.rng.integers(len(changed)))] ^= 1 << int(case.rng.integers(8))
    return bytes(changed)


def damage_bytes(case: Case) -> None:
    path = case.pick(sorted(case.files))
    case.files[path] = change_bytes(case, case.base.files[path])


def change_bytes(case: Case, data: bytes) -> bytes:
    """A run of bytes overwritten, cut out, inserted, repeated, or everything after it cut off."""
    start, stop = sorted(int(each) for each in case.rng.integers(0, len(data) + 1, 2))
    if case.rng.random() < 0.5:
        stop = min(stop, start + int(case.rng.integers(1, 65)))
    run = case.rng.bytes(stop - start)
    return {
        "random": lambda: data[:start] + run + data[stop:],
        "zero": lambda: data[:start] + bytes(stop - start) + data[stop:],
        "ones": lambda: data[:start] + b"\xff" * (stop - start) + data[stop:],
        "cut": lambda: data[:start] + data[stop:],
        "insert": lambda: data[:start] + run + data[start:],
        "repeat": lambda: data[:stop] + data[start:],
        "truncate": lambda: data[:start],
        "few bytes lost": lambda: data[: -int(case.rng.integers(1, 17))],
    }[
        case.pick(
            ["random", "zero", "ones", "cut", "insert", "repeat", "truncate", "few bytes lost"]
        )
    ]()


def damage_places(case: Case) -> None:
    """Shards swapped, doubled, missing, or something there that is no file."""
    first, second = (entry["path"] for entry in case.rng.permutation(case.manifest["shards"])[:2])
    path = case.pick([first, *(path for path in case.files if path != "manifest.json")])
    there = case.base.files[path]
    changes: list[dict[str, Content | None]] = [
        {first: case.base.files[second], second: case.base.files[first]},
        {first: case.base.files[second]},
        {path: None},
        {path: b""},
        {path: Path.mkdir},
        {path: os.mkfifo},
        {path: lambda at: at.symlink_to("/dev/zero")},
        {path: lambda at: at.symlink_to("/etc/passwd")},
        {path: lambda at: at.symlink_to(at)},
        {path: lambda at: at.symlink_to("nowhere")},
        {
            path: lambda at: (
                (at.parent / "elsewhere").write_bytes(there) and at.symlink_to("elsewhere")
            )
        },
        {"data/shard-99999.arrow": case.base.files[second]},
        {".build/header.json": b"{"},
    ]
    for at, content in case.pick(changes).items():
        if content is None:
            del case.files[at]
        else:
            case.files[at] = content


NUMBERS: list[Any] = [
    0,
    1,
    -1,
    2,
    255,
    256,
    257,
    2**16,
    2**24,
    2**24 + 1,
    2**31 - 1,
    2**31,
    2**53,
    2**62,
    2**63 - 1,
    2**63,
]
NUMBERS += [
    -(2**63),
    2**64,
    10**30,
    10**400,
    -(10**400),
    0.0,
    -0.0,
    0.5,
    1.5,
    3.0,
    1e-300,
    5e-324,
    1e300,
]
NUMBERS += [2.0**-20, 2.0**-16, 2.0**-3, 0.1, float("nan"), float("inf"), float("-inf")]
OTHERS: list[Any] = [
    None,
    True,
    False,
    "",
    "1",
    "logitcask",
    "\0",
    "\ud800",
    "x" * 70_000,
    [],
    {},
    [[]],
    [None],
    {"a": 1},
]
PATHS = [
    "../shard.arrow",
    "data/../../x.arrow",
    "/etc/passwd",
    "data/../manifest.json",
    "data\\shard-00000.arrow",
]
PATHS += [
    "data/shard-00000.arrow\0",
    "data/shard-00000.arrow\n",
    "data/.arrow",
    "data//x.arrow",
    "data/nowhere.arrow",
]
PATHS += [
    "data/" + "x" * 300 + ".arrow",
    "data/SHARD-00000.ARROW",
    "file:///etc/passwd",
    "tail_prior.arrow",
    ".",
]


def edit_manifest(case: Case) -> None:
    """One to three values, keys or entries changed."""
    for _ in range(case.pick([1, 1, 1, 2, 3])):
        edit = case.pick([edit_value, edit_value, edit_value, edit_store, edit_shards, edit_path])
        try:
            edit(case)
        except (TypeError, KeyError, IndexError, ValueError, AttributeError):
            continue  # an earlier edit has removed what this one is about
    case.put_manifest()


def edit_value(case: Case) -> None:
    holder, key = case.pick(list(places_in(case.manifest)))
    value = holder[key]
    changes: list[Callable[[], Any]] = [
        lambda: case.pick(NUMBERS),
        lambda: copy.deepcopy(case.pick(OTHERS)),  # a later edit may change what is inside
        lambda: {"nested": [value]},
        lambda: str(value),
    ]
    if isinstance(value, int | float):
        changes += [
            lambda: value + 1,
            lambda: value - 1,
            lambda: -value,
            lambda: value * 2,
            lambda: value / 2,
        ]
    if isinstance(value, str) and value:
        changes += [
            lambda: value[:-1],
            lambda: value + "0",
            lambda: value[::-1],
            lambda: value.upper(),
        ]
    what = case.pick(["change", "change", "change", "delete", "rename"])
    if what == "change":
        holder[key] = case.pick(changes)()
    elif what == "delete" or isinstance(holder, list):
        del holder[key]
    else:
        holder[key + "_"] = holder.pop(key)


def places_in(node: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything in a JSON document."""
    items = (
        node.items()
        if isinstance(node, dict)
        else enumerate(node)
        if isinstance(node, list)
        else ()
    )
    for key, value in items:
        yield node, key
        yield from places_in(value)


def edit_store(case: Case) -> None:
    case.manifest["store"][case.pick(sorted(case.manifest["store"]))] = copy.deepcopy(
        case.pick([*NUMBERS, *OTHERS])
    )


def edit_shards(case: Case) -> None:
    shards = case.manifest["shards"]
    first, second = (int(each) for each in case.rng.permutation(len(shards))[:2])
    what = case.pick(["swap", "drop", "double", "number", "number", "number", "no prior"])
    if what == "swap":
        shards[first], shards[second] = shards[second], shards[first]
    elif what == "drop":
        del shards[first]
    elif what == "double":
        shards.append(copy.deepcopy(shards[first]))
    elif what == "no prior":
        case.manifest["tail_prior"] = None
    else:
        keys = [
            "sequences",
            "sequences_per_batch",
            "bytes",
            "tokens",
            "positions",
            "entries",
            "draws",
        ]
        shards[first][case.pick(keys)] = case.pick(NUMBERS)


def edit_path(case: Case) -> None:
    holder = case.pick([*case.manifest["shards"], *filter(None, [case.manifest["tail_prior"]])])
    holder["path"] = case.pick(PATHS)


def edit_text(case: Case) -> None:
    """Documents that a JSON parser should not be shown."""
    text = case.base.files["manifest.json"]
    key = case.pick(
        [
            b"format_version",
            b"sequences",
            b"logprob_step",
            b"path",
            b"shards",
            b"vocab_size",
            b"bytes",
        ]
    )
    at = text.index(b'"' + key + b'"')
    nested = int(case.pick([100, 300, 10_000, 200_000]))
    case.files["manifest.json"] = case.pick(
        [
            lambda: b"\xef\xbb\xbf" + text,
            lambda: text.decode().encode("utf-16"),
            lambda: text.replace(b"train", b"tr\xff\xfein"),
            lambda: text.replace(b"train", b"tr\\ud800in"),
            lambda: text.replace(b"train", b"tr\0in"),
            lambda: (
                text[:at]
                + b'"%s": %s, ' % (key, case.pick([b"0", b"2", b"null", b'"x"']))
                + text[at:]
            ),
            lambda: text.replace(
                b'"config": {', b'"config": {"x": ' + b"[" * nested + b"]" * nested, 1
            ),
            lambda: text.replace(
                b'"config": {', b'"config": {"x": ' + b'{"x":' * nested + b"1" + b"}" * nested, 1
            ),
            lambda: b"[" * nested,
            lambda: text.replace(b'"logprob_step": ', b'"logprob_step": 1e999 , "x":', 1),
            lambda: text.replace(b'"seed": ', b'"seed": 1' + b"0" * 5000 + b', "x":', 1),
            lambda: text.replace(b'"seed": ', b'"seed": 0' + b"0" * 10 + b', "x":', 1),
            lambda: text.replace(b'"seed": ', b'"seed": Infinity, "x":', 1),
            lambda: b" " * (1 << 10) + text,
            lambda: text + b"}",
            lambda: text + text,
            lambda: case.pick([b"", b"null", b"[]", b"{}", b'"logitcask"', b"1", b"\0" * 100]),
        ]
    )()
