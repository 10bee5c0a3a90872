"""Measure what synthesis costs beside the engine, and how well a known distribution comes back.

It also measures how long a pool takes to write.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from benchmarks.forgetting.miniature.family import FAMILY
from benchmarks.forgetting.miniature.instructions import InstructionSample, world_sample
from benchmarks.forgetting.miniature.skills import GENERAL
from benchmarks.harness import record, show, timing
from benchmarks.harness.arguments import add_timing_arguments, check_timing
from benchmarks.harness.model_shapes import REAL
from benchmarks.harness.record import origin
from benchmarks.harness.suite import Caption, Suite, View
from benchmarks.harness.timing import Contender, Measurement, StepResult
from benchmarks.speed import synthesis_stages
from benchmarks.speed.vllm_processes import bare_vllm, engine_of, fresh_run
from synth.config import Config, Instruct, Model, name_of
from synth.engines import kind_of
from synth.engines.interface import Engine
from synth.pool import seeds
from synth.pool.store import Pool
from synth.pool.writer import ResultWriter
from synth.stages.instruct import TurnTask, sample_turns
from trainer.errors import UserError

BARE = "vLLM bare, with log-probs"  # what the method needs: the base's own log-prob of each instruction is kept
MINIATURE = "miniature"
SCORES = 2_700_000  # 100,000 instructions, 9 answers each, 3 judges
SETTINGS = ((0.7, 0.98), (1.0, 0.98), (1.0, 1.0), (1.3, 1.0))  # temperature, top_p


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=(MINIATURE, REAL), default=MINIATURE,
                        help="default: %(default)s; smollm2, a real model, is timed stage by stage, and tells what pools cost")
    parser.add_argument("--prompts", type=int, help="instructions of a round (default: 2,000, and 32 of smollm2)")
    add_timing_arguments(parser, rounds=7)
    parser.add_argument("--rows", type=int, default=100_000, help="scores that are written")
    parser.add_argument("--count", type=int, default=4000, help="instructions sampled at each temperature")


def run(arguments: argparse.Namespace) -> dict:
    """Measure, and return the record. UserError where vLLM is missing."""
    check_timing(arguments)
    model = Model(path=str(FAMILY["base"].folder))
    if kind_of(model) != "vllm":
        raise UserError("synthesis: expected vLLM, found none; install what requirements-synth.txt lists")
    arguments.prompts = arguments.prompts or (2000 if arguments.model == MINIATURE else 32)
    if arguments.model == REAL:
        return synthesis_stages.run(arguments)
    with tempfile.TemporaryDirectory() as work, engine_of(model, Path(work)) as engine:
        samples, agreement = overhead(engine, model, arguments, Path(work))
        written = writing(arguments.rows, Path(work))
        found = distribution(engine, model, arguments.count, Path(work))
    bare, ours = samples[BARE], samples["synth"]
    lines = [{"line": name, "tokens_per_second": asdict(timing.spread(line, rate)),
              "share_of_bare": asdict(timing.ratio(line, bare, rate))} for name, line in samples.items()]
    conditions = {"engine": engine.info.name, "model": "miniature base", "prompts": arguments.prompts, "rounds": arguments.rounds,
                  "tokens": ours[0].tokens, "writing": written, "distribution": found}
    return record.make("synthesis-cpu", conditions, agreement, lines, timing.raw(samples))


def rate(sample: Measurement) -> float:
    """Tokens per second of wall time."""
    return sample.tokens / sample.wall


# ---------------------------------------------------------------- overhead


def overhead(engine: Engine, model: Model, arguments: argparse.Namespace,
             work: Path) -> tuple[dict[str, list[Measurement]], dict[str, float]]:
    """Time stage `instruct` against one `LLM.generate` call on equal requests, in two processes in turns."""
    with fresh_run(model, work, Config(base=model, instruct=Instruct(num_instructions=arguments.prompts, max_tokens=64))) as run:
        asking = TurnTask(run, 0)
        requests = [{"token_ids": r.prompt.token_ids, "seed": r.seed, **r.sampling._asdict()}
                    for r in asking.requests(range(arguments.prompts))]
    texts = {}

    with bare_vllm(model.path) as ask:
        def bare(logprobs: int | None) -> StepResult:
            file = work / f"requests-{logprobs}.json"
            if not file.exists():
                file.write_text(json.dumps([request | {"logprobs": logprobs} for request in requests]))
            said = ask(file)
            texts["bare"] = said["texts"]
            return StepResult(0.0, said["tokens"], 0, 0, 0.0)

        def ours() -> StepResult:
            settings = Config(base=model, instruct=Instruct(num_instructions=arguments.prompts, max_tokens=64))
            with fresh_run(model, work, settings) as run:
                sample_turns(run, ResultWriter(run.pool, run.say, "instruct", name_of(model), engine), 0)
                rows = run.pool.select("SELECT text, tokens FROM turns ORDER BY item")
            texts["synth"] = [text for text, _ in rows]
            return StepResult(0.0, sum(tokens for _, tokens in rows), 0, 0, 0.0)

        contenders = [Contender(BARE, lambda: bare(0)), Contender(f"{BARE} (A/A)", lambda: bare(0)),
                      Contender("vLLM bare, text alone", lambda: bare(None)), Contender("synth", ours)]
        samples = timing.interleave(contenders, arguments.rounds, 1)
    different = sum(a.strip() != b for a, b in zip(texts["bare"], texts["synth"], strict=True))
    return samples, {"texts that differ": different / arguments.prompts}


# ---------------------------------------------------------------- writing


def writing(rows: int, work: Path) -> dict:
    """Write scores into a pool, judge after judge in the stage's batches, and time it.

    The seconds of a whole pool of SCORES are extrapolated.
    """
    from synth.pool.writer import BATCH

    with Pool(work / "writing.sqlite") as pool:
        began, quarters = time.perf_counter(), []
        for start in range(0, rows, BATCH):
            batch = range(start, min(start + BATCH, rows))
            with pool.transaction():
                pool.insert("scores", [score_row(i, rows) for i in batch])
                pool.add_usage("judge", "judge", len(batch), 60 * len(batch), len(batch), 0.1)
            if len(quarters) < 4 * batch[-1] // rows:
                quarters.append(time.perf_counter() - began)
        seconds = time.perf_counter() - began
    first, last = quarters[0], seconds - quarters[-1]
    return {"rows": rows, "seconds": seconds, "last_quarter_over_first": last / first, "scores": SCORES,
            "extrapolated_seconds": seconds * SCORES / rows, "bytes": (work / "writing.sqlite").stat().st_size}


def score_row(i: int, rows: int) -> tuple:
    """Return the i-th score: of three judges one after another, on nine answers to each item.

    Three answers are of each of three models.
    """
    judge, answer = divmod(i, -(-rows // 3))
    item, rest = divmod(answer, 9)
    return item, f"model-{rest // 3}", rest % 3, f"judge-{judge}", 3.25, 0.98, None, seeds.seed(0, "judge", judge, answer), None


# ---------------------------------------------------------------- the distribution that comes back


def distribution(engine: Engine, model: Model, count: int, work: Path) -> list[dict]:
    """Return topic distance and the share of invalid instructions, by temperature.

    The distance is to the world's true shares; one row is without duplicates.
    """
    rows = [figures("the world's own", world_sample(GENERAL, count))]
    for temperature, top_p in SETTINGS:
        settings = Config(base=model, instruct=Instruct(num_instructions=count, max_tokens=64, temperature=[temperature], top_p=[top_p]))
        with fresh_run(model, work, settings) as run:
            sample_turns(run, ResultWriter(run.pool, run.say, "instruct", name_of(model), engine), 0)
            texts = [chat.instruction for chat in run.pool.chats()]
            dropped = Counter(reason for reason, in run.pool.select("SELECT reason FROM drops"))
        rows.append(figures(f"T {temperature:g}, top_p {top_p:g}", InstructionSample(tuple(texts), GENERAL), dropped.total() / count))
        if (temperature, top_p) == (1.0, 0.98):
            rows.append(figures("the same without duplicates", InstructionSample(tuple(dict.fromkeys(texts)), GENERAL)))
    return rows


def figures(name: str, found: InstructionSample, dropped: float = 0.0) -> dict:
    return {"sampled": name, "distance": found.distance, "invalid": found.invalid, "dropped": dropped,
            "distinct": len(set(found.instructions)) / len(found.instructions), "shares": found.shares}


# ---------------------------------------------------------------- how a record is shown


def table(record: dict) -> list[list[str]]:
    """Return how well the distribution of instructions comes back, at every setting."""
    head = ["instructions", "topic distance", "invalid", "dropped", "distinct"]
    return [head] + [[row["sampled"], f"{row['distance']:.3f}", f"{row['invalid']:.1%}", f"{row['dropped']:.1%}", f"{row['distinct']:.0%}"]
                     for row in record["conditions"]["distribution"]]


def caption(record: dict) -> Caption:
    c = record["conditions"]
    speeds = "; ".join(f"{row['line']} {row['tokens_per_second']['value']:,.0f} tokens/s, {show.interval(row['share_of_bare'])} of bare"
                       for row in record["summary"])
    writing = c["writing"]
    return Caption(
        "How close sampled instructions are to the data that the miniature base was tuned on. Topic distance: total variation between the "
        "shares of the world's eight skills and those among the instructions. Invalid: a question of no skill.",
        (f"Speed of stage `instruct` ({c['prompts']:,} prompts, {c['tokens']:,} tokens, {c['engine']}, {c['rounds']} rounds in turns): "
         f"{speeds}.",
         f"The pool: {writing['rows']:,} scores written in {writing['seconds']:.1f} s, so {writing['scores'] / 1e6:.1f} million take about "
         f"{writing['extrapolated_seconds']:.0f} s.",
         f"{show.machine(record)}; {origin(record)}."))


def draw(record: dict, figure) -> None:
    """Draw topic distance and the share of invalid instructions."""
    rows = record["conditions"]["distribution"][::-1]
    axes = show.axes_of(figure, 8, 1.3 + 0.45 * len(rows))
    for i, (key, colour) in enumerate((("distance", show.OURS), ("invalid", show.SECOND))):
        axes.barh([j + 0.2 - 0.4 * i for j in range(len(rows))], [row[key] for row in rows], 0.38, color=colour,
                  label={"distance": "topic distance", "invalid": "invalid"}[key])
    axes.set_yticks(range(len(rows)), [row["sampled"] for row in rows])
    axes.legend(frameon=False)


SUITE = Suite("synthesis", "What synthesis costs beside the engine's own work, and how well a known distribution comes back",
              add_arguments, run,
              {"synthesis": View(table, caption, draw, lambda record: "Sampled instructions against the base's own training data"),
               synthesis_stages.SUITE: synthesis_stages.VIEW})
