"""Every option of `python -m synth.run`, its default, and what it does.

YAML sections and dotted overrides bear these names.
"""

from __future__ import annotations

import dataclasses
import datetime
import re
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

from trainer.errors import UserError, require

# More are a slip of the keyboard
MAX_INSTRUCTIONS, MAX_SAMPLES, MAX_TOKENS, MAX_TURNS, MAX_COPIES = 10_000_000, 10_000, 10_000_000, 100, 256
PROBE_SAMPLES = (20, 128)  # least and most at each temperature: 20 tell a share of junk to about 10 points, 128 to about 4
PROBE_MIN_TOKENS = 256
REFERENCE_SAMPLES = (100, 1_000)  # least and most
STAGES = ("probe", "instruct", "clean", "respond", "judge", "select", "report")
KEY_PREFIXES = ("sk-", "sk_", "gsk_", "hf_", "AIza")  # with which providers' API keys begin


@dataclass
class Model:
    """One language model, and the engine that runs it."""

    path: str  # folder or hub name; with engine openai: the name under which the server knows the model
    adapter: str | None = None  # folder or hub name of a LoRA adapter, with which the model answers; vllm, transformers
    name: str | None = None  # its name in the pool and the report; default: the last part of `path`, and that of `adapter`
    engine: Literal["auto", "vllm", "transformers", "openai"] = "auto"  # auto: vllm where it is installed, else transformers
    base_url: str | list[str] | None = None  # openai: URLs of one or more servers of the model, e.g. http://localhost:8000/v1
    api_key_env: str = "OPENAI_API_KEY"  # openai: NAME of the environment variable that holds the API key, never the key itself
    key_over_http: bool = False  # openai: send the key to a server outside the local network that has no https
    concurrency: int = 64  # openai: requests in flight at each server
    requests_per_minute: int = 0  # openai: limit for each server; 0: no limit
    # openai: what the server fails in all tries (5xx, timeouts, unreadable answers): asked again by the next call, or recorded as failed
    on_server_error: Literal["ask_again", "record"] = "ask_again"
    price: list[float] = field(default_factory=lambda: [0.0, 0.0])  # openai: cost of a million prompt and completion tokens
    # auto on a CPU: float32, but bfloat16 where the CPU has products of it and the weights are stored in 16 bits
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_model_len: int | None = None  # context: tokens of prompt and completion together; default: the model's own
    data_parallel_size: int = 0  # copies of the model, one process and tensor_parallel_size devices each; 0: as many as fit
    tensor_parallel_size: int = 1  # vllm: GPUs for one copy of the model
    gpu_memory_utilization: float = 0.9  # vllm: share of each GPU's memory
    batch_invariant: bool = False  # results that do not depend on the batch (slower): vLLM's mode on a GPU, float32 on a CPU
    trust_remote_code: bool = False  # run Python code that comes with the model


@dataclass
class Probe:
    """A few samples of the base's instructions, to look at before the pool is sampled."""

    samples: int | None = None  # at each temperature; default: a twentieth of instruct.num_instructions, from 20 to 128
    # Longer ones are cut; default: two tokens for each of instruct.num_instructions, from 256 to instruct.max_tokens
    max_tokens: int | None = None
    temperature: list[float] = field(default_factory=lambda: [0.7, 1.0, 1.3])


@dataclass
class System:
    """One of the system prompts under which instructions are sampled."""

    text: str | None = None  # None: what the chat template does without one
    weight: float = 1.0


@dataclass
class Instruct:
    """Sampling of the base's own instructions through its chat template."""

    num_instructions: int = 1000
    temperature: list[float] = field(default_factory=lambda: [1.0])  # several values: each for an equal share of the instructions
    top_p: list[float] = field(default_factory=lambda: [0.98])  # likewise
    max_tokens: int = 1024  # of one user turn; longer ones are dropped
    turn_weights: list[float] = field(default_factory=lambda: [1.0])  # shares of chats with 1, 2, 3 ... user turns
    system_prompts: list[System] = field(default_factory=lambda: [System()])
    languages: dict[str, float] = field(default_factory=dict)  # wanted shares by ISO code, reached by weights; none: as sampled
    # Samples at temperature 1 and top_p 1, outside the pool, that the report compares it with; default: num_instructions, 100 to 1,000
    reference_samples: int | None = None


@dataclass
class Clean:
    """Filters that decide which instructions are kept. Every drop has its reason in the pool."""

    min_characters: int = 2
    max_characters: int = 20_000
    max_repetition: float = 0.6  # largest share of an instruction that may be one repeated phrase
    languages: list[str] = field(default_factory=list)  # ISO codes to keep; none: all
    # Groups of near-duplicates: keep them; drop all but one; cap: at most `duplicate_cap` of a group stay; weight: all stay and share the
    # weight of one. Frequent instructions are part of the base's distribution: a small fixed cap on a large pool would distort it.
    duplicates: Literal["keep", "drop", "cap", "weight"] = "cap"
    duplicate_cap: float = 0.002  # below 1: a share of all instructions, but at least 5 of them; 1 or more: a count
    dedup_jaccard: float = 0.8  # Jaccard similarity of 5-grams from which two instructions are near-duplicates
    contamination: list[str] = field(default_factory=list)  # evaluation files whose items must not be in the pool
    contamination_ngram: int = 13  # words in a row that an instruction may not share with an evaluation item (or a whole shorter item)
    contamination_cosine: float = 0.0  # cosine of the base's embeddings from which an instruction is contaminated; 0: off


@dataclass
class Respond:
    """Responses to the instructions that were kept."""

    num_samples: int = 3  # sampled responses of each model to each instruction; 0: only the greedy one
    temperature: float = 1.0
    top_p: float = 0.98
    max_tokens: int = 2048
    include_greedy: bool = True  # the base's greedy response is a candidate too
    score_with_base: bool = True  # log-probability of every response under the base, for select.rule majority and base_likelihood


@dataclass
class Judge:
    """Scores of the responses."""

    rubric: str | None = None  # text file with {instruction} and {response} in it; default: our own rubric with scores from 1 to 5
    # expected_score: the mean of the judge's distribution over the digits 1 to 5; generated: it writes a justification, then the score
    scoring: Literal["expected_score", "generated"] = "expected_score"
    exclude_self: bool = True  # no model judges its own responses, as long as there is another judge
    calibrate_judges: bool = True  # bring every judge's scores to the same mean and spread before they are averaged
    max_tokens: int = 512  # generated: of the justification
    pairwise: bool = False  # also compare the two best responses, in both orders


@dataclass
class Select:
    """Choice of the response to each instruction that goes into the replay set."""

    # best: the best score. majority: of the responses within `margin` of the best, the text that most of them have, word for word; ties
    # go to the likeliest under the base. base_likelihood: of the responses within `margin`, the likeliest under the base. first: the
    # first of `candidates`, judged or not.
    rule: Literal["best", "majority", "base_likelihood", "first"] = "majority"
    candidates: list[str] = field(default_factory=list)  # a model's name, or one response, as name:0 or name:greedy; none: all
    statistic: Literal["mean", "mode"] = "mean"  # of a judge's distribution over the digits; mode: the likeliest digit, as in the paper
    margin: float = 0.5  # majority, base_likelihood: points below the best score within which responses count as equally good
    min_score: float = 0.0  # instructions whose best response scores less are dropped


@dataclass
class Report:
    """The HTML report about a pool."""

    sample: int = 2000  # at most this many instructions of each kind are compared
    embeddings: bool = True  # also compare by the base's embeddings: loads the base once more, with transformers
    topics: int = 12  # groups that instructions are sorted into


@dataclass
class Config:
    """Sample a model's own instructions, have models answer and judge them, and write a replay set."""

    output: str = "runs/synth"  # folder of the pool, the replay set, its manifest and the report
    base: Model = field(default_factory=lambda: Model(path=""))
    responders: list[Model] = field(default_factory=list)  # models that respond beside the base
    judges: list[Model] = field(default_factory=list)  # default: base and responders
    preset: Literal["default", "paper"] = "default"  # paper: fixes the options of arXiv 2506.09428
    stages: list[Literal["probe", "instruct", "clean", "respond", "judge", "select", "report"]] = field(
        default_factory=lambda: list(STAGES))  # those to run
    probe: Probe = field(default_factory=Probe)
    instruct: Instruct = field(default_factory=Instruct)
    clean: Clean = field(default_factory=Clean)
    respond: Respond = field(default_factory=Respond)
    judge: Judge = field(default_factory=Judge)
    select: Select = field(default_factory=Select)
    report: Report = field(default_factory=Report)
    format: Literal["jsonl", "parquet"] = "jsonl"  # of the replay set
    date: str = "2025-01-01"  # "today" for chat templates that print the date
    seed: int = 0


def resolve_presets(config: Config) -> Config:
    """Return a run's configuration: judges and sizes filled in, and the options of preset `paper`."""
    config = dataclasses.replace(config, judges=config.judges or [config.base, *config.responders], **_sizes(config))
    if config.preset == "default":
        return config
    return dataclasses.replace(
        config,
        instruct=dataclasses.replace(config.instruct, temperature=[1.0], top_p=[0.98], turn_weights=[1.0]),
        clean=dataclasses.replace(config.clean, duplicates="keep"),
        respond=dataclasses.replace(config.respond, num_samples=3, include_greedy=False, score_with_base=False),
        judge=dataclasses.replace(config.judge, scoring="generated", exclude_self=False, calibrate_judges=False),
        select=dataclasses.replace(config.select, rule="best", statistic="mean", min_score=0.0))


def _sizes(config: Config) -> dict[str, Any]:
    """Return sections `probe` and `instruct` with the sizes that follow the number of instructions."""
    probe, instruct, job = config.probe, config.instruct, config.instruct.num_instructions
    return {
        "probe": dataclasses.replace(
            probe, samples=_given(probe.samples, max(PROBE_SAMPLES[0], min(job // 20, PROBE_SAMPLES[1]))),
            max_tokens=min(_given(probe.max_tokens, max(PROBE_MIN_TOKENS, 2 * job)), instruct.max_tokens)),
        "instruct": dataclasses.replace(
            instruct, reference_samples=_given(instruct.reference_samples, max(REFERENCE_SAMPLES[0], min(job, REFERENCE_SAMPLES[1])))),
    }


def _given(value: int | None, default: int) -> int:
    return default if value is None else value


def name_of(model: Model) -> str:
    """Return the name of a model in the pool and the report."""
    return model.name or "+".join(path.rstrip("/").rpartition("/")[2] for path in (model.path, model.adapter) if path)


# ---------------------------------------------------------------- validation


def validate(config: Config) -> None:
    """Check the values of all options; their types are the parser's.

    Raises UserError that names the option.
    """
    require(bool(config.output.strip()), "output", "a folder", "none")
    require(bool(config.base.path), "base.path", "the model to be fine-tuned: a folder or hub name", "none")
    require(config.base.engine != "openai", "base.engine", "vllm or transformers, since a server hides how a user's turn begins",
            config.base.engine)
    for option, models in (("base", [config.base]), ("responders", config.responders), ("judges", config.judges)):
        for model in models:
            _validate_model(option, model)
    _validate_names(config)
    _validate_instruct(config)
    _validate_clean(config.clean)
    _validate_respond_and_select(config)
    _validate_report(config.report)
    require(bool(re.fullmatch(r"\d{4}-\d\d-\d\d", config.date)) and _is_date(config.date), "date", "a date such as 2025-01-31", config.date)
    require(bool(config.stages), "stages", f"some of {', '.join(STAGES)}", "none")
    require(0 <= config.seed < 2**63, "seed", "0 <= seed < 2^63", config.seed)


def _is_date(text: str) -> bool:
    try:
        datetime.date.fromisoformat(text)
    except ValueError:
        return False
    return True


def _validate_report(report: Report) -> None:
    require(report.sample >= 1, "report.sample", "1 or more", report.sample)
    require(1 <= report.topics <= 1000, "report.topics", "1 to 1,000", report.topics)


def _validate_model(option: str, model: Model) -> None:
    require(model.engine != "openai" or bool(model.base_url), f"{option}: base_url", "the server's URL, with engine openai", "none")
    require(model.engine != "openai" or model.adapter is None, f"{option}: adapter",
            "engine vllm or transformers beside it; for a server, give the adapter's name there as path", "openai")
    if _looks_like_a_key(model.api_key_env):  # the value is not printed
        raise UserError(f"{option}: api_key_env: expected the NAME of an environment variable that holds the API key, got what is no such "
                        "name or looks like a key; export the key and give the variable's name, e.g. OPENAI_API_KEY")
    for url in [model.base_url] if isinstance(model.base_url, str) else model.base_url or []:
        _validate_url(f"{option}: base_url", url)
    require(1 <= model.concurrency <= 10_000, f"{option}: concurrency", "1 to 10,000", model.concurrency)
    require(model.requests_per_minute >= 0, f"{option}: requests_per_minute", "0 or more", model.requests_per_minute)
    require(model.max_model_len is None or model.max_model_len >= 1, f"{option}: max_model_len", "1 or more", model.max_model_len)
    for name, least in (("data_parallel_size", 0), ("tensor_parallel_size", 1)):
        require(least <= getattr(model, name) <= MAX_COPIES, f"{option}: {name}", f"{least} to {MAX_COPIES}", getattr(model, name))
    require(0 < model.gpu_memory_utilization <= 1, f"{option}: gpu_memory_utilization", "above 0, at most 1", model.gpu_memory_utilization)
    require(len(model.price) == 2 and min(model.price) >= 0, f"{option}: price", "two numbers, 0 or more", model.price)


def _validate_url(option: str, url: str) -> None:
    """Check that a URL is one, and holds no secret: it is written into the manifest."""
    try:
        parts = urlsplit(url)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_url = False
    require(is_url, option, "a URL such as http://localhost:8000/v1", url if "@" not in url and "?" not in url else "another text")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:  # the value is not printed
        raise UserError(f"{option}: expected a URL without user, password and query, got one with them; export the key and give the "
                        "variable's name in api_key_env")


def _looks_like_a_key(name: str) -> bool:
    """Return whether this is no name of an environment variable, or more likely an API key."""
    is_name = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name)
    return not is_name or name.startswith(KEY_PREFIXES) or (len(name) >= 32 and "_" not in name)


def _validate_names(config: Config) -> None:
    """Check that responders have names of their own, and that a name always means the same model."""
    names = [name_of(model) for model in (config.base, *config.responders)]
    require(len(set(names)) == len(names), "responders: name", "names that differ from each other and the base's", names)
    by_name = {}
    for model in (config.base, *config.responders, *config.judges):
        other = by_name.setdefault(name_of(model), model)
        require(dataclasses.astuple(other) == dataclasses.astuple(model), "judges: name",
                f"equal options wherever {name_of(model)} is named", "two different models of that name")


def _validate_instruct(config: Config) -> None:
    probe, instruct = config.probe, config.instruct
    require(probe.samples is None or 1 <= probe.samples <= MAX_INSTRUCTIONS, "probe.samples", f"1 to {MAX_INSTRUCTIONS:,}", probe.samples)
    require(probe.max_tokens is None or 1 <= probe.max_tokens <= MAX_TOKENS, "probe.max_tokens", f"1 to {MAX_TOKENS:,}", probe.max_tokens)
    require(bool(probe.temperature), "probe.temperature", "1 or more", probe.temperature)
    require(1 <= instruct.num_instructions <= MAX_INSTRUCTIONS, "instruct.num_instructions", f"1 to {MAX_INSTRUCTIONS:,}",
            instruct.num_instructions)
    require(bool(instruct.temperature) and min(instruct.temperature) >= 0, "instruct.temperature", "0 or more", instruct.temperature)
    require(bool(instruct.top_p) and all(0 < p <= 1 for p in instruct.top_p), "instruct.top_p", "above 0, at most 1", instruct.top_p)
    shares = instruct.turn_weights
    require(0 < len(shares) <= MAX_TURNS and min(shares) >= 0 and sum(shares) > 0, "instruct.turn_weights",
            f"at most {MAX_TURNS} shares, 0 or more, not all 0", shares)
    require(bool(instruct.system_prompts) and all(system.weight > 0 for system in instruct.system_prompts), "instruct.system_prompts",
            "weights above 0", [system.weight for system in instruct.system_prompts])
    reference = instruct.reference_samples
    require(reference is None or 0 <= reference <= MAX_INSTRUCTIONS, "instruct.reference_samples", f"0 to {MAX_INSTRUCTIONS:,}", reference)
    require(1 <= instruct.max_tokens <= MAX_TOKENS, "instruct.max_tokens", f"1 to {MAX_TOKENS:,}", instruct.max_tokens)


def _validate_clean(clean: Clean) -> None:
    require(0 <= clean.min_characters <= clean.max_characters, "clean.min_characters, clean.max_characters", "0 <= min <= max",
            (clean.min_characters, clean.max_characters))
    require(0 < clean.duplicate_cap < 1 or clean.duplicate_cap >= 1 and float(clean.duplicate_cap).is_integer(), "clean.duplicate_cap",
            "a share above 0 and below 1, or a whole number of 1 or more", clean.duplicate_cap)
    require(0 < clean.dedup_jaccard <= 1, "clean.dedup_jaccard", "above 0, at most 1", clean.dedup_jaccard)
    require(clean.contamination_ngram >= 1, "clean.contamination_ngram", "1 or more", clean.contamination_ngram)
    require(0 <= clean.contamination_cosine <= 1, "clean.contamination_cosine", "0 to 1", clean.contamination_cosine)


def _validate_respond_and_select(config: Config) -> None:
    respond, judge, select = config.respond, config.judge, config.select
    require(respond.num_samples >= (not respond.include_greedy), "respond.num_samples", "1 or more, or 0 with respond.include_greedy true",
            respond.num_samples)
    require(respond.num_samples >= 1 or not config.responders, "respond.num_samples", "1 or more, for responders", respond.num_samples)
    require(respond.temperature >= 0 and 0 < respond.top_p <= 1, "respond.temperature, respond.top_p", "0 or more, and above 0 to 1",
            (respond.temperature, respond.top_p))
    require(respond.num_samples <= MAX_SAMPLES, "respond.num_samples", f"at most {MAX_SAMPLES:,}", respond.num_samples)
    require(1 <= respond.max_tokens <= MAX_TOKENS, "respond.max_tokens", f"1 to {MAX_TOKENS:,}", respond.max_tokens)
    require(1 <= judge.max_tokens <= MAX_TOKENS, "judge.max_tokens", f"1 to {MAX_TOKENS:,}", judge.max_tokens)
    require(select.rule not in ("majority", "base_likelihood") or respond.score_with_base or config.preset == "paper",
            "respond.score_with_base", f"true, for select.rule {select.rule}", False)
    require(select.statistic == "mean" or judge.scoring == "expected_score", "select.statistic", "mean, with judge.scoring generated",
            select.statistic)
    require(select.rule != "first" or not judge.pairwise, "select.rule", "best, majority or base_likelihood, with judge.pairwise",
            select.rule)
    require(select.margin >= 0, "select.margin", "0 or more points", select.margin)
