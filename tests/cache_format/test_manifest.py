"""The manifest's schema as a file, and the identity under which a cache is known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import logitcask.cache_format
from logitcask.cache_format.manifest import Manifest, check_step


def test_the_exported_schema_is_in_step():
    """Written by: python -c "import json; from logitcask.cache_format import Manifest;
    print(json.dumps(Manifest.model_json_schema(), indent=2))"
    """
    exported = Path(logitcask.cache_format.__file__).parent / "manifest.schema.json"
    assert json.loads(exported.read_text()) == Manifest.model_json_schema()


def test_the_fingerprint_is_of_the_content(header):
    base = header().with_fingerprint()
    assert base.fingerprint == header().with_fingerprint().fingerprint

    def with_teacher(**changes):
        return (
            base.model_copy(update={"teacher": base.teacher.model_copy(update=changes)})
            .with_fingerprint()
            .fingerprint
        )

    assert with_teacher(route="flat") == base.fingerprint
    assert with_teacher(model="other") != base.fingerprint
    assert with_teacher(dtype="bfloat16") != base.fingerprint
    weighed = with_teacher(weights_sha256="1")
    assert weighed != base.fingerprint
    assert with_teacher(weights_sha256="1", model="same weights elsewhere") == weighed
    assert header(top_k=4).with_fingerprint().fingerprint != base.fingerprint


def test_public_names():
    """What other people import; a name that goes is a breaking change."""
    assert set(logitcask.cache_format.__all__) >= {
        "CacheReader",
        "CacheWriter",
        "Manifest",
        "CacheError",
        "CachedSequence",
        "verify",
    }


@pytest.mark.parametrize("step", [0, -1, 0.1, 2, 2.0**-17, float("nan")])
def test_only_powers_of_two_are_steps(step):
    with pytest.raises(ValueError, match="power of two"):
        check_step(step)
