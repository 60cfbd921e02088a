"""One seed of a comparison: train a small classifier, cut copies of it in several ways, fine-tune, measure.

`python -m compressor.vision.experiment SPEC.json RESULT.json`. What is finished is kept beside the result, so that a
run that was stopped continues. The tables of the repository are made with it.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

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

CPU = torch.device("cpu")


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


class Experiment(BaseModel):
    """One seed.

    Attributes:
        data: Labelled images.
        model: Fields of a `ResNetConfig`.
        training: Fields of `Training` for the original.
        finetune: Fields of `Training` for what was cut.
        arms: What is compared.
        formats: Formats, per channel, that the weights of what was fine-tuned are rounded to, to the nearest value.
        seed: Of the first weights, the order of images, the choice of ranking images, and chance.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str
    model: dict[str, Any]
    training: dict[str, Any]
    finetune: dict[str, Any]
    arms: tuple[Arm, ...]
    formats: tuple[str, ...] = ()
    seed: int = 0


def run(experiment: Experiment, result: Path, told: Any = print) -> dict[str, Any]:
    """Run one seed, or what is left of it, and write the result.

    Returns:
        The original's figures, and one entry per arm with figures after the cut and after fine-tuning.
    """
    data = read_data(experiment.data, experiment.seed)
    preprocess = Preprocess(result.parent, 3)
    images, test = Pixels(data.train, preprocess), Pixels(data.test, preprocess)
    example = images[torch.arange(2)]
    done: dict[str, Any] = json.loads(result.read_text()) if result.is_file() else {"arms": []}
    model = _original(experiment, len(data.train.classes), images, result.with_suffix(".safetensors"), told)
    if "original" not in done:
        done["original"] = {**_measure(model, test, example), "formats": _rounded(experiment, model, test)}
        _save(result, done)
    for arm in experiment.arms:
        if any(entry["arm"] == described(arm) for entry in done["arms"]):
            continue
        started = time.process_time()
        entry = _arm(experiment, arm, model, images, test, example)
        done["arms"].append({**entry, "cpu_seconds": time.process_time() - started})
        _save(result, done)
        after = entry["finetuned"]["balanced_accuracy"]
        told(
            f"{arm.name} {arm.sparsity:.0%}: balanced accuracy {after:.4f}, {entry['finetuned']['macs']} multiply-adds"
        )
    wanted = [described(arm) for arm in experiment.arms]
    done["arms"] = sorted((e for e in done["arms"] if e["arm"] in wanted), key=lambda e: wanted.index(e["arm"]))
    _save(result, done)
    return done


def _original(experiment: Experiment, classes: int, images: Pixels, saved: Path, told: Any) -> nn.Module:
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
) -> dict[str, Any]:
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
    return {"arm": described(arm), "pruned": pruned, "finetuned": finetuned, "ratios": ratios}


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
    _, ratios = cut_filters(graph, method, ratios, images, CPU, experiment.seed, share)
    return ratios


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


def main(arguments: list[str]) -> int:
    """Run the experiment a file describes."""
    if len(arguments) != 2:
        sys.stderr.write("usage: python -m compressor.vision.experiment SPEC.json RESULT.json\n")
        return 2
    spec, result = (Path(argument) for argument in arguments)
    run(
        Experiment.model_validate_json(spec.read_text(encoding="utf-8")),
        result,
        told=lambda text: print(text, flush=True),
    )
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))
