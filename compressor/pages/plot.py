"""An SVG of divergence over bits: a mark for every measured row, the best ones joined and named.

Colours are those of Okabe and Ito (2008), which people with any colour vision tell apart; shape and filling carry what
colour does not. The paper is part of the picture, so that it reads the same on a white and on a dark page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 960, 560
LEFT, RIGHT, TOP, BOTTOM = 76, 232, 56, 58
RADIUS = 5.0
GAP = 10.5
"""Pixels between the centres of marks that stand side by side because they would cover each other."""

LINE = 16
"""Pixels between lines of text."""

TICK = 0.5
"""Bits between lines across."""

EMPTY = 1.5
"""Bits without a mark that the axis leaves out."""

BREAK = 36
"""Pixels in place of what it leaves out."""

KL_TICKS = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003)
INK, NOTE, GRID, PAPER = "#1b2540", "#4a5578", "#dfe4ee", "#ffffff"

Shape = Literal["circle", "square", "diamond"]


@dataclass(frozen=True)
class Mark:
    """One measured row.

    Attributes:
        name: Shown when pointed at, and beside it if it is on the frontier.
        bits: Per weight.
        kl: Nats per token, above zero.
        series: Which entry of the key it belongs to.
        shape: Of what grid the weights are.
        hollow: Made by another tool.
    """

    name: str
    bits: float
    kl: float
    series: str
    shape: Shape
    hollow: bool = False


def frontier(marks: Sequence[Mark]) -> list[Mark]:
    """Return the marks that no other beats in both bits and divergence, by rising bits."""
    best: list[Mark] = []
    for mark in sorted(marks, key=lambda one: (one.bits, one.kl)):
        if not best or mark.kl < best[-1].kl:
            best.append(mark)
    return best


def draw(marks: Sequence[Mark], colours: dict[str, str], title: str, shapes: dict[Shape, str], ours: str) -> str:
    """Return the picture.

    Args:
        marks: At least one.
        colours: Series -> colour, in the order of the key.
        title: Heading, and what a reader who cannot see the picture is told.
        shapes: Shape -> what it stands for.
        ours: Note of the key on filled and hollow marks.
    """
    axes = _Axes.around(marks)
    best = frontier(marks)
    summary = "; ".join(f"{mark.name}: {mark.bits:g} bits, KL {mark.kl:g}" for mark in best)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="t d" '
        'font-family="system-ui, sans-serif" font-size="13">',
        f'<title id="t">{escape(title)}</title>',
        f'<desc id="d">{escape("The best for every size: " + summary)}</desc>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="{PAPER}"/>',
        _text(LEFT, 30, title, size=16, weight=600),
        *_grid(axes),
    ]
    path = " ".join(f"{axes.x(mark.bits):.1f},{axes.y(mark.kl):.1f}" for mark in best)
    out.append(f'<polyline points="{path}" fill="none" stroke="{NOTE}" stroke-width="1.5" stroke-dasharray="5 4"/>')
    for mark, across in _side_by_side(marks, axes):
        symbol = _symbol(mark.shape, across, axes.y(mark.kl), colours[mark.series], mark.hollow)
        out.append(f"<g><title>{escape(f'{mark.name}: {mark.bits:g} bits, KL {mark.kl:g}')}</title>{symbol}</g>")
    out += _labels(best, axes)
    out += _key(colours, {mark.series for mark in marks}, shapes, {mark.shape for mark in marks}, ours)
    return "\n".join([*out, "</svg>"]) + "\n"


@dataclass(frozen=True)
class _Axes:
    """Bits, and logarithms of divergence, to pixels.

    Attributes:
        pieces: From where to where the axis of bits goes, gaps left out.
        kl: From where to where the other one goes.
    """

    pieces: tuple[tuple[float, float], ...]
    kl: tuple[float, float]

    @classmethod
    def around(cls, marks: Sequence[Mark]) -> _Axes:
        bits, kl = sorted({mark.bits for mark in marks}), [mark.kl for mark in marks]
        cuts = [i for i in range(1, len(bits)) if bits[i] - bits[i - 1] > EMPTY]
        ends = zip([0, *cuts], [*cuts, len(bits)], strict=True)
        pieces = tuple((bits[first] - 0.3, bits[last - 1] + 0.3) for first, last in ends)
        return cls(pieces, (min(kl) / 1.6, max(kl) * 1.5))

    def x(self, bits: float) -> float:
        breaks = BREAK * (len(self.pieces) - 1)
        scale = (WIDTH - LEFT - RIGHT - breaks) / sum(high - low for low, high in self.pieces)
        x = float(LEFT)
        for low, high in self.pieces:
            if bits <= high:
                return x + scale * (bits - low)
            x += scale * (high - low) + BREAK
        return x - BREAK

    def y(self, kl: float) -> float:
        low, high = self.kl
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * math.log(kl / low) / math.log(high / low)

    def ticks(self) -> list[float]:
        """Return the bits that are written below the axis."""
        counts = [range(math.ceil(low / TICK), math.floor(high / TICK) + 1) for low, high in self.pieces]
        return [count * TICK for piece in counts for count in piece]


def _grid(axes: _Axes) -> list[str]:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    out = []
    for kl in KL_TICKS:
        if axes.kl[0] <= kl <= axes.kl[1]:
            y = axes.y(kl)
            out.append(f'<path d="M{LEFT} {y:.1f}H{right}" stroke="{GRID}"/>')
            out.append(_text(LEFT - 8, y + 4, f"{kl:g}", anchor="end", colour=NOTE))
    for bits in axes.ticks():
        x = axes.x(bits)
        out.append(f'<path d="M{x:.1f} {TOP}V{bottom}" stroke="{GRID}"/>')
        out.append(_text(x, bottom + 20, f"{bits:g}", anchor="middle", colour=NOTE))
    for _, high in axes.pieces[:-1]:
        x = axes.x(high) + BREAK / 2
        out.append(f'<rect x="{x - 5:.1f}" y="{TOP}" width="10" height="{bottom - TOP}" fill="{PAPER}"/>')
        for side in (-4, 4):
            out.append(f'<path d="M{x + side - 3:.1f} {bottom + 6}l6 -12" stroke="{NOTE}"/>')
    middle = (TOP + bottom) / 2
    out.append(_text((LEFT + right) / 2, HEIGHT - 14, "bits per weight, scales included", anchor="middle"))
    turned = f' transform="rotate(-90 20 {middle:.0f})"'
    out.append(_text(20, middle, "KL to the original, nats per token", anchor="middle", more=turned))
    return out


def _side_by_side(marks: Sequence[Mark], axes: _Axes) -> list[tuple[Mark, float]]:
    """Return every mark with its place across, moved a little where it would cover one that is there already."""
    placed: list[tuple[Mark, float]] = []
    for mark in sorted(marks, key=lambda one: (one.bits, one.kl, one.name)):
        home, y = axes.x(mark.bits), axes.y(mark.kl)
        taken = [across for other, across in placed if abs(axes.y(other.kl) - y) < 2 * RADIUS]
        steps = (0.0, *(sign * step * GAP for step in range(1, 6) for sign in (1, -1)))
        across = next((home + s for s in steps if all(abs(home + s - other) > 2 * RADIUS for other in taken)), home)
        placed.append((mark, across))
    return placed


def _labels(best: Sequence[Mark], axes: _Axes) -> list[str]:
    """Name the frontier below and to the left of it, where no mark can be; the line does not go through names."""
    halo = f' stroke="{PAPER}" stroke-width="5" stroke-linejoin="round" paint-order="stroke"'
    out, lowest = [], -math.inf
    for mark in best:
        y = lowest = max(axes.y(mark.kl) + LINE + 2, lowest + LINE)
        x = axes.x(mark.bits) - 4
        fits = x - 7 * len(mark.name) > LEFT
        out.append(_text(x if fits else LEFT + 4, y, mark.name, anchor="end" if fits else "start", more=halo))
    return out


def _key(colours: dict[str, str], used: set[str], shapes: dict[Shape, str], drawn: set[Shape], ours: str) -> list[str]:
    x, y = WIDTH - RIGHT + 28, TOP + 12
    out = []
    for name, colour in colours.items():
        if name in used:
            out += [_symbol("circle", x, y - 4, colour, False), _text(x + 16, y, name)]
            y += LINE + 4
    y += LINE
    for shape, meaning in shapes.items():
        if shape in drawn:
            out += [_symbol(shape, x, y - 4, NOTE, False), _text(x + 16, y, meaning)]
            y += LINE + 4
    y += LINE
    out += [_symbol("circle", x, y - 4, NOTE, True), _text(x + 16, y, ours)]
    y += LINE + 4
    dashes = f'<path d="M{x - 8} {y - 4}H{x + 8}" stroke="{NOTE}" stroke-width="1.5" stroke-dasharray="5 4"/>'
    return [*out, dashes, _text(x + 16, y, "best at every size")]


def _symbol(shape: Shape, x: float, y: float, colour: str, hollow: bool) -> str:
    look = f'fill="{PAPER if hollow else colour}" stroke="{colour}" stroke-width="2"'
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{RADIUS - 1:g}" {look}/>'
    half = RADIUS - 1.2
    if shape == "square":
        return f'<rect x="{x - half:.1f}" y="{y - half:.1f}" width="{2 * half:g}" height="{2 * half:g}" {look}/>'
    reach = RADIUS + 0.3
    return f'<path d="M{x:.1f} {y - reach:.1f}l{reach} {reach}l-{reach} {reach}l-{reach} -{reach}z" {look}/>'


def _text(
    x: float,
    y: float,
    text: str,
    *,
    anchor: str = "start",
    colour: str = INK,
    size: int = 13,
    weight: int = 400,
    more: str = "",
) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}"'
    look = (f' font-size="{size}"' if size != 13 else "") + (f' font-weight="{weight}"' if weight != 400 else "")
    return f"<text {place}{look}{more}>{escape(text)}</text>"
