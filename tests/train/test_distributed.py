"""Two processes on the CPU (gloo) train as one does, with DDP."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM

from pipeline.config import BuildConfig
from pipeline.run import build
from train.config import TrainConfig

STEPS = 5


@pytest.fixture(scope="session")
def uneven(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of very different lengths, so that processes have very different numbers of positions."""
    folder = tmp_path_factory.mktemp("distributed")
    texts = ["zz" if i % 2 else f"{i}: it was the {i}th of its kind, and not the last one. " * 2 for i in range(60)]
    (folder / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = BuildConfig.model_validate(
        {
            "teacher": {"model": str(tiny_llama), "backend": "transformers"},
            "data": {"path": str(folder / "data.jsonl"), "max_length": 120},
            "output": str(folder / "cache"),
        }
    )
    build(config)
    return config.output


class Runs:
    def __init__(self, folder: Path, cache: Path, student: dict[str, Any]) -> None:
        self.folder, self.cache, self.student = folder, cache, student

    def __call__(self, name: str, processes: int, batch: int, accumulate: int = 1, **training: Any) -> dict[str, Any]:
        output = self.folder / name
        config = {
            "cache": str(self.cache),
            "student": self.student,
            "losses": [{"name": "forward_kl"}, {"name": "ranking", "weight": 2.0, "k": 5}],
            "ce_weight": 0.5,
            "logits_chunk": 50,
            "evaluation": {"held_out": 0.2},
            "training": {
                "output_dir": str(output),
                "max_steps": STEPS,
                "learning_rate": 3e-3,
                "logging_steps": 1,
                "seed": 7,
                "per_device_train_batch_size": batch,
                "gradient_accumulation_steps": accumulate,
                "per_device_eval_batch_size": 5,
                "disable_tqdm": True,
                "use_cpu": True,
                "save_steps": 3,
                **training,
            },
        }
        file = self.folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(TrainConfig.model_validate(config).model_dump(mode="json")))
        launch = [sys.executable]
        if processes > 1:
            launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [*launch, "-m", "train", str(file)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-5000:]
        log = json.loads((output / "log.json").read_text())
        return {
            "metrics": json.loads((output / "metrics.json").read_text()),
            "steps": [record for record in log if "loss" in record],
            "output": output,
        }


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """The losses of every step, of all processes together, and the metrics before and after."""
    assert len(found["steps"]) == len(expected["steps"]) == STEPS
    for mine, theirs in zip(found["steps"], expected["steps"], strict=True):
        for name in ("loss", "loss_forward_kl", "loss_ranking", "loss_ce", "positions"):
            assert mine[name] == pytest.approx(theirs[name], abs=1e-4), name
    assert found["steps"][-1]["loss"] < found["steps"][0]["loss"] - 0.1
    for when in ("before", "after"):
        assert found["metrics"][when] == pytest.approx(expected["metrics"][when], abs=2e-4)
    assert found["metrics"]["positions_trained"] == expected["metrics"]["positions_trained"]
    saved = AutoModelForCausalLM.from_pretrained(found["output"])
    assert saved.num_parameters() == expected["metrics"]["student"]["parameters"]


def test_two_processes_train_as_one_does(uneven: Path, tmp_path: Path) -> None:
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    small |= {"num_key_value_heads": 1, "vocab_size": 384, "max_position_embeddings": 128, "initializer_range": 0.2}
    run = Runs(tmp_path, uneven, {"config": {"model_type": "llama", "tie_word_embeddings": True, **small}})
    one = run("one", processes=1, batch=4)
    same(run("ddp", processes=2, batch=2), one)
