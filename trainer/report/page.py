"""Draw plots in a light and a dark theme, format numbers, and render HTML pages that share one style.

A page is one file that opens without a network: its style sheet and images are embedded. A template extends `page.html.jinja` and fills
the blocks `header` and `main`; `figure(plot)` there shows a plot in the reader's theme.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from trainer.errors import printable

SHELL = Path(__file__).parent
WIDTH = 4.2  # inches of 100 CSS pixels: shown at 1.2 times that on a desk, at 0.8 on a phone, legible on both
DPI = 240  # two image pixels per CSS pixel on a desk


@dataclass(frozen=True)
class Theme:
    """Colours of plots; those of `page.html.jinja` are the same."""

    paper: str
    ink: str
    muted: str
    line: str
    series: tuple[str, ...]


LIGHT = Theme("#ffffff", "#1b2330", "#667085", "#e6e3dc", ("#1f5f8b", "#d0762b", "#4c9a78", "#8a6bb1"))
DARK = Theme("#191e26", "#e6e9ee", "#98a2b3", "#2c333e", ("#6cb0e0", "#eba261", "#7cc7a2", "#b79bdc"))


@dataclass(frozen=True)
class Plot:
    """A plot in both themes, as PNG."""

    name: str
    title: str
    caption: str
    light: bytes = field(repr=False)
    dark: bytes = field(repr=False)


def plot(name: str, title: str, caption: str, draw: Callable[[Axes, Theme], None], height: float = 2.6) -> Plot:
    """Draw a plot in each theme by `draw(axes, theme)`; `height` is in inches of 100 CSS pixels."""
    return Plot(name, title, caption, *(_png(draw, theme, height) for theme in (LIGHT, DARK)))


def _png(draw: Callable[[Axes, Theme], None], theme: Theme, height: float) -> bytes:
    style = {
        "font.size": 10, "axes.labelsize": 9.5, "legend.fontsize": 9.5, "xtick.labelsize": 9, "ytick.labelsize": 9,
        "figure.facecolor": theme.paper, "axes.facecolor": theme.paper, "text.color": theme.ink,
        "axes.labelcolor": theme.muted, "xtick.color": theme.line, "ytick.color": theme.line,
        "xtick.labelcolor": theme.muted, "ytick.labelcolor": theme.muted, "axes.edgecolor": theme.line,
        "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "ytick.major.size": 0,
        "axes.grid": True, "axes.grid.axis": "y", "grid.color": theme.line, "grid.linewidth": 0.8,
        "axes.axisbelow": True, "text.parse_math": False,  # names may have dollar signs
         "axes.formatter.useoffset": False,
        "lines.linewidth": 1.6, "lines.markersize": 4.5, "lines.solid_capstyle": "round",
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
        axes = figure.subplots()
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        draw(axes, theme)
        image = io.BytesIO()
        figure.savefig(image, format="png")
    return image.getvalue()


def legend(axes: Axes) -> None:
    """Add a legend above the axes, where it hides no data."""
    place = dict(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=4)
    axes.legend(**place, frameon=False, handlelength=1.2, columnspacing=1.4)


def compact_axis(axis) -> None:
    """Format an axis's ticks as 3.5k and 2M."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))


def write(path: Path, template: Path, plots: list[Plot], **values) -> None:
    """Render `template` into the page `path`, and write each plot's light image beside it as NAME.png."""
    for drawn in plots:
        path.with_name(f"{drawn.name}.png").write_bytes(drawn.light)
    path.write_text(render(template, plots={drawn.name: drawn for drawn in plots}, **values), encoding="utf-8")


def render(template: Path, **values) -> str:
    """Return the page that a template of the shell gives."""
    loader = jinja2.FileSystemLoader([template.parent, SHELL])
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "number": number, "compact": compact, "percent": percent, "duration": duration, "data_uri": _data_uri,
        "visible": printable,
    }
    return environment.get_template(template.name).render(**values)


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def number(value) -> str:
    """Format a number as 12,345 or 1.518, and anything else as a dash."""
    if not _is_number(value):
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def compact(value) -> str:
    """Format a number as 950, 3.12k, 7.15M or 1.2B."""
    if not _is_number(value):
        return "–"
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:  # what three digits round up to it
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def percent(value) -> str:
    """Format a share of 1 as 12.3%."""
    return f"{100 * value:.1f}%" if _is_number(value) else "–"


def duration(seconds) -> str:
    """Format seconds as 4.2 s, 12 min 4 s or 3 h 5 min."""
    if not _is_number(seconds):
        return "–"
    if seconds < 59.5:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
