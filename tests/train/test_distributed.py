"""Two processes on the CPU (gloo) train as one does, through the trainer: DDP, and FSDP2
(``fully_shard``).
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import AutoModelForCausalLM

from logitcask.pipeline.builder.run import build
from logitcask.pipeline.config import BuildConfig
from logitcask.train.config import TrainConfig
from logitcask.train.run import train
from tests.train import several_processes

STEPS, SAVED = 5, 3
LOSSES = [{"name": "forward_kl"}, {"name": "ranking", "weight": 2.0, "k": 5}]
# The same sum as LOSSES, with a loss from the working directory.
OWN = [{"name": "its_own:twice", "weight": 0.5}, LOSSES[1]]
ITS_OWN = """
from logitcask.train.losses import forward_kl, loss

@loss(source="-", formula="-", needs="-", from_head="lower", from_samples="unbiased", use="-")
def twice(student_logits, teacher):
    return 2 * forward_kl(student_logits, teacher)
"""
TAID = [{"name": "taid", "alpha": 0.3}]
GAPS = {"positions": {"by": "gap", "share": 0.4}}
ACID = {"sequences": {"filter_ratio": 0.5}}
PAIRS = [{"name": "dpkd_sequence"}, {"name": "forward_kl", "caches": ["text"]}]
FSDP = {
    "fsdp": True,
    "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
}


@pytest.fixture(scope="module")
def uneven(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of very different lengths, so that processes have very different numbers of
    positions.
    """
    texts = [
        "zz" if i % 2 else f"{i}: it was the {i}th of its kind, and not the last one. " * 2
        for i in range(60)
    ]
    return built(texts, tiny_llama, tmp_path_factory.mktemp("distributed"))


@pytest.fixture(scope="module")
def preferred(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another document of each row."""
    texts = [f"it is {i}, " * (1 + i % 5) for i in range(50)]
    return built(texts, tiny_llama, tmp_path_factory.mktemp("preferred"))


def built(texts: list[str], teacher: Path, folder: Path) -> Path:
    (folder / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = BuildConfig.model_validate(
        {
            "teacher": {"model": str(teacher), "backend": "transformers"},
            "data": {"path": str(folder / "data.jsonl"), "max_length": 120},
            "output": str(folder / "cache"),
        }
    )
    build(config)
    return config.output


class Runs:
    """Trainings in one folder: ``config`` describes them, ``alone`` and ``together`` do them,
    ``result`` reads them.
    """

    def __init__(self, folder: Path, caches: tuple[Path, Path], fork: Any, two_ranks: Any) -> None:
        self.folder, (self.cache, self.preferred) = folder, caches
        self._fork, self._two_ranks = fork, two_ranks

    def config(
        self,
        name: str,
        *,
        batch: int,
        tied: bool,
        losses: list[dict[str, Any]] = LOSSES,
        selection: dict[str, Any] | None = None,
        pairs: bool = False,
        **training: Any,
    ) -> dict[str, Any]:
        small = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        }
        small |= {
            "num_key_value_heads": 1,
            "vocab_size": 384,
            "max_position_embeddings": 128,
            "initializer_range": 0.2,
        }
        return {
            "cache": self._mixture() if pairs else str(self.cache),
            "student": {"config": {"model_type": "llama", "tie_word_embeddings": tied, **small}},
            "losses": PAIRS if pairs else losses,
            "ce_weight": 0.5,
            "logits_chunk": 50,
            "evaluation": {"held_out": 0.2},
            "selection": selection or {},
            "training": {
                "output_dir": str(self.folder / name),
                "max_steps": STEPS,
                "learning_rate": 1e-2,
                "logging_steps": 1,
                "seed": 7,
                "per_device_train_batch_size": batch,
                "per_device_eval_batch_size": 5,
                "disable_tqdm": True,
                "use_cpu": True,
                "save_steps": SAVED,
                **training,
            },
        }

    def _mixture(self) -> list[dict[str, Any]]:
        """Documents, and such as are preferred to others."""
        return [
            {"cache": str(self.cache), "name": "text", "weight": 0.3},
            {"cache": str(self.preferred), "name": "preferred", "weight": 0.5},
            {
                "cache": str(self.cache),
                "name": "other",
                "weight": 0.2,
                "preferred": "preferred",
            },
        ]

    def alone(self, name: str, **fields: Any) -> dict[str, Any]:
        train(TrainConfig.model_validate(self.config(name, **fields)))
        return self.result(name)

    def together(
        self, *jobs: dict[str, Any], fsdp: bool = False, dies: bool = False
    ) -> list[bool | None]:
        """Whether each job's run was found finished; None where it was interrupted.

        Jobs of which one dies have the real launcher. The processes of others are forked, which
        saves a start of Python and torch in each.
        """
        file = self.folder / "jobs.json"
        file.write_text(json.dumps({"fsdp": fsdp, "jobs": jobs}))
        file.with_suffix(".found").unlink(missing_ok=True)
        if dies:
            self._launched(file)
            return []
        self._forked(file)
        return json.loads(file.with_suffix(".found").read_text())

    def _launched(self, file: Path) -> None:
        launch = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
        ]
        command = [*launch, str(Path(__file__).parent / "several_processes.py"), str(file)]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, cwd=self.folder
        )
        assert done.returncode != 0, done.stderr[-8000:]

    def _forked(self, file: Path) -> None:
        said = self.folder / "said.txt"
        said.unlink(missing_ok=True)

        def work(environment: dict[str, str]) -> None:
            os.environ.update(environment)
            os.chdir(self.folder)
            # As in a process that has trained nothing yet.
            AcceleratorState._reset_state(reset_partial_state=True)
            sys.stdout = sys.stderr = said.open("a", buffering=1)
            logging.root.handlers.clear()
            several_processes.main(file)

        running = [self._fork(partial(work, environment)) for environment in self._two_ranks()]
        try:
            # If one fails, the other would wait for it.
            while running and all(not process.exitcode for process in running):
                wait([process.sentinel for process in running])
                running = [process for process in running if process.exitcode != 0]
            assert not running, said.read_text()[-8000:]
        finally:
            for process in running:
                process.kill()
                process.join()

    def result(self, name: str) -> dict[str, Any]:
        output = self.folder / name
        state = json.loads((output / f"checkpoint-{SAVED}" / "trainer_state.json").read_text())
        return {
            "metrics": json.loads((output / "metrics.json").read_text()),
            "steps": [
                record
                for record in json.loads((output / "log.json").read_text())
                if "loss" in record
            ],
            "objective": state["stateful_callbacks"].get("objective"),
            "saved": AutoModelForCausalLM.from_pretrained(output).state_dict(),
        }


@pytest.fixture(scope="module")
def runs(
    uneven: Path,
    preferred: Path,
    tmp_path_factory: pytest.TempPathFactory,
    fork: Any,
    two_ranks: Any,
) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "its_own.py").write_text(ITS_OWN)
    return Runs(folder, (uneven, preferred), fork, two_ranks)


@pytest.fixture(scope="module")
def one(runs: Runs) -> dict[str, dict[str, Any]]:
    """One process. Sequences are chosen from what one process reads at a time, so there it reads
    as much as each of two.
    """
    return {
        "tied": runs.alone("one-tied", batch=4, tied=True),
        "untied": runs.alone("one-untied", batch=4, tied=False),
        "8": runs.alone("one-8", batch=8, tied=True),
        "taid": runs.alone("one-taid", batch=4, tied=True, losses=TAID),
        "pairs": runs.alone("one-pairs", batch=4, tied=True, pairs=True),
        "gaps": runs.alone("one-gaps", batch=4, tied=True, selection=GAPS),
        "acid": runs.alone(
            "one-acid", batch=2, tied=True, selection=ACID, gradient_accumulation_steps=2
        ),
    }


def halves(runs: Runs, kind: str, **training: Any) -> dict[str, dict[str, Any]]:
    """The same trainings as ``one`` has, for two processes, and one of them in bfloat16."""
    return {
        "tied": runs.config(f"{kind}-tied", batch=2, tied=True, **training),
        "untied": runs.config(f"{kind}-untied", batch=2, tied=False, **training),
        "8": runs.config(
            f"{kind}-8", batch=2, tied=True, gradient_accumulation_steps=2, **training
        ),
        "taid": runs.config(
            f"{kind}-taid",
            batch=2,
            tied=True,
            losses=TAID,
            ddp_find_unused_parameters=True,
            **training,
        ),
        "own": runs.config(f"{kind}-own", batch=2, tied=True, losses=OWN, **training),
        "pairs": runs.config(f"{kind}-pairs", batch=2, tied=True, pairs=True, **training),
        "gaps": runs.config(f"{kind}-gaps", batch=2, tied=True, selection=GAPS, **training),
        "acid": runs.config(f"{kind}-acid", batch=2, tied=True, selection=ACID, **training),
        "bf16": runs.config(
            f"{kind}-bf16", batch=2, tied=True, gradient_accumulation_steps=2, bf16=True, **training
        ),
    }


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """The losses and gradient norms of every step, the metrics before and after, and every
    weight that was saved.
    """
    assert len(found["steps"]) == len(expected["steps"]) == STEPS
    for mine, theirs in zip(found["steps"], expected["steps"], strict=True):
        names = [name for name in theirs if name.startswith("loss")]
        assert len(names) >= 3
        for name in (*names, "positions"):
            assert mine[name] == pytest.approx(theirs[name], abs=1e-4), name
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    assert found["metrics"]["after"]["kl"] < found["metrics"]["before"]["kl"] - 0.05
    for when in ("before", "after"):
        # The perplexity, exp(ce), is as far off as ce, times itself.
        metrics = pytest.approx(expected["metrics"][when], abs=2e-4, rel=2e-5)
        assert found["metrics"][when] == metrics
    assert found["metrics"]["positions_trained"] == expected["metrics"]["positions_trained"]
    assert found["saved"].keys() == expected["saved"].keys()
    for name, weight in expected["saved"].items():
        torch.testing.assert_close(
            found["saved"][name], weight, rtol=0, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


def same_but_for_rounding(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """bfloat16 against float32: the losses of the first step within 1/1000, before rounded
    gradients make another student.

    Losses or a teacher in bfloat16 put them off by up to 1/250.
    """
    for step, (mine, theirs) in enumerate(zip(found["steps"], expected["steps"], strict=True)):
        for name in (name for name in theirs if name.startswith("loss")):
            assert mine[name] == pytest.approx(theirs[name], rel=5e-3 if step else 1e-3), name
        assert mine["positions"] == theirs["positions"]
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.05)
    for when in ("before", "after"):
        for name in ("kl", "reverse_kl", "ce"):
            assert found["metrics"][when][name] == pytest.approx(
                expected["metrics"][when][name], rel=5e-3
            ), name
    assert {weight.dtype for weight in found["saved"].values()} == {torch.float32}


def same_with_a_loss_of_its_own(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for mine, theirs in zip(found["steps"], expected["steps"], strict=True):
        assert mine["loss_its_own:twice"] == pytest.approx(2 * theirs["loss_forward_kl"], abs=2e-4)
        for name in ("loss", "loss_ranking", "loss_ce"):
            assert mine[name] == pytest.approx(theirs[name], abs=1e-4), name
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def all_the_same(runs: Runs, kind: str, one: dict[str, dict[str, Any]]) -> None:
    for name, expected in one.items():
        same(runs.result(f"{kind}-{name}"), expected)
    same_with_a_loss_of_its_own(runs.result(f"{kind}-own"), one["tied"])
    assert 0.4 < one["taid"]["objective"]["taid"]["t"] < 1
    found = runs.result(f"{kind}-taid")["objective"]["taid"]
    assert found == pytest.approx(one["taid"]["objective"]["taid"], abs=1e-4)


def test_ddp(runs: Runs, one: dict[str, dict[str, Any]]) -> None:
    """All of ``one``; one process of the untied one is killed; some of that again."""
    jobs = halves(runs, "ddp")
    killed = {"config": jobs["untied"], "killed": 4}
    runs.together(
        *({"config": config} for name, config in jobs.items() if name != "untied"),
        killed,
        dies=True,
    )
    assert not (runs.folder / "ddp-untied" / "metrics.json").exists()
    assert (runs.folder / "ddp-untied" / f"checkpoint-{SAVED}").exists()
    again = [
        {"config": jobs["untied"]},
        {"config": jobs["8"]},
        {"config": jobs["tied"], "restart": True},
    ]
    assert runs.together(*again) == [False, True, False]
    all_the_same(runs, "ddp", one)
    same_but_for_rounding(runs.result("ddp-bf16"), one["8"])


def test_fsdp2(runs: Runs, one: dict[str, dict[str, Any]]) -> None:
    """The same with every parameter sharded; checkpoints and the student that is saved are
    whole.
    """
    jobs = halves(runs, "fsdp", **FSDP)
    interrupted = {"config": jobs["untied"], "interrupted": 4}
    again = [{"config": jobs["8"]}, {"config": jobs["tied"], "restart": True}]
    everything = [interrupted, *({"config": config} for config in jobs.values()), *again]
    assert runs.together(*everything, fsdp=True) == [None, *len(jobs) * [False], True, False]
    all_the_same(runs, "fsdp", one)
    same_but_for_rounding(runs.result("fsdp-bf16"), one["8"])


LATE = """
import sys, time, torch, torch.distributed as dist
from logitcask.train.distributed import leave
rank, store = int(sys.argv[1]), sys.argv[2]
leave()  # without a group it does nothing
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
tensor = torch.zeros(1)
if rank == 0:
    work = dist.all_reduce(tensor, async_op=True)
    del work, tensor  # the last reference is gloo's
    sys.setswitchinterval(1e6)  # from here on this thread keeps the interpreter's lock
    until = time.monotonic() + 3
    while time.monotonic() < until:
        pass
else:
    time.sleep(0.5)
    dist.all_reduce(tensor)
print("done")
leave(3)
"""


def test_a_thread_of_gloo_that_still_holds_a_tensor_does_not_abort_the_end(tmp_path: Path) -> None:
    """Rank 0's thread waits for the interpreter's lock to drop a tensor; ``sys.exit(3)`` in
    place of ``leave(3)`` aborts.
    """
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    both = [
        subprocess.Popen(
            [sys.executable, "-c", LATE, str(rank), str(tmp_path / "store")],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    ends = [(process.communicate()[0], process.returncode) for process in both]
    assert ends == [("done\n", 3), ("done\n", 3)]
