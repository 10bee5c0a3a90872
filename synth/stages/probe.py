"""Stage `probe`: show the prompt of a user's turn, and sample instructions at several temperatures.

No later stage depends on it. It is for reading before a long run: is the prompt right, how much is junk, and at which temperature does the
variety end or the junk begin?
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from synth.config import Config, name_of
from synth.engines.chat_format import ChatFormat
from synth.engines.interface import Completion, CompletionRequest, Failure, Prompt, Sampling
from synth.filters.repetition import repetition
from synth.pool import seeds
from synth.pool.synthesis_run import SynthesisRun, why_unusable

EXAMPLES = 3  # printed samples of each temperature
EXAMPLE_CHARACTERS = 100  # of a printed sample
MAX_REPETITION = 0.6  # share of a sample that is one phrase, above which it is junk


def probe(run: SynthesisRun) -> None:
    """Run the stage; with the settings of an earlier call its results are shown again."""
    config, format = run.config, run.format(run.base)
    settings = {"top_p": config.instruct.top_p[0], **dataclasses.asdict(config.probe)}
    run.say(size_line(config))
    for line in prompt_lines(format):
        run.say(f"probe: {line}")
    summaries = run.pool.get("probe")
    if not summaries or run.pool.get("settings.probe") != settings:
        summaries = sample_and_summarise(run, format, settings)
        with run.pool.transaction():
            run.pool.set("settings.probe", settings)
            run.pool.set("probe", summaries)
            run.pool.set("done.probe", True)
    for line in summary_lines(summaries):
        run.say(line)


def sample_and_summarise(run: SynthesisRun, format: ChatFormat, settings: dict) -> list[dict]:
    """Sample first user turns at each temperature, and return a summary of each."""
    config, prompt, stops = run.config, format.user_prompt([]), format.user_stops

    def request(i: int, temperature: float, sample: int) -> CompletionRequest:
        sampling = Sampling(temperature, settings["top_p"], settings["max_tokens"], *stops)
        return CompletionRequest((i, sample), Prompt(prompt.token_ids), sampling,
                                 seeds.seed(config.seed, "probe", name_of(run.base), i, sample))

    requests = [request(i, temperature, sample)
                for i, temperature in enumerate(config.probe.temperature) for sample in range(config.probe.samples)]
    by_temperature: dict[int, list] = defaultdict(list)

    def collect(results: list) -> None:
        for result in results:
            by_temperature[result.key[0]].append(result)

    with run.use_engine("probe", run.base) as writer:
        writer.complete(requests, len(requests), collect)
    cut = settings["max_tokens"] < config.instruct.max_tokens
    return [summarise(temperature, sorted(by_temperature[i], key=lambda result: result.key), prompt.rest, format, cut)
            for i, temperature in enumerate(config.probe.temperature)]


def summarise(temperature: float, results: Sequence[Completion | Failure], rest: str, format: ChatFormat, cut: bool) -> dict:
    """Summarise the samples at one temperature: junk by kind, variety, length and likelihood.

    `rest` is the text of the template that the prompt leaves for the model to write first. With `cut`, the samples are shorter than an
    instruction may be: those that do not end are counted apart, not as junk.
    """
    completions = [result for result in results if isinstance(result, Completion)]
    texts = [completion.text.removeprefix(rest).strip() for completion in completions]
    unended = sum(completion.finish == "length" for completion in completions)
    if cut:
        completions = [completion._replace(finish="stop") for completion in completions]
    junk = Counter(filter(None, (_junk_kind(completion, text, format) for completion, text in zip(completions, texts))))
    tokens = sum(completion.tokens for completion in completions)
    logprobs = [completion.logprob for completion in completions]
    return {
        "temperature": temperature, "samples": len(results), "failed": len(results) - len(completions),
        "cut": unended / len(results) if cut else 0.0,
        "junk": sum(junk.values()) / len(results), "kinds": {kind: count / len(results) for kind, count in sorted(junk.items())},
        "distinct": len(set(texts)) / max(1, len(texts)), "tokens": tokens / max(1, len(completions)),
        "nats_per_token": None if None in logprobs else -sum(logprobs) / max(1, tokens),
        "examples": texts[:EXAMPLES],
    }


def _junk_kind(completion: Completion, text: str, format: ChatFormat) -> str | None:
    """Return why a sample is junk; None where it is usable."""
    if format.leaked_token(text):
        return "special token"
    return why_unusable(completion, None) or ("repetition" if repetition(text) > MAX_REPETITION else None)


# ---------------------------------------------------------------- console


def size_line(config: Config) -> str:
    """Say how many samples are drawn, how long they may be, and for how large a job."""
    probe, job = config.probe, config.instruct.num_instructions
    return (f"probe: {probe.samples:,} samples of at most {probe.max_tokens:,} tokens at each of {len(probe.temperature)} temperatures, "
            f"for {job:,} instructions of at most {config.instruct.max_tokens:,}")


def prompt_lines(format: ChatFormat) -> list[str]:
    """Describe the prompt and the stops.

    The prompt is decoded from its tokens, to show that they are the template's text.
    """
    prompt, stops = format.user_prompt([]), format.user_stops
    text = format.tokenizer.decode(prompt.token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    rest = f"; the model writes {prompt.rest!r} itself" if prompt.rest else ""
    user_ends = [*_token_names(format, stops.ids), *stops.texts]
    response_ends = _token_names(format, format.response_stops.ids)
    return [f"prompt of a user's turn: {text!r} ({len(prompt.token_ids)} tokens){rest}",
            f"a user's turn ends at {', '.join(map(repr, user_ends))}; a response ends at {', '.join(map(repr, response_ends))}"]


def _token_names(format: ChatFormat, ids: Iterable[int]) -> list[str]:
    return [format.tokenizer.convert_ids_to_tokens(i) for i in ids]


def summary_lines(summaries: Sequence[dict]) -> list[str]:
    """Describe the samples of each temperature, with a few examples."""
    lines = []
    for row in summaries:
        kinds = ", ".join(f"{kind} {share:.1%}" for kind, share in row["kinds"].items())
        junk = f"junk {row['junk']:.1%}" + (f" ({kinds})" if kinds else "")
        cut = f", cut short {row['cut']:.1%}" if row.get("cut") else ""
        nats = "" if row["nats_per_token"] is None else f", {row['nats_per_token']:.2f} nats per token"
        lines.append(f"probe: temperature {row['temperature']:g}: {junk}{cut}, {row['distinct']:.0%} distinct, {row['tokens']:.0f} tokens "
                     f"on average{nats}")
        lines += [f"         {' '.join(text.split())[:EXAMPLE_CHARACTERS]}" for text in row["examples"]]
    return lines
