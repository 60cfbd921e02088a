"""An image classifier as one ONNX file, through PyTorch's own exporter, checked in ONNX Runtime.

The exporter folds batch normalization into the convolutions before it; packed weights are decoded first, as ONNX has no
operators for this package's formats.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compressor.checkpoint.config import quiet
from compressor.checkpoint.resolve import resolve_model
from compressor.errors import RecipeError, UnsupportedError, VerificationError, disk_error
from compressor.runtime import load
from compressor.runtime.convolution import PackedConv2d
from compressor.runtime.modules import PackedLinear
from compressor.vision.clusters import logits_of

NEEDED = ("onnxscript", "onnxruntime")
TOLERANCE = 1e-3
"""Allowed relative difference of the logits: another library sums in another order, and folds normalization."""

BATCHES = (1, 3)
"""Images the written file is run on, besides those it was traced with: the batch must not be fixed."""


@dataclass(frozen=True)
class Exported:
    """A written file.

    Attributes:
        path: The file.
        bytes: Its size.
        opset: Version of ONNX's operators it needs.
        operators: Operator -> how often it occurs.
        images: Shape of the input, `[batch, channels, height, width]`; the batch is free.
        relative_error: Largest difference of the logits in ONNX Runtime, over the logits' size.
        decoded: Packed layers that are dense in the file.
    """

    path: str
    bytes: int
    opset: int
    operators: dict[str, int]
    images: tuple[str | int, ...]
    relative_error: float
    decoded: int

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def export_onnx(
    model: str,
    out: Path,
    *,
    image_size: int | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
) -> Exported:
    """Write an image classifier as an ONNX file with input `pixel_values` and output `logits`, float32.

    Args:
        model: Checkpoint folder, cut and quantized ones included, or Hub id.
        out: File to write.
        image_size: Height and width; None takes what the checkpoint says.
        force: Overwrite a file.
        trust_remote_code: Run model code that comes with the checkpoint.

    Raises:
        UnsupportedError: The packages are not there, or this is no image classifier that can be exported.
        RecipeError: The file exists, or the size of images is not known.
        VerificationError: ONNX Runtime gives other logits; the file is not kept.
        ResourceError: It cannot be written.
    """
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise UnsupportedError(f"export to ONNX needs {' and '.join(missing)}", "pip install 'compress-hf[onnx]'")
    if out.exists() and not force:
        raise RecipeError(f"{out}: exists", "give another file, or --force")
    path, _ = resolve_model(model, trust_remote_code)
    classifier = load(path, device="cpu", trust_remote_code=trust_remote_code)
    if classifier.main_input_name != "pixel_values" or not getattr(classifier.config, "num_labels", 0):
        raise UnsupportedError(
            f"{model}: {type(classifier).__name__} is no image classifier", "only those are exported to ONNX"
        )
    decoded = decode_packed(classifier)
    height, width = (image_size, image_size) if image_size else _size(model, path, classifier)
    shape = (getattr(classifier.config, "num_channels", 3), height, width)
    logits = _Logits(classifier.float()).eval()
    program = _exported(model, logits, _images(2, shape))
    temporary = out.with_name(f".{out.name}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with _silent():
            program.save(temporary)
        error = max(_difference(temporary, logits, _images(count, shape)) for count in BATCHES)
        if not error <= TOLERANCE:
            raise VerificationError(
                f"{out}: logits in ONNX Runtime differ by {error:.1e}, allowed is {TOLERANCE:.0e}",
                "this is a bug: please report it with the model's config.json",
            )
        temporary.replace(out)
    except OSError as problem:
        raise disk_error(problem, out) from problem
    finally:
        temporary.unlink(missing_ok=True)
    operators: dict[str, int] = {}
    for node in program.model.graph:
        operators[node.op_type] = operators.get(node.op_type, 0) + 1
    opset = int(program.model.opset_imports[""])
    ordered = dict(sorted(operators.items()))
    return Exported(str(out), out.stat().st_size, opset, ordered, ("batch", *shape), error, decoded)


def decode_packed(model: nn.Module) -> int:
    """Put dense layers in the place of packed ones, in place; returns how many there were.

    Raises:
        UnsupportedError: A layer rounds its inputs, which a dense one would not.
    """
    packed = [(name, module) for name, module in model.named_modules() if isinstance(module, PackedLinear)]
    for name, module in packed:
        if module.inputs:
            raise UnsupportedError(
                f"{name}: rounds its inputs, and ONNX would not", "export a checkpoint whose weights alone are rounded"
            )
        bias = module.bias is not None
        dense: nn.Module
        if isinstance(module, PackedConv2d):
            window: dict[str, Any] = {"kernel_size": module.kernel_size, "stride": module.stride}
            window |= {"padding": module.padding, "dilation": module.dilation, "groups": module.groups}
            window |= {"padding_mode": module.padding_mode, "bias": bias}
            dense = nn.Conv2d(module.in_channels, module.out_channels, **window)
        else:
            dense = nn.Linear(module.in_features, module.out_features, bias=bias)
        dense.requires_grad_(False)
        dense.get_parameter("weight").copy_(module.dequantize())
        if module.bias is not None:
            dense.get_parameter("bias").copy_(module.bias)
        model.set_submodule(name, dense.eval())
    return len(packed)


class _Logits(nn.Module):
    """A classifier whose output is the logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return logits_of(self.model(pixel_values))


def _size(name: str, path: Path, model: PreTrainedModel) -> tuple[int, int]:
    """Return height and width of the images a checkpoint takes, from its processor or its config.

    Raises:
        RecipeError: Neither says.
    """
    from transformers import AutoImageProcessor

    sizes: list[Any] = []
    if (path / "preprocessor_config.json").is_file() and importlib.util.find_spec("PIL") is not None:
        with quiet():
            processor = AutoImageProcessor.from_pretrained(path)
        crops = getattr(processor, "do_center_crop", False)
        sizes += [getattr(processor, "crop_size", None) if crops else None, getattr(processor, "size", None)]
    sizes.append(getattr(model.config, "image_size", None))
    for size in sizes:
        if isinstance(size, int):
            return size, size
        if isinstance(size, list | tuple) and len(size) == 2:
            return int(size[0]), int(size[1])
        if size is not None and not isinstance(size, list | tuple):
            found = {
                key: getattr(size, key, None) or (size.get(key) if hasattr(size, "get") else None) for key in _SIDES
            }
            if found["height"] and found["width"]:
                return int(found["height"]), int(found["width"])
            if found["shortest_edge"]:
                return int(found["shortest_edge"]), int(found["shortest_edge"])
    raise RecipeError(f"{name}: does not say how large its images are", "say it, for example --image-size 224")


_SIDES = ("height", "width", "shortest_edge")


def _images(count: int, shape: tuple[int, ...]) -> Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(count))


def _exported(name: str, model: nn.Module, images: Tensor) -> Any:
    """Trace a model with a free batch.

    Raises:
        UnsupportedError: The exporter cannot.
    """
    try:
        with _silent(), torch.no_grad():
            return torch.onnx.export(
                model,
                (images,),
                dynamo=True,
                input_names=["pixel_values"],
                output_names=["logits"],
                dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}},
                external_data=False,
                verbose=False,
            )
    except Exception as error:  # the exporter raises whatever a model provokes
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UnsupportedError(
            f"{name}: PyTorch's exporter fails: {reason}", "this architecture is not supported"
        ) from error


def _difference(path: Path, model: nn.Module, images: Tensor) -> float:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    got = torch.from_numpy(session.run(["logits"], {"pixel_values": images.numpy()})[0])
    with torch.no_grad():
        expected = model(images)
    if got.shape != expected.shape:
        return float("inf")
    return float((got - expected).norm() / expected.norm())


@contextmanager
def _silent() -> Iterator[None]:
    """Keep the exporter's remarks about packages and PyTorch's own deprecated calls to itself."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
