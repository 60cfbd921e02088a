"""The calibration set of a job: text, images, or what the model writes itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compressor.api.job import Job, expert_tokens
from compressor.calibration.dataset import CalibrationSet, Generate, build
from compressor.checkpoint.config import quiet
from compressor.environment import load_tokenizer
from compressor.vision.calibration import calibration_images

GENERATED_AT_ONCE = 8
"""Samples the model writes side by side for `--data self`: much faster than one by one, and the cache stays small."""


def calibrate(job: Job) -> CalibrationSet:
    """Build the calibration set of a job.

    Raises:
        CompressorError: Before any work: unreadable, too little, or not this model's vocabulary.
    """
    if job.skeleton.model.main_input_name == "pixel_values":
        return calibration_images(job.recipe.calibration, job.source.path, job.skeleton.model.config, job.recipe.seed)
    tokenizer = load_tokenizer(job.source.path, job.recipe.trust_remote_code)
    vocab_size = job.skeleton.model.config.get_text_config().vocab_size
    reserve = job.recipe.calibration.n_samples if expert_tokens(job) else 0
    return build(job.recipe.calibration, tokenizer, vocab_size, job.recipe.seed, _generator(job), reserve)


def _generator(job: Job) -> Generate:
    """Return a function that lets the full-precision model write its own calibration text."""

    def generate(n_samples: int, seq_len: int, seed: int) -> Tensor:
        from compressor.runtime import load

        model: Any = load(job.source.path, trust_remote_code=job.recipe.trust_remote_code)
        torch.manual_seed(seed)  # transformers samples from the global generator
        vocab_size = model.config.get_text_config().vocab_size
        start = torch.randint(0, vocab_size, (n_samples, 1))
        rows = []
        with torch.no_grad(), quiet():
            for first in start.split(GENERATED_AT_ONCE):  # [at most GENERATED_AT_ONCE, 1]
                # Sampled, not greedy: greedy text of small models repeats itself.
                out = model.generate(
                    first,
                    attention_mask=torch.ones_like(first),
                    do_sample=True,
                    top_k=0,
                    max_new_tokens=seq_len,
                    min_new_tokens=seq_len,
                    pad_token_id=0,
                    use_cache=True,
                )
                rows.append(out[:, 1:])
        return torch.cat(rows)

    return generate
