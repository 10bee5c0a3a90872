"""Generate answers with vLLM (`generation.engine: vllm`), which is faster than transformers.

vLLM runs in a process of its own (`python -m trainer.evaluation.vllm DESCRIPTOR`), to which requests go over a socket; it ends when its
parent does. For an evaluation it runs before any model is loaded here, so that all its memory is free again. An adapter is switched on per
request, so base and model share one process, and so do the states of an adapter that trains meanwhile. vLLM sums in another order than
transformers, which may change the choice between two tokens that are equally likely to the last bits.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from transformers import AutoConfig

from trainer import config as training
from trainer.data.chat_template import ChatTemplate
from trainer.errors import UserError, last_error_line
from trainer.evaluation.config import Config
from trainer.evaluation.generation import Completion, decode_completion, end_token_ids
from trainer.evaluation.items import ItemFile
from trainer.evaluation.models import EvaluatedModels, models_to_load, template_of
from trainer.evaluation.tokens import encode
from trainer.model.generation_settings import read_settings
from trainer.model.locate import model_source, one_line_errors
from trainer.model.saved_adapter import adapter_settings
from trainer.model.serving import max_lora_rank, why_vllm_refuses
from trainer.runtime.device import compute_dtype, dtype_name

CPU_CACHE = 1_000_000_000  # bytes of key-value cache without a GPU
QUIET = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false",
         "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def require(config: Config) -> None:
    """Check that vLLM can run, before a model is loaded; raise UserError if not."""
    if config.generation.engine != "vllm":
        return
    if importlib.util.find_spec("vllm") is None:
        raise UserError("generation.engine: vllm is not installed; pip install 'steadfast-sft[synth]', or use transformers")
    if config.load_in_4bit:
        raise UserError("generation.engine: vllm cannot load a model in 4 bits, as load_in_4bit asks; use transformers")


def generate_all(models: EvaluatedModels, files: Sequence[ItemFile], config: Config, device: torch.device,
                 log: Path) -> dict[str, list[Completion]]:
    """Return the answers of base and model, in the order of their prompts.

    Raises UserError, with the last error line of the log, if vLLM fails.
    """
    completions: dict[str, list[Completion]] = {}
    jobs: dict[str, tuple[dict, list, list]] = {}  # model -> vLLM's options, its requests, and what they are for
    for name, model_options, adapter in models_to_load(models):
        source, template = model_source(model_options), template_of(model_options, config)
        with one_line_errors("model.path", source):
            context = getattr(AutoConfig.from_pretrained(source, trust_remote_code=model_options.trust_remote_code).get_text_config(),
                              "max_position_embeddings", None)
        prompts = encode(files, template, config, context).prompts
        if not prompts:
            continue
        ends = end_ids(source, template)
        options, requests, askers = jobs.setdefault(source, (job_options(source, model_options, config.precision, device), [], []))
        if adapter is not None:
            options |= lora_options(adapter)
        requests.append({"prompts": [prompt.ids for prompt in prompts], "max_tokens": [prompt.max_tokens for prompt in prompts],
                         "stop": ends, "adapter": None if adapter is None else str(adapter.resolve())})
        askers.append((name, template, ends))
    for options, requests, askers in jobs.values():
        with contextlib.closing(VllmProcess(options, log)) as process:
            for request, (name, template, ends) in zip(requests, askers, strict=True):
                completions[name] = [decode_completion(template, ids, ends) for ids in process.answers(request)]
    return completions


def end_ids(source: str, template: ChatTemplate) -> list[int]:
    """Return the tokens that end an answer of the model at `source`."""
    return end_token_ids(read_settings(source), template)


def job_options(source: str, model_options: training.Model, precision: str, device: torch.device) -> dict:
    """Return vLLM's options to load a model."""
    options = {"model": source, "dtype": dtype_name(compute_dtype(precision, device)), "load_format": "safetensors",
               "generation_config": "vllm", "trust_remote_code": model_options.trust_remote_code, "seed": 0}
    if model_options.tokenizer is not None:
        options["tokenizer"] = model_options.tokenizer
    if device.type == "cpu":
        options |= {"enforce_eager": True, "kv_cache_memory_bytes": CPU_CACHE}
    return options


def lora_options(adapter: Path) -> dict:
    """Return vLLM's options for an adapter. Raises UserError for one that it does not apply."""
    settings = adapter_settings("adapter", adapter)
    if refusal := why_vllm_refuses(settings):
        raise UserError(f"generation.engine: vllm does not apply this adapter: {refusal}; use transformers")
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": max_lora_rank(settings)}


class VllmProcess:
    """A process in which vLLM holds a model, until it is closed."""

    def __init__(self, options: dict, log: Path):
        """Start it with vLLM's options; its output goes to `log`."""
        ours, theirs = socket.socketpair()
        self.model, self.log, self.resources = options["model"], log, contextlib.ExitStack()
        folder = self.resources.enter_context(tempfile.TemporaryDirectory())
        path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
        log.parent.mkdir(parents=True, exist_ok=True)
        with theirs, log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "trainer.evaluation.vllm", str(theirs.fileno())], pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                env=os.environ | QUIET | {"PYTHONPATH": path, "TMPDIR": folder})
        self.connection = Connection(ours.detach())
        self._send(options)

    def answers(self, request: dict) -> list[list[int]]:
        """Return the token ids of the answer to each prompt, up to a token that ends it.

        A request has `prompts`, `max_tokens` of each, the tokens `stop`, and the folder of an `adapter` or None. With a `seed` answers are
        drawn at temperature 1, without one they are greedy. A `number` tells states of one adapter apart. Raises UserError, with the last
        error line of the log, if vLLM fails.
        """
        self._send(request)
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            self.process.wait()
            raise UserError(f"generation.engine: vllm failed on {self.model}: {last_error_line(self.log)}; see {self.log}, "
                            "or use transformers") from None

    def _send(self, message: dict) -> None:
        with contextlib.suppress(OSError):  # a process that has ended is noticed where its answers are awaited
            self.connection.send(message)

    def close(self) -> None:
        """End the process, and remove its temporary files."""
        self.connection.close()
        self.process.wait()
        self.resources.close()


# ---------------------------------------------------------------- in the other process


def serve(connection: Connection) -> None:
    """Load a model with vLLM, and answer requests until the parent closes the connection."""
    from vllm import LLM

    options = connection.recv()
    llm = LLM(**options)
    while True:
        try:
            request = connection.recv()
        except (EOFError, OSError):
            return
        if options.get("enable_sleep_mode"):
            llm.wake_up()
        connection.send(_answer(llm, request))
        if options.get("enable_sleep_mode"):
            llm.sleep(level=1)


def _answer(llm, request: dict) -> list[list[int]]:
    """Return the token ids of the answers to a request, stop tokens included."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.lora.request import LoRARequest

    seed = request.get("seed")
    sampling = [SamplingParams(temperature=0.0 if seed is None else 1.0, seed=None if seed is None else seed + i, max_tokens=limit,
                               stop_token_ids=request["stop"], detokenize=False) for i, limit in enumerate(request["max_tokens"])]
    number = request.get("number", 1)
    adapter = LoRARequest(f"adapter-{number}", number, request["adapter"]) if request["adapter"] else None
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in request["prompts"]]
    outputs = llm.generate(prompts, sampling, use_tqdm=False, lora_request=adapter)
    return [list(output.outputs[0].token_ids) for output in outputs]


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
