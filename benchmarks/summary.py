"""Make the README's own sections from the newest records.

They are the headline, the summary table and the picture of forgetting.
"""

from __future__ import annotations

from typing import Any

from benchmarks.harness import show
from benchmarks.harness.suite import Caption, View

TRAINING = "training-cpu-smollm2-gsm8k"  # the record of training that the README shows: a real model's
PICTURE = "forgetting-cpu"  # file name of the picture, beside the suites' own
# Recipes of the study that the README shows, and their names there.
RECIPES = {"domain only": "domain data alone", "public, other style": "with public data", "self 1x1": "with replay: the base's answers",
           "3 models x 3, filtered (the paper)": "with replay: best of nine (paper)", "plus": "with replay: best of nine (Steadfast)"}


def headline(records: dict[str, dict]) -> str:
    """Return three bullets: speed, forgetting, and the state of the GPU."""
    training, forgetting = records[TRAINING], recipes(records["miniature-cpu"])
    alone, replay = forgetting["domain only"], forgetting["plus"]
    rows = measured(training)
    return (
        f"- **Fast.** {'; '.join(faster(row) for row in rows)}. A training step adds {rows[0]['mib']:,.0f} MiB to the memory in use, the "
        f"plain loop's {plain(training)['mib']:,.0f}.\n"
        f"- **Without forgetting.** In a controlled study, fine-tuning on the domain alone loses {alone['forgotten']:.0%} of what the "
        f"model could do; together with a replay set that the models wrote themselves, {replay['forgotten']:.1%}. Accuracy on the "
        f"domain: {alone['domain']:.0%} and {replay['domain']:.0%}.\n"
        f"- **GPU:** {gpu_state(records)}\n")


def summary(records: dict[str, dict]) -> str:
    """Return the table of benchmarks: training, memory, forgetting, synthesis, GPU."""
    training = records[TRAINING]
    rows = measured(training)
    speed = "; ".join(f"{row['dtype']} " + ", ".join(f"{ratio['value']:.1f}× {form}" for form, ratio in row["ratio"].items())
                      for row in rows)
    forgotten = "; ".join(f"{RECIPES[arm]} {row['forgotten']:.1%}" for arm, row in recipes(records["miniature-cpu"]).items())
    synthesis = next(row for row in records["synthesis-cpu"]["summary"] if "synth" in row.values())["share_of_bare"]
    table = [
        ["", "measured", "details"],
        ["training", f"times as fast as a Hugging Face loop of the same dtype: {speed}", "[training](benchmarks/README.md#training)"],
        ["memory", f"a step adds {rows[0]['mib']:,.0f} MiB; a plain loop's {plain(training)['mib']:,.0f}",
         "[training](benchmarks/README.md#training)"],
        ["forgetting", f"answers lost: {forgotten}", "[forgetting](benchmarks/README.md#forgetting)"],
        ["synthesis", f"{show.interval(synthesis)} of the speed of bare vLLM", "[synthesis](synth/README.md)"],
        ["GPU", gpu_state(records), "[on a GPU](benchmarks/README.md#on-a-gpu)"]]
    return show.markdown_table(table, text_columns=3) + "\n"


def measured(training: dict) -> list[dict]:
    """Return Steadfast's rows of the dtypes in which it was compared with plain loops."""
    rows = (ours(training, dtype) for dtype in ("fp32", "bf16"))
    return [row for row in rows if row and "plain" in row["ratio"]]


def faster(row: dict) -> str:
    """Say how many times as fast a row is as the loops of its dtype."""
    loops = {"plain": "as fast as a plain Hugging Face loop", "grouped": "one that groups chats by length", "packed": "one that packs"}
    ratios = [f"{row['ratio'][form]['value']:.1f} times {loop}" for form, loop in loops.items() if form in row["ratio"]]
    return f"On a CPU in {row['dtype']}, {', '.join(ratios)}"


def gpu_state(records: dict[str, dict]) -> str:
    """Return one sentence on what has been measured on a GPU."""
    on_gpu = [name for name in records if name.startswith("gpu")]
    if not on_gpu:
        return "not timed yet. The Triton kernels are tested in Triton's interpreter and compiled for six architectures."
    return f"measured on {records[on_gpu[0]]['device']}."


def draw(study: dict, figure: Any) -> None:
    """Draw the share of forgotten answers and the domain accuracy of each recipe, averaged over the bases."""
    found = recipes(study)
    names = [RECIPES[arm] for arm in reversed(found)]
    rows = list(reversed(found.values()))
    figure.set_size_inches(8.5, 3)
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    colours = [show.OURS if "replay" in name else show.OTHERS for name in names]
    for axes, column, label in ((left, "forgotten", "right answers that are wrong now (less is better)"),
                                (right, "domain", "accuracy on the domain")):
        axes.barh(names, [row[column] for row in rows], xerr=[row[f"{column}_error"] for row in rows], color=colours, ecolor=show.GREY)
        for i, row in enumerate(rows):
            axes.text(row[column] + row[f"{column}_error"], i, f" {row[column]:.1%}", va="center", fontsize=9)
        axes.set(xlim=(0, 1.18), xlabel=label, xticks=[0, 0.5, 1], xticklabels=["0%", "50%", "100%"])
        show.bare(axes)
    right.set_yticks([])


def picture_headline(study: dict) -> str:
    """Return what the picture shows in one line."""
    found = recipes(study)
    return f"Fine-tuning forgets {found['domain only']['forgotten']:.0%}; with replay, {found['plus']['forgotten']:.0%}"


def recipes(study: dict) -> dict[str, dict[str, float]]:
    """Return the README's recipes, their figures averaged over the study's bases."""
    found = {}
    for arm in RECIPES:
        rows = [row for row in study["summary"] if row["arm"] == arm]
        if rows:
            found[arm] = {column: sum(row[column] for row in rows) / len(rows)
                          for column in ("forgotten", "forgotten_error", "domain", "domain_error")}
    return found


def ours(training: dict, dtype: str) -> dict | None:
    return next((row for row in training["summary"] if row["contender"] == f"Steadfast, {dtype}"), None)


def plain(training: dict) -> dict:
    """Return the row of the plain loop in fp32."""
    name = training["conditions"]["bases"]["fp32"]["plain"]
    return next(row for row in training["summary"] if row["contender"] == name)


VIEW = View(lambda study: [], lambda study: Caption(""), draw, picture_headline)
SECTIONS = {"headline": headline, "summary": summary}
