"""What each method looks at and which grids it takes, readable without loading torch.

The classes decide; a test holds this table to them.
"""

from __future__ import annotations

from dataclasses import dataclass

FAMILIES: dict[str, str] = {
    "int": "2-8",
    "nvfp4": "4",
    "mxfp4": "4",
    "llm-fp4": "4-8",
    "power": "2-8",
    "fp8": "8",
}
"""Family of formats -> bits of its codes; `llm-fp4` are LLM-FP4's own floats, `fp8` those with a fixed split."""

_SCALABLE = ("int", "nvfp4", "mxfp4", "llm-fp4", "power")


@dataclass(frozen=True)
class Facts:
    """What a method needs and serves with its default options.

    Attributes:
        scope: How much it must see at once: `layer`, `group` (layers that runtimes fuse) or `block`.
        data: Calibration data it needs: `text`, `none`, or `text or none` where options decide.
        families: Families of formats it serves, keys of `FAMILIES`.
    """

    scope: str
    data: str
    families: tuple[str, ...]

    @property
    def bits(self) -> str:
        """Range of bits over its families, e.g. `2-8`."""
        ends = [int(end) for family in self.families for end in FAMILIES[family].split("-")]
        return str(min(ends)) if min(ends) == max(ends) else f"{min(ends)}-{max(ends)}"


FACTS: dict[str, Facts] = {
    "adaround": Facts("block", "text", ("int",)),
    "awq": Facts("layer", "text", _SCALABLE),
    "eaquant": Facts("group", "text", ("int",)),
    "flexround": Facts("block", "text", _SCALABLE),
    "fp4": Facts("group", "text", ("nvfp4", "mxfp4", "llm-fp4")),
    "gptq": Facts("group", "text", _SCALABLE),
    "nupes": Facts("block", "text or none", ("power",)),
    "outliertune": Facts("layer", "text", ("int",)),
    "rtn": Facts("layer", "none", tuple(FAMILIES)),
    "smoothquant": Facts("layer", "text", tuple(FAMILIES)),
}


def family(name: str) -> str:
    """Return the family of a format by its name, a key of `FAMILIES`."""
    for start in ("int", "power", "nvfp4", "mxfp4"):
        if name.startswith(start):
            return start
    return "fp8" if name in ("mxfp8", "fp8") or name.startswith(("fp8-tensor", "fp8-block")) else "llm-fp4"
