"""Names of files and folders in a cache, and of the state files of an unfinished build (SPEC.md
sections 2 and 7).
"""

from __future__ import annotations

MANIFEST = "manifest.json"

SIGNATURE = "manifest.json.sig"
"""Signatures of the manifest, if somebody has signed it."""

PRIOR = "tail_prior.arrow"

CARD = "README.md"
PREVIEW = "preview/preview.parquet"

BUILD_DIR = ".build"
"""The state of an unfinished build."""

OWNER = f"{BUILD_DIR}/owner.json"
"""In a store, while a cache is built there: who builds it."""

PULL_DIR = ".pull"
"""In a local folder, while a copy into it is unfinished: the lock and temporary files. Never a
build's ``.build``.
"""

PUSH_MARK = ".push"
"""In a store, while a push to it is unfinished: what is pushed, so that the same push can go on."""

GROW_DIR = ".growing"
"""In a growing cache: the lock of its writer, and the shard that is being written."""
