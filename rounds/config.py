"""The config of ``student-rounds``: two other configs, and how rounds are made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, field_validator, model_validator

from logitcask.cache_format.cli.config_docs import markdown
from logitcask.cache_format.cli.config_model import ConfigModel, expanded


class StopConfig(ConfigModel):
    """The end of the rounds before `count`, by the KL on held-out text after each round."""

    patience: int = Field(
        1, ge=1, description="Rounds in a row that may fail to improve on the lowest KL so far."
    )
    min_improvement: float = Field(
        0.0, ge=0, description="Smallest decrease of the KL that is an improvement, in nats."
    )


class SkdConfig(ConfigModel):
    """Speculative knowledge distillation (arXiv 2410.11325): in the students' answers, each token
    that the teacher ranks low is replaced by a sample of the teacher, and the student goes on from
    there.
    """

    top_k: int = Field(
        25,
        ge=1,
        description="A token is accepted if fewer than top_k ids are more probable to the teacher.",
    )
    passes: int = Field(
        8,
        ge=2,
        description="Passes in a round at most, each of which replaces a token of every answer that "
        "has one to reject. The first one writes the answers. Passes end when nothing is rejected.",
    )
    temperature: float = Field(
        0.2, ge=0, description="Of the teacher's sampling. 0: its most probable token."
    )
    top_p: float = Field(0.5, gt=0, le=1, description="Of the teacher's sampling.")


PROMPT = "{prompt}"
"""The place of a hard prompt's text in the augmentor's instruction."""


class AugmentConfig(ConfigModel):
    """More prompts like the hard ones, as competitive distillation has them (arXiv 2311.08213): in
    each round the prompts are flagged at whose answers student and teacher differ most. The teacher
    writes new ones like them, and the next round has these, too.
    """

    prompts: int = Field(
        ge=1,
        description="New prompts that the teacher is asked for before each round but the first. "
        "Empty ones, duplicates and those that are too long are dropped and counted.",
    )
    hard_fraction: float = Field(
        0.25,
        gt=0,
        le=1,
        description="Share of a round's prompts that are flagged: those with the largest mean, over "
        "the tokens of the answer, of the student's logprob minus the teacher's.",
    )
    instruction: str | None = Field(
        None,
        description="The request to the teacher, with `{prompt}` in the place of the hard prompt's "
        "text. Default: one that asks for another request of the same kind (docs/rounds.md).",
    )
    system_prompt: str | None = Field(
        None,
        description="System message of the request. That of data.generate is for answers, and is "
        "not used.",
    )
    first_line: bool = Field(
        False, description="Whether only the first line of what the teacher writes is the prompt."
    )
    max_prompt_tokens: int = Field(
        128, ge=1, description="Longest new prompt, in tokens. A longer one is dropped."
    )
    max_length: int | None = Field(
        None,
        ge=1,
        description="Of a request and the new prompt together, in tokens. It may be raised later. "
        "Default: data.max_length.",
    )
    temperature: float = Field(1.0, ge=0, description="Of the teacher's sampling of prompts.")
    top_p: float = Field(1.0, gt=0, le=1, description="Of the teacher's sampling of prompts.")

    @field_validator("instruction")
    @classmethod
    def _prompt_has_a_place(cls, instruction: str | None) -> str | None:
        if instruction is not None and PROMPT not in instruction:
            raise ValueError(
                f"the instruction has no {PROMPT}, so the teacher would not see the hard prompt; put it where its text belongs"
            )
        return instruction


class RoundsSettings(ConfigModel):
    """The rounds."""

    count: int = Field(
        ge=1,
        description="Number of rounds. It may be raised later: finished rounds are kept, and the "
        "training goes on.",
    )
    prompts: int = Field(
        ge=1,
        description="Prompts that the student answers in a round: the next ones of the data. After "
        "the last prompt the first one follows again.",
    )
    steps_per_round: int = Field(ge=1, description="Optimizer steps in a round.")
    warmup_steps: int = Field(
        0,
        ge=0,
        description="Optimizer steps on the student's own cache of given text, before the first "
        "round.",
    )
    on_policy_fraction: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Share of the learnt positions that students have written (GKD's lambda). The "
        "rest is of the cache that the student config names: text of data, or of the teacher; with "
        "teacher_text, what the teacher writes in the rounds. 0, only with augment and teacher_text: "
        "students' text serves to find the hard prompts alone.",
    )
    teacher_text: bool = Field(
        False,
        description="Whether the teacher answers each round's prompts, too. Its answers are a cache "
        "of their own, called teacher-N in the mixture beside the student's, round-N.",
    )
    replay: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Share of the students' positions that is of earlier rounds. Default: 0.25, or "
        "0 with a loss that old text misleads (reverse_kl, skew_reverse_kl, policy_gradient, jsd "
        "with beta above 0.5).",
    )
    stop: StopConfig | None = Field(None, description="An early end. Default: none.")
    skd: SkdConfig | None = Field(
        None, description="Tokens of the teacher in the students' answers. Default: none."
    )
    augment: AugmentConfig | None = Field(
        None, description="New prompts like those that the student finds hard. Default: none."
    )

    @model_validator(mode="after")
    def _teacher_text_is_learnt_from(self) -> Self:
        if self.teacher_text and self.on_policy_fraction == 1:
            raise ValueError(
                "teacher_text is true, but on_policy_fraction is 1, which leaves the teacher's text no share; set it below 1, "
                "such as 0.5"
            )
        return self

    @model_validator(mode="after")
    def _students_text_is_of_use(self) -> Self:
        if self.on_policy_fraction == 0 and (self.augment is None or not self.teacher_text):
            raise ValueError(
                "on_policy_fraction is 0, so that nobody learns from what students write; set it above 0, or set augment, "
                "which finds the hard prompts by it, and teacher_text"
            )
        return self


class RoundsConfig(ConfigModel):
    """A `student-rounds` config."""

    teacher_config: Path = Field(
        description="A teacher-cache config with data.generate: the teacher, the prompts, the "
        "sampling, and what is stored. Its output is not used."
    )
    student_config: Path = Field(
        description="A train-student config: the student, the losses and the training. Its `cache` "
        "has given text to evaluate on, and to learn from; `cache_config` builds it. "
        "training.max_steps is the length of the learning rate's schedule. Default: all steps of "
        "all rounds."
    )
    rounds: RoundsSettings
    output: Path = Field(
        description="Folder of the run: a cache and a student of each round, state.json and "
        "rounds.json."
    )

    @field_validator("teacher_config", "student_config", "output")
    @classmethod
    def _home(cls, path: Path) -> Path:
        return expanded(path)

    @model_validator(mode="after")
    def _files_are_there(self) -> Self:
        for name in ("teacher_config", "student_config"):
            path: Path = getattr(self, name)
            if not path.is_file():
                raise ValueError(f"{name} is {path}, and there is no such file")
        return self


if __name__ == "__main__":  # for docs/config.md
    print(markdown(RoundsConfig))
