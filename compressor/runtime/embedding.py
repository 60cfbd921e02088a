"""An embedding table that stays packed: only the rows that are looked up are decoded."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compressor.formats.base import PackedTensor, QuantFormat
from compressor.kernels import dispatch
from compressor.kernels.reference.linear import dequantize
from compressor.runtime.modules import PackedLinear


class PackedEmbedding(PackedLinear):
    """A table of embeddings; small on disk and in memory.

    Args:
        packed: The table, `[entries, width]`.
        fmt: The format that packed it.
        embedding: The module it replaces: gives the padding entry.
        dtype: The model's dtype, which decoded rows are rounded to.
    """

    def __init__(
        self, packed: PackedTensor, fmt: QuantFormat, embedding: nn.Embedding, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(packed, fmt, dtype=dtype)
        self.num_embeddings, self.embedding_dim = packed.shape
        self.padding_idx = embedding.padding_idx

    def prepare(self) -> None:
        """Leave the table as it is on disk: no kernel looks up rows of another layout."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the rows of int64 `x` `[...]`, `[..., width]` in the model's dtype."""
        packed = self.packed
        rows, places = x.unique(return_inverse=True)
        part = some_rows(packed, self.fmt, rows)
        if part is None:
            return nn.functional.embedding(x, dequantize(packed, self.fmt, self.dtype))
        return nn.functional.embedding(places, dequantize(part, self.fmt, self.dtype))


class TiedHead(nn.Module):
    """An output head that multiplies by a packed table of embeddings; it stores nothing of its own."""

    def __init__(self, table: PackedEmbedding, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.__dict__["_table"] = table  # not a submodule: it has its name elsewhere
        self.out_features, self.in_features = table.num_embeddings, table.embedding_dim
        self.bias = bias

    @property
    def weight(self) -> Tensor:
        """The decoded table, made anew each time."""
        table: PackedEmbedding = self.__dict__["_table"]
        return table.dequantize()

    def forward(self, x: Tensor) -> Tensor:
        """Return `[..., entries]` in the dtype of `x` `[..., width]`."""
        table: PackedEmbedding = self.__dict__["_table"]
        return dispatch.linear(x, table.packed, table.fmt, self.bias, table.dtype)


def tie_heads(model: PreTrainedModel) -> None:
    """Let output heads that the config ties to a packed table multiply by it."""
    for name, other in list(model.all_tied_weights_keys.items()):
        table, head = (model.get_submodule(param.rpartition(".")[0]) for param in (other, name))
        if isinstance(table, PackedEmbedding):
            bias = head.bias
            assert bias is None or isinstance(bias, nn.Parameter)
            model.set_submodule(name.rpartition(".")[0], TiedHead(table, bias))
            del model.all_tied_weights_keys[name]


def some_rows(packed: PackedTensor, fmt: QuantFormat, rows: Tensor) -> PackedTensor | None:
    """Return some rows of a packed matrix, or None for formats where rows cannot be told apart.

    Args:
        packed: The matrix.
        fmt: Its format.
        rows: int64 `[n]`.
    """
    n, k = packed.shape
    whole, one = fmt.layout((n, k)), fmt.layout((1, k))
    tensors = {}
    for suffix, tensor in packed.tensors.items():
        if suffix == "weight_shape":
            tensors[suffix] = torch.tensor((len(rows), k))
        elif whole[suffix].shape == (n, *one[suffix].shape[1:]) and one[suffix].shape[0] == 1:
            tensors[suffix] = tensor.index_select(0, rows)
        elif whole[suffix].shape == one[suffix].shape:
            tensors[suffix] = tensor  # the same for all rows
        else:
            return None
    return PackedTensor(packed.format, (len(rows), k), tensors)
