"""Summarise the study on a real model, and show its record: table, caption, picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.forgetting.real_model.arms import BASE
from benchmarks.harness import show
from benchmarks.harness.record import origin
from benchmarks.harness.suite import Caption, View
from trainer.evaluation.significance import wilson

RULES, WORDS, PUBLIC, PROBLEMS, MINI = "ifeval", "lambada_openai", "public", "problems", "mini_"
CONFIDENCE = 0.95
COLUMNS = {  # of the table: its head, and the figure
    "choices": "choices", "IFEval": "rules", "mini suite": "mini", "lost, gained": "lost_gained", "ended": "ended", "LAMBADA": "words",
    "public text": "public", "KL, public": "public_kl", "domain text": "domain", "KL, domain": "domain_kl", "problems": "problems",
    "CPU min": "minutes"}
SHARES, CHANGES = ("choices", "rules", "mini", "ended", "words", "problems"), ("public", "domain")


# ---------------------------------------------------------------- figures


def summary(base: dict, outcomes: Sequence[dict]) -> list[dict]:
    """Return a row for the base and each arm: shares of items, and means of log-probs and KL."""
    rows = [{"line": BASE, "seeds": 1, **shares([base])}]
    for name in dict.fromkeys(outcome["arm"] for outcome in outcomes):
        seeds = [outcome for outcome in outcomes if outcome["arm"] == name]
        rows.append({"line": name, "seeds": len(seeds), **shares(seeds), **changes(seeds)})
    return rows


def shares(outcomes: Sequence[dict]) -> dict[str, dict]:
    """Return the shares of right items over all seeds, and of answers in chats that end."""
    files = outcomes[0]["files"]
    groups = {"choices": [name for name, file in files.items() if file["metric"] == "choice"], "rules": [RULES], "mini": mini(files),
              "words": [WORDS], "problems": [PROBLEMS]}
    found = {}
    for key, names in groups.items():
        judged = [name for name in names if name in files and "right" in files[name]["model"]]
        sides = [outcome["files"][name]["model"] for outcome in outcomes for name in judged]
        if sides:
            found[key] = _share(sum(side["right"] for side in sides), sum(side["judged"] for side in sides))
    answers = [outcome["files"][name] for outcome in outcomes for name in answered(files)]
    if answers:
        total = sum(file["items"] for file in answers)
        found["ended"] = _share(total - sum(file["model"]["unfinished"] for file in answers), total)
    return found


def mini(files: dict) -> list[str]:
    return [name for name in files if name.startswith(MINI)]


def answered(files: dict) -> list[str]:
    """Return the files of general prompts that are answered: IFEval's and the mini suite's."""
    return [name for name in files if name == RULES or name.startswith(MINI)]


def _share(right: int, total: int) -> dict:
    low, high = wilson(right, total, CONFIDENCE)
    return {"value": right / total, "low": low, "high": high}


def changes(outcomes: Sequence[dict]) -> dict[str, Any]:
    """Return what training changed: answers lost and gained over all seeds, and means of nats per token."""
    files = outcomes[0]["files"]
    found: dict[str, Any] = {"minutes": statistics.median(sum(outcome["cpu_seconds"].values()) for outcome in outcomes) / 60}
    found["lost_gained"] = [sum(outcome["files"][name]["change"][key] for outcome in outcomes for name in answered(files))
                            for key in ("lost", "gained")]
    for key, name in (("public", PUBLIC), ("domain", PROBLEMS)):
        if name in files:
            found[key] = _mean([outcome["files"][name]["change"]["logprob_per_token"] for outcome in outcomes])
            found[f"{key}_kl"] = _mean([outcome["files"][name]["change"]["kl_per_token"] for outcome in outcomes])
    return found


def _mean(values: Sequence[float]) -> dict:
    return {"value": statistics.fmean(values), "error": statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None}


# ---------------------------------------------------------------- how a record is shown


EXPLAINED = ("Lost, gained: answers that kept the rules under the base and do not now, or the reverse. Ended: answers that end. Text: nats "
             "per token against the base. Problems: right answers to GSM8K. 95% intervals of items.")


def table(record: dict) -> list[list[str]]:
    return cells(record["summary"])


def cells(rows: Sequence[dict]) -> list[list[str]]:
    """Return the head and a line for each row of a summary, without columns that nothing fills."""
    columns = {head: key for head, key in COLUMNS.items() if any(key in row for row in rows)}
    return [["arm", *columns], *([row["line"], *(_cell(row, key) for key in columns.values())] for row in rows)]


def _cell(row: dict, key: str) -> str:
    value = row.get(key)
    if value is None:
        return ""
    if key in SHARES:
        return f"{value['value']:.1%} ({value['low']:.0%}-{value['high']:.0%})"
    if key == "lost_gained":
        return "{}, {}".format(*value)
    if key == "minutes":
        return f"{value:.0f}"
    error = f" ± {value['error']:.3f}" if value["error"] is not None else ""
    return f"{value['value']:{'+' if key in CHANGES else ''}.3f}{error}"


def caption(record: dict) -> Caption:
    c, items = record["conditions"], record["conditions"]["items"]
    seeds = c["seeds"]
    replay = "half of them replay where there is any" + ", unless named" * (len({*c["ratios"].values()}) > 1)
    sets = "; ".join(f"{name} {count:,}" for name, count in c["rows"].items())
    return Caption(
        f"{c['base']} learns {c['domain'].upper()}. Choices: items of {', '.join(c['suites'])} right. IFEval: strict, by prompt. Lost, "
        "gained: answers to IFEval (and the mini suite) that kept the rules under the base and do not now, or the reverse; ended: answers "
        f"that end. Text: nats per token against the base. {seeds} seed{'s' * (seeds > 1)}; 95% intervals of items.",
        (f"{c['steps']} steps of {c['tokens']:,} tokens for every arm, {replay}; LoRA of rank 16 on all linear layers unless named, "
         f"learning rate {c['learning_rate']:g}, {c['precision']}; KL of weight {c['kl_weight']:g} over all tokens.",
         f"Items: {sum(items[name] for name in c['suites'])} of choices, {items[RULES]} of IFEval (answers of at most {c['rules_tokens']} "
         f"tokens), {items[WORDS]} of LAMBADA, {items[PUBLIC]} held-out chats of dolly, {items[PROBLEMS]} problems of the domain (greedy "
         f"answers of at most {c['problem_tokens']} tokens; the last number counts).",
         "CPU minutes: training and scoring, in the sitting that ended the arm; the base is scored once.",
         f"Rows: {sets}. Responders beside the base: {', '.join(c['responders']) or 'none'}.",
         f"{c['workers']} worker{'s' * (c['workers'] > 1)} of one thread, {record['cpu']}. {origin(record)}."))


def draw(record: dict, figure: Any) -> None:
    """Draw what each arm keeps of instruction following and of likely text, and what it learns."""
    rows = record["summary"][::-1]
    figure.set_size_inches(11, 1.3 + 0.35 * len(rows))
    panels = (("rules", "IFEval: prompts followed"), ("ended", "answers that end"), ("public_kl", "KL from the base, public text"),
              ("domain", "domain text, nats per token"))
    for i, (key, title) in enumerate(panels):
        axes = show.bare(figure.add_subplot(1, len(panels), i + 1))
        values = [row.get(key) or {"value": 0.0} for row in rows]
        errors = show.whiskers(values) if key in SHARES else [value.get("error") or 0 for value in values]
        axes.barh([row["line"] for row in rows], [value["value"] for value in values], xerr=errors, ecolor=show.GREY,
                  color=[show.OTHERS if row["line"] == BASE else show.SECOND if row["line"].startswith("domain only") else show.OURS
                         for row in rows])
        axes.set_title(title, fontsize=9)
        axes.tick_params(labelleft=i == 0, labelsize=8)


VIEW = View(table, caption, draw, lambda record: f"What {record['conditions']['base'].partition(',')[0]} forgets while it learns "
            f"{record['conditions']['domain'].upper()}")
