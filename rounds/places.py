"""The files of a run of rounds."""

from __future__ import annotations

from pathlib import Path

from logitcask.rounds import skd
from logitcask.rounds.config import RoundsSettings


class Places:
    """The files of the rounds in ``folder``. ``passes``: the number of passes over the answers of a
    round, if it has several.
    """

    def __init__(self, folder: Path, rounds: RoundsSettings) -> None:
        self.folder, self.rounds = folder, rounds
        self.passes: dict[int, int] = {}

    def of_round(self, number: int) -> Path:
        return self.folder / f"round-{number:03d}"

    # --- prompts, with ``rounds.augment``

    def drawn(self, number: int) -> Path:
        """The prompts that the data has for a round."""
        return self.of_round(number) / "drawn.jsonl"

    def hard(self, number: int) -> Path:
        """The requests for new prompts of a round, each with a hard prompt of the round before."""
        return self.of_round(number) / "hard.jsonl"

    def augmented(self, number: int) -> Path:
        """The cache of the teacher's answers to the requests."""
        return self.of_round(number) / "augment"

    def prompts(self, number: int) -> Path:
        """All prompts of a round."""
        return self.of_round(number) / "prompts.jsonl"

    # --- caches and students

    def cache(self, number: int) -> Path:
        """The cache of a round; of its newest pass, if it has several."""
        return self.cache_of_pass(number, self.passes.get(number, 1))

    def cache_of_pass(self, number: int, pass_number: int) -> Path:
        return self.of_round(number) / skd.cache_name(pass_number)

    def answers(self, number: int) -> Path:
        """The cache of the teacher's own answers."""
        return self.of_round(number) / "teacher"

    def model(self, number: int) -> Path:
        """The student after a round; after round 0, the one that the first round begins with."""
        return self.of_round(number) / "student"

    def last_step(self, number: int) -> int:
        """Steps of the whole training at the end of a round."""
        return self.rounds.warmup_steps + number * self.rounds.steps_per_round

    def checkpoint(self, number: int) -> Path:
        return self.model(number) / f"checkpoint-{self.last_step(number)}"
