"""New prompts like the hard ones: the assessor, the augmentor's prompts, and rounds with both."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from logitcask.cache_format import CacheReader
from logitcask.cache_format.errors import ConfigError, UserError
from logitcask.rounds.augment import (
    INSTRUCTIONS,
    Assessed,
    assess,
    figures_of,
    flag,
    key,
    new_prompts,
    requests,
)
from logitcask.rounds.config import AugmentConfig
from logitcask.rounds.page import parts_of
from logitcask.rounds.run import Rounds, report_again, run_rounds
from logitcask.rounds.state import State

from .conftest import COMMANDS, kill_at
from .test_page import EVIL
from .test_run import same, state_of, weights

AUGMENT = {
    "prompts": 5,
    "hard_fraction": 0.5,
    "instruction": "{prompt} or, in other words: ",
    "max_prompt_tokens": 12,
    "max_length": 64,
}
COMD = {"augment": AUGMENT, "teacher_text": True, "on_policy_fraction": 0}


@pytest.fixture
def texts(rounds, tmp_path):
    """``texts(**options)``: rounds on texts that are continued, in which nearly every new prompt is
    one: at the longest length it is cut.
    """

    def make(*, samples: int = 1, **options: Any) -> Any:
        generate = {"max_new_tokens": 10, "samples": samples}
        data = {"text_field": "q", "max_length": 48, "generate": generate}
        teacher = {"data": {"path": str(tmp_path / "prompts.jsonl"), **data}}
        return rounds(teacher=teacher, **{"augment": AUGMENT, **options})

    return make


def rows_of(config: Any, number: int, name: str = "prompts") -> list[dict[str, Any]]:
    file = config.output / f"round-{number:03d}" / f"{name}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def cache_of(config: Any, number: int, name: str = "cache") -> CacheReader:
    return CacheReader(config.output / f"round-{number:03d}" / name)


def prompts_in(cache: CacheReader) -> set[str]:
    return {each.sequence_id.rpartition("/")[0] for each in cache}


# --- the assessor


@torch.no_grad()
def logprobs(model: Any, sequence: Any) -> torch.Tensor:
    """Of the written tokens, from whole distributions in float64."""
    ids = torch.from_numpy(sequence.input_ids).long()
    at = torch.from_numpy(sequence.positions).long()
    return model(ids[None]).logits[0, at].log_softmax(1)[torch.arange(len(at)), ids[at + 1]]


def test_the_assessor_is_that_of_the_models(texts, tiny_llama):
    """Logprobs by transformers in float64, two answers to each prompt."""
    config = texts(count=1, samples=2, warmup_steps=2)
    run_rounds(config, [])
    models = [
        AutoModelForCausalLM.from_pretrained(folder).double()
        for folder in (config.output / "round-000" / "student", tiny_llama)
    ]
    gaps: dict[str, list[float]] = {}
    for sequence in cache_of(config, 1):
        of_student, of_teacher = (logprobs(model, sequence) for model in models)
        prompt = sequence.sequence_id.rpartition("/")[0]
        gaps.setdefault(prompt, []).extend((of_student - of_teacher).tolist())
    found = assess(config.output / "round-001" / "cache")
    assert {each.row_id: each.tokens for each in found} == {n: len(g) for n, g in gaps.items()}
    for each in found:
        # Both logprobs are stored rounded to 1/256.
        assert each.kl == pytest.approx(np.mean(gaps[each.row_id]), abs=1 / 256 + 1e-4)
    # What the round says of its text is the mean over the tokens of all.
    round_ = state_of(config).of("write-1").figures
    tokens = [each.tokens for each in found]
    assert np.average([each.kl for each in found], weights=tokens) == pytest.approx(
        round_["reverse_kl"]
    )
    hard = flag(found, 0.5)
    assert len(hard) == 2
    assert min(each.kl for each in hard) >= max(e.kl for e in found if e not in hard)
    for name, chosen in (("kl_flagged", hard), ("kl_rest", [e for e in found if e not in hard])):
        mean = np.mean([gap for each in chosen for gap in gaps[each.row_id]])
        assert round_["assessed"][name] == pytest.approx(mean, abs=1 / 256 + 1e-4)


def test_equal_prompts_are_flagged_by_id():
    found = [Assessed(name, kl, 3) for name, kl in (("d", 1.0), ("b", 2.0), ("c", 2.0), ("a", 2.0))]
    assert [each.row_id for each in flag(found, 0.5)] == ["a", "b"]
    assert [each.row_id for each in flag(found, 0.01)] == ["a"]
    assert [each.row_id for each in flag(found, 1.0)] == ["a", "b", "c", "d"]
    assert flag([], 0.5) == []
    assert figures_of([], 0.5)["kl_flagged"] is None


# --- the augmentor's prompts, and its answers


CHATS = [
    {"id": "a", "messages": [{"role": "user", "content": "Add {1} and 2"}]},
    {
        "id": "b",
        "messages": [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": "A list?"},
            {"role": "assistant", "content": "Of what?"},
            {"role": "user", "content": "Of {prompt}s", "name": "x"},
        ],
        "tools": [{"type": "function", "function": {"name": "look"}}],
    },
    {"id": "c", "messages": [{"role": "user", "content": "?"}, {"role": "tool", "content": "42"}]},
]
HARD = [Assessed(name, kl, 5) for name, kl in (("b", 3.0), ("c", 2.0), ("a", 1.0))]


def test_requests_of_chats():
    augment = AugmentConfig(prompts=3, instruction="Like {prompt}!")
    found = requests(HARD, CHATS, augment, 4)
    # In turns, the hardest first; one that a tool ends has no text to write another one like.
    assert [(each["id"], each["like"], each["kl"]) for each in found] == [
        ("augment-4/0", "b", 3.0),
        ("augment-4/1", "a", 1.0),
        ("augment-4/2", "b", 3.0),
    ]
    # The context stays, without the system message.
    assert found[0]["messages"] == [
        {"role": "user", "content": "A list?"},
        {"role": "assistant", "content": "Of what?"},
        {"role": "user", "content": "Like Of {prompt}s!"},
    ]
    assert found[1]["messages"] == [{"role": "user", "content": "Like Add {1} and 2!"}]
    assert requests(HARD[1:2], CHATS, augment, 4) == []
    default = AugmentConfig(prompts=1)
    (asked,) = requests(HARD[2:], CHATS, default, 2)
    assert asked["messages"][0]["content"] == INSTRUCTIONS["chats"].replace(
        "{prompt}", "Add {1} and 2"
    )
    (asked,) = requests([Assessed("t", 1.0, 1)], [{"id": "t", "text": "Once"}], default, 2)
    assert asked["text"] == INSTRUCTIONS["documents"].replace("{prompt}", "Once")


def answers(*given: tuple[str, str]) -> list[dict[str, Any]]:
    return [
        {"id": f"augment-4/{n}/0", "answer": text, "finish": finish}
        for n, (text, finish) in enumerate(given)
        if finish
    ]


def test_answers_become_prompts():
    augment = AugmentConfig(prompts=8)
    asked = requests(HARD, CHATS, augment, 4)
    given = answers(
        (" Of  names\n\nof two lines ", "stop"),
        ("Add 3", "length"),
        ("of {PROMPT}S ", "stop"),  # what it should be like, but for case
        ("  ", "stop"),
        ("OF NAMES of two\nlines", "stop"),
        ("", ""),  # asked, and nothing was written
        ("", ""),  # not asked
        ("Subtract 1", "stop"),
    )
    known = {key({"messages": [{"role": "user", "content": "subtract  1"}]}), *map(key, CHATS)}
    found, figures = new_prompts(asked, given, CHATS, known, augment, answered=7)
    assert found == [
        {
            "id": "augment-4/0",
            "messages": [
                *CHATS[1]["messages"][:-1],
                {"role": "user", "content": "Of  names\n\nof two lines", "name": "x"},
            ],
            "tools": CHATS[1]["tools"],
            "like": "b",
        }
    ]
    dropped = {"no_room": 1, "empty": 2, "too_long": 1, "duplicate": 3}
    assert figures == {"asked": 8, "new_prompts": 1, "dropped": dropped}


def test_the_first_line_alone():
    augment = AugmentConfig(prompts=3, first_line=True)
    asked = requests(HARD[2:], CHATS, augment, 4)
    given = answers(("\nA b\nand so", "length"), ("A c", "length"), ("A b\nc", "stop"))
    found, figures = new_prompts(asked, given, CHATS, set(), augment, answered=3)
    assert [each["messages"][-1]["content"] for each in found] == ["A b"]
    assert figures["dropped"] == {"no_room": 0, "empty": 0, "too_long": 1, "duplicate": 1}


def test_texts_are_cut_at_the_longest_length():
    texts = [{"id": "t", "text": "Once"}]
    augment = AugmentConfig(prompts=2)
    asked = requests([Assessed("t", 1.0, 1)], texts, augment, 4)
    given = answers((" There was\ufffd", "length"), ("\ufffd", "length"))
    found, figures = new_prompts(asked, given, texts, set(), augment, answered=2)
    assert found == [{"id": "augment-4/0", "text": "There was", "like": "t"}]
    assert figures["dropped"]["empty"] == 1


def test_prompts_that_are_the_same():
    one, two = ([{"role": "user", "content": text}] for text in ("A  b", "a B\n"))
    assert key({"messages": one}) == key({"messages": two})
    before = {"role": "user", "content": "x"}
    assert key({"messages": [before, *one]}) != key({"messages": two})
    assert key({"text": "a b"}) == key({"text": "A b "}) == key({"messages": one})
    assert key(CHATS[2]) != key({"messages": CHATS[2]["messages"][:1]})


# --- rounds


def test_a_round_has_prompts_like_the_hard_ones_before(texts, tiny_llama):
    config = texts(count=3, warmup_steps=1)
    document, table = run_rounds(config, [])
    stages = [done.stage for done in state_of(config).done]
    later = [f"{kind}-{n}" for n in (2, 3) for kind in ("augment", "prompts", "write", "train")]
    assert stages == ["text", "start", "prompts-1", "write-1", "train-1", *later]
    known: list[str] = []
    for number in (1, 2, 3):
        rows, cache = rows_of(config, number), cache_of(config, number)
        data = [row for row in rows if "like" not in row]
        assert [row["id"] for row in data] == [f"train/{n % 10}" for n in range(4 * number - 4, 4 * number)]  # fmt: skip
        assert [row["text"] for row in data] == [f"what is {row['id'][6:]}?" for row in data]
        new = rows[len(data) :]
        assert prompts_in(cache) == {row["id"] for row in rows}
        known += [row["text"] for row in data]
        assert not {row["text"] for row in new} & set(known)
        known += [row["text"] for row in new]
        figures = document["rounds"][number]
        assessed = figures["cache"]["assessed"]
        assert assessed["prompts"] == len(rows)
        assert assessed["flagged"] == -(-len(rows) // 2)
        assert assessed["kl_flagged"] > assessed["kl_rest"]
        assert assessed["new_prompts"] == len(new)
        if number == 1:
            assert (new, assessed["kl_new"], figures["prompts"]["new_prompts"]) == ([], None, 0)
            continue
        hard = [each.row_id for each in flag(assess(cache_of(config, number - 1).path), 0.5)]
        asked = rows_of(config, number, "hard")
        assert [row["like"] for row in asked] == [hard[n % len(hard)] for n in range(5)]
        before = {row["id"]: row["text"] for row in rows_of(config, number - 1)}
        assert [row["text"] for row in asked] == [
            f"{before[row['like']]} or, in other words: " for row in asked
        ]
        written = cache_of(config, number, "augment")
        assert written.manifest.data.generation.writer is None
        assert prompts_in(written) == {row["id"] for row in asked}
        assert 0 < len(new) <= 5
        assert {row["id"]: row["like"] for row in new}.items() <= {
            row["id"]: row["like"] for row in asked
        }.items()
        told = figures["prompts"]
        assert told["asked"] == told["new_prompts"] + sum(told["dropped"].values()) == 5
        assert (told["new_prompts"], told["data_prompts"], told["left_out"]) == (len(new), 4, 0)
        # Of all prompts, the flagged ones may be new ones: so difficulty goes on.
        of_new = [each for each in assess(cache.path) if each.row_id.startswith("augment-")]
        assert assessed["kl_new"] == pytest.approx(
            np.average([each.kl for each in of_new], weights=[each.tokens for each in of_new])
        )
        assert set(figures["stages"]) == {"augment", "prompts", "write", "train"}
        of_stages = (s["seconds"] + s["handover_seconds"] for s in figures["stages"].values())
        assert sum(parts_of(figures)) == pytest.approx(sum(of_stages))
    head, *lines = table.splitlines()
    assert head.split()[4:8] == ["own", "KL", "hard", "KL"]
    assert [len(line.split()) for line in lines[:4]] == [len(lines[0].split())] * 4
    assert lines[3].split()[6] == str(document["rounds"][3]["prompts"]["new_prompts"])
    assert "hard KL: own KL of the prompts" in table


def test_the_same_texts_as_without_new_prompts(texts):
    """Until the first new prompts come, the answers are those of rounds without an augmentor."""
    one, other = texts(count=1), texts(count=1, augment=None, output="other")
    for each in (one, other):
        run_rounds(each, [])
    assert cache_of(one, 1).manifest.content_sha256 == cache_of(other, 1).manifest.content_sha256
    assert same(weights(one, 1), weights(other, 1))


def test_the_paper_learns_from_the_teachers_answers(texts):
    config = texts(**COMD, replay=0.5)
    document, _ = run_rounds(config, [])
    for number in (1, 2):
        ids = {row["id"] for row in rows_of(config, number)}
        assert prompts_in(cache_of(config, number, "teacher")) == ids
        assert document["rounds"][number]["cache"]["assessed"]["prompts"] == len(ids)
        assert document["rounds"][number]["staleness"] is None
    names = set(document["rounds"][2]["passes"])
    assert names == {"text", "teacher-1", "teacher-2"}
    shares = {each["name"]: each["weight"] for each in Rounds(config, []).mixture(2)}
    assert shares == {"text": 0.0, "teacher-1": 0.5, "teacher-2": 0.5}
    # reverse_kl learns from nothing that a student has written, so nothing old misleads it.
    reverse = texts(**COMD, student={"losses": [{"name": "reverse_kl"}]})
    assert Rounds(reverse, []).replay == 0.25


def test_pairs_have_new_prompts_too(texts):
    student = {"losses": [{"name": "dpkd_sequence"}]}
    config = texts(**{**COMD, "on_policy_fraction": 0.5}, student=student)
    document, _ = run_rounds(config, [])
    both = [prompts_in(cache_of(config, 2, name)) for name in ("cache", "teacher")]
    assert any(each.startswith("augment-2/") for each in both[0] & both[1])
    assert document["rounds_done"] == 2


def test_chats(rounds):
    """Half of the texts reach the length limit and are dropped, or all of them: it is a small model
    of random weights.
    """
    augment = {"prompts": 8, "first_line": True, "max_prompt_tokens": 24, "max_length": 96}
    config = rounds(augment={**augment, "instruction": "{prompt} more"})
    document, _ = run_rounds(config, [])
    told = document["rounds"][2]["prompts"]
    assert told["asked"] == told["new_prompts"] + sum(told["dropped"].values()) == 8
    assert told["dropped"]["no_room"] == 0
    assert rows_of(config, 1)[0] == {
        "id": "train/0",
        "messages": [{"role": "user", "content": "what is 0?"}],
    }
    assert prompts_in(cache_of(config, 2)) == {row["id"] for row in rows_of(config, 2)}


def test_requests_without_room(texts):
    """The length may be raised: it is that of requests to come."""
    short = {**AUGMENT, "max_length": 13}
    with pytest.raises(UserError, match=r"no prompt came out of .*hard\.jsonl: 5 overlong_prompts"):
        run_rounds(texts(augment=short), [])
    document, _ = run_rounds(texts(), [])
    assert document["rounds"][2]["prompts"]["new_prompts"] > 0


def test_the_page_has_hard_prompts_and_new_ones(texts):
    config = texts(count=2)
    run_rounds(config, [])
    html = (config.output / "rounds.html").read_text()
    for title in ("KL of hard prompts", "KL of new prompts", "dropped: duplicate"):
        assert title in html
    section = html[html.index('<section id="new"') :].partition("</section>")[0]
    first = rows_of(config, 2, "hard")[0]
    assert f"Round 2: {first['kl']:.2f} nats per token" in section
    assert first["prompt"] in section
    # Hostile text is text.
    for name, field in (("hard", "prompt"), ("prompts", "text")):
        rows = [{**row, field: EVIL} for row in rows_of(config, 2, name)]
        file = config.output / "round-002" / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report_again(config)
    html = (config.output / "rounds.html").read_text()
    assert "<script" not in html
    assert "\u202e" not in html
    assert html.count("{{ 7 * 7 }}") > 1
    file.unlink()
    report_again(config)
    assert 'id="new"' not in (config.output / "rounds.html").read_text()


def test_rounds_go_on_with_new_prompts(texts):
    config = texts(count=1)
    first = run_rounds(config, [])
    COMMANDS.clear()
    assert run_rounds(config, []) == first
    assert COMMANDS == []
    training = {"student": {"training": {"max_steps": 4}}}
    whole = texts(output="whole", count=2, **training)
    run_rounds(whole, [])
    run_rounds(texts(output="again", count=1, **training), [])
    again = texts(output="again", count=2, **training)
    run_rounds(again, [])
    assert same(weights(again, 2), weights(whole, 2))


def test_files_that_are_exchanged(texts):
    config, more = texts(count=2), texts(count=3)
    run_rounds(config, [])
    file = config.output / "round-001" / "prompts.jsonl"
    before = file.read_bytes()
    file.write_bytes(before.replace(b"what", b"that"))
    known = state_of(config).of("prompts-1").fingerprint[:16]
    with pytest.raises(UserError, match=f"not as prompts-1 has written it: .* expected {known}"):
        run_rounds(more, [])
    file.unlink()
    with pytest.raises(UserError, match=r"the file of prompts-1, .* is gone"):
        run_rounds(more, [])
    file.write_bytes(before)
    folder = config.output / "round-002"
    shutil.rmtree(folder / "augment")
    shutil.copytree(folder / "cache", folder / "augment")
    known = state_of(config).of("augment-2").fingerprint[:16]
    with pytest.raises(UserError, match=f"another cache than augment-2 .* expected {known}"):
        run_rounds(more, [])


def test_new_prompts_are_no_more_of_the_same_rounds(rounds):
    run_rounds(rounds(count=1), [])
    with pytest.raises(UserError, match=r"rounds\.augment"):
        run_rounds(rounds(count=2, augment=AUGMENT), [])


KILLS = [
    *(("prompts-1", 1), ("prompts-1", 4)),
    *(("answer-1", 9), ("write-1", 12)),
    *(("augment-2", 1), ("augment-2", 12), ("augment-2", 5)),
    *(("prompts-2", 2), ("prompts-2", 5)),
    *(("answer-2", 9), ("train-2", 3)),
]
"""Stages, and events in them at which a run is killed: each start goes on from the one before."""


def test_kills(texts, fork):
    """Killed in any stage, a run ends with the same prompts and the same student."""
    whole, config = texts(output="whole", **COMD), texts(**COMD)
    run_rounds(whole, [])
    save = State.save

    def killed(stage: str, event: int) -> tuple[int | None, list[str]]:
        def save_and_wait(self: State, folder: Path) -> None:
            save(self, folder)
            if stage in self.starts:
                kill_at(event)

        def work() -> None:
            State.save = save_and_wait  # type: ignore[method-assign]
            run_rounds(config, [])

        child = fork(work)
        child.join()
        return child.exitcode, list(state_of(config).starts)

    for stage, event in KILLS:
        assert killed(stage, event) == (-signal.SIGKILL, [stage])
    run_rounds(config, [])
    for number in range(3):
        assert same(weights(config, number), weights(whole, number))
    for name in ("prompts", "hard"):
        assert rows_of(config, 2, name) == rows_of(whole, 2, name)
    stages = [[done.stage for done in state_of(each).done] for each in (config, whole)]
    assert stages[0] == stages[1]
    for name in ("augment", "teacher", "cache"):
        one, other = (cache_of(each, 2, name).manifest for each in (config, whole))
        assert (one.content_sha256, one.fingerprint) == (other.content_sha256, other.fingerprint)


@pytest.mark.parametrize(
    ("augment", "fields", "said"),
    [
        ({}, {"skd": {}}, r"rounds\.augment is set beside rounds\.skd"),
        (
            {"max_prompt_tokens": 64},
            {},
            "max_prompt_tokens is 64, which leaves no room .* 64 tokens",
        ),
        ({"system_prompt": "Be brief."}, {}, "system_prompt is set, but text_field"),
    ],
)
def test_mistakes_are_said_before_anything_runs(texts, augment, fields, said):
    with pytest.raises(ConfigError, match=said) as error:
        run_rounds(texts(augment={**AUGMENT, **augment}, **fields), [])
    assert len(str(error.value).splitlines()) == 1
    assert COMMANDS == []


def test_a_limit_of_tokens_is_said_before_anything_runs(rounds, tmp_path):
    fields = {"path": str(tmp_path / "prompts.jsonl"), "prompt_field": "q", "max_length": 48}
    data = {**fields, "max_tokens": 900, "generate": {"max_new_tokens": 10}}
    with pytest.raises(ConfigError, match=r"data\.max_tokens is 900, which would leave out"):
        run_rounds(rounds(augment=AUGMENT, teacher={"data": data}), [])
    assert COMMANDS == []


def test_a_teacher_that_cannot_write_is_said_before_anything_runs(rounds, tiny_llama):
    server = {"model": str(tiny_llama), "backend": "server", "server": {"url": "http://x"}}
    teacher = {"teacher": server, "store": {"top_k": 8, "tail_samples": 0}}
    with pytest.raises(ConfigError, match="a server only scores"):
        run_rounds(rounds(augment=AUGMENT, teacher=teacher), [])
    assert COMMANDS == []


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"augment": {**AUGMENT, "instruction": "More!"}}, "has no {prompt}"),
        ({"augment": {**AUGMENT, "hard_fraction": 0}}, "hard_fraction"),
        ({"on_policy_fraction": 0}, "nobody learns from what students write"),
        ({"on_policy_fraction": 0, "augment": AUGMENT}, "nobody learns from what students write"),
        ({"on_policy_fraction": 0, "teacher_text": True}, "nobody learns from what students write"),
    ],
)
def test_settings_that_do_not_go_together(rounds, wrong, said):
    with pytest.raises(ValueError, match=said):
        rounds(**wrong)
