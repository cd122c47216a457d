"""The model card of a trained student."""

from __future__ import annotations

from pathlib import Path

from logitcask.train.output.metrics_file import RunMetrics, kind_of


def model_card(metrics: RunMetrics, output: Path) -> str:
    """``README.md`` of the student in ``output``, from the content of metrics.json."""
    before, after = metrics["before"], metrics["after"]
    losses = " + ".join(f"{weight} x {name}" for name, weight in metrics["losses"])
    rows = "\n".join(
        f"| {name} | {value:.4f} | {after[name]:.4f} | {kind_of(metrics, name)} |"
        for name, value in before.items()
    )
    reference = metrics.get("reference")
    judged = (
        "held-out positions"
        if reference is None
        else f"positions of the reference cache `{reference['fingerprint']}` of {reference['teacher']}, whose texts it has not learnt from"
    )
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- knowledge-distillation
- logitcask
---
# {metrics["run"]}

{metrics["student"]["architecture"]} of {metrics["student"]["parameters"]:,} parameters, distilled from {metrics["teacher"]["model"]}
through a cache of its next-token distributions on {metrics["cache"]["source"]} (fingerprint `{metrics["cache"]["fingerprint"]}`), with
Logitcask: {losses}, {metrics["steps"]} steps, seed {metrics["seed"]}.

On {metrics["held_out_positions"]:,} {judged} ({metrics["kl_kind"]}):

| metric | before | after | exactness |
| --- | --- | --- | --- |
{rows}

{_of_teacher(metrics["teacher"]["ce"])}`report.html` shows the curves.

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{output}")
```

As a server:

```
vllm serve {output}
```

Benchmarks, with `pip install 'logitcask[lm-eval]'`:

```
lm_eval --model hf --model_args pretrained={output} --tasks hellaswag,arc_easy,piqa --batch_size auto
```
"""


def _of_teacher(ce: float | None) -> str:
    """The sentence on the teacher's own cross-entropy (nats); empty if it is not known."""
    return "" if ce is None else f"The teacher's own cross-entropy there is {ce:.4f} nats. "
