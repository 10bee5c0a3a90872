"""Greedy answers by vLLM, for models and files that transformers is too slow for: `generation.engine: vllm`.

vLLM runs before any model is loaded here and in a process of its own (`python -m trainer.evaluation.vllm JOB`), so that all its memory
comes back; an adapter is switched on per request, so base and model share one process. Its sums run in another order than ours, which may
turn the choice between two tokens that are equally likely to the last bits.
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
from trainer.evaluation.generation import Answer, answer_of, end_tokens
from trainer.evaluation.items import ItemFile
from trainer.evaluation.models import EvaluatedModels, parts, template_of
from trainer.evaluation.tokens import encode
from trainer.model.locate import model_source, one_line_errors
from trainer.runtime.device import compute_dtype, dtype_name

RANKS = (8, 16, 32, 64, 128, 256, 512)  # that vLLM has room for
CPU_CACHE = 1_000_000_000  # bytes of key-value cache without a GPU
QUIET = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false",
         "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def require(config: Config) -> None:
    """UserError, before anything is loaded, where vLLM cannot serve."""
    if config.generation.engine != "vllm":
        return
    if importlib.util.find_spec("vllm") is None:
        raise UserError("generation.engine: vllm is not installed; pip install 'steadfast-sft[synth]', or use transformers")
    if config.load_in_4bit:
        raise UserError("generation.engine: vllm holds no model in the 4 bits of load_in_4bit; use transformers")


def all_answers(found: EvaluatedModels, files: Sequence[ItemFile], config: Config, device: torch.device, log: Path
                ) -> dict[str, list[Answer]]:
    """The answers of base and model, in the order of their prompts. UserError, of one line, where vLLM does not run."""
    said: dict[str, list[Answer]] = {}
    jobs: dict[str, tuple[dict, list]] = {}
    for name, settings, adapter in parts(found):
        source, template = model_source(settings), template_of(settings, config)
        with one_line_errors("model.path", source):
            context = getattr(AutoConfig.from_pretrained(source, trust_remote_code=settings.trust_remote_code).get_text_config(),
                              "max_position_embeddings", None)
        prompts = [prompt.ids for prompt in encode(files, template, config, context).prompts]
        if not prompts:
            continue
        ends = end_tokens(_generation_config(source), template)
        job, waiting = jobs.setdefault(source, (_job(source, settings, config, device), []))
        if adapter is not None:
            job["adapter"] = str(adapter.resolve())
            job["options"] |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": _room_for(adapter)}
        job["asked"].append({"prompts": prompts, "stop": ends, "adapter": adapter is not None})
        waiting.append((name, template, ends))
    for job, waiting in jobs.values():
        for (name, template, ends), texts in zip(waiting, _run(job, log), strict=True):
            said[name] = [answer_of(template, ids, ends) for ids in texts]
    return said


def _generation_config(source: str) -> GenerationConfig | None:
    try:
        return GenerationConfig.from_pretrained(source)
    except OSError:  # a model without the file
        return None


def _job(source: str, settings: training.Model, config: Config, device: torch.device) -> dict:
    """What the process is told: how to load the model, and (later) what it is asked."""
    options = {"model": source, "dtype": dtype_name(compute_dtype(config.precision, device)), "load_format": "safetensors",
               "generation_config": "vllm", "trust_remote_code": settings.trust_remote_code, "seed": 0}
    if settings.tokenizer is not None:
        options["tokenizer"] = settings.tokenizer
    if device.type == "cpu":
        options |= {"enforce_eager": True, "kv_cache_memory_bytes": CPU_CACHE}
    return {"options": options, "adapter": None, "max_tokens": config.generation.max_tokens, "asked": []}


def _room_for(adapter: Path) -> int:
    saved = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    rank = max(saved["r"], *(saved.get("rank_pattern") or {}).values(), 0)
    if rank > RANKS[-1]:
        raise UserError(f"generation.engine: vllm takes adapters of rank {RANKS[-1]} at most, found {rank}; use transformers")
    return next(room for room in RANKS if room >= rank)


def _run(job: dict, log: Path) -> list[list[list[int]]]:
    """Token ids of the answers to every prompt of every part of the job."""
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder) / "job.json", Path(folder) / "answers.json"
        given.write_text(json.dumps(job))
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as file:
            done = subprocess.run([sys.executable, "-m", "trainer.evaluation.vllm", str(given), str(made)], stdin=subprocess.DEVNULL,
                                  stdout=file, stderr=subprocess.STDOUT, env=os.environ | QUIET | {"PYTHONPATH": path})
        if done.returncode:
            raise UserError(f"generation.engine: vllm failed on {job['options']['model']}: {last_error_line(log)}; see {log}, "
                            "or use transformers")
        return json.loads(made.read_text())


# ---------------------------------------------------------------- in the other process


def serve(given: Path, made: Path) -> None:
    """Run a job and write its answers, stop tokens included."""
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.lora.request import LoRARequest

    job = json.loads(given.read_text())
    llm, answers = LLM(**job["options"]), []
    for part in job["asked"]:
        how = SamplingParams(temperature=0.0, max_tokens=job["max_tokens"], stop_token_ids=part["stop"], detokenize=False)
        adapter = LoRARequest("adapter", 1, job["adapter"]) if part["adapter"] else None
        outputs = llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in part["prompts"]], how, use_tqdm=False, lora_request=adapter)
        answers.append([list(output.outputs[0].token_ids) for output in outputs])
    made.write_text(json.dumps(answers))


if __name__ == "__main__":
    serve(Path(sys.argv[1]), Path(sys.argv[2]))
