"""Line charts as SVG: panels in a grid under one legend. Pure; equal input gives equal bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

# Okabe and Ito's colours, which people who see no red or no green tell apart; the first is the darkest.
COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a8a8a", "#9a6a00")
WIDTH, HEIGHT = 300, 190  # of a panel, pixels
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 26, 38  # of a panel's frame
TICKS = 5  # about so many on an axis
LEGEND_ROW = 20


@dataclass(frozen=True, slots=True)
class Line:
    """`points` are (x, y) in order of x. Lines of one name have one colour over all panels, and one legend entry."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Panel:
    """`y_range` and `x_range` None: what the lines need. `log_x` leaves out what is not above 0."""

    title: str
    lines: Sequence[Line]
    x_label: str = ""
    y_label: str = ""
    log_x: bool = False
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None


def svg(panels: Sequence[Panel], columns: int, *, legend: bool = True) -> str:
    """The whole picture."""
    names = list(dict.fromkeys(line.name for panel in panels for line in panel.lines))
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names)}
    columns = min(columns, len(panels))
    width = columns * WIDTH
    head, top = _legend(colours, width) if legend else ([], 0)
    rows = -(-len(panels) // columns)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {top + rows * HEIGHT}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{top + rows * HEIGHT}" fill="#ffffff"/>',
        *head,
    ]
    for index, panel in enumerate(panels):
        x, y = index % columns * WIDTH, top + index // columns * HEIGHT
        parts.append(f'<g transform="translate({x} {y})">')
        parts += _panel(panel, colours)
        parts.append("</g>")
    return "\n".join((*parts, "</svg>")) + "\n"


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high`, about TICKS of them."""
    rough = (high - low) / TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    return [step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _legend(colours: dict[str, str], width: int) -> tuple[list[str], int]:
    parts, x, y = [], 10, 15
    for name, colour in colours.items():
        long = 34 + 7 * len(name)
        if x + long > width and x > 10:
            x, y = 10, y + LEGEND_ROW
        parts.append(f'<path d="M{x} {y - 4}h18" stroke="{colour}" stroke-width="2.5"/>')
        parts.append(f'<text x="{x + 23}" y="{y}">{escape(name)}</text>')
        x += long
    return parts, y + 10


def _panel(panel: Panel, colours: dict[str, str]) -> list[str]:
    points = [point for line in panel.lines for point in line.points if not panel.log_x or point[0] > 0]
    x_low, x_high = panel.x_range or _span([x for x, _ in points])
    y_low, y_high = panel.y_range or _span([0.0, *(y for _, y in points)])
    across, down = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def place_x(value: float) -> float:
        if panel.log_x:
            return LEFT + across * math.log(value / x_low) / math.log(x_high / x_low)
        return LEFT + across * (value - x_low) / (x_high - x_low)

    def place_y(value: float) -> float:
        return TOP + down * (1 - (value - y_low) / (y_high - y_low))

    parts = [f'<text x="{LEFT}" y="{TOP - 8}" font-weight="bold">{escape(panel.title)}</text>']
    for value in ticks(y_low, y_high):
        y = place_y(value)
        parts.append(f'<path d="M{LEFT} {y:.1f}h{across}" stroke="#dddddd"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{_number(value)}</text>')
    for value in _decades(x_low, x_high) if panel.log_x else ticks(x_low, x_high):
        x = place_x(value)
        parts.append(f'<path d="M{x:.1f} {TOP}v{down}" stroke="#eeeeee"/>')
        parts.append(f'<text x="{x:.1f}" y="{TOP + down + 14}" text-anchor="middle">{_number(value)}</text>')
    parts.append(f'<rect x="{LEFT}" y="{TOP}" width="{across}" height="{down}" fill="none" stroke="#999999"/>')
    if panel.x_label:
        x, y = LEFT + across / 2, TOP + down + 29
        parts.append(f'<text x="{x:.1f}" y="{y}" text-anchor="middle">{escape(panel.x_label)}</text>')
    if panel.y_label:
        y = TOP + down / 2
        turned = f'transform="rotate(-90 12 {y:.1f})"'
        parts.append(f'<text x="12" y="{y:.1f}" text-anchor="middle" {turned}>{escape(panel.y_label)}</text>')
    for line in panel.lines:
        shown = [
            f"{place_x(min(max(x, x_low), x_high)):.1f},{place_y(min(max(y, y_low), y_high)):.1f}"
            for x, y in line.points
            if not panel.log_x or x > 0
        ]
        if shown:
            colour = colours[line.name]
            parts.append(f'<polyline points="{" ".join(shown)}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
    return parts


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values, default=0.0), max(values, default=1.0)
    return (low, high) if high > low else (low, low + 1.0)


def _decades(low: float, high: float) -> list[float]:
    return [10.0**power for power in range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)]


def _number(value: float) -> str:
    return f"{value:.6g}"
