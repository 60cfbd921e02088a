"""What every method states about itself, checked whatever its scope."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pydantic import ValidationError

from compressor.errors import RecipeError
from compressor.formats import get_format, parse_group_size
from compressor.formats.base import QuantFormat
from compressor.methods import METHODS, SUMMARIES, get_method, method_class
from compressor.methods.base import Method, MethodOptions, Scope, Stream
from compressor.testing.formats import describe


class StatedMethod:
    """Checks of name, registry, page and options; the suites of each scope derive from it.

    Attributes:
        method: The method, with the options to test.
        formats: Formats it claims to serve: names, or formats of your own.
        registered: Set to False for a method that is not in `compressor.methods.METHODS`.
    """

    method: ClassVar[Any] = None
    formats: ClassVar[tuple[str | QuantFormat, ...]] = ()
    registered: ClassVar[bool] = True
    fmt: ClassVar[Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__name__.endswith("Conformance"):  # a suite, not yet the test of a method
            return
        assert cls.formats, f"{cls.__name__}.formats is empty: nothing would be tested"
        assert cls.method is not None, f"{cls.__name__}.method is not set"

        @pytest.fixture(params=resolved(cls.formats), ids=describe)
        def fmt(self: StatedMethod, request: pytest.FixtureRequest) -> Any:
            return request.param

        cls.fmt = fmt

    def test_it_says_what_it_is(self) -> None:
        """Name, summary, scope, stream and statistics are stated and agree with each other."""
        assert isinstance(self.method, Method), "a member of the Method protocol is missing"
        assert self.method.name, "the name is empty"
        assert self.method.summary, "the summary is empty"
        assert issubclass(self.method.Options, MethodOptions)
        decide = {Scope.LAYER: "solve", Scope.GROUP: "solve_group", Scope.BLOCK: "solve_block"}.get(self.method.scope)
        assert decide, f"the suite cannot test scope {self.method.scope}"
        assert callable(getattr(self.method, decide, None)), f"{self.method.scope} needs {decide}()"
        for fmt in resolved(self.formats):
            if self.method.scope is Scope.BLOCK:
                assert self.method.stream is Stream.BOTH, "block methods get both streams"
            else:
                free = not self.method.stats(fmt)
                assert free == (self.method.stream is Stream.NONE), f"{self.method.stream} does not fit its statistics"

    def test_it_is_registered(self) -> None:
        """The registry finds this class under its name and lists the summary the class states."""
        if not self.registered:
            pytest.skip("a method outside the registry")
        name = self.method.name
        assert name in METHODS
        assert method_class(name) is type(self.method)
        assert SUMMARIES[name] == self.method.summary
        assert type(get_method(name, {})) is type(self.method), "it cannot be built with its defaults"

    def test_its_page_names_every_option(self) -> None:
        """Beside the module lies a page of the same name that mentions each option in backquotes."""
        page = Path(inspect.getfile(type(self.method))).with_suffix(".md")
        assert page.is_file(), f"{page.name} is missing"
        text = page.read_text(encoding="utf-8")
        for option, info in self.method.Options.model_fields.items():
            assert info.description, f"option {option} has no description"
            assert f"`{option}`" in text, f"{page.name} does not mention `{option}`"

    def test_unknown_options_are_rejected(self) -> None:
        """An option nobody knows is an error, not ignored."""
        with pytest.raises(ValidationError):
            self.method.Options(no_such_option=1)
        if self.registered:
            with pytest.raises(RecipeError, match="no_such_option"):
                get_method(self.method.name, {"no_such_option": 1})


def resolved(formats: Sequence[str | QuantFormat]) -> list[QuantFormat]:
    """Build named formats with their default group size and bf16 scales."""
    return [get_format(f, parse_group_size(f, None), torch.bfloat16) if isinstance(f, str) else f for f in formats]
