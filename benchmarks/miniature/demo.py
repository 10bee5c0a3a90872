"""`python -m benchmarks.miniature.demo`: fine-tune the base on the domain, and see what it learns and what it forgets."""

from __future__ import annotations

import sys
from pathlib import Path

from peft import PeftModel

from benchmarks.miniature.domain import DOMAIN
from benchmarks.miniature.evaluate import evaluate
from benchmarks.miniature.family import FAMILY, load
from benchmarks.miniature.skills import GENERAL
from benchmarks.miniature.table import table
from benchmarks.miniature.world import heldout_items, training_records, write_jsonl
from trainer.config import Batch, Config, Data, Logging, Lora, Model, Optim
from trainer.errors import UserError
from trainer.run import train

ROWS, EPOCHS = 600, 6
RUN = Path("runs/demo")
ITEMS = heldout_items(GENERAL, 80), heldout_items(DOMAIN, 80)


def recipe(base: Path, domain: Path, output: Path) -> Config:
    """LoRA on every linear layer. The learning rate suits a model a ten-thousandth the size of those that 2e-4 suits."""
    return Config(
        output=str(output), model=Model(path=str(base)), lora=Lora(rank=16, alpha=32.0), data=Data(train=str(domain), max_length=256),
        batch=Batch(tokens_per_pack=1024, tokens_per_step=1024), optim=Optim(lr=5e-3), epochs=EPOCHS, logging=Logging(every=5))


def main() -> int:
    base = FAMILY["base"].folder
    model, tokenizer = load(base)
    arms = {"base": tuple(evaluate(model, tokenizer, items) for items in ITEMS)}
    domain = write_jsonl(training_records(DOMAIN, ROWS, seed=0), RUN / "domain.jsonl")
    try:
        run = train(recipe(base, domain, RUN))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    tuned = PeftModel.from_pretrained(model, run.folder / "adapter")
    arms["domain only"] = tuple(evaluate(tuned, tokenizer, items) for items in ITEMS)
    print(f"\nAccuracy on held-out items; forgotten: share of the base's right general answers that are wrong now.\n\n{table(arms)}\n")
    print(f"How the run went: {run.folder / 'report.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
