"""Time and peak memory of losses through the lm_head: hidden states in, gradients of hidden states
and head out.

The yardstick is plain torch cross-entropy over whole logits, which is what fine-tuning costs. All
methods take turns, in rounds; what is reported are medians and their ratios within the run. Peak
memory is taken in a process of its own per method, beyond what was there before (weights, inputs, a
dense teacher's logits) and beyond the gradients that it leaves.

    python benchmarks/loss.py [--sizes 49k-1024 152k-2048] [--rounds 5]

Sizes are run and stored one by one in benchmarks/results/loss.json; docs/speed.md has the table.
What needs CUDA is left out without it.

Shapes: T positions, V vocabulary, H hidden size, K head entries, S draws.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from machine import machine
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from transformers import LlamaConfig, LlamaForCausalLM

from logitcask.train.config import TrainConfig
from logitcask.train.head.chunked import head_losses
from logitcask.train.head.lm_head import LogitsHead
from logitcask.train.loop.objective import Objective
from logitcask.train.losses import SparseTeacher, TailDraws

RESULTS = Path(__file__).parent / "results" / "loss.json"
SIZES = {
    "49k-1024": (1024, 49_152, 576),
    "49k-2048": (2048, 49_152, 576),
    "152k-1024": (1024, 151_936, 896),
    "152k-2048": (2048, 151_936, 896),
}
K, DRAWS = 64, 16
BASELINE = "cross-entropy, whole logits"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
RECIPE = [{"name": "forward_kl"}, {"name": "ranking", "weight": 2.0, "k": 5}]


class Inputs:
    """Random weights, hidden states and a sparse teacher of these sizes."""

    def __init__(self, size: str) -> None:
        torch.manual_seed(0)
        self.T, self.V, self.H = SIZES[size]
        config = LlamaConfig(
            vocab_size=self.V,
            hidden_size=self.H,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=1,
        )
        self.head = LogitsHead(LlamaForCausalLM(config).to(DEVICE, DTYPE))
        assert isinstance(self.head.lm_head, nn.Linear)
        self.weight = self.head.lm_head.weight
        self.hidden = torch.randn(self.T, self.H, device=DEVICE, dtype=DTYPE)
        self.target = torch.randint(self.V, (self.T,), device=DEVICE)

    def teacher(self, kind: str) -> SparseTeacher:
        """``head``: K entries everywhere. ``ragged``: 1 to K of them, and draws from the tail.
        ``prior``: and a prior.
        """
        ids = torch.stack(
            [torch.randperm(self.V, device=DEVICE)[: K + DRAWS] for _ in range(self.T)]
        )
        logprobs = (2 * torch.randn(self.T, K, device=DEVICE)).log_softmax(1).sort(
            1, descending=True
        ).values - 0.1
        head = ids[:, :K].clone()
        samples = None
        if kind == "ragged":
            out = torch.arange(K, device=DEVICE) >= torch.randint(
                1, K + 1, (self.T, 1), device=DEVICE
            )
            head, logprobs, samples = (
                head.masked_fill(out, -1),
                logprobs.masked_fill(out, -torch.inf),
                ids[:, K:],
            )
        tail = torch.log1p(-logprobs.exp().sum(1).clamp_max(1 - 1e-6))
        return SparseTeacher(
            ids=head,
            logprobs=logprobs,
            tail_logprob=tail,
            target_ids=self.target,
            target_logprob=logprobs[:, 0],
            vocab_size=self.V,
            draws=None
            if samples is None
            else TailDraws(samples, (tail - 6).unsqueeze(1).expand(samples.shape).contiguous()),
            prior=torch.rand(self.V, device=DEVICE).softmax(0) if kind == "prior" else None,
        )


Step = Callable[[], Any]


def ours(inputs: Inputs, kind: str, losses: list[dict[str, Any]], ce_weight: float) -> Step:
    fields = {"cache": "-", "student": {"init_from": "-"}, "training": {"output_dir": "-"}}
    objective = Objective(
        TrainConfig.model_validate({**fields, "losses": losses, "ce_weight": ce_weight})
    )
    teacher = inputs.teacher(kind)

    def step() -> None:
        hidden = inputs.hidden.detach().requires_grad_()
        head_losses(inputs.head, hidden, objective.per_chunk(teacher)).objective.backward()

    return step


def dense(inputs: Inputs, loss: Callable[[Tensor], Tensor]) -> Step:
    """A loss of whole logits, by autograd."""

    def step() -> None:
        hidden = inputs.hidden.detach().requires_grad_()
        loss(linear(hidden, inputs.weight)).backward()

    return step


def naive_sparse_kl(inputs: Inputs) -> Step:
    """The ghost's KL + CE as one would write it down."""
    teacher = inputs.teacher("head")
    p, m = teacher.logprobs.exp(), teacher.tail_logprob.exp()

    def loss(logits: Tensor) -> Tensor:
        log_q = logits.float().log_softmax(1)
        on_head = log_q.gather(1, teacher.ids)
        log_Q = torch.log1p(-on_head.exp().sum(1).clamp_max(1 - 1e-6))
        kl = (p * (teacher.logprobs - on_head)).sum(1) + m * (teacher.tail_logprob - log_Q)
        ce = -log_q.gather(1, teacher.target_ids.unsqueeze(1)).squeeze(1)
        return (kl + 0.5 * ce).sum()

    return dense(inputs, loss)


def trl_jsd(inputs: Inputs) -> Step:
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    teacher = 2 * torch.randn(1, inputs.T, inputs.V, device=DEVICE, dtype=DTYPE)
    return dense(
        inputs,
        lambda logits: GKDTrainer.generalized_jsd_loss(
            logits.unsqueeze(0), teacher, reduction="sum"
        ),
    )


def liger_jsd(inputs: Inputs) -> Step:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(compiled=DEVICE == "cuda")
    teacher_weight = torch.randn_like(inputs.weight)

    def step() -> None:
        hidden = inputs.hidden.detach().requires_grad_()
        loss(hidden, inputs.weight, inputs.hidden, teacher_weight, inputs.target).backward()

    return step


def liger_ce(inputs: Inputs) -> Step:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")

    def step() -> None:
        hidden = inputs.hidden.detach().requires_grad_()
        loss(inputs.weight, hidden, inputs.target).backward()

    return step


METHODS: dict[str, Callable[[Inputs], Step]] = {
    BASELINE: lambda i: dense(
        i, lambda logits: cross_entropy(logits.float(), i.target, reduction="sum")
    ),
    "forward KL (ragged head + draws) + CE": lambda i: ours(i, "ragged", RECIPE[:1], 0.5),
    "forward KL (ragged head + draws) + ranking + CE": lambda i: ours(i, "ragged", RECIPE, 0.5),
    "forward KL (ghost, K = 64) + ranking + CE": lambda i: ours(i, "head", RECIPE, 0.5),
    "forward KL (prior, K = 64) + ranking + CE": lambda i: ours(i, "prior", RECIPE, 0.5),
    "naive sparse KL (K = 64) + CE": naive_sparse_kl,
    "TRL generalized JSD, dense teacher": trl_jsd,
    "Liger fused linear JSD, teacher's head beside": liger_jsd,
}
if DEVICE == "cuda":
    METHODS["Liger fused linear CE"] = liger_ce


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-of", nargs=2, metavar=("SIZE", "METHOD"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    missing = [package for package in ("trl", "liger_kernel") if find_spec(package) is None]
    if missing:
        parser.exit(
            2,
            f"error: {', '.join(missing)}, to compare with, is not installed; pip install -e '.[bench,dev]'\n",
        )
    if options.memory_of:
        print(peak_memory(*options.memory_of))
        return
    for size in options.sizes:
        memory = {name: memory_in_a_process(size, name) for name in METHODS}
        seconds = times(size, options.rounds)
        store(size, options.rounds, seconds, memory)


def times(size: str, rounds: int) -> dict[str, list[float]]:
    inputs = Inputs(size)
    return taking_turns(inputs, {name: make(inputs) for name, make in METHODS.items()}, rounds)


def taking_turns(inputs: Inputs, steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of each step in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for at in range(rounds + 1):  # the first warms up
        for name, step in steps.items():
            inputs.weight.grad = None
            began = time.perf_counter()
            step()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            if at:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def memory_in_a_process(size: str, method: str) -> int:
    command = [sys.executable, __file__, "--memory-of", size, method]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**17)}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return int(done.stdout.split()[-1])


def peak_memory(size: str, method: str) -> int:
    """Bytes at the peak of one step, beyond what was there before and the gradients of weight
    and hidden states.
    """
    inputs = Inputs(size)
    step = METHODS[method](inputs)
    # Threads, libraries and their workspaces come with the first product of this kind, and stay.
    (inputs.hidden[:64] @ inputs.weight.detach()[:64].t()).log_softmax(1)
    gradients = inputs.weight.element_size() * (inputs.weight.numel() + inputs.hidden.numel())
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before - gradients
    # What was freed before would otherwise be used again unseen: with MALLOC_MMAP_THRESHOLD_, freed
    # is given back.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    step()
    return status("VmHWM") - before - gradients


def status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


def store(size: str, rounds: int, seconds: dict[str, list[float]], memory: dict[str, int]) -> None:
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    T, V, H = SIZES[size]
    base, base_memory = statistics.median(seconds[BASELINE]), memory[BASELINE]
    entry = {
        "machine": {
            **machine(),
            "threads": torch.get_num_threads(),
            "dtype": str(DTYPE).removeprefix("torch."),
        },
        "sizes": {
            "positions": T,
            "vocabulary": V,
            "hidden": H,
            "head": K,
            "draws": DRAWS,
            "rounds": rounds,
        },
        "baseline": {"name": BASELINE, "seconds": base, "mib": base_memory / 2**20},
        "methods": {
            name: {
                "time": statistics.median(taken) / base,
                "time_spread": [min(taken) / base, max(taken) / base],
                "memory": memory[name] / base_memory,
            }
            for name, taken in seconds.items()
        },
    }
    RESULTS.write_text(json.dumps({**found, size: entry}, indent=1) + "\n")
    print(json.dumps(entry, indent=1), flush=True)


if __name__ == "__main__":
    main()
