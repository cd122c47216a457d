"""The dataset card that every cache carries, so that a hub or a colleague knows what the folder is."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cache_format.manifest import Manifest


def dataset_card(manifest: Manifest) -> str:
    """README.md of a cache. The front matter names the shards, so that ``datasets`` does not load the JSON instead."""
    teacher, data, store, totals = manifest.teacher, manifest.data, manifest.store, manifest.statistics
    head = "-" if totals.head_mass is None else f"{totals.head_mass:.1%}"
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

A [Logitcask](https://pypi.org/project/logitcask/) cache: a sparse summary of the teacher's next-token distribution per token.

| | |
| --- | --- |
| teacher | {teacher.model} ({teacher.engine}, {teacher.dtype}) |
| data | {data.source}, split {data.split}, {data.kind}, loss mask: {data.mask_policy} |
| tokens | {totals.tokens:,} in {totals.sequences:,} sequences; {totals.positions:,} kept positions |
| head | top {store.top_k}, holding {head} of the mass on average |
| size | {totals.bytes:,} bytes, {totals.bytes_per_token:.1f} per token |
| teacher's loss on the text | {loss} |
| fingerprint | `{manifest.fingerprint}` |

```python
from cache_format import CacheReader

cache = CacheReader("path/to/this/folder")
sequence = cache[0]          # input_ids, positions, ids, logprobs, tail_logprob, ...
```
"""
