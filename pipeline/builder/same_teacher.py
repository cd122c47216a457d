"""Whether the teacher of a finished cache is that of a config, as far as is known before its engine
starts.
"""

from __future__ import annotations

import logging
from typing import Any

from logitcask.cache_format import Manifest, UserError
from logitcask.cache_format.errors import one_line
from logitcask.pipeline.builder.inputs import Inputs
from logitcask.pipeline.builder.request import as_of_today, request_of
from logitcask.pipeline.config import BuildConfig
from logitcask.pipeline.teachers.built_in_model import BUILT_IN

log = logging.getLogger(__name__)


def same_teacher(
    config: BuildConfig, inputs: Inputs, manifest: Manifest, *, before_plan: bool = False
) -> bool:
    """Whether a build with this config asks the teacher of ``manifest``: the same weights, engine,
    arithmetic and code.
    """
    now = request_of(config)
    # Only this part of a manifest, which may be a stranger's, is taken for a config.
    parts = ("teacher", "code_sha256")
    theirs = {name: manifest.config[name] for name in parts if name in manifest.config}
    rest = {name: value for name, value in now.items() if name not in parts}
    before = as_of_today({**rest, **theirs}, config)
    if teacher_request(before) != teacher_request(now):
        return False
    return same_weights(config, inputs, manifest, before_plan=before_plan)


def same_weights(
    config: BuildConfig, inputs: Inputs, manifest: Manifest, *, before_plan: bool = False
) -> bool:
    """Whether the config names the model of ``manifest``. Before a plan, a model that cannot be
    resolved now counts as the same by its name, with a warning.
    """
    asked, teacher = config.teacher, manifest.teacher
    if asked.is_synthetic:
        return (asked.model, asked.vocab_size, f"seed-{asked.seed}") == (
            teacher.model,
            teacher.vocab_size,
            teacher.revision,
        )
    if asked.model == teacher.model and asked.model in BUILT_IN:
        return True
    try:
        model = inputs.model
    except UserError as error:
        if before_plan:
            log.warning(
                "whether the teacher has changed since cannot be checked: %s", one_line(error)
            )
        return before_plan and asked.model == teacher.model
    if model is None:
        return asked.model == teacher.model
    if teacher.weights_sha256 is not None:
        return model.revision is None and model.weights_sha256() == teacher.weights_sha256
    return (model.name, model.revision) == (teacher.model, teacher.revision)


def teacher_request(request: dict[str, Any]) -> Any:
    """The teacher's part of a request, without the place of its weights."""
    teacher = request.get("teacher")
    if not isinstance(teacher, dict):
        return None
    fields = {name: value for name, value in teacher.items() if name not in ("model", "revision")}
    code = request.get("code_sha256")
    return [fields, code.get(str(teacher.get("backend"))) if isinstance(code, dict) else None]
