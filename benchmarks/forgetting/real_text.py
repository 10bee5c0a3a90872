"""Measure forgetting on real text: a small model learns GSM8K with and without replay.

The base is trained here from random weights, on the data of `real_text_data`. `synth.run` samples it once; `trainer.run` trains every arm
and seed, and `trainer.evaluate` compares each with the base. A seed draws the domain rows, the order of the data and the adapter's initial
weights; all seeds share the base, the replay sets that it writes, and the items.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from random import Random

from transformers import AutoModelForCausalLM

from benchmarks.forgetting import real_text_data
from benchmarks.forgetting.job import LEARNING_RATES, Arm, Job, configuration
from benchmarks.forgetting.miniature.summary import BASE, estimate
from benchmarks.forgetting.miniature.world import training_records, write_jsonl
from benchmarks.forgetting.real_text_data import Counts, Schooling, Texts
from benchmarks.harness import parallel, record, show
from benchmarks.harness.parallel import begin, quietly, results_of
from benchmarks.harness.public_sets import add_data_argument
from benchmarks.harness.record import origin
from benchmarks.harness.suite import Caption, Suite, View
from benchmarks.harness.synthetic_models import quiet
from synth import config as synthesis
from synth.run import synthesise
from trainer.config import Config, Data, Items, Logging, Model, Replay
from trainer.evaluate import evaluate
from trainer.evaluation import config as evaluation
from trainer.run import train

RATIO = 0.5  # share of the tokens that is replay
KL = {"kl_weight": 1.0, "kl_positions": "all", "kl_reference": "cached"}
# Replay sets that the base writes -> their candidate responses. One more, "real", has the data that the base was trained on, which in
# practice nobody has.
SELF_SETS = {"self 1x1": "base:0", "self, greedy": "base:greedy"}
METRICS = {  # of the item files, by role
    "general": {"skills": "exact", "decisions": "choice", "long answers": "logprob", "tasks": "logprob"},
    "domain": {"problems": "logprob", "solutions": "choice"}}
TEXT = ("long answers", "tasks")
ARMS = (
    Arm("domain only"), Arm("domain only, LR/10", lr_factor=0.1), Arm("self 1x1", "self 1x1"), Arm("self, greedy", "self, greedy"),
    Arm("self, greedy + KL", "self, greedy", kl=True), Arm("real data (oracle)", "real"),
    Arm("full: domain only", full=True), Arm("full: self, greedy + KL", "self, greedy", full=True, kl=True),
)


@dataclass(frozen=True)
class Size:
    """Sizes of data and training."""

    schooling: Schooling = field(default_factory=Schooling)
    counts: Counts = field(default_factory=Counts)
    instructions: int = 2000  # that the base is sampled for, and rows of real replay
    domain: int = 3000  # upper bound of problems: more than the steps take
    steps: int = 300
    tokens: int = real_text_data.TOKENS  # a step
    answer: int = 12  # upper bound of the tokens of a generated answer: more than any right one has


SIZE = Size()


def base_folder(work: Path) -> Path:
    """Return the folder of the model that every arm is trained on."""
    return work / BASE / "model"


# ---------------------------------------------------------------- replay


def replay_file(work: Path, name: str, seed: int) -> Path:
    return work / "replay" / (f"{name}.jsonl" if name in SELF_SETS else f"{name} {seed}.jsonl")


def make_self_sets(work: Path, size: Size) -> dict[str, int]:
    """Run synthesis once up to the responses, then select each set; return the rows of each."""
    def synthesis_config(candidate: str, stages: Sequence[str]) -> synthesis.Config:
        return synthesis.Config(
            output=str(work / "synth"), base=synthesis.Model(path=str(base_folder(work)), name=BASE, engine="transformers"),
            stages=[*stages], probe=synthesis.Probe(samples=32),
            instruct=synthesis.Instruct(num_instructions=size.instructions, max_tokens=400, reference_samples=0),
            respond=synthesis.Respond(num_samples=1, max_tokens=200, score_with_base=False),
            select=synthesis.Select(rule="first", candidates=[candidate]))

    rows = {}
    with quietly(work / "synth.log"):
        synthesise(synthesis_config(SELF_SETS["self 1x1"], ["probe", "instruct", "clean", "respond"]))
        for name, candidate in SELF_SETS.items():
            synthesise(synthesis_config(candidate, ["select"]))
            path = replay_file(work, name, 0)
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(work / "synth" / "replay.jsonl", path)
            rows[name] = len(path.read_text(encoding="utf-8").splitlines())
    return rows


def write_real(texts: Texts, size: Size, seed: int, work: Path) -> None:
    """Write rows of the base's training data, in the base's shares; those of skills are new ones."""
    chats = [chat for group in texts.general.values() for chat in group]
    real = round(size.instructions * (1 - size.schooling.skills / (size.schooling.skills + size.schooling.passes * len(chats))))
    drawn = Random(f"replay {seed}").sample(chats, min(real, len(chats)))
    rows = [*map(real_text_data.record, drawn), *training_records(real_text_data.SKILLS, size.instructions - len(drawn), seed=1000 + seed)]
    write_jsonl(rows, replay_file(work, "real", seed))


def write_domain(texts: Texts, size: Size, seed: int, work: Path) -> None:
    """Write a seed's domain rows."""
    drawn = Random(f"domain {seed}").sample(texts.domain, min(size.domain, len(texts.domain)))
    write_jsonl([*map(real_text_data.record, drawn)], work / f"domain {seed}.jsonl")


# ---------------------------------------------------------------- one arm


def measure(job: Job) -> dict:
    """Train an arm, and score it and the base."""
    with quietly(job.output.with_suffix(".log")):
        begun = time.process_time()
        folder = train(recipe(job)).folder
        seconds = time.process_time() - begun
        if job.arm.full:
            config = evaluation.Config(model=Model(path=str(folder / "model")), base=evaluation.Base(path=str(base_folder(job.work))))
        else:
            config = evaluation.Config(adapter=str(folder / "adapter"))
        return {"arm": job.arm.name, "seed": job.seed, "cpu_seconds": seconds, **score(config, job.work, job.size, folder / "scores")}


def recipe(job: Job) -> Config:
    """Return the configuration of an arm's run."""
    arm, size = job.arm, job.size
    replay = Replay(data=str(replay_file(job.work, arm.replay, job.seed)), ratio=RATIO, unit="tokens") if arm.replay else Replay()
    data = Data(train=str(job.work / f"domain {job.seed}.jsonl"), max_length=size.tokens, on_overlong="drop",
                cache_dir=str(job.work / "cache"), num_proc=1)
    return replace(configuration(job, base_folder(job.work), data, replay, KL), precision=real_text_data.precision(),
                   logging=Logging(every=50, tensorboard=False, progress=False))


def score(config: evaluation.Config, work: Path, size: Size, output: Path) -> dict:
    """Return the figures of `trainer.evaluate` by role and item file, and a mark for every item."""
    files = {role: [Items(str(work / "items" / f"{name}.jsonl"), metric=metric, choice_by="sum" if name == "decisions" else "tokens")
                    for name, metric in metrics.items()] for role, metrics in METRICS.items()}
    result = evaluate(replace(
        config, output=str(output), data=evaluation.Data(**files), generation=evaluation.Generation(max_tokens=size.answer)))
    marks: dict[str, dict[str, str]] = {}
    for row in map(json.loads, (output / "results.jsonl").read_text(encoding="utf-8").splitlines()):
        for side in (BASE, "model"):
            if "right" in row[side]:
                file_marks = marks.setdefault(row["file"], {})
                file_marks[side] = file_marks.get(side, "") + "01"[row[side]["right"]]
    files = {file["name"]: {key: value for key, value in file.items() if key not in ("name", "path")} for file in result["files"]}
    return {"roles": result["roles"], "files": files, "marks": marks}


# ---------------------------------------------------------------- figures


def figures(outcome: dict) -> dict[str, float]:
    """Return one arm's figures with one seed, beside the base's: shares of items, and nats per token."""
    files, roles = outcome["files"], outcome["roles"]
    skills, text = files["skills"], [files[name] for name in TEXT]
    base_right, change = skills[BASE]["right"], skills["change"]
    tokens = sum(file["model"]["tokens"] for file in text)
    return {
        "general": skills["model"]["accuracy"],
        "domain": files["problems"]["change"]["logprob_per_token"],
        "forgotten": change["lost"] / max(1, base_right),
        "gained": change["gained"] / max(1, skills[BASE]["judged"] - base_right),
        "decisions": files["decisions"]["model"]["chance_adjusted"],
        "text": sum(file["change"]["logprob_per_token"] * file["model"]["tokens"] for file in text) / tokens,
        "kl_general": roles["general"]["change"]["kl_per_token"],
        "solutions": files["solutions"]["model"]["accuracy"],
        "kl_domain": roles["domain"]["change"]["kl_per_token"]}


def summary(outcomes: Sequence[dict]) -> list[dict]:
    """Return a row for the base and each arm: means over seeds, and their standard errors."""
    first = outcomes[0]
    base_row = {"general": first["files"]["skills"][BASE]["accuracy"], "decisions": first["files"]["decisions"][BASE]["chance_adjusted"],
                "solutions": first["files"]["solutions"][BASE]["accuracy"]}
    rows = [{"line": BASE, **{name: 0.0 for name in figures(first)}, **base_row}]
    for name in dict.fromkeys(outcome["arm"] for outcome in outcomes):
        by_seed = [outcome for outcome in outcomes if outcome["arm"] == name]
        row = {"line": name, "seeds": len(by_seed), "cpu_seconds": statistics.median(outcome["cpu_seconds"] for outcome in by_seed)}
        for figure in figures(first):
            row |= estimate(figure, [figures(outcome)[figure] for outcome in by_seed])
        rows.append(row)
    return rows


def base_logprobs(outcome: dict) -> dict[str, dict[str, float]]:
    """Return the log-prob per token of held-out text before and after the base's training."""
    return {name: {side: outcome["files"][name][side]["logprob_per_token"] for side in (BASE, "model")} for name in (*TEXT, "problems")}


# ---------------------------------------------------------------- all arms


def prepare(texts: Texts, size: Size, seeds: int, work: Path) -> dict:
    """Make items, domain rows, real replay and the base, and score the base and its random weights."""
    real_text_data.write_items(texts, size.counts, work / "items")
    for seed in range(seeds):
        write_domain(texts, size, seed, work)
        write_real(texts, size, seed, work)
    with quietly(work / "base.log"):
        start, trained = real_text_data.make_base(texts, size.schooling, work / "schooling")
        shutil.copytree(trained, base_folder(work))
        config = evaluation.Config(model=Model(path=str(base_folder(work))), base=evaluation.Base(path=str(start)))
        return score(config, work, size, work / "base scores")


def run_all(size: Size, seeds: int, work: Path, workers: int, begun: float) -> tuple[list[dict], dict[str, int]]:
    """Measure every arm with every seed, and count the rows of the sets that the base writes.

    Arms that need none of these sets are trained while the base is sampled.
    """
    jobs = [Job(BASE, arm, seed, size, work) for seed in range(seeds) for arm in ARMS]
    with parallel.pool(workers) as pool:
        self_sets = pool.submit(make_self_sets, work, size)
        running = [pool.submit(measure, job) for job in jobs if job.arm.replay not in SELF_SETS]
        rows = self_sets.result()
        running += [pool.submit(measure, job) for job in jobs if job.arm.replay in SELF_SETS]
        outcomes = results_of(begun, running, lambda outcome: f"{outcome['arm']}, seed {outcome['seed']}")
    order = [(arm.name, seed) for arm in ARMS for seed in range(seeds)]
    return sorted(outcomes, key=lambda outcome: order.index((outcome["arm"], outcome["seed"]))), rows


# ---------------------------------------------------------------- the suite


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data_argument(parser, "folder with " + ", ".join(real_text_data.FILES))
    parallel.add_arguments(parser, seeds=2)


def run(arguments: argparse.Namespace) -> dict:
    parallel.check(arguments)
    begun, size = time.perf_counter(), SIZE
    begin()
    quiet()
    with parallel.working_folder(arguments) as work:
        texts = real_text_data.read(arguments.data or real_text_data.download(work / "public sets"))
        base, cpu = prepare(texts, size, arguments.seeds, work), time.process_time()
        parameters = AutoModelForCausalLM.from_pretrained(base_folder(work)).num_parameters()
        print(f"{time.perf_counter() - begun:6.0f} s  base", flush=True)
        outcomes, rows = run_all(size, arguments.seeds, work, arguments.workers, begun)
    conditions = {
        **asdict(size), "parameters": parameters, "items": {name: file["items"] for name, file in base["files"].items()},
        "seeds": arguments.seeds, "ratio": RATIO, "rates": LEARNING_RATES, "kl": KL, "precision": real_text_data.precision(),
        "replay_rows": rows, "schooled": base_logprobs(base), "base_cpu_seconds": cpu, "workers": arguments.workers,
        "seconds": time.perf_counter() - begun}
    return record.make("retention-cpu", conditions, {}, summary(outcomes), {"base": [base], "outcomes": outcomes})


# ---------------------------------------------------------------- how a record is shown


def table(record: dict) -> list[list[str]]:
    """Return each arm's accuracy in general, what it forgot there, and what it gained on the domain."""
    head = ["arm", "general", "domain", "forgotten", "gained", "general text", "KL, general", "KL, domain", "decisions", "solutions"]
    keys = ("general", "domain", "forgotten", "gained", "text", "kl_general", "kl_domain", "decisions", "solutions")
    return [head] + [[row["line"], *(format_mean(row, key, sign=key in ("domain", "text")) for key in keys)] for row in record["summary"]]


def format_mean(row: dict, key: str, sign: bool = False) -> str:
    """Format a mean, with its standard error where it has one."""
    error = row.get(f"{key}_error")
    value = f"{row[key]:+.3f}" if sign and row[key] else f"{row[key]:.3f}"
    return value + (f" ± {error:.3f}" if error is not None else "")


def caption(record: dict) -> Caption:
    c = record["conditions"]
    items, seeds = c["items"], c["seeds"]
    logprobs = "; ".join(f"{name} {figures['base']:.2f} to {figures['model']:.2f}" for name, figures in c["schooled"].items())
    return Caption(
        f"General: exact match of greedy answers to {items['skills']} skill items. Forgotten, gained: share of items that the base has "
        "right, or wrong, and the arm does not. Domain, general text: change of held-out answers' log-prob against the base, nats per "
        f"token. Means of {seeds} seed{'s' * (seeds > 1)}{' ± standard error' * (seeds > 1)}.",
        (f"Domain: {items['problems']} problems of GSM8K's test set. General text: {items['long answers']} PubMedQA answers, "
         f"{items['tasks']} self-instruct tasks. KL: from the base on these answers, nats per token.",
         f"Decisions: {items['decisions']} of PubMedQA, accuracy adjusted for chance. Solutions: the right one of four is the likeliest "
         f"per token ({items['solutions']} problems; by chance 0.25).",
         f"{c['steps']} steps of {c['tokens']:,} tokens for every arm, {c['ratio']:.0%} of them replay where there is any; LoRA of rank 16 "
         f"unless full; {c['precision']} training.",
         f"The base: Llama, {c['parameters'] / 1e6:.1f} M parameters, trained from random weights in {c['base_cpu_seconds'] / 60:.1f} CPU "
         f"minutes, which brought held-out log-probs per token from {logprobs}.",
         f"{c['seconds'] / 60:.0f} minutes with {c['workers']} workers of one thread on {record['cpu']}. {origin(record)}."))


def draw(record: dict, figure) -> None:
    """Draw what each arm keeps of skills and of text, and what it learns of the domain.

    Error bars are standard errors.
    """
    rows = record["summary"][::-1]
    figure.set_size_inches(10, 1.3 + 0.35 * len(rows))
    for i, (key, name) in enumerate((("general", "general: skill items right"), ("text", "general text: nats per token, against the base"),
                                     ("domain", "GSM8K: nats per token, against the base"))):
        panel = show.bare(figure.add_subplot(1, 3, i + 1))
        panel.barh([row["line"] for row in rows], [row[key] for row in rows], xerr=[row.get(f"{key}_error") or 0 for row in rows],
                   ecolor=show.GREY,
                   color=[show.OTHERS if row["line"] == "base" or "domain only" in row["line"] else show.OURS for row in rows])
        panel.set_title(name, fontsize=9)
        panel.tick_params(labelleft=i == 0, labelsize=9)


SUITE = Suite("retention", "Forgetting on real text: a small model learns GSM8K, with and without replay", add_arguments, run,
              {"retention": View(table, caption, draw, lambda record: "Replay keeps what a model knew of real text")})
