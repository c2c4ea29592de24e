"""Draws what missing an SLO costs: the score's factor 1 - penalty against the violation, for some shapes.

    python benchmarks/slo_curve.py [docs/images/slo-penalty.svg]

The points come from `search_spaces.slos.Slo.penalty`, which scores use. Without a path it prints the SVG.
"""

from __future__ import annotations

import sys
from pathlib import Path

from search_spaces.slos import Slo

SHAPES = ((1.0, 1.0, "#1f77b4"), (1.0, 0.3, "#d62728"), (0.2, 0.3, "#2ca02c"), (0.5, 2.0, "#9467bd"))
"""Weight, steepness and colour."""
LEFT, TOP, WIDTH, HEIGHT = 60, 20, 420, 260
POINTS = 140
MOST = 1.4
"""Largest violation drawn."""


def x_of(violation: float) -> float:
    """Horizontal position of a violation."""
    return LEFT + WIDTH * violation / MOST


def y_of(factor: float) -> float:
    """Vertical position of a factor."""
    return TOP + HEIGHT * (1 - factor)


def curve(weight: float, steepness: float, colour: str) -> str:
    """One shape as a line."""
    slo = Slo(metric="ttft_p95_ms", threshold=1.0, hard=False, weight=weight, steepness=steepness)
    steps = [MOST * index / POINTS for index in range(POINTS + 1)]
    points = " ".join(f"{x_of(v):.1f},{y_of(1 - slo.penalty(1 + v)):.1f}" for v in steps)
    return f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'


def text(x: float, y: float, content: str, *, anchor: str = "middle", colour: str = "#333") -> str:
    """A label."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{content}</text>'


def axes() -> list[str]:
    """Frame, ticks and titles."""
    parts = [f'<rect x="{LEFT}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#999"/>']
    for percent in range(0, 141, 20):
        x = x_of(percent / 100)
        parts += [f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{TOP + HEIGHT}" stroke="#eee"/>']
        parts += [text(x, TOP + HEIGHT + 16, f"{percent}%")]
    for tenth in range(0, 11, 2):
        y = y_of(tenth / 10)
        parts += [f'<line x1="{LEFT}" y1="{y:.1f}" x2="{LEFT + WIDTH}" y2="{y:.1f}" stroke="#eee"/>']
        parts += [text(LEFT - 8, y + 4, f"{tenth / 10:.1f}", anchor="end")]
    parts.append(text(LEFT + WIDTH / 2, TOP + HEIGHT + 36, "violation: (actual - threshold) / threshold"))
    parts.append(f'<g transform="translate(16 {TOP + HEIGHT / 2}) rotate(-90)">{text(0, 0, "score factor")}</g>')
    return parts


def picture() -> str:
    """The whole drawing."""
    head = '<svg xmlns="http://www.w3.org/2000/svg" width="720" height="330" font-family="sans-serif" font-size="12">'
    parts = [head, '<rect width="720" height="330" fill="white"/>', *axes()]
    for row, (weight, steepness, colour) in enumerate(SHAPES):
        parts.append(curve(weight, steepness, colour))
        label = f"weight {weight:g}, steepness {steepness:g}"
        parts.append(text(LEFT + WIDTH + 20, TOP + 20 + 22 * row, label, anchor="start", colour=colour))
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    """Write or print the drawing."""
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(picture(), encoding="utf-8")
    else:
        print(picture())


if __name__ == "__main__":
    main()
