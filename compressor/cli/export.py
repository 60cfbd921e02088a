"""`compress export MODEL --onnx FILE`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compressor.cli.flags import Force, Json, Model, TrustRemoteCode
from compressor.cli.render import STDOUT, print_json, size


def export(
    model: Model,
    onnx: Annotated[Path, typer.Option("--onnx", metavar="FILE", help="ONNX file to write.")],
    image_size: Annotated[int | None, typer.Option(min=1, max=65_536, help="Height and width of the images.")] = None,
    force: Force = False,
    trust_remote_code: TrustRemoteCode = False,
    json_: Json = False,
) -> None:
    """Write an image classifier as an ONNX file, and compare it with PyTorch."""
    from compressor.vision.onnx_export import export_onnx

    found = export_onnx(model, onnx, image_size=image_size, force=force, trust_remote_code=trust_remote_code)
    if json_:
        print_json(found.to_json())
        return
    shape = ", ".join(str(side) for side in found.images)
    STDOUT.print(
        f"{found.path}: {size(found.bytes)}, opset {found.opset}, pixel_values [{shape}] -> logits; "
        f"relative difference in ONNX Runtime {found.relative_error:.1e}",
        soft_wrap=True,
        markup=False,
    )
    if found.decoded:
        STDOUT.print(f"note: {found.decoded} packed layers are dense in the file", soft_wrap=True)
