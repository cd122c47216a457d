"""The dataset card of a cache, which explains the folder to people and hubs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from logitcask.cache_format.describe import describe_head, describe_tail

if TYPE_CHECKING:
    from logitcask.cache_format.manifest import Manifest

_TOP_BYTES = 4096
"""Of a card: more than its front matter, which names this format."""


def dataset_card(manifest: Manifest) -> str:
    """README.md of a cache. The front matter names the shards, so that ``datasets`` loads these and
    not the JSON.
    """
    teacher, data, totals = manifest.teacher, manifest.data, manifest.statistics
    loss = "-" if totals.teacher_ce is None else f"{totals.teacher_ce:.3f} nats"
    return f"""---
configs:
- config_name: default
  data_files:
  - split: {"".join(c if c.isalnum() else "_" for c in data.split)}
    path: data/*.arrow
tags:
- knowledge-distillation
- logitcask
---
# Teacher logprobs of {teacher.model} on {data.source}

A Logitcask cache: a sparse summary of the teacher's next-token distribution per token.

| | |
| --- | --- |
| teacher | {teacher.model} ({teacher.engine}, {teacher.dtype}) |
| data | {data.source}, split {data.split}, {data.kind}, loss mask: {data.mask_policy} |
| tokens | {totals.tokens:,} in {totals.sequences:,} sequences; {totals.positions:,} kept positions |
| head | {describe_head(manifest)} |
| tail | {describe_tail(manifest)} |
| size | {totals.bytes:,} bytes, {totals.bytes_per_token:.1f} per token |
| teacher's loss on the text | {loss} |
| fingerprint | `{manifest.fingerprint}` |

```python
from logitcask import CacheReader

cache = CacheReader("hf://datasets/ORG/NAME")  # where this card stands: the Hub, a bucket, a folder
sequence = cache[0]  # input_ids, positions, ids, logprobs, tail_logprob, samples, ...
```

`teacher-cache pull URL FOLDER` copies it, every shard verified; `train-student` trains from it. `datasets.load_dataset` opens the
shards, too; what is packed in them is described in `cache_format/SPEC.md` of Logitcask.
"""


def is_card(file: Path) -> bool:
    """Whether ``file`` is the card of a cache."""
    try:
        with open(file, "rb") as handle:
            return b"\n- logitcask\n" in handle.read(_TOP_BYTES)
    except OSError:
        return False
