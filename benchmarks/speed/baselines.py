"""Baselines: a plain Hugging Face training loop in its usual forms, and TRL's SFTTrainer.

All take equal tokens (`TokenSamples`), the same base weights and adapter, and AdamW at a constant rate with gradients clipped to norm 1.
The plain loop is a stock model with sdpa attention, PEFT's LoRA, the loss that the model computes from labels, and torch's AdamW; its
forms differ in how batches are made (padded, grouped by length, packed), in torch.compile and in gradient checkpointing. In bf16 the base
has bf16 weights and PEFT's adapters stay in fp32 (its default); under autocast all weights are fp32.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, DataCollatorWithFlattening, PreTrainedTokenizerBase
from transformers.trainer_pt_utils import get_length_grouped_indices

from benchmarks.harness.gpu_timing import free
from benchmarks.harness.timing import StepResult, TokenSamples, step_result
from trainer.metrics.throughput import model_size
from trainer.metrics.timers import Phases

IGNORED = -100  # the label that Hugging Face's losses leave out
CPU = torch.device("cpu")


def load_stock(model_folder: Path, adapter_folder: Path | None, in_4bit: bool = False, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Load a stock model with PEFT's adapter on it.

    Without an adapter folder all weights are trained. `in_4bit`: the base in NF4.
    """
    from peft import PeftModel

    quantized = {"quantization_config": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)}
    model = AutoModelForCausalLM.from_pretrained(
        model_folder, dtype=dtype, attn_implementation="sdpa", **quantized if in_4bit else {})
    return model if adapter_folder is None else PeftModel.from_pretrained(model, adapter_folder, is_trainable=True)


# ---------------------------------------------------------------- batches


def endless(count: int, seed: int) -> Iterator[int]:
    """Yield 0 .. count - 1 in random order, then again in another, without end."""
    order = np.random.default_rng(seed)
    while True:
        yield from order.permutation(count).tolist()


def shuffled(count: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    """Yield batches of `batch_size` indices in random order, without end."""
    order = endless(count, seed)
    while True:
        yield list(islice(order, batch_size))


def grouped(lengths: list[int], batch_size: int, seed: int) -> Iterator[list[int]]:
    """Yield batches of similar lengths in random order, as transformers' Trainer groups them.

    Without the random order, neighbouring steps would all be long or all be short.
    """
    draw, order = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    while True:
        epoch = get_length_grouped_indices(lengths, batch_size, generator=draw)
        batches = [epoch[i : i + batch_size] for i in range(0, len(epoch) - batch_size + 1, batch_size)]
        yield from (batches[i] for i in order.permutation(len(batches)))


def first_fit(lengths: list[int], tokens: int, seed: int) -> Iterator[list[int]]:
    """Yield samples in random order, as many as fit into `tokens`; a longer one has a row of its own."""
    pack: list[int] = []
    for i in endless(len(lengths), seed):
        if pack and sum(lengths[j] for j in pack) + lengths[i] > tokens:
            yield pack
            pack = []
        pack.append(i)


FLATTEN = DataCollatorWithFlattening()


def flattened(samples: TokenSamples) -> dict[str, Tensor]:
    """Return input_ids, labels and position_ids, int64[1, sum of lengths].

    The positions of every sample begin at 0.
    """
    return dict(FLATTEN([{"input_ids": ids, "labels": np.where(supervised, ids, IGNORED)} for ids, supervised in samples]))


def padded(samples: TokenSamples, pad_token: int = 1) -> dict[str, Tensor]:
    """Return input_ids, attention_mask and labels, int64[n, longest], padded on the right."""
    shape = len(samples), max(len(ids) for ids, _ in samples)
    input_ids, attention_mask, labels = np.full(shape, pad_token), np.zeros(shape, np.int64), np.full(shape, IGNORED)
    for i, (ids, supervised) in enumerate(samples):
        input_ids[i, : len(ids)] = ids
        attention_mask[i, : len(ids)] = 1
        labels[i, : len(ids)] = np.where(supervised, ids, IGNORED)
    arrays = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


# ---------------------------------------------------------------- the plain loop


class PlainLoop:
    """A stock model trained by its own loss and torch's AdamW, as a page of tutorial code does.

    `batches` yields the indices of a step's samples, `collate` makes the model's inputs of them. A step of more than `micro_batch`
    samples accumulates gradients. `autocast`: the forward runs in bf16 over fp32 weights.
    """

    def __init__(self, model: nn.Module, samples: TokenSamples, batches: Iterator[list[int]],
                 collate: Callable[[TokenSamples], dict[str, Tensor]], lr: float, device: torch.device = CPU,
                 micro_batch: int | None = None, autocast: bool = False):
        self.model, self.samples, self.batches, self.collate = model.train(), samples, batches, collate
        self.device, self.micro_batch, self.autocast = device, micro_batch, autocast
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.size = model_size(model)
        self.optimizer = torch.optim.AdamW(self.trained, lr=lr, weight_decay=0.0, fused=device.type == "cuda" or None)
        self.phases = Phases(device)

    def step(self) -> StepResult:
        return self.step_on(self.next_batch())

    def next_batch(self) -> TokenSamples:
        return [self.samples[i] for i in next(self.batches)]

    def samples_of(self, batch: TokenSamples) -> TokenSamples:
        return batch

    def step_on(self, samples: TokenSamples) -> StepResult:
        loss, computed = self.gradients(samples)
        with self.phases("optimizer"):
            torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return step_result(samples, loss, computed, self.size)

    def gradients(self, samples: TokenSamples) -> tuple[Tensor, int]:
        """Accumulate the gradients of a step. Returns its loss and the number of positions that were computed."""
        size = self.micro_batch or len(samples)
        parts = [samples[start : start + size] for start in range(0, len(samples), size)]
        # One micro-batch averages over its own labels; several are divided by the labels of all.
        divisor = {} if len(parts) == 1 else {"num_items_in_batch": sum(int(mask[1:].sum()) for _, mask in samples)}
        loss, computed = torch.zeros((), device=self.device), 0
        for part in parts:
            with self.phases("data"):
                batch = {name: tensor.to(self.device) for name, tensor in self.collate(part).items()}
            with self.phases("forward"), torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                share = self.model(**batch, use_cache=False, **divisor).loss
            with self.phases("backward"):
                share.backward()
            loss, computed = loss + share.detach(), computed + batch["input_ids"].numel()
        return loss, computed

    def halve_until_it_fits(self) -> None:
        """Halve the micro-batch until the longest samples fit into a GPU's memory.

        Raises OutOfMemoryError where one sample does not fit.
        """
        count = len(self.next_batch())
        longest = sorted(self.samples, key=lambda sample: -len(sample[0]))[:count]
        fits = False
        while not fits:
            try:
                self.gradients(longest)
                fits = True
            except torch.cuda.OutOfMemoryError:
                if self.micro_batch == 1:
                    raise
                self.micro_batch = (self.micro_batch or count) // 2
            self.optimizer.zero_grad()
            free()

    def use(self, samples: TokenSamples, tokens_per_step: int) -> None:
        """Train on these samples from now on, all of them in each step."""
        self.samples, self.batches = samples, shuffled(len(samples), len(samples), 0)

    def use_learning_rate(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def drop_batches(self) -> None:
        """Give back the gradients of a step that failed."""
        self.optimizer.zero_grad()

    def state_tensors(self) -> list[Tensor]:
        """Return what is held between steps: weights, buffers and the optimizer's moments."""
        moments = [t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        return [*self.model.parameters(), *self.model.buffers(), *moments]


class Batching(NamedTuple):
    """The sizes of a step's batches: samples of a padded batch, tokens of a pack."""

    samples: int = 8
    tokens: int = 1024


def padded_loop(model: nn.Module, samples: TokenSamples, size: Batching, lr: float, seed: int = 0, **options) -> PlainLoop:
    """Return the plain loop over batches in random order, padded to their longest sample."""
    return PlainLoop(model, samples, shuffled(len(samples), size.samples, seed), padded, lr, **options)


def grouped_loop(model: nn.Module, samples: TokenSamples, size: Batching, lr: float, seed: int = 0, **options) -> PlainLoop:
    """Return the plain loop over padded batches of similar lengths."""
    batches = grouped([len(ids) for ids, _ in samples], size.samples, seed)
    return PlainLoop(model, samples, batches, padded, lr, **options)


def packed_loop(model: nn.Module, samples: TokenSamples, size: Batching, lr: float, seed: int = 0, **options) -> PlainLoop:
    """Return the plain loop over packs, told apart by position ids as transformers' collator does."""
    packs = first_fit([len(ids) for ids, _ in samples], size.tokens, seed)
    return PlainLoop(model, samples, packs, flattened, lr, **options)


def compiled(loop: PlainLoop, backend: str = "inductor") -> PlainLoop:
    """Compile the loop's model with torch.compile, for batches of any shape."""
    loop.model.compile(dynamic=True, backend=backend)
    return loop


def checkpointed(loop: PlainLoop) -> PlainLoop:
    """Turn on gradient checkpointing of every layer."""
    loop.model.gradient_checkpointing_enable({"use_reentrant": False})
    return loop


# ---------------------------------------------------------------- TRL, and libraries that need a GPU

TrlBatch = tuple[dict[str, Tensor], Tensor]  # the model's inputs, and how many of their tokens are supervised


def missing(package: str, device: torch.device) -> str | None:
    """Return why a library whose kernels are written for GPUs cannot be measured, or None."""
    if find_spec(package) is None:
        return f"{package.replace('_', '-')} is not installed"
    return None if device.type == "cuda" else "its kernels need a GPU"


class Trl:
    """TRL's SFTTrainer, with its collator, loss and optimizer, on padded or best-fit packed batches.

    Its steps are called one at a time, to be interleaved with others: the logging and callbacks of `train()` are left out.
    """

    def __init__(self, model: nn.Module, samples: TokenSamples, tokenizer: PreTrainedTokenizerBase, arguments: dict, seed: int = 0,
                 device: torch.device = CPU):
        self.device, self.trainer = device, sft_trainer(model, samples, tokenizer, arguments, seed, device)
        if self.trainer.args.use_liger_kernel:  # as `train()` does
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

    def samples_of(self, batch: TrlBatch) -> TokenSamples:
        """Return the samples inside: rows without their padding, or a pack cut where position_ids are 0."""
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
        return step_result(samples, loss.detach(), computed, self.size)


def padded_arguments(batch_size: int) -> dict:
    """Return TRL's arguments for padded batches."""
    return {"per_device_train_batch_size": batch_size, "max_length": None}


def packed_arguments(tokens_per_pack: int) -> dict:
    """Return TRL's arguments for one pack a step."""
    return {"per_device_train_batch_size": 1, "max_length": tokens_per_pack, "packing": True, "packing_strategy": "bfd"}


def sft_trainer(model: nn.Module, samples: TokenSamples, tokenizer: PreTrainedTokenizerBase, arguments: dict, seed: int,
                device: torch.device):
    """Return an SFTTrainer over samples that are tokens already."""
    import trl
    from datasets import Dataset

    rows = {"input_ids": [ids.tolist() for ids, _ in samples], "assistant_masks": [mask.astype(int).tolist() for _, mask in samples]}
    args = trl.SFTConfig(**{
        "output_dir": tempfile.gettempdir(), "lr_scheduler_type": "constant", "weight_decay": 0.0, "gradient_checkpointing": False,
        "bf16": False, "use_cpu": device.type == "cpu", "report_to": [], "save_strategy": "no", "disable_tqdm": True, "seed": seed,
        **arguments})
    logging.getLogger("trl").setLevel(logging.ERROR)  # it warns that packing wants flash attention, which a CPU has not
    return trl.SFTTrainer(model=model, args=args, train_dataset=Dataset.from_dict(rows), processing_class=tokenizer)
