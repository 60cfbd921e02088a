"""Running a talkative library as if it were not there: no output, no warnings, no trace in anybody's random state."""

from __future__ import annotations

import contextlib
import io
import logging
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import TextIO

import datasets  # type: ignore[import-untyped]
import numpy as np
import torch

from compressor.checkpoint.config import quiet
from compressor.report import Progress, Silent


@contextlib.contextmanager
def silenced() -> Iterator[TextIO]:
    """Keep lm-eval and the datasets library from writing anything; yields the stderr that is replaced meanwhile."""
    outside = sys.stderr
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield outside
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            if bars:
                datasets.enable_progress_bars()


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed every global generator on the CPU, and put the caller's state back afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def outside_of(progress: Progress, stderr: TextIO) -> Progress:
    """Let progress through to the real stderr while it is redirected."""

    class Through(Silent):
        def stage(self, name: str) -> None:
            _with_stderr(progress.stage, name)

        def event(self, text: str) -> None:
            _with_stderr(progress.event, text)

    def _with_stderr(call: Callable[[str], None], text: str) -> None:
        with contextlib.redirect_stderr(stderr):
            call(text)

    return Through()
