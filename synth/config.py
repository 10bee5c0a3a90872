"""Every option of `python -m synth.run`, its default, and what it does. YAML sections and dotted overrides bear these names."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Literal

from trainer.errors import UserError

MANY = 100_000_000  # items of a pool: more are a slip of the keyboard
STAGES = ("probe", "instruct", "clean", "respond", "judge", "select", "report")


@dataclass
class Model:
    """One language model, and the engine that runs it."""

    path: str  # folder or hub name; for an OpenAI-compatible server: the name it serves the model under
    name: str | None = None  # how pool and report call it; default: the last part of `path`
    engine: Literal["auto", "vllm", "transformers", "openai"] = "auto"  # auto: vllm where it is installed, else transformers
    url: str | list[str] | None = None  # openai: base URLs of one or more servers, e.g. http://localhost:8000/v1
    api_key: str = "OPENAI_API_KEY"  # openai: the environment variable that holds the key
    concurrency: int = 64  # openai: requests in flight on each server
    requests_per_minute: int = 0  # openai: at most this many on each server; 0: no limit
    price: list[float] = field(default_factory=lambda: [0.0, 0.0])  # openai: cost of a million prompt and completion tokens
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_length: int | None = None  # tokens of prompt and completion together; default: what the model can
    shards: int = 0  # processes that share the work, one device (tensor_parallel devices) each; 0: as many as there are devices
    tensor_parallel: int = 1  # vllm: GPUs for one copy of the model
    memory: float = 0.9  # vllm on a GPU: share of its memory
    batch_invariant: bool = False  # vllm on a GPU: results that do not depend on the batch (slower)
    trust_remote_code: bool = False  # run Python code that comes with the model


@dataclass
class Probe:
    """A look at what the base asks before it is sampled in earnest."""

    samples: int = 128  # at each temperature
    temperature: list[float] = field(default_factory=lambda: [0.7, 1.0, 1.3])


@dataclass
class System:
    """One system prompt among those that items are sampled under."""

    text: str | None = None  # None: what the template does without one
    weight: float = 1.0


@dataclass
class Instruct:
    """Sampling the base's own instructions through its chat template."""

    count: int = 1000  # items to sample
    temperature: list[float] = field(default_factory=lambda: [1.0])  # strata, equally often
    top_p: list[float] = field(default_factory=lambda: [0.98])
    max_tokens: int = 1024  # of one user turn; longer ones are dropped
    turns: list[float] = field(default_factory=lambda: [1.0])  # shares of items with 1, 2, 3 ... user turns
    systems: list[System] = field(default_factory=lambda: [System()])
    languages: dict[str, float] = field(default_factory=dict)  # wanted shares by ISO code, reached by weights; none: as they come
    fresh: int = 1000  # samples apart, at temperature 1 and top_p 1, that the report compares the pool with


@dataclass
class Clean:
    """Which instructions are kept. Every drop has a reason in the pool."""

    min_characters: int = 2
    max_characters: int = 20_000
    max_repetition: float = 0.6  # share of an instruction that is one repeated phrase
    languages: list[str] = field(default_factory=list)  # ISO codes to keep; none: all
    # Near-duplicates: "keep", "cap:k" (k of a group stay), "cap:p%" (p percent of all items, but at least 5), "weight" (a group weighs as
    # one) or "drop". A cap that does not grow with the pool is a de-duplication where the pool is large, and narrows what it stands for.
    duplicates: str = "cap:0.2%"
    similarity: float = 0.8  # Jaccard similarity of 5-grams from which two instructions are near-duplicates
    contamination: list[str] = field(default_factory=list)  # evaluation files whose items must not be in the pool
    ngram: int = 13  # words in a row that an item may not share with an evaluation item (all of it, where it is shorter)
    embedding_similarity: float = 0.0  # cosine of the base's embeddings from which an item counts as contaminated; 0: off


@dataclass
class Respond:
    """Answers to the instructions that were kept."""

    samples: int = 3  # sampled answers of each model to each instruction; 0: the greedy one alone
    temperature: float = 1.0
    top_p: float = 0.98
    max_tokens: int = 2048
    greedy_self: bool = True  # the base's greedy answer is a candidate too
    base_likelihood: bool = True  # how likely every answer is under the base: what select.rule likeliest needs


@dataclass
class Judge:
    """Scores of the answers."""

    rubric: str | None = None  # a text file with {instruction} and {response} in it, in place of our own rubric from 1 to 5
    score: Literal["expect", "paper"] = "expect"  # mean of the digit's distribution; or justify, then score on the last line
    exclude_self: bool = True  # no model judges its own answers, as long as there is another judge
    normalise: bool = True  # every judge's scores to the same mean and spread before they are averaged
    max_tokens: int = 512  # paper: of the justification
    pairwise: bool = False  # also compare the two best in both orders


@dataclass
class Select:
    """Which answer to each instruction goes into the replay set."""

    # max: the best; agreed: of those near the best what most say word for word, then the likeliest under the base; likeliest: the likeliest
    # of those near the best, however many say it; first: the first of `among`, judged or not
    rule: Literal["max", "agreed", "likeliest", "first"] = "agreed"
    among: list[str] = field(default_factory=list)  # candidates: a model's name, or one answer, as name:0 or name:greedy; none: all
    score: Literal["mean", "mode"] = "mean"  # of the distribution over the digits; mode: the likeliest digit, as the paper's integers
    within: float = 0.5  # agreed, likeliest: points below the best that still count as near
    floor: float = 0.0  # instructions whose best answer scores less are dropped


@dataclass
class Report:
    """The page about a pool."""

    sample: int = 2000  # at most this many instructions of each kind are compared
    embeddings: bool = True  # also by the base's own embeddings: loads it once more, with transformers
    topics: int = 12  # groups that instructions are sorted into


@dataclass
class Config:
    """Rebuild a model's own instruction distribution, and write a replay set: `python -m synth.run --base.path M`."""

    output: str = "runs/synth"  # folder of the pool, the replay set, its manifest and the report
    base: Model = field(default_factory=lambda: Model(path=""))
    responders: list[Model] = field(default_factory=list)  # beside the base
    judges: list[Model] = field(default_factory=list)  # default: base and responders
    preset: Literal["plus", "paper"] = "plus"  # paper: arXiv 2506.09428 to the letter
    stages: list[Literal["probe", "instruct", "clean", "respond", "judge", "select", "report"]] = field(
        default_factory=lambda: list(STAGES))  # which of them this call runs
    probe: Probe = field(default_factory=Probe)
    instruct: Instruct = field(default_factory=Instruct)
    clean: Clean = field(default_factory=Clean)
    respond: Respond = field(default_factory=Respond)
    judge: Judge = field(default_factory=Judge)
    select: Select = field(default_factory=Select)
    report: Report = field(default_factory=Report)
    format: Literal["jsonl", "parquet"] = "jsonl"  # of the replay set
    date: str = "2025-01-01"  # what templates that print today's date are told
    seed: int = 0


def settled(config: Config) -> Config:
    """The configuration that a run works with: judges named, and with the paper's settings where they were asked for."""
    judges = config.judges or [config.base, *config.responders]
    if config.preset == "plus":
        return dataclasses.replace(config, judges=judges)
    return dataclasses.replace(
        config, judges=judges,
        instruct=dataclasses.replace(config.instruct, temperature=[1.0], top_p=[0.98], turns=[1.0]),
        clean=dataclasses.replace(config.clean, duplicates="keep"),
        respond=dataclasses.replace(config.respond, samples=3, greedy_self=False, base_likelihood=False),
        judge=dataclasses.replace(config.judge, score="paper", exclude_self=False, normalise=False),
        select=dataclasses.replace(config.select, rule="max", score="mean", floor=0.0))


def name_of(model: Model) -> str:
    return model.name or model.path.rstrip("/").rpartition("/")[2]


def validate(config: Config) -> None:
    """Refuse values that no run can use. Types are checked before, by the parser. Raises UserError naming the option."""
    instruct, clean, respond, select = config.instruct, config.clean, config.respond, config.select
    _require(bool(config.output.strip()), "output", "a folder", "none")
    _require(bool(config.base.path), "base.path", "the model to be fine-tuned: a folder or hub name", "none")
    _require(config.base.engine != "openai", "base.engine", "vllm or transformers: a server's chat format hides the start of a user turn",
             config.base.engine)
    for option, models in (("base", [config.base]), ("responders", config.responders), ("judges", config.judges)):
        for model in models:
            _require(model.engine != "openai" or bool(model.url), f"{option}: url", "the server's base URL beside engine openai", "none")
            _require(model.concurrency >= 1, f"{option}: concurrency", "1 or more", model.concurrency)
            _require(model.shards >= 0 and model.tensor_parallel >= 1, f"{option}: shards, tensor_parallel", "0 or more, 1 or more",
                     (model.shards, model.tensor_parallel))
            _require(0 < model.memory <= 1, f"{option}: memory", "a share of the GPU's memory, above 0, at most 1", model.memory)
            _require(len(model.price) == 2 and min(model.price) >= 0, f"{option}: price", "two numbers, 0 or more", model.price)
    names = [name_of(model) for model in (config.base, *config.responders)]
    _require(len(set(names)) == len(names), "responders: name", "names that differ from each other and the base's", names)
    by_name = {}
    for model in (config.base, *config.responders, *config.judges):
        other = by_name.setdefault(name_of(model), model)
        _require(dataclasses.astuple(other) == dataclasses.astuple(model), "judges: name",
                 f"the same settings wherever {name_of(model)} stands", "two models of that name")
    _require(config.probe.samples >= 1 and bool(config.probe.temperature), "probe.samples, probe.temperature", "1 or more of each",
             (config.probe.samples, config.probe.temperature))
    _require(1 <= instruct.count <= MANY, "instruct.count", f"1 to {MANY:,}", instruct.count)
    _require(bool(instruct.temperature) and min(instruct.temperature) >= 0, "instruct.temperature", "0 or more", instruct.temperature)
    _require(bool(instruct.top_p) and all(0 < p <= 1 for p in instruct.top_p), "instruct.top_p", "above 0, at most 1", instruct.top_p)
    _require(bool(instruct.turns) and min(instruct.turns) >= 0 and sum(instruct.turns) > 0, "instruct.turns",
             "shares, 0 or more, not all 0", instruct.turns)
    _require(bool(instruct.systems) and all(s.weight > 0 for s in instruct.systems), "instruct.systems", "weights above 0",
             [s.weight for s in instruct.systems])
    _require(0 <= clean.min_characters <= clean.max_characters, "clean.min_characters, clean.max_characters", "0 <= min <= max",
             (clean.min_characters, clean.max_characters))
    _require(0 < clean.similarity <= 1, "clean.similarity", "above 0, at most 1", clean.similarity)
    _require(0 <= clean.embedding_similarity <= 1, "clean.embedding_similarity", "0 to 1", clean.embedding_similarity)
    _require(clean.ngram >= 1, "clean.ngram", "1 or more", clean.ngram)
    duplicate_rule(clean.duplicates)
    _require(instruct.fresh >= 0, "instruct.fresh", "0 or more", instruct.fresh)
    _require(select.rule not in ("agreed", "likeliest") or respond.base_likelihood or config.preset == "paper", "respond.base_likelihood",
             f"true, for select.rule {select.rule}", False)
    _require(respond.samples >= (not respond.greedy_self), "respond.samples", "1 or more; 0 beside respond.greedy_self true",
             respond.samples)
    _require(respond.samples >= 1 or not config.responders, "respond.samples", "1 or more, for responders", respond.samples)
    _require(select.score == "mean" or config.judge.score == "expect", "select.score", "mean, beside judge.score paper", select.score)
    _require(select.rule != "first" or not config.judge.pairwise, "select.rule", "max, agreed or likeliest, beside judge.pairwise",
             select.rule)
    _require(respond.temperature >= 0 and 0 < respond.top_p <= 1, "respond.temperature, respond.top_p", "0 or more, and above 0 to 1",
             (respond.temperature, respond.top_p))
    for option, value in (("instruct.max_tokens", instruct.max_tokens), ("respond.max_tokens", respond.max_tokens),
                          ("judge.max_tokens", config.judge.max_tokens)):
        _require(value >= 1, option, "1 or more", value)
    _require(select.within >= 0, "select.within", "0 or more points", select.within)
    _require(bool(config.stages), "stages", f"some of {', '.join(STAGES)}", "none")
    _require(0 <= config.seed < 2**63, "seed", "0 <= seed < 2^63", config.seed)


def duplicate_rule(text: str) -> tuple[str, float]:
    """("cap", k), ("cap", share below 1), ("keep", 0), ("weight", 0) or ("drop", 0) from the option's text. UserError for anything else."""
    if match := re.fullmatch(r"cap:(\d*\.?\d+)(%?)", text):
        count = float(match[1]) / 100 if match[2] else float(match[1])
        if 0 < count < 1 if match[2] else count >= 1 and count.is_integer():
            return "cap", count
    _require(text in ("keep", "weight", "drop"), "clean.duplicates",
             "keep, cap:k with k of 1 or more, cap:p% with p above 0 and below 100, weight, or drop", text)
    return text, 0


def _require(holds: bool, option: str, expected: str, found) -> None:
    if not holds:
        raise UserError(f"{option}: expected {expected}, got {found}")
