"""What a model of any size costs: bytes by counting, hours by counting operations at the rate of a measured run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compressor.calibration.stats import LANES

STATISTIC = 4
"""Bytes of a number of a statistic, and of a hidden state."""

CORRELATED = "gptq"
"""The method that is counted beside `rtn`: it needs the second moment of every input."""

WORKSPACE = 5
"""Matrices `[in, in]` that are in memory beside a second moment while it is factored."""


@dataclass(frozen=True)
class Matrix:
    """Weights `[rows, columns]` of one block.

    Attributes:
        rows: Outputs.
        columns: Inputs.
        copies: How many there are, each reading another tensor: the experts of a mixture.
        shared: Matrices of these columns that read the same tensor, this one included.
        chosen: Share of tokens that pass through one of them.
    """

    rows: int
    columns: int
    copies: int = 1
    shared: int = 1
    chosen: float = 1.0

    @property
    def weights(self) -> int:
        """Weights of all copies."""
        return self.rows * self.columns * self.copies


@dataclass(frozen=True)
class Model:
    """A model as far as its cost goes: blocks that are all alike.

    Attributes:
        name: What it is.
        blocks: How many.
        hidden: Width of the residual stream.
        outside: Weights outside the blocks.
        matrices: Those of one block.
    """

    name: str
    blocks: int
    hidden: int
    outside: int
    matrices: tuple[Matrix, ...]

    @property
    def weights(self) -> int:
        """Weights of one block."""
        return sum(matrix.weights for matrix in self.matrices)

    @property
    def statistics(self) -> int:
        """Bytes of one total of the second moments of a block."""
        return STATISTIC * round(sum(m.columns**2 * m.copies / m.shared for m in self.matrices))


def llama(name: str, hidden: int, intermediate: int, key_rows: int, blocks: int, vocab: int = 32_000) -> Model:
    """Return a Llama; `key_rows` is the width of all keys of a token."""
    attention = (
        Matrix(hidden, hidden, shared=3),
        Matrix(key_rows, hidden, shared=3),
        Matrix(key_rows, hidden, shared=3),
        Matrix(hidden, hidden),
    )
    gate = Matrix(intermediate, hidden, shared=2)
    return Model(name, blocks, hidden, 2 * vocab * hidden, (*attention, gate, gate, Matrix(hidden, intermediate)))


def deepseek(name: str = "671B mixture of experts") -> Model:
    """Return DeepSeek-V3 with all blocks counted as mixtures (three of its 61 are dense)."""
    gate = Matrix(2048, 7168, copies=256, shared=2, chosen=8 / 256)
    down = Matrix(7168, 2048, copies=256, chosen=8 / 256)
    one = (Matrix(2048, 7168, shared=2), Matrix(2048, 7168, shared=2), Matrix(7168, 2048))  # the shared expert
    attention = (
        *(Matrix(1536, 7168, shared=2), Matrix(576, 7168, shared=2), Matrix(24_576, 1536), Matrix(32_768, 512)),
        Matrix(7168, 16_384),
    )
    return Model(name, 61, 7168, 2 * 129_280 * 7168, (gate, gate, down, *one, *attention))


MODELS = (
    llama("7B Llama", 4096, 11_008, 4096, 32),
    llama("70B Llama", 8192, 28_672, 1024, 80),
    deepseek(),
)


def operations(model: Model, tokens: int) -> float:
    """Return the operations of `gptq` on one block.

    Two passes of the samples, the second moments (of which three fifths are computed), a Cholesky factor and its
    inverse for each, the updates of columns not yet rounded, and two products for the error.
    """
    total = 0.0
    for m in model.matrices:
        seen = tokens * m.chosen
        own = 4.0 * seen * m.rows * m.columns + 5.0 * m.rows * m.columns**2
        total += m.copies * (own + (1.2 * seen * m.columns**2 + 4 / 3 * m.columns**3) / m.shared)
    return total


def memory(model: Model, processes: int, statistics: bool) -> float:
    """Return the bytes of tensors in one process: a block in float32 and as stored, and what `gptq` adds."""
    total = 6.0 * model.weights
    if statistics:
        # The totals it keeps; beside them the open lane while samples pass, or one matrix while it is factored.
        widest = max(m.columns for m in model.matrices)
        total += model.statistics / processes + max(model.statistics, WORKSPACE * STATISTIC * widest**2)
    return total


def least_memory(model: Model) -> float | None:
    """Return the bytes of tensors that `gptq` needs with one expert at a time; None for models without experts."""
    experts = [m for m in model.matrices if m.copies > 1]
    if not experts:
        return None
    others = [m for m in model.matrices if m.copies == 1]
    weights = sum(m.rows * m.columns for m in (*others, *experts))
    # Total and open lane; those of experts and those of the others are never there together.
    sums = (2 * STATISTIC * sum(m.columns**2 / m.shared for m in some) for some in (others, experts))
    solver = WORKSPACE * STATISTIC * max(max(m.rows, m.columns) * m.columns for m in model.matrices)
    return max(6.0 * weights + max(sums) + solver, 6.0 * model.outside)


def hidden_states(model: Model, tokens: int, streams: int = 1) -> int:
    """Return the bytes of hidden states on disk: those that enter a block and those that leave it."""
    return 2 * streams * tokens * model.hidden * STATISTIC


def network(model: Model, tokens: int, processes: int, bits: float = 4.25) -> float:
    """Return the bytes that pass between processes, or between them and a shared disk, per block of `gptq`.

    Lanes to the processes that keep the totals, packed weights to all, hidden states out and in twice, and the block's
    own weights to every process.
    """
    away = (processes - 1) / processes
    lanes = LANES * model.statistics * away
    packed = model.weights * bits / 8 * (processes - 1)
    states = 3.0 * tokens * model.hidden * STATISTIC
    return lanes + packed + states + 2.0 * model.weights * processes


def predict(results: Sequence[Mapping[str, Any]], tokens: int = 128 * 2048, bits: float = 4.25) -> str:
    """Return a Markdown table of what models cost in one process; times need a measured run of each method.

    Args:
        results: Measured runs of the first of `MODELS`, by method in their command.
        tokens: Calibration tokens.
        bits: Stored bits of a weight.
    """
    by_method = {method: _find(results, method) for method in ("rtn", CORRELATED)}
    memories, disk = ("RAM `rtn`", "RAM `gptq`", "at least"), ("source on disk", "result", "hidden states")
    head = ("model", *memories, *disk, "`rtn`", "`gptq`")
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for model in MODELS:
        all_weights = model.weights * model.blocks
        cells = [
            model.name,
            _gb(memory(model, 1, statistics=False)),
            _gb(memory(model, 1, statistics=True)),
            "" if (least := least_memory(model)) is None else _gb(least),
            _gb(2.0 * (all_weights + model.outside)),
            _gb(bits / 8 * all_weights + 2.0 * model.outside),
            _gb(hidden_states(model, tokens)),
            *(_hours(seconds_of(model, method, run, tokens)) for method, run in by_method.items()),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def predict_shared(sizes: Sequence[int], tokens: int = 128 * 2048) -> str:
    """Return a Markdown table of what several processes need each, and send each other, for `gptq`."""
    head = ("model", "processes", "RAM of each", "sent per block", "statistics of it", "packed weights of it")
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for model in MODELS[1:]:
        for size in sizes:
            lanes = LANES * model.statistics * (size - 1) / size
            packed = model.weights * 4.25 / 8 * (size - 1)
            cells = (
                *(model.name, str(size), _gb(memory(model, size, statistics=True))),
                *(_gb(value) for value in (network(model, tokens, size), lanes, packed)),
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def seconds_of(model: Model, method: str, run: Mapping[str, Any] | None, tokens: int) -> float | None:
    """Return the processor seconds of a whole model from those of a measured run; None without one."""
    if run is None:
        return None
    measured = MODELS[0]
    blocks = len(run["units"]) - 1
    per_block = run["cpu_seconds"] / blocks
    if method == "rtn":
        return float(per_block * model.weights / measured.weights * model.blocks)
    return float(per_block * operations(model, tokens) / operations(measured, run["tokens"]) * model.blocks)


def _find(results: Sequence[Mapping[str, Any]], method: str) -> Mapping[str, Any] | None:
    return next((run for run in results if f"--method {method} " in run["command"]), None)


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:,.0f} GB" if nbytes >= 9.95e9 else f"{nbytes / 1e9:.1f} GB"


def _hours(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds / 3600:,.1f} h" if seconds < 100 * 3600 else f"{seconds / 86400:,.0f} days"
