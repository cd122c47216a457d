"""Every layout refuses the files of every other one, in one line."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest
import torch

from logitcask.cache_format import UserError
from logitcask.pipeline.commands import imports as command
from logitcask.pipeline.imports.layouts import LAYOUTS, recognised
from tests.pipeline.imports import (
    test_axolotl,
    test_distillkit_legacy,
    test_distillkit_packed,
    test_distillkit_raw,
    test_megatron,
    test_probabilities,
    test_sidecar,
    test_torch_items,
)
from tests.pipeline.imports.conftest import LAYOUTS as WRITTEN
from tests.pipeline.imports.conftest import imported, make_texts

_OPTIONS = {
    "distillkit-packed": {"k": 12, "exact_k": 4, "polynomial_terms": "0,1,2"},
    "distillkit-legacy": {"k": 12, "exact_k": 5, "polynomial_degree": 2},
}


@pytest.fixture
def files(rng, tmp_path):
    """A source of each layout, and the sidecar's data."""
    texts = make_texts(rng, 36, 6)
    folder = tmp_path / "sources"
    folder.mkdir()
    found = {name: folder / f"{name}.parquet" for name in WRITTEN}
    test_distillkit_raw.write(found["distillkit-raw"], texts, lambda text: text.logprobs)
    test_distillkit_packed.write(found["distillkit-packed"], texts, 12, exact_k=4, terms=(0, 1, 2))
    test_distillkit_legacy.write(found["distillkit-legacy"], texts)
    rows = [
        {
            "input_ids": text.tokens.tolist(),
            test_axolotl._FIELD: [None, *test_axolotl.lists(text, 1)[0]],
        }
        for text in texts
    ]
    pq.write_table(test_axolotl.pa.Table.from_pylist(rows), found["axolotl"])
    test_axolotl.prepared(found["axolotl-prepared"], texts, "current")
    test_sidecar.write(folder, texts)
    found["sidecar"] = folder / "beside.parquet"
    test_probabilities.write(found["probabilities"], texts, lambda text: text.logprobs)
    found["torch"] = folder / "items.pt"
    torch.save([test_torch_items.item(text, 2) for text in texts], found["torch"])
    found["megatron"] = folder / "megatron"
    found["megatron"].mkdir()
    test_megatron.write(found["megatron"], [text.top(text.logprobs) for text in texts])
    return found


def test_no_layout_takes_the_file_of_another(files, tmp_path):
    tokens = str(tmp_path / "sources" / "data.parquet")
    assert set(files) == set(LAYOUTS)
    for name in LAYOUTS:
        options = {"tokens": tokens, **_OPTIONS.get(name, {})}
        imported(name, files[name], tmp_path / name, **options)
        for other in set(files) - {name}:
            with pytest.raises(UserError) as error:
                imported(name, files[other], tmp_path / "other", **options)
            said = str(error.value)
            assert "\n" not in said
            assert len(said) < 600
            assert f"not in the layout {name}" in said or "no data at" in said, (name, other, said)


def test_tables_are_recognised(files):
    for name, file in files.items():
        if file.suffix == ".parquet":
            assert recognised(pq.read_schema(file).names) == name
    assert recognised(["text"]) is None


def test_the_help_names_every_layout():
    assert all(name in " ".join(command._SUMMARIES.split()) for name in LAYOUTS)
