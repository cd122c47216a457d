"""Teacher backends outside this project: opened, named in the manifest, and refused in one line."""

from __future__ import annotations

import hashlib
import json
import sys

import numpy as np
import pytest

from logitcask.cache_format import CacheReader, ConfigError, UserError
from logitcask.pipeline.audit.reference import open_reference
from logitcask.pipeline.builder.request import as_of_today, request_of
from logitcask.pipeline.builder.run import build
from logitcask.pipeline.commands.sequence_table import token_text
from logitcask.pipeline.config import BuildConfig, TeacherConfig
from logitcask.pipeline.distribution.capture import Capture
from logitcask.pipeline.estimate.speed import probe, speed_from_hardware
from logitcask.pipeline.teachers.base import Prompt, Sampling
from logitcask.pipeline.teachers.open import open_teacher, open_tokenizer, resolved, vocab_size_of
from logitcask.pipeline.teachers.own import OwnTeacher
from logitcask.pipeline.teachers.synthetic_tokenizer import SyntheticTokenizer

FLAT = '''
import numpy as np
from logitcask.cache_format.manifest import TeacherIdentity
from logitcask.pipeline.distribution.dense import scored_from_dense
from logitcask.pipeline.teachers.synthetic_tokenizer import SyntheticTokenizer

class Flat:
    """Every id with the probability (id + offset) / sum."""
    vocab_size = 300
    @staticmethod
    def open_tokenizer(config): return SyntheticTokenizer()
    def __init__(self, config, model, *, max_length, capture, offset=1.0):
        assert model is None
        self._capture = capture
        p = np.arange(300) + offset
        self._row = np.log(p / p.sum())
    def identity(self):
        return TeacherIdentity(model="m", backend="vllm", engine="flat 1", dtype="float64",
                               route="dense", vocab_size=300)
    def score(self, sequences):
        for s in sequences:
            yield scored_from_dense(np.tile(self._row, (len(s.input_ids) - 1, 1)), s.input_ids, self._capture)
    def close(self): pass
'''


@pytest.fixture
def write(user_folder):
    """``write(text)``: the module ``mine``, read afresh. At first it is ``FLAT``; a method after it
    replaces the one in it.
    """

    def make(text):
        sys.modules.pop("mine", None)
        (user_folder / "mine.py").write_text(text)

    make(FLAT)
    return make


@pytest.fixture
def config(user_folder):
    def make(**teacher):
        rows = user_folder / "rows.jsonl"
        rows.write_text("".join(json.dumps({"text": f"row {i} of text"}) + "\n" for i in range(9)))
        return BuildConfig(
            teacher={"model": "no such model", "backend": "mine:Flat", **teacher},
            data={"path": str(rows)},
            store={"logprob_step": 2**-12},
            output=user_folder / "cache",
        )

    return make


def teacher(capture=None, **fields):
    config = TeacherConfig(**{"model": "x", "backend": "mine:Flat", **fields})
    return OwnTeacher(config, None, max_length=9, capture=capture or Capture(4))


def test_a_build_with_it(write, config, caplog):
    caplog.set_level("INFO")
    manifest = build(config(engine_args={"offset": 3.0})).manifest
    code = hashlib.sha256(FLAT.encode()).hexdigest()
    assert manifest.teacher.backend == "mine:Flat"  # whatever its identity says
    assert manifest.teacher.engine == f"flat 1, code {code[:16]}"
    assert manifest.tokenizer.name == "mine:Flat"
    assert manifest.config["code_sha256"] == {"mine:Flat": code}
    assert manifest.config["teacher"]["engine_args"] == {"offset": 3.0}
    assert "mine:Flat is a model of its own" in manifest.audit.skipped
    p = (np.arange(300) + 3.0) / (np.arange(300) + 3.0).sum()
    for sequence in CacheReader(config().output):
        assert (sequence.ids[:, :8] == np.arange(299, 291, -1)).all()
        np.testing.assert_allclose(
            sequence.logprobs[:, :8],
            np.tile(np.log(p[:291:-1]), (len(sequence.ids), 1)),
            atol=2**-12,
        )
        np.testing.assert_allclose(
            sequence.target_logprob, np.log(p[sequence.input_ids[1:]]), rtol=2**-11
        )


def test_reuse_and_an_edit(write, config, user_folder):
    assert not build(config()).reused
    assert build(config()).reused
    write(FLAT + "# another line\n")
    with pytest.raises(
        UserError,
        match=r"with other settings: code_sha256\.mine:Flat: \"\w{64}\" -> \"\w{64}\"; choose",
    ):
        build(config())
    with pytest.raises(UserError, match="engine_args"):
        build(config(engine_args={"offset": 2.0}))


def test_an_unfinished_build_is_not_resumed_with_other_code(write, config, user_folder):
    write(FLAT + "    def score(self, sequences): raise OSError('the disk is gone')\n")
    with pytest.raises(
        UserError, match=r"mine:Flat: score failed: the disk is gone \(OSError\), at .*mine.py:\d+ "
    ):
        build(config())
    write(FLAT)
    with pytest.raises(
        UserError, match=r"unfinished build with other settings: code_sha256\.mine:Flat"
    ):
        build(config())
    assert not build(config(), restart=True).reused


def test_configs_of_caches_import_nothing(write, config, user_folder):
    """A cache from a stranger may name any module."""
    request = request_of(config())
    sys.modules.pop("mine")
    (user_folder / "mine.py").write_text("raise SystemExit('imported')\n")
    mine = BuildConfig(teacher={"model": "synthetic"}, data={"path": "python-docs"}, output="o")
    assert as_of_today(request, mine)["code_sha256"] == request["code_sha256"]
    assert TeacherConfig(model="m", backend="mine:Flat").has_own_backend


def test_inspecting_runs_its_code_only_if_asked(write, config, user_folder, caplog):
    build(config())
    sys.modules.pop("mine")
    cache = CacheReader(config().output)
    assert token_text(cache, None)(104) == "104"
    assert "mine" not in sys.modules
    assert "it is that of mine:Flat; --tokenizer mine:Flat runs its code" in caplog.text
    assert token_text(cache, "mine:Flat")(104) == "h"


def test_an_audit_says_that_it_has_nothing_to_compare_with(write, config):
    manifest = build(config()).manifest
    with (
        pytest.raises(UserError, match=r"mine:Flat is a model of its own, .* by --teacher"),
        open_reference(manifest),
    ):
        pass


def test_what_it_is_opened_with(write, tiny_llama):
    backend = TeacherConfig(model="x", backend="mine:Flat")
    assert resolved(backend) is None
    assert isinstance(open_tokenizer(backend), SyntheticTokenizer)
    assert vocab_size_of(backend) == 258
    assert open_teacher(backend, max_length=9, capture=Capture(2)).vocab_size == 300
    named = TeacherConfig(model="synthetic", backend="mine:Flat")
    assert (named.is_synthetic, named.gpus_per_engine) == (False, 1)


def test_an_engine_for_models_of_transformers(user_folder, tiny_llama, as_sequence):
    """Without a tokenizer of its own it is given the model that the config names."""
    (user_folder / "mine.py").write_text(
        "from logitcask.pipeline.teachers.transformers import TransformersTeacher\n"
        "class Engine(TransformersTeacher): pass\n"
    )
    config = TeacherConfig(model=str(tiny_llama), backend="mine:Engine")
    found = open_teacher(config, max_length=16, capture=Capture(4))
    plain = open_teacher(
        TeacherConfig(model=str(tiny_llama), backend="transformers"),
        max_length=16,
        capture=Capture(4),
    )
    assert found.identity().weights_sha256 == plain.identity().weights_sha256
    assert found.identity().backend == "mine:Engine"
    sequence = as_sequence("a", [1, 5, 9, 2])
    (one,), (other,) = list(found.score([sequence])), list(plain.score([sequence]))
    np.testing.assert_array_equal(one.logprobs, other.logprobs)


def test_entry_points(write, install):
    with pytest.raises(
        ValueError, match="no teacher backend is called 'flat'; there are server, synthetic, tr"
    ):
        TeacherConfig(model="m", backend="flat")
    install("extras", "1", {"logitcask.teachers": {"flat": "mine:Flat", "server": "mine:Flat"}})
    config = TeacherConfig(model="m", backend="flat")
    found = open_teacher(config, max_length=9, capture=Capture(2))
    assert found.identity().backend == "flat"
    assert not TeacherConfig(
        model="m", backend="server", server={"url": "http://h:1"}
    ).has_own_backend


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (FLAT.replace("def close", "def shut"), "mine:Flat is no teacher: it has no close; see"),
        (
            FLAT + "    vocab_size = 100\n",
            r"predicts 100 ids \(vocab_size\), but its tokenizer has 258; expected as many or more",
        ),
        (
            FLAT.replace("assert model is None", "raise IndexError('i')"),
            r"mine:Flat: the start failed: i \(IndexError\), at .*mine.py:13 \(--debug",
        ),
        (
            FLAT.replace("capture, offset=1.0", "offset=1.0"),
            "mine:Flat: the start failed: .*unexpected keyword argument 'capture'",
        ),
    ],
)
def test_what_is_no_teacher(write, text, message):
    write(text)
    with pytest.raises(UserError, match=message):
        teacher()


def test_options_are_checked(write):
    with pytest.raises(
        ConfigError, match=r"^teacher.engine_args: mine:Flat has no option 'ofset'; it has offset$"
    ):
        teacher(engine_args={"ofset": 2})
    teacher(engine_args={"trust_remote_code": True, "offset": 2})


@pytest.mark.parametrize(
    ("identity", "message"),
    [
        ("return 'flat'", "mine:Flat: identity returned 'flat'; expected a TeacherIdentity"),
        ("return {}['x']", r"mine:Flat: identity failed: 'x' \(KeyError\)"),
    ],
)
def test_a_wrong_identity(write, identity, message):
    write(f"{FLAT}    def identity(self): {identity}\n")
    with pytest.raises(UserError, match=message):
        teacher().identity()


CHANGED = """
    def change(self, scored, **changes):
        import dataclasses
        return dataclasses.replace(scored, **{k: f(scored) for k, f in changes.items()})
    def rows(self, s):
        return scored_from_dense(np.tile(self._row, (len(s.input_ids) - 1, 1)), s.input_ids, self._capture)
    def sized(self, scored):
        scored.draws.head_size[0] = 9
        return scored
"""


@pytest.mark.parametrize(
    ("score", "message"),
    [
        ("for s in given: yield 3", "mine:Flat: score yields int; expected Scored"),
        ("yield 3", "score yields a result before it has read a sequence for it"),
        ("s = next(given); yield self.rows(s); yield self.rows(s)", "score yields a result before"),
        (
            "for s in given: yield self.change(self.rows(s), ids=lambda x: x.ids[:, :2])",
            r"mine:Flat: ids of sequence 'a' has shape \(3, 2\); expected \(3, 4\)",
        ),
        (
            "for s in given: yield self.change(self.rows(s), target_rank=lambda x: x.target_rank[1:])",
            r"target_rank of sequence 'a' has shape \(2,\); expected \(3,\)",
        ),
        (
            "for s in given: yield self.sized(self.rows(s))",
            "head_size of sequence 'a' is not between 0 and 4",
        ),
        ("list(given); yield None.x", r"score failed: .*\(AttributeError\), at .*mine.py:\d+ "),
        ("return iter(())", "score ended without a result for sequence 'a'; expected one for each"),
        ("yield self.rows(next(given))", "score ended without a result for sequence 'b'"),
    ],
)
def test_wrong_scores(write, as_sequence, score, message):
    write(f"{FLAT}{CHANGED}    def score(self, given):\n        {score}\n")
    sequences = [as_sequence(name, [1, 2, 3, 4]) for name in "ab"]
    with pytest.raises(UserError, match=message):
        list(teacher().score(sequences))


def test_writing_needs_a_method(write):
    sampling = Sampling(temperature=1.0, top_p=1.0, end_tokens=(257,))
    config = TeacherConfig(model="x", backend="mine:Flat")
    with pytest.raises(UserError, match="mine:Flat only scores: it has no method generate"):
        OwnTeacher(config, None, max_length=9, capture=Capture(1), sampling=sampling)
    write(
        FLAT.replace(
            "offset=1.0):", "offset=1.0, sampling=None):\n        self.ends = sampling.end_tokens"
        )
        + "    def generate(self, prompts):\n"
        "        for p in prompts: yield np.array([*p.input_ids[:1], *self.ends], np.int32)\n"
    )
    found = OwnTeacher(config, None, max_length=9, capture=Capture(1), sampling=sampling)
    (answer,) = found.generate([Prompt(np.array([7, 8], np.int32), 3, 0)])
    assert answer.tolist() == [7, 257]


def test_forecasts(write, config, as_sequence):
    with pytest.raises(
        UserError,
        match="no figures for the speed of mine:Flat; give --tokens-per-second or --probe",
    ):
        speed_from_hardware(config(), "h100", 10.0, 8.0)
    kept, speed = probe(config(), [as_sequence("a", [1, 2, 3, 4])])
    assert len(kept) == 1
    assert speed.notes[0].count("flat 1, code ") == 1
