"""One of the models of an evaluation: found and fingerprinted when named, loaded when first needed."""

from __future__ import annotations

import gc
import hashlib
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from compressor.checkpoint.config import read_config
from compressor.checkpoint.resolve import resolve_model
from compressor.checkpoint.source import shard_files
from compressor.environment import load_tokenizer
from compressor.errors import UnsupportedError
from compressor.evals.activations import check_activations
from compressor.evals.saturation import Watch
from compressor.evals.scores import Model
from compressor.files import sha256_file
from compressor.runtime import execution_path, load

DTYPE = torch.float32
"""What models compute in: scores should show what compression costs, not what half precision does."""

_TOKENIZER_FILES = ("added_tokens.json", "merges.txt", "special_tokens_map.json", "token*", "vocab*")

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""Names under which configs say how many experts a layer has."""


class Subject:
    """A model to be evaluated.

    Args:
        name: A folder, or anything else `resolve_model` takes.
        device: Where it is loaded.
        rows: Rows of activations its kernels are named for.
        trust_remote_code: Run model code that comes with the checkpoint, where transformers has none of its own.

    Attributes:
        folder: The checkpoint.
        commit: Commit of a Hub revision, else None.
        fingerprint: Hash of config, weights and tokenizer.
        execution_path: What computes it; None until it was loaded, or set from a cached result.
        saturation: Counts what static scales of its inputs cut off.

    Raises:
        CompressorError: It cannot be found or fetched.
    """

    def __init__(self, name: str, device: torch.device, rows: int, trust_remote_code: bool) -> None:
        self.name, self.device, self.rows, self.trust_remote_code = name, device, rows, trust_remote_code
        self.folder, self.commit = resolve_model(name, trust_remote_code)
        self.fingerprint = fingerprint(self.folder)
        self.execution_path: str | None = None
        self.saturation = Watch()
        self._model: PreTrainedModel | None = None
        self._tokenizer: Any = None

    @property
    def model(self) -> PreTrainedModel:
        """The model, loaded the first time.

        Raises:
            UnsupportedError: It has a head that predicts no tokens, or its inputs should be quantized, which its path
                does not do.
            CheckpointError: It cannot be read.
        """
        if self._model is None:
            model = load(self.folder, dtype=DTYPE, device=self.device, trust_remote_code=self.trust_remote_code)
            check_activations(model, self.folder)
            if model.get_output_embeddings() is None and not self.headless:
                raise UnsupportedError(
                    f"{self.folder}: {type(model).__name__} predicts no tokens", "evaluate a language model"
                )
            self.saturation.over(model)
            self._model, self.execution_path = model, execution_path(model, self.rows)
        return self._model

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, loaded the first time."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.folder, self.trust_remote_code)
        return self._tokenizer

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding, as the config says."""
        size: int = read_config(self.folder, self.trust_remote_code).get_text_config().vocab_size
        return size

    @property
    def has_experts(self) -> bool:
        """Whether it is a mixture of experts, as the config says."""
        config = read_config(self.folder, self.trust_remote_code).get_text_config()
        return any((getattr(config, name, None) or 0) > 1 for name in _EXPERTS)

    @property
    def positions(self) -> int:
        """The longest text it takes, in tokens, as config and tokenizer say."""
        config = read_config(self.folder, self.trust_remote_code).get_text_config()
        limits = (getattr(config, "max_position_embeddings", None), self.tokenizer.model_max_length)
        return min(int(limit) for limit in limits if isinstance(limit, int | float) and limit > 0)

    @property
    def headless(self) -> bool:
        """Whether it reads text and has no head, as its class's name in the config says."""
        config = read_config(self.folder, self.trust_remote_code)
        names = config.architectures or ("",)
        return bool(names[0].endswith("Model")) and hasattr(config.get_text_config(), "vocab_size")

    def release(self) -> None:
        """Free the model's memory; it is loaded again if it is needed again."""
        self._model = None
        gc.collect()

    def header(self) -> Model:
        """Describe the model for the evaluation file; what computed it must be known by now."""
        assert self.execution_path is not None, self.name
        dtype = str(DTYPE).removeprefix("torch.")
        return Model(self.name, self.commit, self.fingerprint, self.execution_path, dtype)


def fingerprint(folder: Path) -> str:
    """Return the SHA-256 over config, weights and tokenizer files, so that the same model is known by any path.

    Raises:
        CheckpointError: There is no checkpoint in the folder.
    """
    weights = shard_files(folder)
    tokenizer = {path.name for pattern in _TOKENIZER_FILES for path in folder.glob(pattern) if path.is_file()}
    total = hashlib.sha256()
    for file in ["config.json", *weights, *sorted(tokenizer)]:
        total.update(f"{file}\0{sha256_file(folder / file)}\n".encode())
    return total.hexdigest()
