"""The parts of ``benchmarks/gpu.py``. Each takes sizes and the work folder, and returns figures and
``checks``.

A check is True, False, or a word why it was not made. Speeds are checked on CUDA alone, at sizes
that mean something.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import loss as losses
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from logitcask.cache_format import CacheReader, UserError
from logitcask.pipeline.config import BuildConfig, StoreConfig, TeacherConfig
from logitcask.pipeline.teachers.model import resolve_model
from logitcask.pipeline.text.python_docs import BUILT_IN

DEVICE = losses.DEVICE
NO_CUDA = "no CUDA here"
PACKAGES = {"flash attention": "flash_attn", "Liger": "liger_kernel", "TRL": "trl"}

Found = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """What is measured: the model, its text, how often, and the losses' sizes (names of
    ``loss.SIZES``).
    """

    model: dict[str, int]
    student_layers: int
    max_length: int
    documents: int
    rounds: int
    steps: int
    batch: int
    losses: tuple[str, ...]


FULL = Sizes(
    model={
        "vocab_size": 151_936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    student_layers=6,
    max_length=1024,
    documents=80,
    rounds=2,
    steps=4,
    batch=2,
    losses=("49k-2048", "152k-2048"),
)
TINY = Sizes(
    model={
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
    },
    student_layers=1,
    max_length=32,
    documents=30,
    rounds=1,
    steps=1,
    batch=2,
    losses=("tiny",),
)
losses.SIZES["tiny"] = (2, 200, 16)


# --- the model ------------------------------------------------------------------------------------


def model_folder(sizes: Sizes, work: Path) -> Path:
    """A random Llama with a tokenizer of bytes, made once.

    Weights are small enough that bfloat16 keeps its limit through all layers. An output head of its
    own gives logits a spread of two nats: flat beside a trained model's, so that every position has
    the most draws a store asks for.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = work / f"model-{sizes.model['vocab_size']}"
    if (folder / "model.safetensors").exists():
        return folder
    alphabet = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(
        models.BPE(vocab={piece: at for at, piece in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>"
    ).save_pretrained(folder)
    per_width = sizes.model["hidden_size"] ** -0.5
    config = LlamaConfig(
        **sizes.model,
        max_position_embeddings=2 * sizes.max_length,
        initializer_range=0.3 * per_width,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    torch.nn.init.normal_(model.lm_head.weight, std=2 * per_width)
    model.to(torch.bfloat16 if DEVICE == "cuda" else torch.float32).save_pretrained(folder)
    return folder


def text_file(sizes: Sizes, work: Path) -> Path:
    """Documents of ``max_length`` tokens each, out of Python's documentation."""
    text = "".join(text for _, text in BUILT_IN["python-docs"]()).encode("ascii", "ignore").decode()
    starts = range(0, sizes.documents * sizes.max_length, sizes.max_length)
    file = work / f"text-{sizes.documents}.jsonl"
    file.write_text(
        "".join(json.dumps({"text": text[at : at + sizes.max_length]}) + "\n" for at in starts)
    )
    return file


def cache_folder(work: Path) -> Path:
    """The cache that ``capture`` leaves; it is the last one that its pipeline has written."""
    folder = work / "written"
    if not (folder / "manifest.json").exists():
        raise SystemExit("error: there is no cache yet; run the part capture first")
    return folder


# --- capture --------------------------------------------------------------------------------------


def capture(sizes: Sizes, work: Path) -> Found:
    """One engine, both widths of its answers: with draws, and (a width that the plugin leaves
    alone) without.
    """
    from capture import Bench, ratios

    from logitcask.pipeline.teachers.rows import ColumnRequest

    folder, store = model_folder(sizes, work), StoreConfig(shard_tokens=10**9)
    config = BuildConfig(
        teacher=TeacherConfig(model=str(folder)),
        data={
            "path": str(text_file(sizes, work)),
            "text_field": "text",
            "max_length": sizes.max_length,
        },
        store=store,
        output=work / "cache",
    )
    for left in ("cache", "plain"):  # by a run that was stopped
        shutil.rmtree(work / left, ignore_errors=True)
    started = time.perf_counter()
    memory: list[Found] = []
    teacher = watched(sizes, memory)(
        config.teacher,
        resolve_model(str(folder), None),
        max_length=sizes.max_length,
        capture=store.capture(),
    )
    start_seconds = time.perf_counter() - started
    try:
        if not memory:  # an engine on a CPU leaves this out
            teacher.check_memory(sizes.max_length)
        (step,) = memory
        try:
            teacher.check_draws(sizes.max_length)
            draws_agree = True
        except UserError as error:
            print(error)
            draws_agree = False
        found = {}
        for label, draws in (("draws", True), ("heads", False)):
            one = teacher
            if not draws:
                plain = store.model_copy(update={"tail_samples": 0, "mass_per_sample": None})
                config = config.model_copy(update={"store": plain, "output": work / "plain"})
                one = copy.copy(teacher)
                one._request = ColumnRequest.of(plain.capture(), teacher.vocab_size)
            ways = (
                ["flat", "raw", "pipeline", "bare"]
                if draws
                else ["undecoded", "flat", "raw", "pipeline", "bare"]
            )
            (work / label).mkdir(exist_ok=True)
            # The cache with draws is the one that later parts read.
            bench = Bench.of(one, config, work if draws else work / label)
            rounds = bench.rounds(ways, sizes.rounds, label)
            found[label] = {
                "tokens": bench.tokens,
                "bare_tokens_per_second": round(statistics.median(rounds["bare"])),
                "ratio_to_bare": {
                    ("stock" if way == "undecoded" else way): r
                    for way, r in ratios(rounds, "bare").items()
                },
            }
        runner = getattr(teacher._llm.llm_engine.vllm_config, "use_v2_model_runner", False)
        second = DEVICE == "cuda" and bool(runner)
        speeds = {
            f"a cache is written at 0.9 of bare scoring, {label}": one["ratio_to_bare"]["pipeline"][
                "median"
            ]
            >= 0.9
            if DEVICE == "cuda"
            else NO_CUDA
            for label, one in found.items()
        }
        return {
            **found,
            "start_seconds": round(start_seconds, 1),
            "first_step": step,
            "teacher": teacher.identity().model_dump(
                mode="json", exclude={"model", "weights_sha256"}
            ),
            "model_runner": 2 if second else 1,
            "checks": {
                "the raw route works": teacher.route == "raw",
                "draws are those of the engine's whole distributions": draws_agree,
                "draws come from model runner V2": second
                or (NO_CUDA if DEVICE != "cuda" else False),
                # 1,024 rows of float32 logits, and what is made of them, several times over.
                "the first full step takes at most six times its logits": (step["ratio"] <= 6)
                if DEVICE == "cuda"
                else NO_CUDA,
                **speeds,
            },
        }
    finally:
        teacher.close()


def watched(sizes: Sizes, memory: list[Found]) -> type:
    """The teacher's class, whose first full steps, at its start on a GPU, leave in ``memory``
    the bytes they took.
    """
    from logitcask.pipeline.teachers.vllm.engine import VllmTeacher

    class Watched(VllmTeacher):
        def check_memory(self, max_length: int) -> None:
            with peak_memory() as taken:
                super().check_memory(max_length)
            logits = 4 * min(1024, sizes.max_length) * self.vocab_size
            memory.append({"bytes": taken[0], "logits_bytes": logits, "ratio": taken[0] / logits})

    return Watched


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Of the whole device (an engine has a process of its own, whose allocator keeps what it has
    taken), else of this process.
    """
    found: list[int] = []
    if DEVICE == "cuda":
        before = torch.cuda.mem_get_info()[0]
        yield found
        found.append(before - torch.cuda.mem_get_info()[0])
    else:
        with host_memory() as taken:
            yield found
        found.append(taken[0])


@contextmanager
def host_memory() -> Iterator[list[int]]:
    """Bytes at the peak of this process, beyond what it held before; files that are mapped do
    not count.
    """
    found: list[int] = []
    before, done = losses.status("RssAnon"), threading.Event()
    peak = [before]

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], losses.status("RssAnon"))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()
    found.append(max(peak[0], losses.status("RssAnon")) - before)


# --- audit ----------------------------------------------------------------------------------------


def audit(sizes: Sizes, work: Path) -> Found:
    """The cache against the model in float32, on the device."""
    from logitcask.pipeline.audit.run import audit as compare

    torch.zeros(1, device=DEVICE)  # what CUDA itself takes of the host comes before
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    with host_memory() as host:
        found = compare(str(cache_folder(work)), sequences=2)
    weights = sum(file.stat().st_size for file in model_folder(sizes, work).glob("*.safetensors"))
    weights *= 2 if DEVICE == "cuda" else 1  # saved in 16 bits, compared in 32
    device = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0
    return {
        "reference": found.reference,
        "compared_seconds": round(time.perf_counter() - started, 1),
        "limit": found.limit,
        "engine_head": found.head.engine,
        "engine_target": found.target.engine,
        "draws": None
        if found.draws is None
        else {"p": found.draws.p_value, "z": found.draws.z_logprob},
        "float32_weights_bytes": weights,
        "host_bytes": host[0],
        "device_bytes": device,
        "problems": list(found.problems),
        "checks": {
            "cache and reference agree": not found.problems,
            "the reference is on the device": device >= weights if DEVICE == "cuda" else NO_CUDA,
            "host memory holds less than half of its weights": host[0] < weights / 2
            if DEVICE == "cuda"
            else NO_CUDA,
        },
    }


# --- kernels --------------------------------------------------------------------------------------

OURS, NAIVE = "forward KL (ghost, K = 64) + ranking + CE", "naive sparse KL (K = 64) + CE"
METHODS = (
    losses.BASELINE,
    "forward KL (ragged head + draws) + CE",
    OURS,
    "forward KL (prior, K = 64) + ranking + CE",
    NAIVE,
)
LIGER = ("Liger fused linear JSD, teacher's head beside", "Liger fused linear CE")


def kernels(sizes: Sizes, work: Path) -> Found:
    """Losses through the lm_head; times and memory as ratios to plain cross-entropy over whole
    logits.
    """
    from logitcask.train.losses import kernels as triton_kernels

    with_liger = find_spec("liger_kernel") is not None
    names = [name for name in (*METHODS, *(LIGER if with_liger else ())) if name in losses.METHODS]
    found: Found = {}
    used, agree, quick, small = [], [], [], []
    for size in sizes.losses:
        inputs = losses.Inputs(size)
        used.append(triton_kernels.usable(inputs.hidden @ inputs.weight.detach().t()))
        agree.append(disagreement(inputs))
        both = losses.taking_turns(
            inputs, {name: losses.METHODS[name](inputs) for name in names}, sizes.rounds
        )
        forward = losses.taking_turns(inputs, forward_steps(inputs), sizes.rounds)
        del inputs
        memory = {name: losses.peak_memory(size, name) for name in names}
        found[size] = {
            "forward_and_backward": over(both, losses.BASELINE),
            "forward": over(forward, losses.BASELINE),
            "memory": {
                name: taken / max(1, memory[losses.BASELINE]) for name, taken in memory.items()
            },
            "gradient_off_by": agree[-1],
        }
        quick.append(found[size]["forward_and_backward"][OURS] <= 1.1)
        small.append(found[size]["memory"][OURS] <= 0.6)
    tolerance = 2e-2 if losses.DTYPE is torch.bfloat16 else 1e-4
    cuda = DEVICE == "cuda"
    return {
        **found,
        "dtype": str(losses.DTYPE).removeprefix("torch."),
        "checks": {
            "the Triton kernels run": all(used),
            "their gradient is that of the naive loss": max(agree) < tolerance,
            "at most 1.1 of plain cross-entropy's time": all(quick) if cuda else NO_CUDA,
            "at most 0.6 of its memory": all(small) if cuda else NO_CUDA,
            "compared with Liger": with_liger or "liger-kernel is not installed",
        },
    }


def forward_steps(inputs: losses.Inputs) -> dict[str, losses.Step]:
    """The same without gradients."""
    teacher = inputs.teacher("head")
    terms = losses.Objective(
        losses.TrainConfig.model_validate(
            {**LOSS_FIELDS, "losses": losses.RECIPE, "ce_weight": 0.5}
        )
    )

    def plain() -> None:
        cross_entropy(linear(inputs.hidden, inputs.weight).float(), inputs.target, reduction="sum")

    def ours() -> None:
        losses.head_losses(inputs.head, inputs.hidden, terms.per_chunk(teacher))

    def naive() -> None:
        log_q = linear(inputs.hidden, inputs.weight).float().log_softmax(1)
        log_q.gather(1, teacher.ids).exp().sum(1).neg().log1p()

    return {
        name: torch.no_grad()(step)
        for name, step in ((losses.BASELINE, plain), (OURS, ours), (NAIVE, naive))
    }


LOSS_FIELDS = {"cache": "-", "student": {"init_from": "-"}, "training": {"output_dir": "-"}}


def disagreement(inputs: losses.Inputs) -> float:
    """Relative difference of the head's gradient between our KL + CE and the same written down
    naively.
    """
    gradients: list[Tensor] = []
    makers: tuple[Callable[[], losses.Step], ...] = (
        lambda: losses.ours(inputs, "head", losses.RECIPE[:1], 0.5),
        lambda: losses.naive_sparse_kl(inputs),
    )
    for make in makers:
        torch.manual_seed(1)  # the same teacher
        step = make()
        inputs.weight.grad = None
        step()
        gradients.append(inputs.weight.grad.float())
    return float((gradients[0] - gradients[1]).norm() / gradients[1].norm())


def over(seconds: dict[str, list[float]], base: str) -> dict[str, float]:
    """Ratios of medians."""
    return {
        name: statistics.median(one) / statistics.median(seconds[base])
        for name, one in seconds.items()
    }


# --- training -------------------------------------------------------------------------------------


def training(sizes: Sizes, work: Path) -> Found:
    """A step from the cache, beside fine-tuning and beside a teacher that is loaded, with each
    kind of attention.
    """
    from training import measure_arms
    from transformers import AutoModelForCausalLM

    from logitcask.train.config import StudentConfig
    from logitcask.train.model.student import build_student

    folder, cache = model_folder(sizes, work), CacheReader(str(cache_folder(work)))
    flash = DEVICE == "cuda" and find_spec("flash_attn") is not None
    options = argparse.Namespace(
        rounds=sizes.rounds, steps=sizes.steps, batch=sizes.batch, length=sizes.max_length
    )
    found, quick = {}, {}
    for attention in ["sdpa", *(["flash_attention_2"] if flash else [])]:
        # Weights of float32, bfloat16 where autocast has it: how fine-tuning in bfloat16 is done.
        # Four students are in memory at once, so the optimizer keeps nothing of them.
        layers = list(range(sizes.student_layers))
        student = build_student(
            StudentConfig(init_from=str(folder), keep_layers=layers, attention=attention), seed=0
        )
        student.to(DEVICE)  # the trainer tries it, and flash attention works on a GPU alone
        teacher = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, attn_implementation=attention
        ).eval()
        times, waits, teacher_seconds = measure_arms(
            options, cache, student, teacher, bf16=True, optim="sgd", use_cpu=DEVICE == "cpu"
        )
        del student, teacher
        step = over(times, "sft")
        quick[attention] = max(step["kd"], step["kd+rank"]) <= 1.1
        found[attention] = {
            "step_over_sft": step,
            "data_wait": {name: max(shares, default=None) for name, shares in waits.items()},
            "teacher_share_of_live": statistics.median(teacher_seconds)
            / statistics.median(times["live"]),
        }
    return {
        **found,
        "checks": {
            "a step from the cache takes at most 1.1 of fine-tuning's": quick["sdpa"]
            if DEVICE == "cuda"
            else NO_CUDA,
            "the same with flash attention": quick.get(
                "flash_attention_2", "flash_attn is not installed"
            ),
        },
    }


# --- distributed ----------------------------------------------------------------------------------


def distributed(sizes: Sizes, work: Path) -> Found:
    """The same training by one process, and by one for every GPU with its weights sharded; on a CPU
    two processes would share what there is, so there is one, over gloo and unsharded."""
    from logitcask.train.config import TrainConfig
    from logitcask.train.run import train

    processes = max(1, torch.cuda.device_count()) if DEVICE == "cuda" else 1
    batch = max(2, processes)
    training = {
        "max_steps": 3,
        "learning_rate": 1e-4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": DEVICE == "cuda",
        "use_cpu": DEVICE == "cpu",
        "seed": 0,
    }
    sharding = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    config: Found = {
        "cache": str(cache_folder(work)),
        # Of fewer layers: the model itself would have nothing to learn.
        "student": {
            "init_from": str(model_folder(sizes, work)),
            "keep_layers": list(range(sizes.student_layers)),
        },
        "losses": losses.RECIPE,
    }

    def fields(name: str, count: int) -> Found:
        return training | {
            "output_dir": str(work / name),
            "per_device_train_batch_size": batch // count,
        }

    sharded = {"fsdp": True, "fsdp_config": sharding} if DEVICE == "cuda" else {}
    file = work / "together.json"  # JSON is YAML
    file.write_text(json.dumps(config | {"training": fields("together", processes) | sharded}))
    launch = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={processes}",
        "-m",
        "logitcask.train",
    ]
    # Both at once: nothing is timed here.
    with subprocess.Popen([sys.executable, *launch, str(file), "--restart"]) as together:
        try:
            train(
                TrainConfig.model_validate(config | {"training": fields("alone", 1)}), restart=True
            )
            if together.wait(timeout=300):
                raise SystemExit(
                    f"error: the sharded training failed with exit code {together.returncode}, see above"
                )
        finally:
            together.kill()
    histories = {}
    for name in ("alone", "together"):
        log = json.loads((work / name / "log.json").read_text())
        histories[name] = [record["loss"] for record in log if "loss" in record]
    apart = max(
        abs(a - b) / abs(a) for a, b in zip(histories["alone"], histories["together"], strict=True)
    )
    return {
        "processes": processes,
        "backend": "nccl" if DEVICE == "cuda" else "gloo",
        "losses": histories,
        "largest_relative_difference": apart,
        "checks": {
            "the losses of every step are those of one process": apart
            < (2e-2 if DEVICE == "cuda" else 1e-4),
            "more than one GPU": processes > 1 or "there is one" if DEVICE == "cuda" else NO_CUDA,
        },
    }
