"""Define every option of `python -m trainer.recover`, and what they are as options of training."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from trainer import config as training
from trainer.config import BatchSize, Items, Source
from trainer.errors import UserError, require
from trainer.model.saved_adapter import adapter_settings, adapter_tokenizer, find_adapter

MOST = 1_000_000  # of rounds, steps, answers and tokens: more are a slip of the keyboard
# Options of training that shared code names in its messages -> ours
OPTION_NAMES = {
    "forgetting.general": "general", "forgetting.domain": "domain_items", "forgetting.floor": "floor",
    "forgetting.max_tokens": "max_tokens",
    "replay.data": "prompts", "data.train": "domain", "lora.path": "adapter", "model.path": "base", "optim.lr": "lr",
    "data.max_length": "batch.tokens_per_pack", "method qlora": "load_in_4bit"}


@dataclass
class Recover:
    """Bring back what an adapter forgot: `python -m trainer.recover --adapter A ...`."""

    adapter: str | None = None  # folder or hub name of a LoRA adapter of PEFT, whoever trained it
    base: str | None = None  # folder or hub name of the model under it; default: the one that the adapter names
    # chats whose prompts the model answers in each round, in a path or a list of sources as in data.train: replay.jsonl of synth.run, made
    # from the base, or your own; their answers are not read
    prompts: str | list[str | Source] = field(default_factory=list)
    # chats of what the adapter learnt, in the same forms, which train beside the answers; of prompts without answers, the adapter's own
    # answers, as it came, do
    domain: str | list[str | Source] = field(default_factory=list)
    share: float = 0.5  # of the samples that are domain chats, above 0 and below 1
    general: str | list[str | Items] = field(default_factory=list)  # items with known answers of what the base can do; suite:NAME too
    domain_items: str | list[str | Items] = field(default_factory=list)  # items of the domain, scored beside them
    # stop at the first round with this share of the base's accuracy on the general items, and of the adapter's on the domain items
    floor: float = 0.97
    # the adapter's update is multiplied by this before the first round; below 1 where most is forgotten: what is shrunk away of the domain
    # is learnt again from its chats, sooner than the rest comes back
    scale: float = 1.0
    rounds: int = 10  # at most
    steps: int = 30  # optimizer steps of a round
    answers: int = 256  # prompts that are answered anew for each round
    max_tokens: int = 256  # of an answer
    lr: float = 2e-4  # peak learning rate; it falls by a cosine over all rounds
    engine: Literal["transformers", "vllm"] = "transformers"  # what samples the answers; vllm: in a process that stays up between rounds
    batch: BatchSize = field(default_factory=BatchSize)
    load_in_4bit: bool = False  # hold the base in 4 bits, as qlora does
    trust_remote_code: bool = False  # run Python code that comes with the base
    seed: int = 0  # of the answers, and of the order of samples
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # of computation; auto: bf16 on a GPU that has it, else fp32
    device: Literal["auto", "cuda", "cpu"] = "auto"
    output: str = "runs/recovered"  # folder of the adapter, the answers, the report and the metrics
    resume: Literal["auto", "never"] = "never"  # auto: from the last whole round in the output folder, if there is one


def validate(config: Recover) -> None:
    """Raise UserError, which names the option, for values that no recovery can use."""
    require(config.adapter is not None, "adapter", "the adapter that forgot: a folder or a hub name", "none")
    for name, what in (("prompts", "chats whose prompts the model answers, such as replay.jsonl of python -m synth.run"),
                       ("general", "items with known answers, to measure what comes back"),
                       ("domain", "chats or prompts of what the adapter learnt, as nothing else would hold it")):
        require(bool(getattr(config, name)), name, what, "none")
    require(0 < config.share < 1, "share", "above 0 and below 1", config.share)
    require(0 < config.scale <= 1, "scale", "above 0, at most 1", config.scale)
    for name in ("rounds", "steps", "answers", "max_tokens"):
        require(1 <= getattr(config, name) <= MOST, name, f"1 to {MOST:,}", getattr(config, name))


def as_training(config: Recover) -> training.Config:
    """Return the options of a run with the KL to the base on the answers, and the loss on the domain.

    Raises UserError where the adapter is not there, or names no base.
    """
    folder = find_adapter("adapter", config.adapter)
    base = config.base or adapter_settings("adapter", folder).get("base_model_name_or_path")
    require(bool(base), "base", f"the model under the adapter, as {folder / 'adapter_config.json'} names none", "none")
    return training.Config(
        output=config.output, method="qlora" if config.load_in_4bit else "lora", lora=training.Lora(path=str(folder)),
        model=training.Model(path=base, tokenizer=adapter_tokenizer(folder), trust_remote_code=config.trust_remote_code),
        data=training.Data(train=config.domain, max_length=config.batch.tokens_per_pack, on_overlong="truncate"),
        replay=training.Replay(data=config.prompts, ratio=1 - config.share),
        retention=training.Retention(kl_weight=1.0, kl_sources="replay", kl_direction="reverse", kl_only=True),
        forgetting=training.Forgetting(general=config.general, domain=config.domain_items, max_tokens=config.max_tokens,
                                       every=config.steps, floor=config.floor, patience=0),
        batch=config.batch, optim=training.Optim(lr=config.lr, warmup_steps=min(config.steps, 10)),
        epochs=config.rounds, max_steps=config.rounds * config.steps, seed=config.seed, precision=config.precision, device=config.device,
        checkpoint=training.Checkpoint(every=config.steps), resume=config.resume,
        logging=training.Logging(every=config.steps, tensorboard=False))


@contextlib.contextmanager
def our_names() -> Iterator[None]:
    """Name options as this command does in the errors of shared code: data.train becomes domain."""
    try:
        yield
    except UserError as error:
        text = str(error)
        for theirs, ours in OPTION_NAMES.items():
            text = re.sub(rf"(?<![\w.]){re.escape(theirs)}(?!\w)", ours, text)
        raise UserError(text) from error
