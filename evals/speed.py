"""How fast models read a prompt and generate, and what they hold in memory, each in a fresh process of its own.

`python -m compressor.evals.speed` is such a process: settings as one JSON line in, then one line per round, and one
JSON line out for each. Rounds of two models alternate, so that whatever else the machine does meets both.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import compressor.errors
from compressor.checkpoint.config import quiet
from compressor.errors import CompressorError, ResourceError, UnsupportedError, VerificationError
from compressor.process import peak_rss
from compressor.runtime import execution_path, load

WARM_UP_TOKENS = 4


@dataclass(frozen=True)
class SpeedSettings:
    """What is run.

    Attributes:
        prompt_tokens: Tokens of the prompt, random ones that depend on the seed alone.
        new_tokens: Tokens generated after it, one at a time, always the most likely one.
        batch: Prompts at once.
        dtype: `float32`, `bfloat16` or `float16`.
        device: `cpu`, `cuda`, ...
        repeats: Rounds that count; one more comes first and does not.
        threads: Processor threads; None leaves them to PyTorch.
        seed: Of the prompt.
        trust_remote_code: Run model code that comes with the checkpoints.
    """

    prompt_tokens: int = 512
    new_tokens: int = 64
    batch: int = 1
    dtype: str = "bfloat16"
    device: str = "cpu"
    repeats: int = 5
    threads: int | None = None
    seed: int = 0
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Spread:
    """Tokens per second over all rounds."""

    median: float
    slowest: float
    fastest: float

    @classmethod
    def of(cls, tokens: int, seconds: Sequence[float]) -> Spread:
        """Return the spread of rounds that all did `tokens`."""
        return cls(tokens / statistics.median(seconds), tokens / max(seconds), tokens / min(seconds))


@dataclass(frozen=True)
class Speed:
    """One model.

    Attributes:
        folder: Its checkpoint.
        prompt: Prompt tokens read per second.
        decode: Tokens generated per second.
        prompt_path: What computes its linear layers with a prompt, as `runtime.execution_path` says it.
        decode_path: The same while generating.
        weight_bytes: Parameters and buffers.
        load_seconds: Wall time of loading.
        rss_before: Resident memory of its process before loading, in bytes: libraries.
        rss_loaded: After loading.
        rss_peak: The most at any time, loading included.
        cuda_peak: The most memory allocated on the GPU while running, in bytes; None without one.
        threads: Processor threads it used.
    """

    folder: str
    prompt: Spread
    decode: Spread
    prompt_path: str
    decode_path: str
    weight_bytes: int
    load_seconds: float
    rss_before: int
    rss_loaded: int
    rss_peak: int
    cuda_peak: int | None
    threads: int

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def measure_speed(
    folders: Sequence[Path], settings: SpeedSettings, progress: Callable[[str], None] = lambda text: None
) -> list[Speed]:
    """Measure models next to each other; they are in memory at the same time.

    Raises:
        UnsupportedError: A model does not generate text with a cache of keys and values.
        ResourceError: A process was killed, which is what running out of memory looks like.
        CompressorError: Whatever loading raises.
    """
    with contextlib.ExitStack() as stack:
        workers = []
        for folder in folders:
            progress(f"loading {folder.name}")
            workers.append(stack.enter_context(_Worker(folder, settings)))
        rounds: list[list[dict[str, float]]] = [[] for _ in workers]
        for turn in range(settings.repeats):
            progress(f"round {turn + 1} of {settings.repeats}")
            order = range(len(workers)) if turn % 2 == 0 else reversed(range(len(workers)))
            for index in order:
                rounds[index].append(workers[index].ask("round"))
        return [worker.result(found) for worker, found in zip(workers, rounds, strict=True)]


class _Worker:
    """A process that holds one model."""

    def __init__(self, folder: Path, settings: SpeedSettings) -> None:
        self.folder, self.settings = folder, settings
        self.loaded: dict[str, Any] = {}

    def __enter__(self) -> _Worker:
        # Not from the working directory: a file there must not stand in for a library.
        environment = {**os.environ, "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "compressor.evals.speed"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            text=True,
        )
        try:
            self.loaded = self.ask(json.dumps({"folder": str(self.folder), **asdict(self.settings)}))
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def ask(self, line: str) -> dict[str, Any]:
        """Send one line and return the answer; its errors are raised here."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it died; the empty answer says so
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        text = self._process.stdout.readline()
        if not text:
            code = self._process.wait()
            if code < 0:
                raise ResourceError(
                    f"{self.folder}: the measuring process was killed (signal {-code})", "is there memory for it?"
                )
            raise VerificationError(f"{self.folder}: the measuring process ended with code {code}", "run it again")
        answer: dict[str, Any] = json.loads(text)
        if "error" in answer:
            raise getattr(compressor.errors, answer["error"])(answer["message"], answer["hint"])
        return answer

    def result(self, rounds: Sequence[dict[str, float]]) -> Speed:
        """Return the model's result once all rounds are done."""
        settings = self.settings
        memory = self.ask("memory")
        prompt = Spread.of(settings.batch * settings.prompt_tokens, [found["prompt"] for found in rounds])
        decode = Spread.of(settings.batch * settings.new_tokens, [found["decode"] for found in rounds])
        return Speed(folder=str(self.folder), prompt=prompt, decode=decode, **self.loaded, **memory)


def run_round(model: PreTrainedModel, ids: Tensor, new_tokens: int) -> dict[str, float]:
    """Return the seconds of reading the prompt `ids` `[batch, tokens]`, and of generating after it.

    Raises:
        UnsupportedError: The model has no cache of keys and values.
    """
    call: Any = model
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    with torch.inference_mode():
        started = _now(ids.device)
        out = call(input_ids=ids, use_cache=True, **last)
        token = out.logits[:, -1:].argmax(-1)
        read = _now(ids.device)
        cache = getattr(out, "past_key_values", None)
        if cache is None:
            raise UnsupportedError(
                f"{type(model).__name__} keeps no keys and values between tokens", "only decoders with such a cache"
            )
        for _ in range(new_tokens):
            out = call(input_ids=token, past_key_values=cache, use_cache=True)
            cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
        return {"prompt": read - started, "decode": _now(ids.device) - read}


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters and buffers, shared ones once."""
    tensors = (*model.parameters(), *model.buffers())
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _serve() -> None:
    """Load the model named by the first line, then answer line by line until the input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever libraries print must not meet the answers

    def answer(data: dict[str, Any]) -> None:
        answers.write(json.dumps(data) + "\n")
        answers.flush()

    try:
        fields = json.loads(sys.stdin.readline())
        folder, settings = Path(fields.pop("folder")), SpeedSettings(**fields)
        model, ids, facts = _prepare(folder, settings)
        answer(facts)
        for line in sys.stdin:
            if line.strip() == "memory":
                peak = torch.cuda.max_memory_allocated(ids.device) if ids.is_cuda else None
                answer({"rss_peak": peak_rss(), "cuda_peak": peak})
            else:
                answer(run_round(model, ids, settings.new_tokens))
    except CompressorError as error:
        answer({"error": type(error).__name__, "message": error.message, "hint": error.hint})
    except torch.OutOfMemoryError as error:
        message = str(error).splitlines()[0]
        answer({"error": "ResourceError", "message": message, "hint": "try a smaller --batch or --prompt-tokens"})


def _prepare(folder: Path, settings: SpeedSettings) -> tuple[PreTrainedModel, Tensor, dict[str, Any]]:
    """Load and warm up a model; return it, its prompt, and what is known of it."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    process = psutil.Process()
    device, before = torch.device(settings.device), process.memory_info().rss
    started = time.perf_counter()
    with quiet():
        dtype = getattr(torch, settings.dtype)
        model = load(folder, dtype=dtype, device=device, trust_remote_code=settings.trust_remote_code)
    seconds = time.perf_counter() - started
    gc.collect()
    loaded = process.memory_info().rss
    if not model.can_generate():
        raise UnsupportedError(
            f"{folder}: {type(model).__name__} does not generate text", "use a causal language model"
        )
    generator = torch.Generator().manual_seed(settings.seed)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (settings.batch, settings.prompt_tokens), generator=generator).to(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    run_round(model, ids, min(WARM_UP_TOKENS, settings.new_tokens))
    facts = {
        "prompt_path": execution_path(model, settings.batch * settings.prompt_tokens),
        "decode_path": execution_path(model, settings.batch),
        "weight_bytes": weight_bytes(model),
        "load_seconds": seconds,
        "rss_before": before,
        "rss_loaded": loaded,
        "threads": torch.get_num_threads(),
    }
    return model, ids, facts


if __name__ == "__main__":
    _serve()
