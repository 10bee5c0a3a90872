"""Ask the model, as it is now, for answers, and keep them in files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from trainer.data.step_plan import hash_seed
from trainer.on_policy import answers
from trainer.on_policy.answers import Answered
from trainer.on_policy.engines import Engine


@dataclass(frozen=True)
class Responder:
    """The model that answers prompts as it is now, and the folder that keeps its answers."""

    engine: Engine
    folder: Path
    max_tokens: int  # of an answer
    longest: int  # tokens of prompt and answer together
    seed: int
    tokenizer: PreTrainedTokenizerBase

    def path(self, name: str) -> Path:
        """Return the file of the answers of this name."""
        return self.folder / f"{name}.jsonl"

    def answer(self, name: str, prompts: list[list[int]], seed: int, room: list[int] | None = None) -> list[Answered]:
        """Return answers to these prompts: those in the file of this name, else drawn now and written there.

        `room` is the most tokens that each answer may have; by default what `max_tokens` and `longest` leave.
        """
        path = self.path(name)
        if (found := answers.read(path)) is not None:
            return found
        room = room or [min(self.max_tokens, self.longest - len(prompt)) for prompt in prompts]
        drawn = self.engine.answer(prompts, room, hash_seed(self.seed, seed + 1))
        answered = [Answered(list(prompt), list(answer)) for prompt, answer in zip(prompts, drawn, strict=True)]
        answers.write(path, answered, self.tokenizer)
        cut = sum(len(answer) >= most for answer, most in zip(drawn, room, strict=True))
        print(f"answers: {len(drawn):,} to {name}, {sum(map(len, drawn)) / len(drawn):.1f} tokens each, {cut:,} as long as they may be",
              flush=True)
        return answered
