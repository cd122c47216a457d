"""Texts without the secrets in them: passwords in URLs, signed queries, tokens of hubs and servers.

Errors, logs, manifests and run files name URLs and texts of libraries. What they say goes to
terminals, files and other people, so it passes through here first.
"""

from __future__ import annotations

import os
import re
from typing import Any

HIDDEN = "***"

_ENVIRONMENT = re.compile(
    r"^(?!.*_(?:PATH|FILE|DIR)$).*(?:TOKEN(?!IZ)|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY|CREDENTIAL)",
    re.I,
)  # not TOKENIZER, nor the place of a file: what they hold is said in many messages
_SECRET_KEY = re.compile(r"(?:^|_)(?:token|password|secret|api_key|access_key)$", re.I)
_LEAST = 8  # characters of a value of the environment; a shorter one would hide ordinary words
_NAMES = (
    r"(?:[\w-]*[_-])?(?:token|secret|password|passwd|signature|credential)|accesstoken|"
    r"(?:api[_-]?)?key|sig|"
    r"x-amz-(?:signature|credential|security-token)|x-goog-(?:signature|credential)|awsaccesskeyid"
)
_PATTERNS = (
    # user:password@host, where the password may hold an @, and token@host
    (re.compile(r"(?<=://)[^/\s:@'\"?#]*:[^/\s'\"]*@"), f"{HIDDEN}@"),
    (re.compile(r"(?:(?<=https://)|(?<=http://))[^/\s:@'\"?#]+@"), f"{HIDDEN}@"),
    (re.compile(rf"([?&;](?:{_NAMES})=)[^&\s'\"#;]+", re.I), rf"\1{HIDDEN}"),
    (re.compile(r"\b(Bearer|Basic)\s+[\w.~+/=-]{8,}", re.I), rf"\1 {HIDDEN}"),
    (re.compile(r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[\w-]{16,}|AKIA[0-9A-Z]{16})\b"), HIDDEN),
)


def redacted(text: str) -> str:
    """``text`` with each secret replaced by ``***``: those that look like one, and the values of
    environment variables whose names say that they are one.
    """
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    for name, value in os.environ.items():
        if len(value) >= _LEAST and _ENVIRONMENT.search(name) and value in text:
            text = text.replace(value, HIDDEN)
    return text


def without_secrets(value: Any) -> Any:
    """``value`` with every string in it ``redacted``: of JSON, its lists and objects. A text under
    a key such as ``hub_token`` is a secret in any case.
    """
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, dict):
        return {
            name: HIDDEN
            if isinstance(each, str) and each and _SECRET_KEY.search(str(name))
            else without_secrets(each)
            for name, each in value.items()
        }
    if isinstance(value, list):
        return [without_secrets(each) for each in value]
    return value
