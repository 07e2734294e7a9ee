"""Colours and axes of all figures, and the conversion of a figure to PNG bytes.

Figures are ``matplotlib.figure.Figure`` objects drawn by the Agg canvas; pyplot and its global state are not
used. One inch is 96 CSS pixels, and a figure has two image pixels per CSS pixel.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CSS_DPI = 96
PIXELS_PER_CSS_PIXEL = 2
WIDE, HALF = 11.3, 5.4  # inches: a figure as wide as the page, and one of two side by side
COLOURS = ("#2b6cb0", "#d2602a", "#14866d", "#8153a6", "#b8860b", "#b83280", "#4a5568", "#0e7490")
INK, SOFT, FAINT, DATA = "#1f2933", "#5f6b7a", "#d5dae1", "#9aa5b1"

Array = NDArray[Any]


@final
@dataclass(frozen=True)
class Picture:
    """An image of the page.

    Attributes:
        png: the PNG file.
        width: width in CSS pixels; a narrow screen reduces it.
        alt: a description for readers who cannot see the image.
        caption: what the image shows and how to read it.
        pixelated: whether a browser enlarges it by nearest neighbour.
    """

    png: bytes
    width: int
    alt: str
    caption: str = ""
    pixelated: bool = False

    @property
    def address(self) -> str:
        """The image as a ``data:`` URL."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode("ascii")


def model_colours(names: Sequence[str]) -> dict[str, str]:
    """One colour per model, the same in every figure."""
    return {name: COLOURS[k % len(COLOURS)] for k, name in enumerate(names)}


def panels(rows: int, columns: int, width: float, height: float, *, sharex: bool = False) -> tuple[Figure, Array]:
    """Make a figure of ``width`` by ``height`` inches; return it with its axes ``(rows, columns)``."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(wspace=0.03), facecolor="white")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=sharex)
    return figure, axes


def tidy(ax: Axes, *, title: str = "", x: str = "", y: str = "", grid: bool = True) -> None:
    """Style axes with scales: two spines, small ticks, a light grid, a title and axis labels."""
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(DATA)
        ax.spines[side].set_linewidth(0.8)
    ax.tick_params(which="both", labelsize=8.5, colors=SOFT, length=3, width=0.8)
    ax.tick_params(which="minor", length=0)
    if grid:
        ax.grid(True, color="#edf0f3", linewidth=0.8)
        ax.set_axisbelow(True)
    if title:
        ax.set_title(escape_formulas(title), fontsize=9.5, color=INK, loc="left")
    ax.set_xlabel(x, fontsize=9, color=SOFT)
    ax.set_ylabel(y, fontsize=9, color=SOFT)


def bare(ax: Axes, *, title: str = "", colour: str = INK, second: str = "", side: str = "") -> None:
    """Style axes without scales: a thin frame, ``title`` above left, ``second`` above right, ``side`` at the left."""
    ax.set_xticks([])
    ax.set_yticks([])
    ax.set_ylabel(escape_formulas(side), fontsize=10, color=colour)
    for spine in ax.spines.values():
        spine.set_color(FAINT)
        spine.set_linewidth(0.8)
    if title:
        ax.set_title(escape_formulas(title), fontsize=9, color=colour, loc="left", pad=4)
    if second:
        ax.set_title(escape_formulas(second), fontsize=8.5, color=SOFT, loc="right", pad=4)


def escape_formulas(text: str) -> str:
    """Escape dollar signs, which matplotlib would read as formulas.

    >>> escape_formulas("a$b")
    'a\\\\$b'
    """
    return text.replace("$", r"\$")


def call_axis(ax: Axes, calls: Sequence[int]) -> None:
    """Make the x axis logarithmic, with ticks at the measured numbers of network calls."""
    from matplotlib.ticker import NullLocator

    ax.set_xscale("log")
    ticks = sorted(set(calls))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticks(_apart(ticks), [str(tick) for tick in _apart(ticks)])
    ax.set_xlim(ticks[0] / 1.35, ticks[-1] * 1.35)


def log_height(ax: Axes, low: float, high: float) -> None:
    """Make the y axis logarithmic with limits about ``low … high``, with ticks at 1, 2, 5 over few decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    ax.set_yscale("log")
    low, high = low / (high / low) ** 0.06 / 1.05, high * (high / low) ** 0.06 * 1.05
    ax.set_ylim(low, high)
    ax.yaxis.set_minor_locator(NullLocator())
    if high / low < 60:
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 12 else (1.0, 3.0)))
    ax.yaxis.set_major_formatter(FuncFormatter(_power_or_number))


def _power_or_number(value: float, _: int) -> str:
    """Format a tick: ``0.02``, ``5``, ``200``; as powers of ten below 0.001 and from 10 000."""
    if 0.001 <= value < 10_000:
        return f"{value:g}"
    exponent = math.floor(math.log10(value) + 1e-9)
    factor = value / 10**exponent
    return f"$10^{{{exponent}}}$" if abs(factor - 1) < 0.01 else f"${factor:.0f}\\cdot10^{{{exponent}}}$"


def _apart(ticks: Sequence[int]) -> list[int]:
    """Leave out ticks whose numbers would overlap with the one before."""
    kept: list[int] = []
    for tick in ticks:
        if not kept or tick / kept[-1] > max(1.25, (ticks[-1] / ticks[0]) ** 0.06):
            kept.append(tick)
    return kept


def halo() -> list[Any]:
    """Path effects that draw a white outline around text, so that it is readable on lines."""
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=3, foreground="white")]


def label_ends(ax: Axes, labels: Sequence[tuple[float, str, str]], gap: float = 0.075) -> None:
    """Write labels ``(y, text, colour)`` at the right of the axes, moved apart where they would overlap.

    It must be called after the limits of the axes are set.

    Args:
        ax: the axes.
        labels: height in data units, text and colour of every label.
        gap: smallest distance between labels, as a share of the axes' height.
    """
    places = [
        (float(ax.transAxes.inverted().transform(ax.transData.transform((1.0, y)))[1]), text, colour)
        for y, text, colour in labels
    ]
    places.sort(key=lambda place: place[0])
    heights = spread([min(max(place[0], 0.0), 1.0) for place in places], gap)
    for (_, text, colour), height in zip(places, heights, strict=True):
        ax.text(1.015, height, escape_formulas(text), transform=ax.transAxes, va="center", fontsize=8.5, color=colour)


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Move ascending heights until neighbours are ``gap`` apart; the mean of each group that moves is kept.

    >>> spread([0.5, 0.5, 0.9], 0.25)
    [0.375, 0.625, 0.9]
    """
    groups: list[tuple[float, list[float]]] = []
    for height in heights:
        members = [height]
        while groups and _bottom(members, gap) - groups[-1][0] < gap:
            members = [*groups.pop()[1], *members]
        groups.append((_bottom(members, gap) + gap * (len(members) - 1), members))
    return [_bottom(members, gap) + gap * k for _, members in groups for k in range(len(members))]


def _bottom(members: Sequence[float], gap: float) -> float:
    """The lowest height of a group that is ``gap`` apart and has the mean of its members."""
    return sum(members) / len(members) - gap * (len(members) - 1) / 2


def picture(figure: Figure, alt: str, caption: str = "") -> Picture:
    """Render a figure to a PNG with a palette of 256 colours.

    Args:
        figure: the figure.
        alt: a description for readers who cannot see it.
        caption: what it shows and how to read it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(CSS_DPI * PIXELS_PER_CSS_PIXEL)
    figure.draw_without_rendering()  # the constrained layout needs two passes
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
    palette = image.quantize(256, dither=Image.Dither.NONE)
    return Picture(png_bytes(palette), image.width // PIXELS_PER_CSS_PIXEL, alt, caption)


def png_bytes(image: Any) -> bytes:
    """The bytes of a PNG file with a Pillow image."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
