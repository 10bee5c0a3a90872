"""Generate greedy answers with vLLM (`generation.engine: vllm`), which is faster than transformers.

vLLM runs in a process of its own (`python -m trainer.evaluation.vllm JOB ANSWERS`) and before any model is loaded here, so that all its
memory is free again. An adapter is switched on per request, so base and model share one process. It sums in another order than
transformers, which may change the choice between two tokens that are equally likely to the last bits.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, GenerationConfig

from trainer import config as training
from trainer.errors import UserError, last_error_line
from trainer.evaluation.config import Config
from trainer.evaluation.generation import Completion, decode_completion, end_token_ids
from trainer.evaluation.items import ItemFile
from trainer.evaluation.models import EvaluatedModels, models_to_load, template_of
from trainer.evaluation.tokens import encode
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
    jobs: dict[str, tuple[dict, list]] = {}  # model -> the job of its process, and what its answers are for
    for name, model_options, adapter in models_to_load(models):
        source, template = model_source(model_options), template_of(model_options, config)
        with one_line_errors("model.path", source):
            context = getattr(AutoConfig.from_pretrained(source, trust_remote_code=model_options.trust_remote_code).get_text_config(),
                              "max_position_embeddings", None)
        prompts = encode(files, template, config, context).prompts
        if not prompts:
            continue
        ends = end_token_ids(_generation_config(source), template)
        job, requests = jobs.setdefault(source, (_job(source, model_options, config, device), []))
        if adapter is not None:
            job["adapter"] = str(adapter.resolve())
            job["options"] |= _lora_options(adapter)
        job["parts"].append({"prompts": [prompt.ids for prompt in prompts], "max_tokens": [prompt.max_tokens for prompt in prompts],
                             "stop": ends, "adapter": adapter is not None})
        requests.append((name, template, ends))
    for job, requests in jobs.values():
        for (name, template, ends), answers in zip(requests, _run_process(job, log), strict=True):
            completions[name] = [decode_completion(template, ids, ends) for ids in answers]
    return completions


def _generation_config(source: str) -> GenerationConfig | None:
    try:
        return GenerationConfig.from_pretrained(source)
    except OSError:  # the model has no generation_config.json
        return None


def _job(source: str, model_options: training.Model, config: Config, device: torch.device) -> dict:
    """Return the job of the vLLM process: how to load the model, and no prompts yet."""
    options = {"model": source, "dtype": dtype_name(compute_dtype(config.precision, device)), "load_format": "safetensors",
               "generation_config": "vllm", "trust_remote_code": model_options.trust_remote_code, "seed": 0}
    if model_options.tokenizer is not None:
        options["tokenizer"] = model_options.tokenizer
    if device.type == "cpu":
        options |= {"enforce_eager": True, "kv_cache_memory_bytes": CPU_CACHE}
    return {"options": options, "adapter": None, "parts": []}


def _lora_options(adapter: Path) -> dict:
    """Return vLLM's options for an adapter. Raises UserError for one that it does not apply."""
    settings = adapter_settings("adapter", adapter)
    if refusal := why_vllm_refuses(settings):
        raise UserError(f"generation.engine: vllm does not apply this adapter: {refusal}; use transformers")
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": max_lora_rank(settings)}


def _run_process(job: dict, log: Path) -> list[list[list[int]]]:
    """Run the job in a process of its own; return the token ids of the answers of each part."""
    with tempfile.TemporaryDirectory() as folder:
        job_file, answers_file = Path(folder) / "job.json", Path(folder) / "answers.json"
        job_file.write_text(json.dumps(job))
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as file:
            command = [sys.executable, "-m", "trainer.evaluation.vllm", str(job_file), str(answers_file)]
            process = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                                     env=os.environ | QUIET | {"PYTHONPATH": path, "TMPDIR": folder})
        if process.returncode:
            raise UserError(f"generation.engine: vllm failed on {job['options']['model']}: {last_error_line(log)}; see {log}, "
                            "or use transformers")
        return json.loads(answers_file.read_text())


# ---------------------------------------------------------------- in the other process


def run_job(job_file: Path, answers_file: Path) -> None:
    """Run a job with vLLM and write the token ids of its answers, stop tokens included."""
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.lora.request import LoRARequest

    job = json.loads(job_file.read_text())
    llm, answers = LLM(**job["options"]), []
    for part in job["parts"]:
        sampling = [SamplingParams(temperature=0.0, max_tokens=limit, stop_token_ids=part["stop"], detokenize=False)
                    for limit in part["max_tokens"]]
        adapter = LoRARequest("adapter", 1, job["adapter"]) if part["adapter"] else None
        outputs = llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in part["prompts"]], sampling, use_tqdm=False,
                               lora_request=adapter)
        answers.append([list(output.outputs[0].token_ids) for output in outputs])
    answers_file.write_text(json.dumps(answers))


if __name__ == "__main__":
    run_job(Path(sys.argv[1]), Path(sys.argv[2]))
