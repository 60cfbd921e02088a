"""The steps of a recipe by name. A new one is a class with the protocol of `Step`, and a line here."""

from __future__ import annotations

from compressor.ship.compressing import Prune, Quantize
from compressor.ship.measuring import Evaluate, Gate, Push

STEPS: dict[str, type[Quantize] | type[Evaluate] | type[Gate] | type[Push]] = {
    "prune": Prune,
    "quantize": Quantize,
    "eval": Evaluate,
    "gate": Gate,
    "push": Push,
}
"""Steps by name, in the order they usually come."""
