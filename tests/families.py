"""Tiny random models of many families through both engines and the audit, a process for each.

    python tests/families.py [--families llama gemma2 ...] [--folder FOLDER]

Prints a Markdown table. ``vLLM - transformers`` is the largest difference of any logprob in the
heads and of the targets, in nats, both engines in float32. ``agrees``: the audit passes;
``refused``: it does not complete the cache; ``skipped``: this vLLM does not run the model here. The
exit code is 1 where that is not as ``FAMILIES`` has it.

Scores are as sharp as those of trained models, windows are shorter than the text, and caps are
below the scores, so that a part that an engine leaves out shows.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
MAX_LENGTH = 200
SIZES = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.25,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_OWN_HEAD_SIZE: dict[str, Any] = {"head_dim": None}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LATENT = {
    "q_lora_rank": 32,
    # vLLM's CPU kernel has one size, the real model's: 512 + 64.
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 16,
    "v_head_dim": 32,
}
# model_type, what its config has beyond SIZES (None: not that field), and what comes of it.
FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("llama", {}, "agrees"),
    "qwen2": ("qwen2", _OWN_HEAD_SIZE, "agrees"),
    "qwen3": ("qwen3", {}, "agrees"),
    "qwen3-moe": ("qwen3_moe", {"num_experts": 4, **_EXPERTS}, "agrees"),
    "gemma2": (
        "gemma2",
        {"query_pre_attn_scalar": 4, "attn_logit_softcapping": 1.0, "sliding_window": 32},
        "agrees",
    ),
    "gemma3": ("gemma3_text", {"query_pre_attn_scalar": 4, "sliding_window": 32}, "agrees"),
    "mistral": ("mistral", {"sliding_window": 32}, "agrees"),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, "agrees"),
    "phi3": ("phi3", _OWN_HEAD_SIZE, "agrees"),
    "olmo2": ("olmo2", _OWN_HEAD_SIZE, "agrees"),
    "smollm3": ("smollm3", _OWN_HEAD_SIZE, "agrees"),
    "gpt-neox": ("gpt_neox", {"head_dim": None, "num_key_value_heads": None}, "agrees"),
    "granite": ("granite", _OWN_HEAD_SIZE, "agrees"),
    "starcoder2": ("starcoder2", _OWN_HEAD_SIZE, "agrees"),
    "cohere2": ("cohere2", {"sliding_window": 32}, "refused"),
    "deepseek-v3": (
        "deepseek_v3",
        {
            "head_dim": None,
            "num_key_value_heads": 2,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 2,
            "first_k_dense_replace": 1,
            # As in the config of the real model, which vLLM reads and transformers does not.
            "topk_method": "noaux_tc",
            **_EXPERTS,
            **_LATENT,
        },
        "refused",
    ),
    "gpt-oss": (
        "gpt_oss",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 32},
        "agrees",
    ),
}


def main() -> None:
    """Prints the table; see above."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), metavar="FAMILY"
    )
    parser.add_argument(
        "--folder", type=Path, help="keep models and caches here; default: none is kept"
    )
    parser.add_argument("--one", choices=FAMILIES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(compare(arguments.one, arguments.folder)))
        return
    print(
        "| family | vLLM - transformers | vLLM's cache | transformers' cache |\n| --- | --- | --- | --- |",
        flush=True,
    )
    unexpected = []
    with tempfile.TemporaryDirectory() as temporary:
        for family in arguments.families:
            found = in_a_process(family, arguments.folder or Path(temporary))
            print(
                f"| {family} | {found['largest']} | {found['vllm']} | {found['transformers']} |",
                flush=True,
            )
            outcomes = found["vllm"].partition(":")[0], found["transformers"].partition(":")[0]
            if outcomes != (FAMILIES[family][2], "agrees"):
                unexpected.append(family)
    if unexpected:
        print(f"not as expected: {', '.join(unexpected)}")
    sys.exit(1 if unexpected else 0)


def in_a_process(family: str, folder: Path) -> dict[str, str]:
    """What ``compare`` says in a fresh process: an engine changes the one that it runs in."""
    command = [sys.executable, __file__, "--one", family, "--folder", str(folder)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        answer: dict[str, str] = json.loads(lines[-1])
        return answer
    why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return {"largest": "", "vllm": f"failed: {why}", "transformers": ""}


def compare(family: str, parent: Path) -> dict[str, str]:
    """The cells of a family's row."""
    from logitcask.pipeline.builder.run import build
    from logitcask.pipeline.config import BuildConfig
    from logitcask.pipeline.teachers.open import open_teacher
    from logitcask.pipeline.teachers.transformers import TransformersTeacher

    logging.getLogger().setLevel(logging.ERROR)
    folder = parent / family
    make(family, folder / "model")

    def config(backend: str) -> Any:
        return BuildConfig.model_validate(
            {
                "teacher": {"model": str(folder / "model"), "backend": backend, "dtype": "float32"},
                "data": {"path": "python-docs", "max_length": MAX_LENGTH, "max_tokens": 2_000},
                "output": str(folder / backend),
            }
        )

    def outcome(backend: str) -> str:
        try:
            audit = build(config(backend), restart=True).manifest.audit
        except Exception as error:
            said = str(error)
            return f"refused: {cell(said.partition('of the same text: ')[2] or said)}"
        assert audit is not None
        return "agrees" if audit.skipped is None else f"not audited: {cell(audit.skipped)}"

    # transformers first, while nothing has changed it.
    answer = {"largest": "", "vllm": "", "transformers": outcome("transformers")}
    asked = config("vllm")
    reference = open_teacher(
        config("transformers").teacher, max_length=MAX_LENGTH, capture=asked.store.capture()
    )
    assert isinstance(reference, TransformersTeacher)
    texts = [sequence(n) for n in (2, 31, 33, 120, MAX_LENGTH)]
    dense = [reference.dense_logprobs(text.input_ids) for text in texts]
    try:
        teacher = open_teacher(asked.teacher, max_length=MAX_LENGTH, capture=asked.store.capture())
    except Exception as error:
        return answer | {"vllm": f"skipped: {cell(error)}"}
    differences = [
        largest(found, each) for found, each in zip(teacher.score(texts), dense, strict=True)
    ]
    import logitcask.pipeline.builder.lazy_teacher

    # The engine that runs already.
    logitcask.pipeline.builder.lazy_teacher.open_teacher = lambda *args, **kwargs: teacher
    return answer | {"largest": f"{max(differences):.1e}", "vllm": outcome("vllm")}


def make(family: str, folder: Path) -> None:
    """A random model of the family, with a tokenizer for its 384 ids."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    model_type, fields, _ = FAMILIES[family]
    sizes = {name: value for name, value in (SIZES | fields).items() if value is not None}
    config = AutoConfig.for_model(model_type, **sizes)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    letters = ["<|bos|>", "<|eos|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(
        models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|bos|>", eos_token="<|eos|>"
    )
    tokenizer.save_pretrained(folder)


def sequence(length: int) -> Any:
    """Random ids, all to be learnt."""
    from logitcask.pipeline.types import Sequence

    ids = np.random.default_rng(length).integers(0, SIZES["vocab_size"], length).astype(np.int32)
    return Sequence(str(length), ids, np.arange(length) > 0)


def largest(found: Any, dense: Any) -> float:
    """Largest difference of a logprob in ``found`` from the same in ``dense`` (float32[n-1, V])."""
    heads = np.take_along_axis(dense, found.ids.astype(np.int64), axis=1)
    targets = np.take_along_axis(dense, found.target_ids[:, None].astype(np.int64), axis=1)[:, 0]
    return float(
        max(np.abs(found.logprobs - heads).max(), np.abs(found.target_logprob - targets).max())
    )


def cell(message: object) -> str:
    """For a table."""
    return " ".join(str(message).split()).replace("|", "/")[:120]


if __name__ == "__main__":
    main()
