"""Methods by the names users type.

Add one: a file with the class, its `.md` page, a line here, and a test class that derives from
`compressor.testing.MethodConformance`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from compressor.errors import RecipeError, did_you_mean

if TYPE_CHECKING:
    from compressor.methods.base import Method

METHODS: dict[str, str] = {
    "adaround": "compressor.methods.adaround:AdaRound",
    "awq": "compressor.methods.awq:AWQ",
    "eaquant": "compressor.methods.eaquant:EAQuant",
    "flexround": "compressor.methods.flexround:FlexRound",
    "fp4": "compressor.methods.fp4:FP4",
    "gptq": "compressor.methods.gptq:GPTQ",
    "nupes": "compressor.methods.nupes:Nupes",
    "outliertune": "compressor.methods.outliertune:OutlierTune",
    "rtn": "compressor.methods.rtn:RTN",
    "smoothquant": "compressor.methods.smoothquant:SmoothQuant",
}

SUMMARIES: dict[str, str] = {
    "adaround": "AdaRound: learn for each weight whether it rounds up or down, block by block; integers",
    "awq": "AWQ: scale loud input channels up before rounding, inverse folded into the operation before",
    "eaquant": "EAQuant: rotate inputs, smooth over experts, keep the router's choices; experts in 4 bits and below",
    "flexround": "FlexRound: learn each weight's rounding and the grid, block by block",
    "fp4": "LLM-FP4: search the scales that minimise each layer's output error; 4-bit floats",
    "gptq": "GPTQ: round input by input, moving each error onto the weights still to come",
    "nupes": "NUPES: grids of powers, exponent and codes learned block by block, or the exponent searched without data",
    "outliertune": "OutlierTune: inputs in integers, their static scales per channel moved into the weights",
    "rtn": "round to nearest on a min-max or clipped grid; no data, seconds, the baseline",
    "smoothquant": "SmoothQuant: move outliers of inputs into the weights, then round to nearest",
}


def method_class(name: str) -> Any:
    """Return the class of a method; importing it is what makes torch load.

    Raises:
        RecipeError: Unknown name.
    """
    if name not in METHODS:
        raise did_you_mean("method", name, METHODS)
    module, _, attribute = METHODS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def get_method(name: str, options: Mapping[str, Any]) -> Method:
    """Build a method with validated options.

    Raises:
        RecipeError: Unknown name, unknown option, or a value out of range.
    """
    return build(name, method_class(name), options)


def build(name: str, cls: Any, options: Mapping[str, Any]) -> Method:
    """Build a method from its class and options that are still to be validated.

    Raises:
        RecipeError: Unknown option, or a value out of range.
    """
    from pydantic import ValidationError

    known = sorted(cls.Options.model_fields)
    for option in options:
        if option not in known:
            if not known:
                raise RecipeError(f"method {name} has no options, but got {option!r}")
            raise did_you_mean(f"option of {name}", option, known)
    try:
        method: Method = cls(cls.Options(**options))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        what = f"option {where} of {name}" if where else f"options of {name}"
        listing = "methods" if name in METHODS else "pruners"
        problem = first["msg"].removeprefix("Value error, ")
        raise RecipeError(f"{what}: {problem}", f"see: compress list {listing} {name}") from error
    return method
