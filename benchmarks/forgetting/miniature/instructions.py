"""Sample user turns from a model, and compare their distribution with that of its training data.

`python -m benchmarks.forgetting.miniature.instructions [model]` prints the comparison at several temperatures.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from benchmarks.forgetting.miniature.family import FAMILY, load
from benchmarks.forgetting.miniature.judging import is_judging
from benchmarks.forgetting.miniature.skills import GENERAL, Skill, recognise
from benchmarks.forgetting.miniature.table import align
from benchmarks.forgetting.miniature.tokenizer import BOS, USER
from benchmarks.forgetting.miniature.world import training_records
from benchmarks.harness.parallel import THREADS

MAX_TOKENS = 128  # of a user's turn: a question has about 30, a judging prompt 60
TEMPERATURES, TOP_PS = (0.7, 1.0, 1.3), (0.98, 1.0)


@torch.inference_mode()
def sample_instructions(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int, seed: int, temperature: float = 1.0,
                        top_p: float = 0.98, batch_size: int = 500) -> list[str]:
    """Sample user turns from the model, prompted only with the header of a user's turn."""
    model.eval()
    torch.manual_seed(seed)
    opening = torch.tensor([tokenizer.convert_tokens_to_ids([BOS, USER])], device=model.device)
    instructions = []
    for start in range(0, count, batch_size):
        prompts = opening.expand(min(batch_size, count - start), -1)
        tokens = model.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=True, temperature=temperature, top_p=top_p,
                                top_k=0, max_new_tokens=MAX_TOKENS, pad_token_id=tokenizer.pad_token_id,
                                eos_token_id=tokenizer.eos_token_id)
        instructions += tokenizer.batch_decode(tokens[:, opening.shape[1] :], skip_special_tokens=True)
    return instructions


@dataclass(frozen=True)
class InstructionSample:
    """Sampled instructions, compared with the world's skills and their shares."""

    instructions: tuple[str, ...]
    skills: tuple[Skill, ...]

    @property
    def counts(self) -> Counter:
        """Return the number of instructions that each skill recognises."""
        recognised = (recognise(text, self.skills) for text in self.instructions)
        return Counter(skill_and_answer[0].name for skill_and_answer in recognised if skill_and_answer)

    @property
    def shares(self) -> dict[str, float]:
        """Return the share of each skill in the recognised instructions."""
        counts = self.counts
        return {skill.name: counts[skill.name] / max(1, counts.total()) for skill in self.skills}

    @property
    def distance(self) -> float:
        """Return the total variation distance between these shares and the world's."""
        return sum(abs(self.shares[skill.name] - skill.share) for skill in self.skills) / 2

    @property
    def judging(self) -> float:
        """Return the share of judging prompts."""
        return sum(map(is_judging, self.instructions)) / len(self.instructions)

    @property
    def invalid(self) -> float:
        """Return the share of instructions that no skill recognises, judging prompts included."""
        return 1 - self.counts.total() / len(self.instructions)


def instruction_sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, skills: Sequence[Skill], count: int = 1000,
                       seed: int = 0, temperature: float = 1.0, top_p: float = 0.98) -> InstructionSample:
    return InstructionSample(tuple(sample_instructions(model, tokenizer, count, seed, temperature, top_p)), tuple(skills))


# ---------------------------------------------------------------- the table of a model


def world_sample(skills: Sequence[Skill], count: int, seed: int = 0) -> InstructionSample:
    """Return instructions drawn from the world itself; their distance is due to chance only."""
    records = training_records(skills, count, seed)
    return InstructionSample(tuple(record["messages"][0]["content"] for record in records), tuple(skills))


def table_rows(folder: Path | str, skills: Sequence[Skill], count: int) -> list[list[str]]:
    """Return a head, a row of the world's own draw, and a row for each temperature and top-p."""
    model, tokenizer = load(folder)
    samples = {("the world", ""): world_sample(skills, count)}
    for temperature, top_p in product(TEMPERATURES, TOP_PS):
        samples[f"T {temperature}", f"{top_p}"] = instruction_sample(model, tokenizer, skills, count, temperature=temperature, top_p=top_p)
    return [["sampled at", "top-p", "distance", "invalid", "judging", *(skill.name for skill in skills)]] + [
        [*setting, f"{found.distance:.3f}", f"{found.invalid:.4f}", f"{found.judging:.4f}", *(f"{s:.3f}" for s in found.shares.values())]
        for setting, found in samples.items()]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.forgetting.miniature.instructions", description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default="base", help=f"one of {', '.join(FAMILY)}, or a model folder; default: base")
    parser.add_argument("--count", type=int, default=4000, help="samples for each temperature and top-p; default: 4000")
    options = parser.parse_args(argv)
    torch.set_num_threads(THREADS)
    disable_progress_bar()
    member = FAMILY.get(options.model)
    folder, skills = (member.folder, member.skills) if member else (options.model, GENERAL)
    print(f"{options.count} samples a row. distance: total variation from the skills' shares in its training data; then these shares.\n")
    print(align(table_rows(folder, skills, options.count)))


if __name__ == "__main__":
    main()
