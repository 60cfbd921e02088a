"""Drawing charts as SVG text: scales, axes, bars, lines, points. Colours are CSS variables of the page around them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

COLOURS = tuple(f"var(--c{index})" for index in range(8))
"""Series colours, in order."""


@dataclass(frozen=True)
class Scale:
    """Maps values to pixels: linear, or logarithmic if `log`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the pixel of a value; values outside are put at the nearer end."""
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        at = math.log10(max(value, self.low)) if self.log else value
        share = (at - low) / (high - low) if high > low else 0.5
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """Return round values inside the scale."""
        if self.log:
            return log_ticks(self.low, self.high)
        return nice_ticks(self.low, self.high, count)


@dataclass
class Chart:
    """A chart in the making: a canvas with margins, to which marks are added.

    Attributes:
        width: Of the canvas.
        height: Of the canvas.
        label: What screen readers say.
        left: Margin.
        right: Margin.
        top: Margin.
        bottom: Margin.
    """

    width: int
    height: int
    label: str
    left: int = 56
    right: int = 14
    top: int = 12
    bottom: int = 38
    parts: list[str] = field(default_factory=list)

    def x(self, low: float, high: float, log: bool = False) -> Scale:
        """Return a horizontal scale over the area inside the margins."""
        return Scale(low, high, self.left, self.width - self.right, log)

    def y(self, low: float, high: float, log: bool = False) -> Scale:
        """Return a vertical scale; it grows upwards."""
        return Scale(low, high, self.height - self.bottom, self.top, log)

    def add(self, tag: str, title: str = "", text: str = "", **attributes: object) -> None:
        """Add an element; underscores in attribute names become hyphens; `title` shows when pointed at."""
        written = "".join(f' {name.rstrip("_").replace("_", "-")}="{_value(v)}"' for name, v in attributes.items())
        inside = (f"<title>{escape(title)}</title>" if title else "") + escape(text)
        self.parts.append(f"<{tag}{written}>{inside}</{tag}>" if inside else f"<{tag}{written}/>")

    def text(self, x: float, y: float, text: str, anchor: str = "start", kind: str = "label") -> None:
        """Write a word."""
        self.add("text", text=text, x=x, y=y, text_anchor=anchor, class_=kind)

    def axes(
        self, x: Scale, y: Scale, x_label: str, y_label: str, show: Callable[[float], str] = lambda v: f"{v:g}"
    ) -> None:
        """Draw grid lines, tick labels and both axes' names."""
        floor = self.height - self.bottom
        for value in y.ticks():
            at = y(value)
            self.add("line", x1=self.left, x2=self.width - self.right, y1=at, y2=at, class_="grid")
            self.text(self.left - 6, at + 4, show(value), "end")
        for value in x.ticks(8):
            self.text(x(value), floor + 16, f"{value:g}", "middle")
        self.add("line", x1=self.left, x2=self.width - self.right, y1=floor, y2=floor, class_="axis")
        self.text((self.left + self.width - self.right) / 2, self.height - 4, x_label, "middle", "name")
        self.add(
            "text", text=y_label, x=0, y=0, text_anchor="middle", class_="name",
            transform=f"translate(12 {(self.top + floor) / 2:.0f}) rotate(-90)",
        )  # fmt: skip

    def line(self, points: Sequence[tuple[float, float]], colour: str, dashed: bool = False) -> None:
        """Draw a line through pixel positions."""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dash = {"stroke_dasharray": "4 3"} if dashed else {}
        self.add("polyline", points=path, fill="none", stroke=colour, stroke_width=1.6, **dash)

    def svg(self) -> str:
        """Return the element."""
        box = f'viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escape(self.label, quote=True)}"'
        return f'<svg xmlns="http://www.w3.org/2000/svg" {box}>{"".join(self.parts)}</svg>'


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """Return about `count` round values between two numbers: multiples of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return powers of ten between two numbers, and 2 and 5 times them where there are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1,) if len(powers) > 4 else (1, 2, 5)
    values = [factor * 10.0**power for power in powers for factor in factors]
    return [value for value in values if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]


def _value(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else escape(str(value), quote=True)
