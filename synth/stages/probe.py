"""Stage `probe`: what the chat template gives to sample with, and a first look at what comes of it at several temperatures.

Nothing later depends on it. It is there to be read before a night of sampling: is the prefix what it should be, is anything junk, and at
which temperature does junk begin or variety end?
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Sequence

from synth.config import name_of
from synth.engines.chat_format import ChatFormat
from synth.engines.interface import Completion, CompletionRequest, Failure, Prompt, Sampling
from synth.filters.repetition import repetition
from synth.pool import seeds
from synth.pool.run import SynthesisRun, usable

SHOWN = 3  # samples of each temperature that are printed
WIDTH = 100  # characters of a sample


def probe(run: SynthesisRun) -> None:
    config, format = run.config, run.format(run.base)
    settings = {"top_p": config.instruct.top_p[0],
                "max_tokens": config.instruct.max_tokens, **dataclasses.asdict(config.probe)}
    describe(run, format)
    if run.pool.get("probe") and run.pool.get("settings.probe") == settings:
        show(run, run.pool.get("probe"))
        return
    found = defaultdict(list)
    prefix, stops = format.pre_query([]), format.user_stops
    requests = [
        CompletionRequest((i, k), Prompt(prefix.token_ids), Sampling(temperature, settings["top_p"], settings["max_tokens"], *stops),
                          seeds.seed(config.seed, "probe", name_of(run.base), i, k))
        for i, temperature in enumerate(config.probe.temperature) for k in range(config.probe.samples)]
    with run.at_work("probe", run.base) as worker:
        worker.complete(requests, len(requests), lambda results: [found[r.key[0]].append(r) for r in results])
    rows = [summary(temperature, sorted(found[i], key=lambda r: r.key), prefix.rest, format)
            for i, temperature in enumerate(config.probe.temperature)]
    with run.pool.transaction():
        run.pool.set("settings.probe", settings)
        run.pool.set("probe", rows)
        run.pool.set("done.probe", True)
    show(run, rows)


def describe(run: SynthesisRun, format: ChatFormat) -> None:
    """Prefix and stops, as text, with the proof that the tokens are the text."""
    prefix, stops = format.pre_query([]), format.user_stops
    shown = format.tokenizer.decode(prefix.token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    run.say(f"probe: a user's turn begins after {shown!r}, {len(prefix.token_ids)} tokens"
            + (f"; the model writes {prefix.rest!r} itself" if prefix.rest else ""))
    names = [format.tokenizer.convert_ids_to_tokens(i) for i in stops.ids]
    run.say(f"probe: it ends at {', '.join(map(repr, [*names, *stops.texts]))}; an answer ends at "
            f"{', '.join(repr(format.tokenizer.convert_ids_to_tokens(i)) for i in format.response_stops.ids)}")


def summary(temperature: float, results: Sequence[Completion | Failure], rest: str, format: ChatFormat) -> dict:
    """Junk by kind, variety and likelihood of the samples at one temperature; rates are shares of the samples."""
    said = [r for r in results if isinstance(r, Completion)]
    texts = [r.text.removeprefix(rest).strip() for r in said]
    reasons = Counter("special token" if format.leaked(text) else usable(r, None) or (repetition(text) > 0.6 and "repetition")
                      for r, text in zip(said, texts))
    reasons.pop(False, None), reasons.pop(None, None)
    counts = Counter(texts)
    tokens = sum(r.tokens for r in said)
    return {
        "temperature": temperature, "samples": len(results), "failed": len(results) - len(said),
        "junk": sum(reasons.values()) / len(results), "kinds": {kind: n / len(results) for kind, n in sorted(reasons.items())},
        "distinct": len(counts) / max(1, len(texts)), "tokens": tokens / max(1, len(said)),
        "nats_per_token": -sum(r.logprob for r in said) / max(1, tokens) if all(r.logprob is not None for r in said) else None,
        "examples": texts[:SHOWN],
    }


def show(run: SynthesisRun, rows: Sequence[dict]) -> None:
    for row in rows:
        kinds = ", ".join(f"{kind} {share:.1%}" for kind, share in row["kinds"].items()) or "none"
        nats = "" if row["nats_per_token"] is None else f", {row['nats_per_token']:.2f} nats a token"
        run.say(f"probe: temperature {row['temperature']:g}: junk {row['junk']:.1%} ({kinds}), {row['distinct']:.0%} distinct, "
                f"{row['tokens']:.0f} tokens{nats}")
        for text in row["examples"]:
            run.say(f"         {' '.join(text.split())[:WIDTH]}")
