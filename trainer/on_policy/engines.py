"""Sample answers from the model in memory, or with vLLM in a process that stays up."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from trainer import config as training
from trainer.data.chat_template import ChatTemplate
from trainer.evaluation.config import Generation
from trainer.evaluation.generation import generate
from trainer.evaluation.vllm import VllmProcess, end_ids, job_options, lora_options
from trainer.model.export import save_adapter
from trainer.model.forward import unwrap_peft
from trainer.retention.monitor import evaluation_mode


class Engine(Protocol):
    """Draws answers of the model as it is now."""

    def answer(self, prompts: Sequence[list[int]], max_tokens: Sequence[int], seed: int) -> list[list[int]]:
        """Return the token ids of an answer to each prompt, drawn at temperature 1, the stop included."""

    def close(self) -> None:
        """End the engine's process, if it has one."""


@dataclass
class InMemory:
    """Samples with transformers from the model that is trained.

    Equal seeds and weights give equal answers on a CPU.
    """

    model: nn.Module
    template: ChatTemplate
    compiled: bool = False  # the model's layers are compiled for training

    def answer(self, prompts: Sequence[list[int]], max_tokens: Sequence[int], seed: int) -> list[list[int]]:
        with evaluation_mode(self.model, compiled=self.compiled):
            return generate(self.model, self.template, prompts, max_tokens, Generation().batch, seed)

    def close(self) -> None:
        pass


class Vllm:
    """Samples with vLLM, which gets the adapter anew for each round, and logs to `vllm.log`."""

    def __init__(self, config: training.Config, model: nn.Module, template: ChatTemplate, device: torch.device, output: Path):
        """Start the process. Raises UserError where vLLM is not there, or does not apply the adapter."""
        source = unwrap_peft(model).name_or_path
        self.model, self.ends, self.folder, self.round = model, end_ids(source, template), output / "adapter-now", 0
        options = job_options(source, config.model, config.precision, device) | lora_options(Path(config.lora.path))
        if device.type == "cuda":  # whose memory the trainer needs between rounds
            options["enable_sleep_mode"] = True
        self.process = VllmProcess(options, output / "vllm.log")

    def answer(self, prompts: Sequence[list[int]], max_tokens: Sequence[int], seed: int) -> list[list[int]]:
        save_adapter(self.model, self.folder)
        self.round += 1
        return self.process.answers({"prompts": prompts, "max_tokens": max_tokens, "stop": self.ends, "adapter": str(self.folder),
                                     "number": self.round, "seed": seed})

    def close(self) -> None:
        self.process.close()
        shutil.rmtree(self.folder, ignore_errors=True)
