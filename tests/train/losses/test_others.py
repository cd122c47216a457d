"""Losses outside this package: found by name, run beside ours, and refused in one line that names
them.
"""

from __future__ import annotations

import hashlib

import pytest
import torch
from pydantic import ValidationError

from logitcask.cache_format.errors import ConfigError, UserError
from logitcask.train.config import LossTerm
from logitcask.train.data.batch import collate
from logitcask.train.data.dataset import CachedDataset, HeldOut
from logitcask.train.identity import identity_of_config
from logitcask.train.loop.objective import Objective
from logitcask.train.loop.try_objective import try_objective
from logitcask.train.losses import LOSSES, SPECS
from logitcask.train.losses.others import code_of, find_loss, listed

TOP = "import torch\nfrom logitcask.train.losses import StudentPass, loss\n"
SAYS = '@loss(source="s", formula="f", needs="n", from_head="exact", from_samples=None, use="u")\n'
HALF = f"{TOP}{SAYS}def half(student_logits, teacher, *, k: int = 1, sharp: float = 2.0):\n" + (
    "    return sharp * StudentPass.of(student_logits, teacher).log_target.square()\n"
)


@pytest.fixture
def write(user_folder):
    """``write(body)``: the module ``mine``, whose loss ``bad`` has this body."""

    def make(body, arguments="student_logits, teacher", says=SAYS, name="mine"):
        lines = "".join(f"    {line}\n" for line in body.splitlines())
        text = f"{TOP}{says}def bad({arguments}):\n{lines}"
        (user_folder / f"{name}.py").write_text(text)

    return make


@pytest.fixture
def half(user_folder):
    (user_folder / "mine.py").write_text(HALF)


@pytest.fixture
def held_out(write_cache):
    cache = write_cache("c", shards=1, sequences=2, top_k=8)
    return HeldOut([CachedDataset(cache, [0, 1])])


def test_a_loss_is_registered_under_its_name_in_the_config(half):
    spec = find_loss("mine:half")
    assert spec.name == "mine:half"
    assert spec.options == {"k": 1, "sharp": 2.0}
    assert LOSSES["mine:half"].__name__ == "half"
    assert "half" not in LOSSES
    assert find_loss("mine:half") == spec


def test_a_loss_that_a_package_passes_on(half, user_folder):
    (user_folder / "face.py").write_text("from mine import half as other\n")
    assert find_loss("face:other").name == "face:other"
    assert LOSSES["face:other"] is LOSSES["mine:half"]
    assert find_loss("face:other").options == {"k": 1, "sharp": 2.0}


def test_a_loss_may_have_the_name_of_one_of_ours(user_folder):
    ours = LOSSES["ce"]
    (user_folder / "mine.py").write_text(HALF.replace("def half", "def ce"))
    find_loss("mine:ce")
    assert LOSSES["ce"] is ours
    assert LOSSES["mine:ce"] is not ours


def test_entry_points(half, install):
    with pytest.raises(ValueError, match=r"no loss is called 'halved'; .*there are adaptive_kl"):
        find_loss("halved")
    install("extras", "3.1", {"logitcask.losses": {"halved": "mine:half", "ce": "mine:half"}})
    assert find_loss("halved").options == {"k": 1, "sharp": 2.0}
    assert find_loss("ce").source.startswith("hard labels")  # ours come first
    found = {each.name: each for each in listed()}
    assert len(found) == len(listed()), "a name occurs once"
    assert found["forward_kl"].origin == found["ce"].origin == "logitcask"
    assert found["halved"] == ("halved", "extras 3.1, mine:half", {"k": 1, "sharp": 2.0}, None)
    install("broken", "1", {"logitcask.losses": {"gone": "absent:loss"}})
    gone = next(each for each in listed() if each.name == "gone")
    assert "there is no module absent" in gone.error


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (
            {"name": "mine:half", "sharpness": 1},
            "mine:half has no option 'sharpness'; it has k, sharp",
        ),
        ({"name": "mine:half", "k": 0}, "mine:half: k is 0; expected a whole number from 1"),
        (
            {"name": "forwrad_kl"},
            "no loss is called 'forwrad_kl'; did you mean forward_kl\\? There are ",
        ),
    ],
)
def test_options_are_checked_as_ours_are(half, term, message):
    with pytest.raises(ValidationError, match=message):
        LossTerm(**term)


def test_what_is_no_loss(user_folder):
    (user_folder / "mine.py").write_text("def plain(student_logits, teacher): pass\n")
    with pytest.raises(
        ConfigError, match=r"^mine:plain is no loss: it is <function .*not under @loss"
    ):
        find_loss("mine:plain")


@pytest.mark.parametrize(
    "arguments",
    [
        "student_logits",
        "student_logits, teacher, sharp=1",
        "student_logits, teacher, *, sharp",
        "student_logits, teacher, **options",
        "*both",
    ],
)
def test_what_cannot_be_called_with_options(write, arguments):
    write("pass", arguments)
    with pytest.raises(
        ConfigError,
        match=r"^the loss mine:bad has the arguments \(.*\); expected \(student_logits, teacher, \*, OPT",
    ):
        find_loss("mine:bad")


@pytest.mark.parametrize(
    ("says", "message"),
    [
        (
            SAYS.replace("exact", "about"),
            "bad: from_head is 'about'; expected 'exact', 'unbiased', 'lower', 'biased'",
        ),
        (SAYS.replace("None", "'maybe'"), "bad: from_samples is 'maybe'; expected .*, None"),
        (SAYS.replace(', use="u"', ""), "missing 1 required positional argument: 'use'"),
    ],
)
def test_a_wrong_description(write, says, message):
    write("pass", says=says)
    with pytest.raises(ConfigError, match=f"the import of mine failed: .*{message}"):
        find_loss("mine:bad")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 3", r"mine:bad returned int; expected a float tensor of shape \(\d,\), one value"),
        (
            "return student_logits.log_target.mean()",
            r"mine:bad returned float32 of shape \(\); expected",
        ),
        ("return student_logits.z_head", r"returned float32 of shape \(\d, \d+\); expected"),
        ("return teacher.target_ids", r"returned int64 of shape \(\d,\); expected a float tensor"),
        (
            "return student_logits.log_target * torch.nan",
            "returned nan at (.) of . positions, although",
        ),
        (
            "return student_logits.log_target - torch.inf",
            "returned -inf at (.) of . positions, although",
        ),
        ("return teacher.target_logprob", "mine:bad has no gradient: its values do not depend"),
        ("return student_logits.log_target.detach()", "mine:bad has no gradient"),
        (
            "return (student_logits.log_target * 0).sqrt()",
            "gradient of the loss mine:bad is not finite",
        ),
        ("return {}['a key']", r"mine:bad failed: 'a key' \(KeyError\), at .*mine.py:5 \(--debug"),
        (
            "return student_logits.log_softmax(1)",
            r"'StudentPass' object has no .*; the loss is given a StudentPass, and",
        ),
    ],
)
def test_wrong_results_are_refused_before_the_first_step(
    write, scratch_config, held_out, body, message
):
    write(body)
    config = scratch_config(cache="c", losses=[{"name": "forward_kl"}, {"name": "mine:bad"}])
    with pytest.raises(UserError, match=message) as caught:
        try_objective(config, dict(enumerate(held_out.parts)))
    assert "\n" not in str(caught.value)


@pytest.mark.random
def test_a_loss_beside_ours(half, scratch_config, held_out, caplog):
    caplog.set_level("INFO")
    config = scratch_config(
        cache="c",
        losses=[{"name": "forward_kl"}, {"name": "mine:half", "weight": 3.0, "sharp": 0.25}],
        ce_weight=0.0,
    )
    objective, _, exactness = try_objective(config, dict(enumerate(held_out.parts)))
    assert exactness["mine:half"] == "exact"
    assert "with this cache, mine:half is exact" in caplog.messages
    data = held_out.parts[0]
    teacher = data.teacher(collate([data[0], data[1]]))
    logits = torch.randn(len(teacher), 64)
    total, values = objective.per_chunk(teacher)(logits.clone(), slice(0, len(teacher)))
    expected = 0.25 * logits.log_softmax(1).gather(1, teacher.target_ids[:, None])[:, 0].square()
    torch.testing.assert_close(values["mine:half"], expected)
    torch.testing.assert_close(total, values["forward_kl"] + 3 * expected)


def test_a_student_that_has_diverged_is_not_the_losss_fault(half, scratch_config, held_out):
    """Its logits are NaN; the record of the step says so."""
    config = scratch_config(cache="c", losses=[{"name": "mine:half"}], ce_weight=0.0)
    objective, data = Objective(config), held_out.parts[0]
    teacher = data.teacher(collate([data[0]]))
    logits = torch.full((len(teacher), 64), torch.nan)
    _, values = objective.per_chunk(teacher)(logits, slice(0, len(teacher)))
    assert values["mine:half"].isnan().all()


def test_a_loss_that_only_some_logits_break(write, scratch_config, held_out):
    """The trial at random logits passes; a later step does not."""
    write(
        "z = StudentPass.of(student_logits, teacher).z_target\nreturn z * torch.where(z > 50, torch.nan, 1.0)"
    )
    config = scratch_config(cache="c", losses=[{"name": "mine:bad"}], ce_weight=0.0)
    objective, _, _ = try_objective(config, dict(enumerate(held_out.parts)))
    data = held_out.parts[0]
    teacher = data.teacher(collate([data[0]]))
    logits = torch.zeros(len(teacher), 64)
    logits[0] = 100.0
    with pytest.raises(
        UserError, match=rf"^the loss mine:bad returned nan at 1 of {len(teacher)} positions"
    ):
        objective.per_chunk(teacher)(logits, slice(0, len(teacher)))


def test_an_edited_loss_is_another_run(half, user_folder, scratch_config):
    names = ["forward_kl", "mine:half"]
    config = scratch_config(cache="c", losses=[{"name": name} for name in names])
    identity = identity_of_config(config)
    expected = hashlib.sha256(HALF.encode()).hexdigest()
    assert identity["code_sha256"] == {"mine:half": expected}
    assert "code_sha256" not in identity_of_config(scratch_config(cache="c"))
    (user_folder / "mine.py").write_text(HALF + "# other\n")
    assert code_of("mine:half") != expected
    assert code_of("forward_kl") is None


def test_the_description_is_a_copy_under_the_new_name(half, user_folder):
    (user_folder / "face.py").write_text("from mine import half\n")
    find_loss("face:half")
    assert (SPECS["face:half"].name, SPECS["mine:half"].name) == ("face:half", "mine:half")
