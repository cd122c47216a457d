"""What ``teacher-cache estimate`` says of a cache's bytes, beside the cache that is then built.

    python benchmarks/estimate.py [--tokens 4000] [--only NAME ...] [--out FILE]

Ten kinds of text, all made from what comes with Python: prose, code, Chinese, Japanese and Korean,
short sentences, chats, chats with short answers, chats of several turns, rows of numbers, logs as
JSON, and long documents. Some with other stores, and some in small shards. The teacher is
SmolLM2-135M by transformers. Each cache is estimated twice: from the config alone, and with a probe
of the engine. A range holds if the bytes on disk lie in it. Results go to
benchmarks/results/estimate.json, a case at a time.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from machine import machine

from logitcask.pipeline.builder.run import build
from logitcask.pipeline.config import BuildConfig
from logitcask.pipeline.estimate.run import estimate

RESULTS = Path(__file__).parent / "results" / "estimate.json"
STORES: dict[str, dict[str, Any]] = {
    "default": {},
    "top 50": {"top_k": 50, "min_k": 50, "min_probability": None, "tail_samples": 0},
    "draws alone": {"top_k": 0, "min_k": 0, "min_probability": None, "tail_samples": 64},
    "draws with logprobs": {"top_k": 16, "min_k": 16, "sample_logprobs": True},
}
CASES = (
    *((kind, "default", 1_000_000) for kind in ("prose", "code", "cjk", "sentences", "chats")),
    *(
        (kind, "default", 1_000_000)
        for kind in ("short answers", "turns", "numbers", "logs", "long")
    ),
    *((kind, "default", 600) for kind in ("prose", "chats", "sentences")),
    *(
        (kind, store, 1_000_000)
        for kind in ("prose", "short answers")
        for store in ("top 50", "draws alone", "draws with logprobs")
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4000, help="of each cache")
    parser.add_argument("--only", nargs="+", help="kinds of text")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    result: dict[str, Any] = {"machine": machine(), "teacher": "smollm2-135m", "cases": {}}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_texts(folder)
        for kind, store, shard_tokens in CASES:
            if arguments.only and kind not in arguments.only:
                continue
            name = f"{kind}, {store}" + (", small shards" if shard_tokens < 10_000 else "")
            config = config_of(folder, kind, STORES[store], shard_tokens, arguments.tokens)
            result["cases"][name] = measured(config)
            shutil.rmtree(config.output)
            print(f"{name:40} {line(result['cases'][name])}", flush=True)
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def config_of(
    folder: Path, kind: str, store: dict[str, Any], shard_tokens: int, tokens: int
) -> BuildConfig:
    file = folder / f"{kind}.jsonl"
    chats = file.read_text(encoding="utf-8").startswith('{"messages"')
    return BuildConfig.model_validate(
        {
            "teacher": {"model": "smollm2-135m", "backend": "transformers"},
            "data": {
                "path": str(file),
                "max_length": 512,
                "max_tokens": tokens,
                **({"messages_field": "messages"} if chats else {}),
            },
            "store": {**store, "shard_tokens": shard_tokens},
            "audit": {"sequences": 0},
            "log": False,
            "output": str(folder / "cache"),
        }
    )


def measured(config: BuildConfig) -> dict[str, Any]:
    """Bytes of the cache and both estimates of them."""
    manifest = build(config).manifest
    assert isinstance(config.output, Path)
    bytes_ = sum(file.stat().st_size for file in config.output.rglob("*") if file.is_file())
    found: dict[str, Any] = {
        "bytes": bytes_,
        "tokens": manifest.statistics.tokens,
        "kept_positions": manifest.statistics.positions,
        "shards": len(manifest.shards),
    }
    for name, probe in (("estimate", False), ("probe", True)):
        size = estimate(config, measure=probe).forecasts[0].bytes
        found[name] = {
            "low": round(size.low),
            "likely": round(size.likely),
            "high": round(size.high),
            "holds": size.low <= bytes_ <= size.high,
        }
    return found


def line(case: dict[str, Any]) -> str:
    parts = [f"{case['bytes'] / 1e3:7.0f} kB"]
    for name in ("estimate", "probe"):
        range_ = case[name]
        parts.append(
            f"{name} {range_['low'] / 1e3:5.0f} to {range_['high'] / 1e3:5.0f}"
            f" ({range_['likely'] / case['bytes']:.2f}){'' if range_['holds'] else ' OUT'}"
        )
    return "  ".join(parts)


# --- texts ----------------------------------------------------------------------------------------


def write_texts(folder: Path) -> None:
    """A file of rows for each kind."""
    import asyncio
    import encodings
    from pydoc_data.topics import topics

    import test.cjkencodings

    rng = random.Random(0)
    pages = [page for _, page in sorted(topics.items())]
    library = Path(asyncio.__file__).parents[1]
    code = [file.read_text(encoding="utf-8") for file in sorted(library.glob("[a-m]*.py"))[:40]]
    # One text for each script: the others are the same ones in other encodings.
    east = [
        (Path(place) / f"{name}-utf8.txt").read_text(encoding="utf-8")
        for place in test.cjkencodings.__path__
        for name in ("big5", "gb18030", "shift_jis", "euc_kr")
    ]
    paragraphs = [
        re.sub(r"\s+", " ", part).strip() for page in pages for part in page.split("\n\n")
    ]
    paragraphs = [part for part in paragraphs if len(part) > 150]
    sentences = [part for text in paragraphs for part in re.split(r"(?<=[.]) ", text)]
    rng.shuffle(paragraphs)
    write(folder, "prose", documents(pages))
    write(folder, "code", documents(code))
    write(folder, "cjk", documents(east))
    write(folder, "sentences", documents(part for part in sentences if 30 < len(part) < 90))
    write(folder, "long", documents("\n".join(pages[at : at + 20]) for at in range(0, 80, 20)))
    write(folder, "chats", (chat(f"What is said of {part[:60]}?", part) for part in paragraphs))
    write(
        folder,
        "short answers",
        (chat(f"How does this begin? {part}", part[:30]) for part in paragraphs),
    )
    write(
        folder,
        "turns",
        (
            chat(*(word for part in paragraphs[at : at + 4] for word in (part[:40], part[40:300])))
            for at in range(0, len(paragraphs) - 4, 4)
        ),
    )
    number = lambda: f"{rng.gauss(100, 30):.2f}"  # noqa: E731
    rows = ["\n".join(",".join(number() for _ in range(8)) for _ in range(40)) for _ in range(30)]
    write(folder, "numbers", documents(rows))
    names = sorted(Path(encodings.__path__[0]).glob("*.py"))
    logs = [
        "\n".join(
            json.dumps(
                {
                    "time": f"2026-05-{rng.randint(10, 28)}T12:{rng.randint(10, 59)}:00Z",
                    "level": rng.choice(["INFO", "INFO", "WARN", "ERROR"]),
                    "path": f"/api/{rng.choice(names).stem}",
                    "ms": rng.randint(1, 900),
                }
            )
            for _ in range(20)
        )
        for _ in range(40)
    ]
    write(folder, "logs", documents(logs))


def documents(texts: Iterable[str]) -> Iterable[dict[str, Any]]:
    return ({"text": text} for text in texts)


def chat(*said: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {
        "messages": [
            {"role": roles[turn % 2], "content": content} for turn, content in enumerate(said)
        ]
    }


def write(folder: Path, kind: str, rows: Iterable[dict[str, Any]]) -> None:
    with open(folder / f"{kind}.jsonl", "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
