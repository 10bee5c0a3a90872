"""The study's record as a table and a picture."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.miniature.summary import BASE

COLOURS = ("#1f6f8b", "#c8803c")  # of the bases
COLUMNS = ("general", "domain", "forgotten")


def bases(record: dict) -> list[str]:
    return list(dict.fromkeys(row["base"] for row in record["summary"]))


def points(record: dict) -> dict[str, float]:
    """Arms that are points of a curve, and where they lie on it; they are drawn and not listed."""
    curves = record["conditions"]["curves"]
    return curves["share"] | curves["unique"]


def rows_of(record: dict) -> dict[str, dict[str, dict]]:
    """Listed arms, each with its row by base."""
    found: dict[str, dict[str, dict]] = {}
    for row in record["summary"]:
        if row["arm"] not in points(record):
            found.setdefault(row["arm"], {})[row["base"]] = row
    return found


# ---------------------------------------------------------------- table


def table(record: dict) -> list[list[str]]:
    """Head and rows: for each base the mean over seeds, and its standard error, of every column."""
    head = ["arm"] + [f"{base}: {column}" for base in bases(record) for column in COLUMNS]
    return [head] + [[arm, *(cell(by_base.get(base), column) for base in bases(record) for column in COLUMNS)]
                     for arm, by_base in rows_of(record).items()]


def cell(row: dict | None, column: str) -> str:
    if row is None:
        return ""
    error = row[f"{column}_error"]
    return f"{row[column]:.3f}" + (f" ± {error:.3f}" if error else "")


def conditions(record: dict) -> str:
    c = record["conditions"]
    right = ", ".join(f"{found['replay']} {found['right']:.1%}" for found in c["replay"] if found["base"] == bases(record)[0])
    times = f"{c['seeds']} seed{'s' * (c['seeds'] > 1)}"
    return (
        f"Exact match of greedy answers to {c['items']['general']:,} general and {c['items']['domain']} domain items of each seed, none of "
        f"which can be met in training but for facts; forgotten: share of the base's right general answers that are wrong now. Means of "
        f"{times}{' ± standard error' if c['seeds'] > 1 else ''}: a seed draws domain rows, items, order and adapter, one pool serves all. "
        f"{c['domain']} domain rows, {c['steps']} steps of {c['tokens']} tokens for every arm, {c['ratio']:.0%} of the rows replay, LoRA "
        f"of rank 16 unless full. Right answers in the sets chosen from the pool of {bases(record)[0]}: {right}. "
        f"{c['seconds'] / 60:.0f} minutes with {c['workers']} workers of one thread. `{record['command']}`, {record['time'][:10]}, commit "
        f"{(record['commit'] or 'none')[:8]}{' with changes' if record['dirty'] else ''}.")


# ---------------------------------------------------------------- picture


def picture(record: dict, figure) -> None:
    """General and domain accuracy of every arm; general accuracy over replay share, and over unique rows, where they were measured."""
    figure.clear()
    arms = rows_of(record)
    if not points(record) or not any(row["arm"] in points(record) for row in record["summary"]):
        figure.set_size_inches(8, 1.2 + 0.3 * len(arms))
        return bars(figure.subplots(), record, arms)
    figure.set_size_inches(11, 1.2 + 0.3 * len(arms))
    grid = figure.add_gridspec(2, 2, width_ratios=(3, 2))
    bars(figure.add_subplot(grid[:, 0]), record, arms)
    rows = {row["arm"]: row for row in record["summary"] if row["base"] == bases(record)[0]}
    c = record["conditions"]
    full = {"share": c["ratio"] * 100, "unique": next(found["rows"] for found in c["replay"] if found["replay"] == "plus")}
    for place, (name, label) in enumerate((("share", "replay, % of the rows"), ("unique", "unique replay rows"))):
        scale = 100 if name == "share" else 1
        found = [(value * scale, rows[arm]) for arm, value in c["curves"][name].items()] + [(full[name], rows["plus"])]
        curve(figure.add_subplot(grid[place, 1]), found, label, logarithmic=name == "unique")


def bars(axes, record: dict, arms: dict[str, dict[str, dict]]) -> None:
    """A dot for each base's general accuracy, a ring for its accuracy on the domain; a dotted line for what each base began with."""
    for base, colour, lift in zip(bases(record), COLOURS, (0.13, -0.13)):
        for place, by_base in enumerate(reversed(arms.values())):
            if row := by_base.get(base):
                error = row["general_error"] or 0
                axes.errorbar(row["general"], place + lift, xerr=error, fmt="o", color=colour, markersize=5, clip_on=False)
                if row["arm"] != BASE:
                    axes.plot(row["domain"], place + lift, "o", color=colour, markersize=5, markerfacecolor="white", clip_on=False)
        axes.axvline(arms[BASE][base]["general"], color=colour, linestyle=":", linewidth=1)
        axes.plot([], [], "o", color=colour, label=f"{base}: general")
        axes.plot([], [], "o", color=colour, markerfacecolor="white", label=f"{base}: domain")
    axes.set_yticks(range(len(arms)), list(reversed(arms)))
    axes.set(xlim=(0, 1), xlabel="accuracy")
    axes.grid(axis="y", color="#eeeeee")
    axes.set_axisbelow(True)
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.4, 1), ncols=2 * len(bases(record)), fontsize="small",
                handletextpad=0.2, columnspacing=1)
    plain(axes)


def curve(axes, found: Sequence[tuple[float, dict]], label: str, logarithmic: bool) -> None:
    for column, face in (("general", COLOURS[0]), ("domain", "white")):
        axes.errorbar([at for at, _ in found], [row[column] for _, row in found], yerr=[row[f"{column}_error"] or 0 for _, row in found],
                      fmt="o-", color=COLOURS[0], markerfacecolor=face, label=column, clip_on=False)
    if logarithmic:
        axes.set_xscale("log")
        axes.set_xticks([at for at, _ in found], [f"{at:,.0f}" for at, _ in found])
        axes.minorticks_off()
    axes.set(xlabel=label, ylim=(0, 1.02), ylabel="accuracy")
    axes.legend(frameon=False, loc="lower right")
    plain(axes)


def plain(axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
