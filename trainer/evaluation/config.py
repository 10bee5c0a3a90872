"""Define every option of `python -m trainer.evaluate`, with its default.

YAML sections and dotted overrides have the names of these classes' fields.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from trainer.config import Items, Metric, Model
from trainer.errors import require

DEFAULT_SUITE = "suite:mini"
MAX_TOKENS = 256  # of an answer, where no option says otherwise


@dataclass
class Data:
    """Item files, and how their prompts become tokens."""

    general: str | list[str | Items] = field(default_factory=list)  # abilities to keep: a path, suite:NAME, or a list with items
    domain: str | list[str | Items] = field(default_factory=list)  # files of what it was tuned for; same forms
    suite_folder: str | None = None  # files of suites, such as arc_easy.jsonl, to read instead of the hub's
    metric: Metric = "auto"  # of files without a metric of their own
    regex: str = ""  # of files without a pattern of their own, e.g. '#### (-?[\d,.]+)' for GSM8K
    chat: bool = True  # render prompts with the chat template; false: the prompt's text, a space, and the answer
    chat_template: str | None = None  # a Jinja file to use instead of the tokenizer's own template
    template_kwargs: dict[str, Any] = field(default_factory=dict)  # keywords for the template, as in training: {enable_thinking: false}
    on_overlong: Literal["error", "drop", "truncate"] = "error"  # what to do with held-out texts longer than a pack or the model's context


@dataclass
class Base:
    """The model to compare with; default: with an adapter its own base, else none."""

    path: str | None = None  # folder or hub name
    tokenizer: str | None = None  # folder or hub name; default: the base's own
    results: str | None = None  # output folder of an earlier evaluation, on the same items, whose figures of the base are used again


@dataclass
class Generation:
    """Greedy generation of answers."""

    engine: Literal["transformers", "vllm"] = "transformers"  # vllm: faster, in a process of its own (needs the `synth` extra)
    max_tokens: int | None = None  # longest answer; reports count those that are cut off; default: that of the file or suite, else 256
    stop: list[str] = field(default_factory=list)  # texts that end an answer, and are not part of it
    batch: int = 64  # prompts in one batch of transformers


@dataclass
class Scoring:
    """Log-probs of given answers, and the KL to the base over them."""

    tokens_per_pack: int = 8192  # capacity of one packed sequence, and the longest sample
    kl_tokens: int = 20_000  # at most so many answer tokens per role have their KL measured; the host keeps a vector of each


@dataclass
class Statistics:
    """Confidence intervals."""

    confidence: float = 0.95  # of all intervals
    bootstrap: int = 2000  # resamples of the items
    seed: int = 0


@dataclass
class Harness:
    """Options of lm-evaluation-harness, for `tasks`."""

    role: Literal["general", "domain"] = "general"  # role of the tasks
    limit: int | None = None  # the first n documents of each task
    num_fewshot: int | None = None  # examples before each question; default: the task's own
    batch: int = 16  # sequences in one call of the model
    chat: bool = False  # render prompts with the chat template


@dataclass
class Config:
    """Score a model on item files and compare it with its base."""

    output: str = "runs/evaluation"  # the folder for results.jsonl, results.json and report.html
    model: Model = field(default_factory=Model)  # model.path is optional if an adapter names its base
    adapter: str | None = None  # folder or hub name of a LoRA adapter on the model
    force_base: bool = False  # put the adapter on model.path although adapter_config.json names another base
    load_in_4bit: bool = False  # load the model in 4 bits, as a QLoRA run does (needs the `quant` extra)
    base: Base = field(default_factory=Base)
    data: Data = field(default_factory=Data)
    generation: Generation = field(default_factory=Generation)
    scoring: Scoring = field(default_factory=Scoring)
    statistics: Statistics = field(default_factory=Statistics)
    tasks: str | list[str] = field(default_factory=list)  # of lm-evaluation-harness, by name: a list, or a,b,c (needs the `eval` extra)
    task_folder: str | None = None  # task files (YAML) beside those of the library
    harness: Harness = field(default_factory=Harness)
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on a GPU that has it, else fp32
    device: Literal["auto", "cuda", "cpu"] = "auto"


@dataclass
class Gate:
    """The rules of `python -m trainer.gate` that can be set."""

    domain: Literal["gain", "hold"] = "gain"  # each domain file must gain, or it must hold as general ones must
    logprob_margin: float = 0.05  # nats per token that files without right and wrong answers may lose


@dataclass
class GateConfig(Config):
    """Pass or fail a model against its base."""

    output: str = "runs/gate"  # the folder for gate.json, gate.md, gate.html and the evaluation's files
    gate: Gate = field(default_factory=Gate)


def with_default_suite(config: Config) -> Config:
    """Return the options with the bundled mini suite as general items, where nothing to score is named."""
    named = config.data.general or config.data.domain or config.tasks
    return config if named else replace(config, data=replace(config.data, general=DEFAULT_SUITE))


def validate(config: Config) -> None:
    """Check the values; raise UserError, which names the option, if one is unusable.

    Types are checked before, by the parser.
    """
    data, scoring, statistics = config.data, config.scoring, config.statistics
    require(bool(config.output.strip()), "output", "a folder", "none")
    keys = ", ".join(key.name for key in fields(Items))
    for role, entries in (("general", data.general), ("domain", data.domain)):
        for items in [entries] if isinstance(entries, str) else entries:
            parsed = not str(items).startswith(("[", "{"))  # a list that the parser could not read is still a string
            require(parsed, f"data.{role}", f"a path, or a list of items in YAML with the keys {keys}", items)
            longest = None if isinstance(items, str) else items.max_tokens
            require(longest is None or longest >= 1, f"data.{role}: max_tokens", "1 or more", longest)
            max_records = None if isinstance(items, str) else items.max_records
            require(max_records is None or max_records >= 1, f"data.{role}: max_records", "1 or more items", max_records)
    require(config.model.config is None, "model.config", "trained weights, as model.path", "a configuration without weights")
    require(config.model.path is not None or config.adapter is not None, "model.path", "a model, or an adapter that names its base",
            "neither")
    require(not config.force_base or config.adapter is not None, "force_base", "an adapter beside it", "none")
    require(config.base.results is None or config.base.path is not None or config.adapter is not None, "base.results",
            "an adapter, or base.path, beside it", "neither")
    require(config.base.results is None or not config.tasks, "base.results", "item files alone", "tasks of lm-evaluation-harness")
    require(config.base.tokenizer is None or config.base.path is not None, "base.tokenizer", "base.path beside it", "none")
    require(config.task_folder is None or bool(config.tasks), "task_folder", "tasks beside it", "none")
    max_tokens = config.generation.max_tokens
    require(max_tokens is None or max_tokens >= 1, "generation.max_tokens", "1 or more", max_tokens)
    require(config.generation.batch >= 1, "generation.batch", "1 or more", config.generation.batch)
    require(scoring.tokens_per_pack >= 2, "scoring.tokens_per_pack", "2 tokens or more", scoring.tokens_per_pack)
    require(scoring.kl_tokens >= 0, "scoring.kl_tokens", "0 or more", scoring.kl_tokens)
    require(0 < statistics.confidence < 1, "statistics.confidence", "0 < confidence < 1", statistics.confidence)
    require(100 <= statistics.bootstrap <= 1_000_000, "statistics.bootstrap", "100 to 1,000,000 resamples", statistics.bootstrap)
    require(0 <= statistics.seed < 2**63, "statistics.seed", "0 <= seed < 2^63", statistics.seed)
    require(config.harness.limit is None or config.harness.limit >= 1, "harness.limit", "1 or more documents", config.harness.limit)
    num_fewshot = config.harness.num_fewshot
    require(num_fewshot is None or num_fewshot >= 0, "harness.num_fewshot", "0 or more", num_fewshot)
    require(config.harness.batch >= 1, "harness.batch", "1 or more", config.harness.batch)
