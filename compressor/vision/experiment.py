"""One seed of a comparison: train a small classifier, cut copies of it in several ways, fine-tune, measure.

`python -m compressor.vision.experiment SPEC.json RESULT.json`. What is finished is kept beside the result, so that a
run that was stopped continues. The tables of the repository are made with it. Rounding what came out, with the
package's own methods, is left to a caller: `compressor.vision_trial`.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

from compressor import saving
from compressor.checkpoint.config import quiet
from compressor.checkpoint.sink import WORK
from compressor.checkpoint.source import Source
from compressor.errors import RecipeError
from compressor.files import replace_text
from compressor.formats import get_format
from compressor.vision.budget import Macs, kept_counts
from compressor.vision.clusters import Graph
from compressor.vision.complexity import count_macs, count_parameters, latency
from compressor.vision.cutting import cut_filters
from compressor.vision.finetune import Training, train
from compressor.vision.images import read_data
from compressor.vision.peer import cut_with_torch_pruning
from compressor.vision.pixels import Pixels, Preprocess
from compressor.vision.recipe import build_method
from compressor.vision.scores import evaluate
from compressor.vision.selection import uniform
from compressor.vision.sparse import shrink

CPU = torch.device("cpu")
ORIGINAL = "original"


class Arm(BaseModel):
    """One way to cut.

    Attributes:
        name: Of the way; arms of one name differ in `sparsity`.
        tool: Another tool that cuts instead, with its own importance; None: a method of ours.
        method: A pruner of kind `vision`, or the tool's importance.
        options: Of the method. With `budget: sensitivity` as many multiply-adds are left as the same share of every
            layer's filters would leave.
        sparsity: Share of the filters to remove.
        finetune: Fields of `Training` that differ from the experiment's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    tool: Literal["torch-pruning"] | None = None
    method: str
    options: dict[str, Any] = Field(default_factory=dict)
    sparsity: float = Field(ge=0, lt=1)
    finetune: dict[str, Any] = Field(default_factory=dict)


class Rounding(BaseModel):
    """One way to round the blocks of a network that is trained.

    Attributes:
        name: Unique in the experiment.
        method: As `compress quantize --method`.
        format: As `--format`; per channel.
        options: Of the method.
        n_samples: Of calibration: each is eight training images.
        batch_norm: As `--batch-norm`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    method: str
    format: str
    options: dict[str, Any] = Field(default_factory=dict)
    n_samples: int = Field(32, ge=1)
    batch_norm: Literal["correct", "reestimate"] | None = None


Rounder: TypeAlias = Callable[[Path, Rounding, str, int], tuple[nn.Module, int]]
"""Checkpoint, way, labelled images, seed -> the rounded model, and the bytes of its tensors on disk."""


class Experiment(BaseModel):
    """One seed.

    Attributes:
        data: Labelled images.
        model: Fields of a `ResNetConfig`.
        training: Fields of `Training` for the original.
        finetune: Fields of `Training` for what was cut.
        arms: What is compared.
        formats: Formats, per channel, that the weights of what was fine-tuned are rounded to, to the nearest value.
        roundings: Ways to round the original and all that was fine-tuned, with the package's methods.
        seed: Of the first weights, the order of images, the choice of ranking images, and chance.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str
    model: dict[str, Any]
    training: dict[str, Any]
    finetune: dict[str, Any]
    arms: tuple[Arm, ...]
    formats: tuple[str, ...] = ()
    roundings: tuple[Rounding, ...] = ()
    seed: int = 0


def run(experiment: Experiment, result: Path, told: Any = print, rounder: Rounder | None = None) -> dict[str, Any]:
    """Run one seed, or what is left of it, and write the result.

    Args:
        experiment: What is compared.
        result: JSON file to write; models are kept in its folder.
        told: Hears a line about everything that is done.
        rounder: Carries out the experiment's roundings.

    Returns:
        The original's figures, one entry per arm with figures after the cut and after fine-tuning, and one per network
        and rounding.

    Raises:
        RecipeError: There are roundings, and no one to carry them out.
    """
    if experiment.roundings and rounder is None:
        raise RecipeError(f"{len(experiment.roundings)} roundings", "run compressor.vision_trial instead")
    data = read_data(experiment.data, experiment.seed)
    preprocess = Preprocess(result.parent, 3)
    images, test = Pixels(data.train, preprocess), Pixels(data.test, preprocess)
    example = images[torch.arange(2)]
    done: dict[str, Any] = json.loads(result.read_text()) if result.is_file() else {"arms": []}
    model = _original(experiment, len(data.train.classes), images, result.with_suffix(".safetensors"), told)
    if "original" not in done:
        done["original"] = {**_measure(model, test, example), "formats": _rounded(experiment, model, test)}
        _save(result, done)
    networks = result.parent / "networks"
    if experiment.roundings and not (networks / ORIGINAL / "config.json").is_file():
        with quiet():
            model.save_pretrained(networks / ORIGINAL)
    for arm in experiment.arms:
        folder = networks / _slug(arm)
        kept = not experiment.roundings or (folder / "config.json").is_file()
        if kept and any(entry["arm"] == described(arm) for entry in done["arms"]):
            continue
        started = time.process_time()
        entry, cut = _arm(experiment, arm, model, images, test, example)
        rest = [entry for entry in done["arms"] if entry["arm"] != described(arm)]
        done["arms"] = [*rest, {**entry, "cpu_seconds": time.process_time() - started}]
        if experiment.roundings:
            (folder / WORK).mkdir(parents=True, exist_ok=True)
            saving.write(cut, Source.open(networks / ORIGINAL, ORIGINAL, None), folder, {})
            shutil.rmtree(folder / WORK)
        _save(result, done)
        after = entry["finetuned"]["balanced_accuracy"]
        told(
            f"{arm.name} {arm.sparsity:.0%}: balanced accuracy {after:.4f}, {entry['finetuned']['macs']} multiply-adds"
        )
    wanted = [described(arm) for arm in experiment.arms]
    done["arms"] = sorted((e for e in done["arms"] if e["arm"] in wanted), key=lambda e: wanted.index(e["arm"]))
    if rounder is not None:
        _round_all(experiment, done, result, test, told, rounder)
    _save(result, done)
    return done


def _round_all(
    experiment: Experiment, done: dict[str, Any], result: Path, test: Pixels, told: Any, rounder: Rounder
) -> None:
    """Round the original and all that was fine-tuned in every way that has no figures yet."""
    networks = {ORIGINAL: ORIGINAL} | {_slug(arm): f"{arm.name}, {arm.sparsity:.0%}" for arm in experiment.arms}
    before, after = done.get("roundings", []), []
    for slug, name in networks.items():
        for rounding in experiment.roundings:
            what = {"network": name, "rounding": rounding.model_dump()}
            entry = next((old for old in before if all(old[key] == value for key, value in what.items())), None)
            if entry is None:
                started = time.process_time()
                model, size = rounder(result.parent / "networks" / slug, rounding, experiment.data, experiment.seed)
                spent = time.process_time() - started
                entry = {**what, **asdict(evaluate(model, test, CPU)), "bytes": size, "cpu_seconds": spent}
                told(f"{name}, {rounding.name}: balanced accuracy {entry['balanced_accuracy']:.4f}, {spent:.0f} s")
            after.append(entry)
            done["roundings"] = after
            _save(result, done)


def _original(
    experiment: Experiment, classes: int, images: Pixels, saved: Path, told: Any
) -> ResNetForImageClassification:
    """Train the model that is cut, or read it back."""
    torch.manual_seed(experiment.seed)
    model = ResNetForImageClassification(ResNetConfig(**{**experiment.model, "num_labels": classes}))
    model.eval().requires_grad_(False)
    if saved.is_file():
        model.load_state_dict(load_file(saved))
        return model
    train(model, images, Training(**experiment.training, seed=experiment.seed), CPU, told=told)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, saved)
    return model


def _arm(
    experiment: Experiment, arm: Arm, original: nn.Module, images: Pixels, test: Pixels, example: torch.Tensor
) -> tuple[dict[str, Any], Any]:
    """Cut a copy and train it; return the figures and the model."""
    model = copy.deepcopy(original)
    ratios: Mapping[str, float] = {}
    if arm.tool is not None:
        cut_with_torch_pruning(model, arm.method, arm.sparsity, images, example, experiment.seed)
    else:
        ratios = _cut(experiment, arm, model, images, example)
    pruned = _measure(model, test, example)
    settings = Training(**{**experiment.finetune, **arm.finetune}, seed=experiment.seed)
    train(model, images, settings, CPU)
    finetuned = {**_measure(model, test, example), "formats": _rounded(experiment, model, test)}
    return {"arm": described(arm), "pruned": pruned, "finetuned": finetuned, "ratios": ratios}, model


def _cut(
    experiment: Experiment, arm: Arm, model: nn.Module, images: Pixels, example: torch.Tensor
) -> Mapping[str, float]:
    """Cut a model in a way of ours; return the share that went, cluster by cluster."""
    method = build_method(arm.method, arm.options)
    graph = Graph(model, example)
    ratios = uniform(graph.clusters, arm.sparsity, method.options.ratios)
    share = None
    if method.options.budget == "sensitivity":
        macs = Macs(graph)
        share = macs.of(kept_counts(graph, ratios, 1)) / macs.dense

    def before_cut(keep: Mapping[str, torch.Tensor]) -> None:
        if epochs := method.options.sparse_epochs:
            fields = {**experiment.finetune, **arm.finetune, "epochs": epochs}
            training = Training(**fields, seed=experiment.seed)
            shrink(graph, keep, images, training, CPU, strength=method.options.sparse_strength)

    _, ratios = cut_filters(graph, method, ratios, images, CPU, experiment.seed, share, before_cut)
    return ratios


def _slug(arm: Arm) -> str:
    """Return the name of the folder an arm's model is kept in."""
    return hashlib.sha256(json.dumps(described(arm), sort_keys=True).encode()).hexdigest()[:12]


def described(arm: Arm) -> dict[str, Any]:
    """Return an arm as plain data, as it is kept in results; what is not set is left out."""
    return arm.model_dump(exclude_none=True)


def _measure(model: nn.Module, test: Pixels, example: torch.Tensor) -> dict[str, Any]:
    return {
        **asdict(evaluate(model, test, CPU)),
        "macs": count_macs(model, example),
        "parameters": count_parameters(model),
        "latency": latency(model, example[:1], seconds=0.3, at_least=20),
    }


@torch.no_grad()
def _rounded(experiment: Experiment, model: nn.Module, test: Pixels) -> dict[str, Any]:
    """Round the weights of all convolutions and linear layers, and return accuracy and bytes by format."""
    found = {}
    for name in experiment.formats:
        fmt = get_format(name, None, torch.float32)
        twin = copy.deepcopy(model)
        size = sum(tensor.numel() * tensor.element_size() for tensor in twin.state_dict().values())
        for module in twin.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                matrix = module.weight.flatten(1)
                parameters = fmt.fit(matrix)
                module.weight.copy_(fmt.decode(fmt.encode(matrix, parameters), parameters).view_as(module.weight))
                packed = sum(slot.nbytes for slot in fmt.layout((matrix.shape[0], matrix.shape[1])).values())
                size += packed - module.weight.numel() * module.weight.element_size()
        found[name] = {"balanced_accuracy": evaluate(twin, test, CPU).balanced_accuracy, "bytes": size}
    return found


def _save(path: Path, done: dict[str, Any]) -> None:
    replace_text(path, json.dumps(done))


def main(arguments: list[str], rounder: Rounder | None = None) -> int:
    """Run the experiment a file describes."""
    if len(arguments) != 2:
        sys.stderr.write("usage: python -m compressor.vision.experiment SPEC.json RESULT.json\n")
        return 2
    spec, result = (Path(argument) for argument in arguments)
    run(
        Experiment.model_validate_json(spec.read_text(encoding="utf-8")),
        result,
        told=lambda text: print(text, flush=True),
        rounder=rounder,
    )
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))
