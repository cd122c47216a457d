"""Files of readings: what was written comes back, and other files are refused."""

from __future__ import annotations

import numpy as np
import pytest

from logitcask.cache_format import UserError
from logitcask.cache_format.readings import Reading, ReadingsOf, read_readings, write_readings
from tests.cache_format.conftest import make_sequence


class Manifest:
    """As much of a manifest as a file of readings is compared with."""

    fingerprint, content_sha256 = "f" * 64, "c" * 64


@pytest.fixture
def file(rng, tmp_path):
    """A file of two sequences of a cache, with the numbers 3 and 7; and both, with their values."""
    sequences = [
        make_sequence(rng, f"s/{n}", tokens=n, vocab_size=60, top_k=6, kind="samples")
        for n in (12, 5)
    ]
    found = {}
    for index, sequence in zip((3, 7), sequences, strict=True):
        sizes = (sequence.ids >= 0).sum(axis=1)
        columns = [rng.normal(size=n).astype(np.float32) for n in (sizes.sum(), *[len(sizes)] * 3)]
        found[index] = (sequence, sizes, Reading(*columns))
    of = ReadingsOf("a run", Manifest.fingerprint, Manifest.content_sha256, "lower", 0.0)
    write_readings(tmp_path / "r.npz", of, [(i, n, r) for i, (_, n, r) in found.items()])
    return tmp_path / "r.npz", of, found


def test_what_was_written_comes_back(file):
    path, of, found = file
    back = read_readings(path, "cache", Manifest)
    assert (back.of, back.indices) == (of, [3, 7])
    for index, (sequence, _, reading) in found.items():
        for one, other in zip(back.reading(index, sequence), reading, strict=True):
            np.testing.assert_array_equal(one, other)
    assert back.reading(4, found[3][0]) is None
    with pytest.raises(UserError, match="other positions or heads of sequence 3"):
        back.reading(3, found[7][0])


def test_another_cache_is_named(file):
    class Other(Manifest):
        content_sha256 = "d" * 64

    with pytest.raises(UserError, match=r"of the cache with the fingerprint f{16}.*other content"):
        read_readings(file[0], "cache", Other)


@pytest.mark.parametrize("fault", ["text", "gone", "meta", "short", "kind", "order", "objects"])
def test_other_files_are_refused(file, fault, tmp_path):
    path = file[0]
    with np.load(path) as opened:
        columns = dict(opened)
    if fault == "meta":
        columns["meta"] = np.array('["logitcask"]')
    elif fault == "short":
        columns["kl"] = columns["kl"][1:]
    elif fault == "kind":
        columns["kl"] = columns["kl"].astype(np.float64)
    elif fault == "order":
        columns["index"] = columns["index"][::-1]
    elif fault == "objects":
        columns["kl"] = np.array([{}], object)
    bad = tmp_path / "bad.npz"
    if fault == "text":
        bad.write_text("no")
    elif fault != "gone":
        np.savez(bad, **columns)
    with pytest.raises(UserError, match="holds no readings"):
        read_readings(bad, "cache", Manifest)
