"""Losses outside this package, as configs name them: imported, registered, and checked at each
call.

Shapes: P positions, V student vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from inspect import Parameter, signature
from typing import Any, NamedTuple

import torch
from torch import Tensor

from logitcask.cache_format.errors import ConfigError, LogitcaskError, UserError
from logitcask.cache_format.runtime.extensions import (
    LOSS,
    code_sha256,
    failure,
    installed,
    is_named,
    load,
    origin,
    unknown,
)
from logitcask.train.losses.base import (
    LOSSES,
    SPECS,
    LossSpec,
    SparseTeacher,
    is_own,
)
from logitcask.train.losses.student_pass import StudentPass


def find_loss(name: str) -> LossSpec:
    """The description of the loss that a config calls ``name``. A loss outside this package is
    imported and registered under this name.

    Raises ValueError for an unknown name, and ConfigError for a loss that cannot be imported or is
    not a loss.
    """
    if name in SPECS and is_own(LOSSES[name]):
        return SPECS[name]
    if not is_named(LOSS, name):
        raise ValueError(unknown(LOSS, name, (known for known in LOSSES if is_own(LOSSES[known]))))
    function = load(LOSS, name)
    known = next((key for key, value in LOSSES.items() if value is function), None)
    if known is None:
        raise ConfigError(
            f"{name} is no loss: it is {function!r}, which is not under @loss(...) of logitcask; see docs/extending.md"
        )
    SPECS[name], LOSSES[name] = replace(SPECS[known], name=name), function
    _check_signature(name, function)
    return SPECS[name]


def code_of(name: str) -> str | None:
    """The sha256 of the file of a loss outside this package; None for a loss of this package, or
    for code without a file.
    """
    return None if is_own(LOSSES[name]) else code_sha256(LOSSES[name])


def call_loss(
    name: str, student: StudentPass, teacher: SparseTeacher, options: dict[str, Any]
) -> Tensor:
    """The values [P] of the loss ``name``.

    Raises UserError if a loss outside this package raises an error, or if its result is not one
    finite number per position although the student's logits are finite.
    """
    function = LOSSES[name]
    if is_own(function):
        return function(student, teacher, **options)
    try:
        value = function(student, teacher, **options)
    except (LogitcaskError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # other people's code may raise anything
        hint = (
            "; the loss is given a StudentPass, and StudentPass.of(student_logits, teacher).logits are the logits"
            if "StudentPass" in str(error)
            else ""
        )
        said = failure(error, function)
        raise UserError(
            f"the loss {name} failed: {said}{hint} (--debug shows the traceback)"
        ) from error
    _check_values(name, value, student)
    return value


def check_gradient(
    name: str, values: Callable[[Tensor], dict[str, Tensor]], logits: Tensor
) -> None:
    """Raises UserError if the loss ``name`` has no gradient or one that is not finite.

    ``values`` gives the losses of [P, V] logits by name.
    """
    logits = logits.detach().requires_grad_()
    value = values(logits)[name]
    if not len(value):
        return
    if not value.requires_grad:
        raise UserError(
            f"the loss {name} has no gradient: its values do not depend on the student's logits, or were detached"
        )
    (gradient,) = torch.autograd.grad(value.sum(), [logits])
    if not bool(gradient.isfinite().all()):
        raise UserError(
            f"the gradient of the loss {name} is not finite, although its values are; see that no branch of a "
            "torch.where, root or logarithm is infinite"
        )


class Listed(NamedTuple):
    """A loss that a config can name: its package, its options with their defaults, and the reason
    why it cannot be used, if there is one.
    """

    name: str
    origin: str
    options: dict[str, Any]
    error: str | None = None


def listed() -> list[Listed]:
    """All losses, those of installed packages included. One that cannot be imported is listed with
    the reason.
    """
    found = []
    ours = [name for name in LOSSES if is_own(LOSSES[name])]
    for name in [*ours, *sorted(set(installed(LOSS)) - set(ours))]:
        where = "logitcask" if name in ours else origin(LOSS, name)
        try:
            found.append(Listed(name, where, dict(find_loss(name).options)))
        except ConfigError as error:
            found.append(Listed(name, where, {}, str(error)))
    return found


def _check_signature(name: str, function: Callable[..., Any]) -> None:
    """Raises ConfigError unless ``function`` takes logits, teacher and keyword-only options, and
    each option that a config can set has a default.
    """
    arguments = list(signature(function).parameters.values())
    positional = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    wrong = [str(each) for each in arguments[:2] if each.kind not in positional]
    wrong += [str(each) for each in arguments[2:] if each.kind is not Parameter.KEYWORD_ONLY]
    wrong += [key for key, value in SPECS[name].options.items() if value is Parameter.empty]
    if wrong or len(arguments) < 2:
        raise ConfigError(
            f"the loss {name} has the arguments {signature(function)}; expected (student_logits, teacher, *, "
            "OPTION=DEFAULT, ...)"
        )


def _check_values(name: str, value: Any, student: StudentPass) -> None:
    expected = f"expected a float tensor of shape ({len(student)},), one value per position"
    if not isinstance(value, Tensor):
        raise UserError(f"the loss {name} returned {type(value).__name__}; {expected}")
    if value.shape != (len(student),) or not value.is_floating_point():
        raise UserError(
            f"the loss {name} returned {str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}; {expected}"
        )
    wrong = (~value.detach().isfinite()).nonzero()
    # If the student's own logits are not finite, it has diverged, which the log of the step says.
    if len(wrong) and bool(student.lse.detach().isfinite().all()):
        raise UserError(
            f"the loss {name} returned {float(value[wrong[0, 0]])} at {len(wrong)} of {len(student)} positions, although "
            "the student's logits are finite; see that it takes no logarithm, root or quotient of 0 (padding included)"
        )
