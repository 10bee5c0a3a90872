"""What Steadfast is measured against: the loop most people start from, the best that stock parts make of it, and TRL's trainer.

All take the same tokens (`Samples`: pairs of input_ids int[L] and supervised bool[L]), the same model and initial adapter, and the
same optimiser (AdamW at a constant rate, gradients clipped to norm 1). The plain loop is a stock model with sdpa attention, batches
padded to their longest sample, PEFT's LoRA, the loss that the model computes from labels, and torch's AdamW. Its other forms change one
thing each: batches of like lengths; packs told apart by position ids; torch.compile; gradient checkpointing. TRL pads, or packs.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, DataCollatorWithFlattening, PreTrainedTokenizerBase
from transformers.trainer_pt_utils import get_length_grouped_indices

from benchmarks.harness.timing import Samples, StepResult, counted
from trainer.metrics.throughput import model_size
from trainer.metrics.timers import Phases

TrlBatch = tuple[dict[str, Tensor], Tensor]  # the model's inputs, and how many of their tokens are supervised
IGNORED = -100  # the label that Hugging Face's losses leave out


def load_stock(model_folder: Path, adapter_folder: Path | None, in_4bit: bool = False) -> nn.Module:
    """The stock model with PEFT's adapter on it, both as saved; None: without one, all of it to be trained. `in_4bit`: the base in NF4."""
    quantized = {"quantization_config": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32)}
    model = AutoModelForCausalLM.from_pretrained(model_folder, attn_implementation="sdpa", **quantized if in_4bit else {})
    return model if adapter_folder is None else PeftModel.from_pretrained(model, adapter_folder, is_trainable=True)


def endless(count: int, seed: int) -> Iterator[int]:
    """0 .. count - 1 in random order, then again in another, without end."""
    order = np.random.default_rng(seed)
    while True:
        yield from order.permutation(count).tolist()


# ---------------------------------------------------------------- a plain loop, and its other forms


class PlainLoop:
    """Stock model and stock loss: what a page of tutorial code gives. `batches` says which samples a step sees, `lay` how they lie."""

    def __init__(self, model: nn.Module, samples: Samples, lr: float, batches: Iterator[list[int]],
                 lay: Callable[[Samples], dict[str, Tensor]]):
        self.model, self.samples, self.batches, self.lay = model.train(), samples, batches, lay
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.size = model_size(model)
        self.optimizer = torch.optim.AdamW(self.trained, lr=lr, weight_decay=0.0)
        self.phases = Phases(torch.device("cpu"))

    def step(self) -> StepResult:
        return self.step_on(self.next_batch())

    def next_batch(self) -> Samples:
        return [self.samples[i] for i in next(self.batches)]

    def samples_of(self, batch: Samples) -> Samples:
        return batch

    def step_on(self, samples: Samples) -> StepResult:
        with self.phases("data"):
            batch = self.lay(samples)
        with self.phases("forward"):
            loss = self.model(**batch, use_cache=False).loss
        with self.phases("backward"):
            loss.backward()
        with self.phases("optimizer"):
            torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return counted(samples, loss.item(), batch["input_ids"].numel(), self.size)


def padded_loop(model: nn.Module, samples: Samples, pad_token: int, batch_size: int, lr: float, seed: int = 0) -> PlainLoop:
    """Batches in random order, padded to their longest sample."""
    return PlainLoop(model, samples, lr, drawn(len(samples), batch_size, seed), lambda batch: padded(batch, pad_token))


def grouped_loop(model: nn.Module, samples: Samples, pad_token: int, batch_size: int, lr: float, seed: int = 0) -> PlainLoop:
    """The same with batches of like lengths, as transformers' Trainer groups them."""
    lengths = [len(ids) for ids, _ in samples]
    return PlainLoop(model, samples, lr, grouped(lengths, batch_size, seed), lambda batch: padded(batch, pad_token))


def packed_loop(model: nn.Module, samples: Samples, tokens: int, lr: float, seed: int = 0) -> PlainLoop:
    """Samples end to end in one row, told apart by position ids alone, as transformers' own collator lays them."""
    return PlainLoop(model, samples, lr, filled([len(ids) for ids, _ in samples], tokens, seed), flattened)


def compiled(loop: PlainLoop, backend: str = "inductor") -> PlainLoop:
    """The same under torch.compile, for batches of any shape."""
    loop.model.compile(dynamic=True, backend=backend)
    return loop


def checkpointed(loop: PlainLoop) -> PlainLoop:
    """The same with every layer's activations computed again in the backward."""
    loop.model.gradient_checkpointing_enable({"use_reentrant": False})
    return loop


def drawn(count: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    order = endless(count, seed)
    while True:
        yield [next(order) for _ in range(batch_size)]


def grouped(lengths: list[int], batch_size: int, seed: int) -> Iterator[list[int]]:
    """Batches of like lengths, these in random order: without it, steps side by side would all be long ones, or short ones."""
    draw, order = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    while True:
        epoch = get_length_grouped_indices(lengths, batch_size, generator=draw)
        batches = [epoch[i : i + batch_size] for i in range(0, len(epoch) - batch_size + 1, batch_size)]
        yield from (batches[i] for i in order.permutation(len(batches)))


def filled(lengths: list[int], tokens: int, seed: int) -> Iterator[list[int]]:
    """Samples in random order, as many as fit into `tokens`; one that is longer than that has a row of its own."""
    pack: list[int] = []
    for i in endless(len(lengths), seed):
        if pack and sum(lengths[j] for j in pack) + lengths[i] > tokens:
            yield pack
            pack = []
        pack.append(i)


FLATTEN = DataCollatorWithFlattening()


def flattened(samples: Samples) -> dict[str, Tensor]:
    """input_ids, labels and position_ids, int64[1, sum of lengths]; the positions of every sample begin at 0."""
    return dict(FLATTEN([{"input_ids": ids, "labels": np.where(supervised, ids, IGNORED)} for ids, supervised in samples]))


def padded(samples: Samples, pad_token: int) -> dict[str, Tensor]:
    """input_ids, attention_mask and labels, int64[n, longest], padded on the right."""
    shape = len(samples), max(len(ids) for ids, _ in samples)
    input_ids, attention_mask, labels = np.full(shape, pad_token), np.zeros(shape, np.int64), np.full(shape, IGNORED)
    for i, (ids, supervised) in enumerate(samples):
        input_ids[i, : len(ids)] = ids
        attention_mask[i, : len(ids)] = 1
        labels[i, : len(ids)] = np.where(supervised, ids, IGNORED)
    arrays = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


# ---------------------------------------------------------------- TRL, and what needs a GPU


def missing(package: str, device: torch.device) -> str | None:
    """Why a line of a package whose kernels are written for GPUs cannot be had, or None."""
    if find_spec(package) is None:
        return f"{package.replace('_', '-')} is not installed"
    return None if device.type == "cuda" else "its kernels need a GPU"


class Trl:
    """TRL's SFTTrainer: its collator, its loss, its optimiser; one padded batch of 8 a step, or one best-fit-decreasing pack.

    Its steps are driven one at a time, to be interleaved with others. That leaves out the logging and callbacks of `train()`.
    """

    def __init__(self, model: nn.Module, samples: Samples, tokenizer: PreTrainedTokenizerBase, settings: dict, seed: int = 0,
                 device: torch.device | None = None):
        self.trainer = sft_trainer(model, samples, tokenizer, settings, seed, device or torch.device("cpu"))
        if self.trainer.args.use_liger_kernel:  # which `train()` would do
            from transformers.integrations.liger import apply_liger_kernel

            apply_liger_kernel(self.trainer.model, self.trainer.args.liger_kernel_config)
        self.trainer.create_optimizer_and_scheduler(num_training_steps=1)
        self.model, self.optimizer = self.trainer.model.train(), self.trainer.optimizer
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.size = model_size(model)
        self.batches = self._endless_batches()

    def _endless_batches(self) -> Iterator[TrlBatch]:
        loader = self.trainer.get_train_dataloader()
        while True:
            epoch = iter(loader)
            while True:
                batches, supervised = self.trainer.get_batch_samples(epoch, 1, self.trainer.args.device)
                if not batches:
                    break
                yield batches[0], supervised

    def step(self) -> StepResult:
        return self.step_on(self.next_batch())

    def next_batch(self) -> TrlBatch:
        return next(self.batches)

    def samples_of(self, batch: TrlBatch) -> Samples:
        """The samples inside: rows without their padding, or a pack cut where position_ids are 0."""
        ids, labels = batch[0]["input_ids"].cpu().numpy(), batch[0]["labels"].cpu().numpy()
        if "position_ids" in batch[0]:
            starts = np.flatnonzero(batch[0]["position_ids"][0].cpu().numpy() == 0)[1:]
            rows = zip(np.split(ids[0], starts), np.split(labels[0], starts), strict=True)
        else:
            lengths = batch[0]["attention_mask"].sum(1).tolist()
            rows = ((row[:n], kept[:n]) for row, kept, n in zip(ids, labels, lengths, strict=True))
        return [(row, kept != IGNORED) for row, kept in rows]

    def step_on(self, batch: TrlBatch) -> StepResult:
        inputs, supervised = batch
        computed, samples = inputs["input_ids"].numel(), self.samples_of(batch)
        loss = self.trainer.training_step(self.model, inputs, supervised)
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return counted(samples, loss.item(), computed, self.size)


def padded_batches(batch_size: int) -> dict:
    return {"per_device_train_batch_size": batch_size, "max_length": None}


def packed_batches(tokens_per_pack: int) -> dict:
    return {"per_device_train_batch_size": 1, "max_length": tokens_per_pack, "packing": True, "packing_strategy": "bfd"}


def sft_trainer(model: nn.Module, samples: Samples, tokenizer: PreTrainedTokenizerBase, settings: dict, seed: int, device: torch.device):
    """An SFTTrainer over samples that are already tokens."""
    import trl

    rows = {"input_ids": [ids.tolist() for ids, _ in samples], "assistant_masks": [mask.astype(int).tolist() for _, mask in samples]}
    args = trl.SFTConfig(
        output_dir=tempfile.gettempdir(), lr_scheduler_type="constant", weight_decay=0.0, gradient_checkpointing=False, bf16=False,
        use_cpu=device.type == "cpu", report_to=[], save_strategy="no", disable_tqdm=True, seed=seed, **settings)
    logging.getLogger("trl").setLevel(logging.ERROR)  # it says that packing wants flash attention, which a CPU has not
    return trl.SFTTrainer(model=model, args=args, train_dataset=Dataset.from_dict(rows), processing_class=tokenizer)
