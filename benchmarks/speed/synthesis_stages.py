"""Time each stage of synthesis on a real model beside bare vLLM, and reckon what pools cost.

First a small pool is made, whose lengths are the costs' tokens per instruction. Then its requests are timed in interleaved rounds: those
of the stages by our engine, and the same answers decoded greedily, and sampled, by vLLM without our patches.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import psutil

from benchmarks.harness import record, show, timing
from benchmarks.harness.record import origin
from benchmarks.harness.smollm2 import smollm2
from benchmarks.harness.suite import Caption, View
from benchmarks.harness.timing import Contender, StepResult
from benchmarks.speed.vllm_processes import bare_vllm, engine_of, fresh_run
from synth.config import Config, Instruct, Model, Respond, name_of
from synth.engines.interface import ChoiceRequest, CompletionRequest, Engine
from synth.pool.synthesis_run import SynthesisRun
from synth.pool.writer import ResultWriter
from synth.stages.instruct import TurnTask, sample_turns
from synth.stages.judge import ScoringTask
from synth.stages.respond import GREEDY, ResponseTask

GREEDILY, SAMPLED = "bare vLLM, greedy", "bare vLLM, sampled, with log-probs"
INSTRUCT, RESPOND, RESPOND_GREEDY, JUDGE = "instruct", "respond, sampled", "respond, greedy", "judge"
LONGEST = 512  # tokens of an instruction or an answer of the small pool
TIMED_TOKENS = 24  # of each completion in a round
SIZES = (1_000, 10_000, 100_000)
SAMPLES = Respond().num_samples


class Published(NamedTuple):
    """A rate that others measured."""

    name: str
    tokens_per_second: float
    source: str


PUBLISHED = (
    Published("H100, SmolLM2-1.7B, vLLM (published)", 33.1e6 / 3600,
              "33.1 million tokens a GPU-hour, The Synthetic Data Playbook, https://huggingface.co/spaces/HuggingFaceFW/finephrase; an "
              "H200 has an H100's products and 1.4 times its memory bandwidth, and the model is 13 times as large as ours"),
    Published("H200, DeepSeek-V3, vLLM (published)", 2_200.0,
              "2,200 tokens/s a GPU, vLLM Large Scale Serving: DeepSeek @ 2.2k tok/s/H200 with Wide-EP, https://blog.vllm.ai, "
              "December 2025"),
)


SUITE = "synthesis-cpu-smollm2"


class Requests(NamedTuple):
    """The requests of a small pool, by stage."""

    instruct: list[CompletionRequest]
    sampled: list[CompletionRequest]
    greedy: list[CompletionRequest]
    judge: list[ChoiceRequest]

    def shortened(self, count: int) -> Requests:
        """Return `count` completions of each kind, all equally short, and every request to the judge."""
        def short(requests: list[CompletionRequest]) -> list[CompletionRequest]:
            return [request._replace(sampling=request.sampling._replace(max_tokens=TIMED_TOKENS)) for request in requests[:count]]

        return Requests(short(self.instruct), short(self.sampled), short(self.greedy), self.judge)


def run(arguments: argparse.Namespace) -> dict:
    """Measure, and return the record. UserError where the model is missing."""
    folder, description = smollm2()
    model = Model(path=str(folder), name="base")
    config = Config(base=model, judges=[model], respond=Respond(max_tokens=LONGEST),
                    instruct=Instruct(num_instructions=arguments.prompts, max_tokens=LONGEST))
    with (tempfile.TemporaryDirectory() as work, engine_of(model, Path(work)) as engine, bare_vllm(model.path) as ask,
          fresh_run(model, Path(work), config) as pool):
        lengths, requests = small_pool(pool, ResultWriter(pool.pool, pool.say, "pool", name_of(model), engine))
        contenders = make_contenders(requests.shortened(arguments.prompts), engine, ask, Path(work), timing.WARMUP + arguments.rounds)
        samples = timing.interleave(contenders, arguments.rounds, 1, cpu=cpu_seconds)
        name = engine.info.name
    lines = [{"line": line, "tokens_per_cpu_second": asdict(timing.spread(rounds)),
              "share_of_greedy": None if line == JUDGE else asdict(timing.ratio(rounds, samples[GREEDILY]))}
             for line, rounds in samples.items()]
    conditions = {"engine": name, "model": description, "prompts": arguments.prompts, "rounds": arguments.rounds, "lengths": lengths,
                  "longest": LONGEST, "timed_tokens": TIMED_TOKENS}
    return record.make(SUITE, conditions, {}, lines, timing.raw(samples))


def cpu_seconds() -> float:
    """Return the CPU-seconds of this process and of the engines that it started."""
    return time.process_time() + sum(sum(child.cpu_times()[:2]) for child in psutil.Process().children(recursive=True))


def small_pool(run: SynthesisRun, writer: ResultWriter) -> tuple[dict[str, float], Requests]:
    """Sample instructions, answer half of those that end, and return mean tokens and all requests."""
    instruct = list(TurnTask(run, 0).requests(range(run.config.instruct.num_instructions)))
    sample_turns(run, writer, 0)
    task = ResponseTask(run, run.base)
    respond = [request for request in task.requests() if request.key[1] in (0, GREEDY)]
    answered = respond[:len(respond) // 4 * 2]
    writer.complete(answered, len(answered), task.write)
    judge = list(ScoringTask(run, run.base).requests())

    def figure(query: str) -> float:
        (value,), = run.pool.select(query)
        return float(value)

    lengths = {
        "kept": len(respond) / 2 / len(instruct), "answered": len(answered) // 2,
        "usable": figure("SELECT avg(reason IS NULL) FROM responses"),
        "instruct": figure("SELECT avg(tokens) FROM turns"), "sampled": figure("SELECT avg(tokens) FROM responses WHERE sample >= 0"),
        "greedy": figure("SELECT avg(tokens) FROM responses WHERE sample < 0"),
        "judge": sum(len(request.prompt.token_ids) for request in judge) / len(judge)}
    sampled, greedy = ([one for one in respond if (one.key[1] == GREEDY) == wanted] for wanted in (False, True))
    return lengths, Requests(instruct, sampled, greedy, judge)


def make_contenders(requests: Requests, engine: Engine, ask: Callable[[Path], dict], work: Path, calls: int) -> list[Contender]:
    """Return what is timed: all stages by our engine, answers by bare vLLM, greedy ones twice."""
    parts = (requests.judge[i::calls] for i in range(calls))

    def bare(name: str, asked: list[CompletionRequest], logprobs: int | None) -> Contender:
        file = work / f"{name}.json"
        file.write_text(json.dumps([{"token_ids": one.prompt.token_ids, "seed": one.seed, "logprobs": logprobs, **one.sampling._asdict()}
                                    for one in asked]))
        return Contender(name, lambda: StepResult(0.0, ask(file)["tokens"], 0, 0, 0.0))

    def ours(name: str, asked: list[CompletionRequest]) -> Contender:
        return Contender(name, lambda: StepResult(0.0, sum(one.tokens for one in engine.complete(asked)), 0, 0, 0.0))

    def judge() -> StepResult:
        """Score answers that no earlier call has scored: the cache of prefixes would know them."""
        return StepResult(0.0, sum(one.prompt_tokens for one in engine.choose(next(parts))), 0, 0, 0.0)

    reference = bare(GREEDILY, requests.greedy, None)
    return [reference, timing.again(reference), bare(SAMPLED, requests.sampled, 0), ours(INSTRUCT, requests.instruct),
            ours(RESPOND, requests.sampled), ours(RESPOND_GREEDY, requests.greedy), Contender(JUDGE, judge)]


# ---------------------------------------------------------------- how a record is shown


def work_of_an_instruction(lengths: dict[str, float]) -> dict[str, float]:
    """Return an instruction's tokens in each stage: generated ones, and of prompts of the judge."""
    kept = lengths["kept"]
    return {INSTRUCT: lengths["instruct"], RESPOND: kept * SAMPLES * lengths["sampled"], RESPOND_GREEDY: kept * lengths["greedy"],
            JUDGE: kept * (SAMPLES + 1) * lengths["usable"] * lengths["judge"]}


def hours(seconds_each: float) -> list[str]:
    """Return the hours that pools of each size take, by the seconds of an instruction."""
    each = [count * seconds_each / 3600 for count in SIZES]
    return [f"{one:.2g}" if one < 10 else f"{one:,.0f}" for one in each]


def table(record: dict) -> list[list[str]]:
    """Return each stage's rate and what it costs, the whole, and the whole at rates that others published."""
    lines, work = {row["line"]: row for row in record["summary"]}, work_of_an_instruction(record["conditions"]["lengths"])
    sizes = [f"hours for {count:,}" for count in SIZES]
    rows = [["stage", "tokens per CPU-second", "of bare greedy decoding", "tokens an instruction", *sizes]]
    for line, row in lines.items():
        of_greedy, speed = show.interval(row["share_of_greedy"]), row["tokens_per_cpu_second"]["value"]
        costs = [f"{work[line]:,.0f}", *hours(work[line] / speed)] if line in work else [""] * (1 + len(SIZES))
        rows.append([line, f"{speed:,.0f}", of_greedy, *costs])
    whole = sum(work[line] / lines[line]["tokens_per_cpu_second"]["value"] for line in work)
    generated = sum(work.values()) - work[JUDGE]
    rows.append(["all stages on this core, extrapolated", "", "", f"{sum(work.values()):,.0f}", *hours(whole)])
    rows += [[one.name, f"{one.tokens_per_second:,.0f}", "", f"{generated:,.0f} generated", *hours(generated / one.tokens_per_second)]
             for one in PUBLISHED]
    return rows


def caption(record: dict) -> Caption:
    c = record["conditions"]
    lengths = c["lengths"]
    return Caption(
        f"Stages of synthesis on {c['model']} ({c['engine']}), and what pools of three sizes cost where the model alone asks, answers "
        f"({SAMPLES} sampled answers and a greedy one) and judges. Judge: tokens of prompts, all others: generated tokens. Hours are "
        "extrapolated from the tokens that an instruction took, at the rates of one core. The last rows are published rates, not measured "
        "here, and count generated tokens alone.",
        (f"{c['prompts']} instructions, {lengths['kept']:.0%} of which end; answers to {lengths['answered']} of them, "
         f"{lengths['usable']:.0%} usable; nothing longer than {c['longest']} tokens. Mean tokens: instruction {lengths['instruct']:.0f}, "
         f"sampled answer {lengths['sampled']:.0f}, greedy answer {lengths['greedy']:.0f}, prompt of the judge {lengths['judge']:.0f}.",
         f"Rates are medians of {c['rounds']} rounds of {c['prompts']} requests of at most {c['timed_tokens']} tokens; ratios with 95% "
         "intervals. Probe, reference samples and the start of engines are not counted.",
         *(f"{one.name}: {one.source}." for one in PUBLISHED),
         f"{show.machine(record)}; {origin(record)}."))


def draw(record: dict, figure) -> None:
    """Draw the rates of what generates tokens."""
    rows = [row for row in record["summary"] if row["line"] != JUDGE and not row["line"].endswith(timing.AGAIN)][::-1]
    axes = show.axes_of(figure, 8, 1.3 + 0.45 * len(rows))
    rates = [row["tokens_per_cpu_second"] for row in rows]
    axes.barh([row["line"] for row in rows], [one["value"] for one in rates], xerr=show.whiskers(rates), height=0.6,
              color=[show.OTHERS if row["line"].startswith("bare") else show.OURS for row in rows])
    axes.set_xlabel("tokens per CPU-second")


VIEW = View(table, caption, draw, lambda record: "Synthesis on a real model beside bare vLLM")
