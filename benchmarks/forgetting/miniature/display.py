"""Show the study's record as a table and a picture."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.forgetting.miniature.summary import BASE
from benchmarks.harness.record import origin
from benchmarks.harness.show import OURS, SECOND, bare
from benchmarks.harness.suite import Caption

COLOURS = (OURS, SECOND)  # of the bases
COLUMNS = ("general", "domain", "forgotten")


def bases(record: dict) -> list[str]:
    return list(dict.fromkeys(row["base"] for row in record["summary"]))


def points(record: dict) -> dict[str, float]:
    """Return the arms that are points of a curve, with their x values; the table omits them."""
    curves = record["conditions"]["curves"]
    return curves["share"] | curves["unique"]


def rows_of(record: dict) -> dict[str, dict[str, dict]]:
    """Return the rows of the arms in the table, by arm and base."""
    rows: dict[str, dict[str, dict]] = {}
    for row in record["summary"]:
        if row["arm"] not in points(record):
            rows.setdefault(row["arm"], {})[row["base"]] = row
    return rows


# ---------------------------------------------------------------- table


def table(record: dict) -> list[list[str]]:
    """Return a head and rows: each column's mean over seeds and standard error, for each base."""
    head = ["arm"] + [f"{base}: {column}" for base in bases(record) for column in COLUMNS]
    return [head] + [[arm, *(cell(by_base.get(base), column) for base in bases(record) for column in COLUMNS)]
                     for arm, by_base in rows_of(record).items()]


def cell(row: dict | None, column: str) -> str:
    if row is None:
        return ""
    error = row[f"{column}_error"]
    return f"{row[column]:.3f}" + (f" ± {error:.3f}" if error else "")


def caption(record: dict) -> Caption:
    c = record["conditions"]
    right = ", ".join(f"{stats['replay']} {stats['right']:.1%}" for stats in c["replay"] if stats["base"] == bases(record)[0])
    seeds = f"{c['seeds']} seed{'s' * (c['seeds'] > 1)}"
    return Caption(
        f"Exact match of greedy answers to {c['items']['general']:,} general and {c['items']['domain']} domain items of each seed. "
        f"Forgotten: share of the base's right general answers that are wrong after training. Means of {seeds}"
        f"{' ± standard error' if c['seeds'] > 1 else ''}.",
        ("No item can be met in training, except facts. A seed draws domain rows, items, order and adapter; one pool serves all.",
         f"{c['domain']} domain rows, {c['steps']} steps of {c['tokens']} tokens for every arm, {c['ratio']:.0%} of the rows replay, LoRA "
         "of rank 16 unless full.",
         f"Right answers in the sets chosen from the pool of {bases(record)[0]}: {right}.",
         f"{c['seconds'] / 60:.0f} minutes with {c['workers']} workers of one thread. {origin(record)}."))


def headline(record: dict) -> str:
    return "How much each way to fine-tune forgets, and what it learns"


# ---------------------------------------------------------------- picture


def draw(record: dict, figure) -> None:
    """Draw what every arm forgets and learns.

    Where they were measured, curves show general and domain accuracy over the replay ratio and over the number of unique replay rows.
    """
    arms = {arm: by_base for arm, by_base in rows_of(record).items() if arm != BASE}
    measured = {row["arm"] for row in record["summary"]} & points(record).keys()
    figure.set_size_inches(11.5 if measured else 8, 1.2 + 0.3 * len(arms))
    grid = figure.add_gridspec(2, 3 if measured else 2, width_ratios=(3, 1.5, 2.2) if measured else (3, 1.5))
    draw_dots(figure.add_subplot(grid[:, 0]), record, arms, "forgotten")
    draw_dots(figure.add_subplot(grid[:, 1]), record, arms, "domain")
    if not measured:
        return
    rows = {row["arm"]: row for row in record["summary"] if row["base"] == bases(record)[0]}
    c = record["conditions"]
    shares = [(0, rows[arm]) for arm in ("domain only",) if arm in rows]
    shares += [(value * 100, rows[arm]) for arm, value in c["curves"]["share"].items()]
    draw_curve(figure.add_subplot(grid[0, 2]), [*shares, (c["ratio"] * 100, rows["plus"])], "plus: % of the rows that are replay", False)
    plus_rows = next(stats["rows"] for stats in c["replay"] if stats["replay"] == "plus" and stats["base"] == bases(record)[0])
    unique = [(value, rows[arm]) for arm, value in c["curves"]["unique"].items()]
    draw_curve(figure.add_subplot(grid[1, 2]), [*unique, (plus_rows, rows["plus"])], "plus: unique replay rows", True)


def draw_dots(axes, record: dict, arms: dict[str, dict[str, dict]], column: str) -> None:
    """Draw a dot with its standard error for each arm and base; the axis of `forgotten` is logarithmic."""
    for base, colour, offset in zip(bases(record), COLOURS, (0.13, -0.13)):
        rows = [(place + offset, by_base[base]) for place, by_base in enumerate(reversed(arms.values())) if base in by_base]
        axes.errorbar([row[column] for _, row in rows], [y for y, _ in rows], xerr=[row[f"{column}_error"] or 0 for _, row in rows],
                      fmt="o", color=colour, markersize=5, clip_on=False, label=base)
    axes.set_ylim(-0.6, len(arms) - 0.4)
    axes.grid(axis="y", color="#eeeeee")
    axes.set_axisbelow(True)
    if column == "forgotten":
        axes.set(xscale="log", xlim=(0.01, 1), xlabel="forgotten, share of what the base had right")
        axes.set_xticks([0.01, 0.03, 0.1, 0.3, 1], ["1%", "3%", "10%", "30%", "100%"])
        axes.minorticks_off()
        axes.set_yticks(range(len(arms)), list(reversed(arms)))
        axes.legend(frameon=False, loc="lower right", title="base")
    else:
        axes.set(xlim=(0, 1), xlabel="accuracy on the domain")
        axes.set_yticks(range(len(arms)), [""] * len(arms))
    bare(axes)


def draw_curve(axes, rows: Sequence[tuple[float, dict]], label: str, logarithmic: bool) -> None:
    """Draw general and domain accuracy over the x value of each row."""
    for column, face in (("general", COLOURS[0]), ("domain", "white")):
        axes.errorbar([x for x, _ in rows], [row[column] for _, row in rows], yerr=[row[f"{column}_error"] or 0 for _, row in rows],
                      fmt="o-", color=COLOURS[0], markerfacecolor=face, label=column, clip_on=False)
    if logarithmic:
        axes.set_xscale("log")
        axes.set_xticks([x for x, _ in rows], [f"{x:,.0f}" for x, _ in rows])
        axes.minorticks_off()
    axes.set(xlabel=label, ylim=(0, 1.02), ylabel="accuracy")
    axes.legend(frameon=False, loc="lower right")
    bare(axes)
