"""Finding the folds of a model: where a factor per channel can move from what produces it into what reads it.

Nothing here knows a model class. `dataflow.py` shows which operations lie between two modules, `probing.py` which
modules are norms and what their gain is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from types import SimpleNamespace

from torch import nn

from compressor.checkpoint.blocks import BlockSequence
from compressor.checkpoint.dataflow import DataFlow, Route
from compressor.checkpoint.probing import gate_is_linear, norm_offset
from compressor.plan import Fold, FoldKind, Kind, LayerPlan, Where

NOTHING_IN_FRONT = "its inputs do not come channel by channel from a norm or a linear layer of its block"


@dataclass(frozen=True)
class Found:
    """The folds of a model.

    Attributes:
        folds: In the order their producers run.
        unfolded: Compressed tensor -> why it is in no fold.
        norms: Compressed tensor in no fold -> the norm whose output it reads, where nothing else happens to that output
            than being read by such layers and added to something.
    """

    folds: tuple[Fold, ...]
    unfolded: dict[str, str]
    norms: dict[str, str] = field(default_factory=dict)


def find_folds(blocks: BlockSequence, layers: Iterable[LayerPlan], kinds: Collection[FoldKind]) -> Found:
    """Find the folds of these kinds, each compressed layer in at most one of them.

    Args:
        blocks: The model, on the meta device.
        layers: The fate of every tensor.
        kinds: Which folds are wanted.

    Raises:
        UnsupportedError: The model's forward cannot run on the meta device.
    """
    search = _Search(blocks, list(layers), kinds)
    for name in search.flow.outputs:
        block = blocks.index_of(name)
        if block is not None:
            search.try_module(name, block)
    search.try_experts()
    if FoldKind.EXPERTS in kinds:
        search.try_mixtures()
    return search.result()


@dataclass
class _Search:
    """One search; collects folds and, for layers that get none, the best reason met."""

    blocks: BlockSequence
    layers: list[LayerPlan]
    kinds: Collection[FoldKind]
    folds: list[Fold] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        model = self.blocks.model
        self.flow = DataFlow.of(self.blocks)
        # A subclass may do more in its forward than multiply.
        self.linears = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
        }
        self.whole = {layer.ref.param: layer for layer in self.layers if layer.ref.where == Where()}
        self.owners: dict[int, int] = {}
        for _, param in model.named_parameters(remove_duplicate=False):
            self.owners[id(param)] = self.owners.get(id(param), 0) + 1
        self.taken: set[str] = set()

    def result(self) -> Found:
        """Return what was found."""
        unfolded = {
            layer.ref.name: self.reasons.get(layer.ref.name, NOTHING_IN_FRONT)
            for layer in self.layers
            if layer.format and layer.ref.name not in self.taken
        }
        return Found(tuple(self.folds), unfolded, self._norms(unfolded))

    def _norms(self, unfolded: Collection[str]) -> dict[str, str]:
        """Return the norms in front of layers that are in no fold; see `Found.norms`."""
        out: dict[str, str] = {}
        for name, outputs in self.flow.outputs.items():
            module = self.blocks.model.get_submodule(name)
            weight = getattr(module, "weight", None)
            if name in self.linears or not isinstance(weight, nn.Parameter) or weight.ndim != 1 or len(outputs) != 1:
                continue
            entries = [
                self.whole.get(f"{reader}.weight") for reader in self.flow.added_and_read(outputs[0], self.linears)
            ]
            readers = [entry.ref.name for entry in entries if entry is not None]
            # A reader that stays dense reads the same tensor as it is, and does so still.
            if norm_offset(module) is not None:
                out |= dict.fromkeys((reader for reader in readers if reader in unfolded), name)
        return out

    def try_module(self, name: str, block: int) -> None:
        """Add the fold that starts at a module, if there is one; else remember why for the layers it feeds."""
        module = self.blocks.model.get_submodule(name)
        is_linear = name in self.linears
        if not is_linear and (list(module.children()) or not isinstance(getattr(module, "weight", None), nn.Parameter)):
            return
        outputs = self.flow.outputs[name]
        if not outputs or outputs[0].ndim == 0 or f"{name}.weight" not in self.whole:
            return
        route = self.flow.follow(outputs[0], self.linears)
        kind = FoldKind.NORM if not is_linear else _kind(route)
        reason = route.obstacle or self._refusal(name, module, kind, block, route)
        if reason is None:
            self._add(self._fold(name, module, kind, block, route))
            return
        for reader in route.readers:
            entry = self.whole.get(f"{reader}.weight")
            if entry is not None:
                self.reasons.setdefault(entry.ref.name, self._without_prefix(f"{name}: {reason}"))

    def try_experts(self) -> None:
        """Add a fold from every expert's up projection into its down projection, where the gate lets factors pass."""
        halves: dict[tuple[str, int | None], dict[str, LayerPlan]] = {}
        for layer in self.layers:
            if layer.ref.kind is Kind.EXPERT and layer.ref.where.expert is not None and layer.format:
                stack = layer.ref.owner
                role = str(layer.ref.role)
                halves.setdefault((stack, layer.ref.where.expert), {})[role] = layer
                if role != "down":
                    self.reasons[layer.ref.name] = "the router reads the same inputs and stays dense"
        passes: dict[str, bool] = {}
        for (stack, _), parts in halves.items():
            if "down" not in parts:
                continue
            if stack not in passes:
                passes[stack] = gate_is_linear(self.blocks.model.get_submodule(stack))
            down = parts["down"]
            if FoldKind.PRODUCT not in self.kinds:
                self.reasons[down.ref.name] = f"this method does not move factors past {_WORDS[FoldKind.PRODUCT]}"
            elif not passes[stack]:
                self.reasons[down.ref.name] = "the experts' gate is not linear in what up_proj gives"
            elif "up" not in parts:
                self.reasons[down.ref.name] = "the up projection of its expert stays dense"
            else:
                up = parts["up"].ref
                assert up.matrix is not None
                readers = (down.ref.name,)
                self._add(Fold(up.module, FoldKind.PRODUCT, up.block, up.name, None, readers, up.matrix[0]))

    def try_mixtures(self) -> None:
        """Add a fold from every norm that feeds a mixture of experts, if all that reads it can take factors."""
        trace = self.blocks.trace()
        for stack in trace.experts:
            block = self.blocks.index_of(stack)
            beside = [name for name, read in trace.reads.items() if read == trace.reads.get(stack) and name != stack]
            norm = self._norm_before(stack)
            if block is None or norm is None:
                continue
            module = self.blocks.model.get_submodule(norm)
            route = self._route_into(norm, stack, beside)
            experts = [layer for layer in self.layers if layer.ref.owner == stack and layer.ref.role in ("gate", "up")]
            readers = [self.whole[f"{name}.weight"] for name in beside if f"{name}.weight" in self.whole]
            reason = route.obstacle
            if reason is None and not (experts and all(layer.format for layer in experts)):
                reason = "not all of its experts are compressed"
            if reason is None and len(readers) < len(beside):
                reason = "something reads it whose weight is not on disk"
            if reason is None and any(self.owners[id(p)] > 1 for p in module.parameters(recurse=False)):
                reason = "its parameters are shared with another module"
            if reason is None and norm_offset(module) is None:
                reason = f"{type(module).__name__} does not multiply each channel by a weight of its own"
            if reason is not None:
                for layer in experts:
                    self.reasons[layer.ref.name] = self._without_prefix(f"{norm}: {reason}")
                continue
            self._add(self._mixture(norm, module, block, experts, readers))

    def _norm_before(self, stack: str) -> str | None:
        """Return the module whose output a stack reads, if it is one with a weight per channel."""
        for name, outputs in self.flow.outputs.items():
            module = self.blocks.model.get_submodule(name)
            weight = getattr(module, "weight", None)
            if not isinstance(weight, nn.Parameter) or weight.ndim != 1 or not outputs or outputs[0].ndim == 0:
                continue
            if stack in self.flow.follow(outputs[0], self.linears, (stack,)).readers:
                return name
        return None

    def _route_into(self, norm: str, stack: str, beside: Iterable[str]) -> Route:
        """Follow a norm's output into a stack and all that reads beside it, routers included."""
        width = self.flow.outputs[norm][0].shape[-1]
        products = {name: SimpleNamespace(in_features=width) for name in beside}
        return self.flow.follow(self.flow.outputs[norm][0], {**self.linears, **products}, (stack,))

    def _mixture(
        self, norm: str, module: nn.Module, block: int, experts: list[LayerPlan], readers: list[LayerPlan]
    ) -> Fold:
        scaled, bias = self.whole[f"{norm}.weight"], self.whole.get(f"{norm}.bias")
        dense = [layer for layer in readers if not layer.format]
        short = [name for name in (*(layer.ref.param for layer in dense),) if self._is_short(name)]
        short += [bias.ref.param] if bias is not None and self._is_short(bias.ref.param) else []
        return Fold(
            name=norm,
            kind=FoldKind.EXPERTS,
            block=block,
            scaled=scaled.ref.name,
            bias=None if bias is None else bias.ref.name,
            readers=tuple(layer.ref.name for layer in (*experts, *(r for r in readers if r.format))),
            channels=scaled.ref.shape[0],
            offset=norm_offset(module) or 0.0,
            powers_of_two=bool(short),
            dense=tuple(layer.ref.name for layer in dense),
        )

    def _refusal(self, name: str, module: nn.Module, kind: FoldKind, block: int, route: Route) -> str | None:
        """Return why the channels of a module may not be divided although their way is free, or None."""
        if not route.readers:
            return "no compressed layer reads it"
        if kind not in self.kinds:
            return f"this method does not move factors past {_WORDS[kind]}"
        if self.flow.calls[name] != 1:
            return f"runs {self.flow.calls[name]} times in one pass"
        if any(self.owners[id(param)] > 1 for param in module.parameters(recurse=False)):
            return "its parameters are shared with another module"
        entries = [self.whole.get(f"{reader}.weight") for reader in route.readers]
        for reader, entry in zip(route.readers, entries, strict=True):
            if entry is None or not entry.format:
                return f"{reader} reads it too and stays dense"
            if entry.ref.block != block:
                return f"{reader} reads it in another block"
            if entry.ref.name in self.taken:
                return f"{reader} is scaled by something else already"
        if len({entry.ref.fed_by for entry in entries if entry}) != 1:
            return "its readers read copies of it, whose statistics are apart"
        if kind is FoldKind.NORM:
            offset = norm_offset(module)
            if offset is None:
                return f"{type(module).__name__} does not multiply each channel by a weight of its own"
            if offset and f"{name}.bias" in self.whole and self._is_short(f"{name}.bias"):
                return f"a gain of {offset:g} + weight and a bias cannot both be divided exactly in few bits"
        return None

    def _fold(self, name: str, module: nn.Module, kind: FoldKind, block: int, route: Route) -> Fold:
        scaled, bias = self.whole[f"{name}.weight"], self.whole.get(f"{name}.bias")
        readers = tuple(self.whole[f"{reader}.weight"].ref.name for reader in route.readers)
        # One tensor in few bits can be divided by factors computed from its rounded values; two, or a matrix, cannot.
        short_matrix = kind is not FoldKind.NORM and not scaled.format and self._is_short(scaled.ref.param)
        short_bias = bias is not None and self._is_short(bias.ref.param)
        offset = norm_offset(module) if kind is FoldKind.NORM else 0.0
        assert offset is not None
        return Fold(
            name=name,
            kind=kind,
            block=block,
            scaled=scaled.ref.name,
            bias=None if bias is None else bias.ref.name,
            readers=readers,
            channels=scaled.ref.shape[0],
            offset=offset,
            powers_of_two=short_matrix or short_bias,
            shifted=self._shifted(kind, bias, route),
        )

    def _shifted(self, kind: FoldKind, bias: LayerPlan | None, route: Route) -> tuple[str, ...]:
        """Return the readers' biases if a shift can move from the norm's bias into them without being rounded."""
        entries = [self.whole.get(f"{reader}.bias") for reader in route.readers]
        if kind is not FoldKind.NORM or bias is None or self._is_short(bias.ref.param):
            return ()
        names = [entry.ref.name for entry in entries if entry and not self._is_short(entry.ref.param)]
        return tuple(names) if len(names) == len(entries) else ()

    def _add(self, fold: Fold) -> None:
        self.folds.append(fold)
        self.taken.update(fold.readers)

    def _is_short(self, param: str) -> bool:
        """Return whether a tensor is stored in fewer than 32 bits."""
        return self.whole[param].ref.dtype not in ("F32", "F64")

    def _without_prefix(self, text: str) -> str:
        """Return a text with names as they are inside a block, so that equal blocks give equal texts."""
        for name in self.blocks.names:
            if name:
                text = text.replace(f"{name}.", "")
        return text


_WORDS = {
    FoldKind.NORM: "norms",
    FoldKind.EXPERTS: "norms into mixtures of experts",
    FoldKind.PRODUCT: "products and activations",
    FoldKind.VALUE: "attention",
}


def _kind(route: Route) -> FoldKind:
    """Return what lies between two linear layers."""
    attention = any(op in ("bmm", "matmul") or op.startswith("_scaled_dot_product") for op in route.passed)
    return FoldKind.VALUE if attention else FoldKind.PRODUCT
