"""Bad input gets one line that names the thing, before any work: missing, truncated, corrupt, pickled, hostile."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from compressor.checkpoint.sink import Journal, Sink
from compressor.checkpoint.source import Source, check_finite
from compressor.errors import CheckpointError, CompressorError, ResourceError, UnsupportedError
from compressor.formats.base import Slot
from compressor.testing import models


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    models.tiny_llama().save_pretrained(tmp_path)
    return tmp_path


def one_line(error: CompressorError) -> None:
    assert error.message
    assert "\n" not in error.message + error.hint
    assert error.hint


def test_reads_what_was_saved(folder: Path) -> None:
    source = Source.open(folder)
    state = models.tiny_llama().state_dict()
    for name, tensor in source.read(source.tensors).items():
        assert torch.equal(tensor, state[name])
    assert source.dtype == "F32"


def test_fingerprint_follows_content_not_path(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    for path in folder.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    assert Source.open(folder).fingerprint == Source.open(other).fingerprint
    data = bytearray((other / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (other / "model.safetensors").write_bytes(data)
    assert Source.open(folder).fingerprint != Source.open(other).fingerprint


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory") as caught:
        Source.open(tmp_path / "nowhere")
    one_line(caught.value)


@pytest.mark.parametrize("keep", [0, 4, 8, 200, -1])
def test_truncated_safetensors(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="not a complete safetensors file") as caught:
        Source.open(folder)
    one_line(caught.value)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b'{"a": 1}',
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1000000000000,1000000],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}',
    ],
    ids=["garbage", "no-entry", "size", "absurd", "overlap", "negative"],
)
def test_corrupt_header(folder: Path, header: bytes) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 8)
    with pytest.raises(CheckpointError) as caught:
        Source.open(folder)
    one_line(caught.value)


def test_header_length_beyond_the_file(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        Source.open(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite(folder: Path, value: float) -> None:
    state = {name: tensor.clone() for name, tensor in models.tiny_llama().state_dict().items() if "lm_head" not in name}
    state["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    source = Source.open(folder)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight: 1 of 8192 .* \(3, 5\)") as caught:
        source.read(source.tensors)
    one_line(caught.value)


def test_large_finite_values_pass() -> None:
    check_finite("w", torch.full((4096,), 3e38))  # their float32 sum overflows, they do not
    with pytest.raises(CheckpointError):
        check_finite("w", torch.tensor([3e38, float("nan")]))


def test_pickles_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="only pickled weights") as caught:
        Source.open(folder)
    one_line(caught.value)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "model.bin"])
def test_index_cannot_leave_the_folder(folder: Path, name: str) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="is not a file of this folder"):
        Source.open(folder)


def test_index_names_a_missing_shard(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"gone\.safetensors: no such file"):
        Source.open(folder)


def test_tensor_in_two_shards(folder: Path) -> None:
    (folder / "b.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    weight_map = {"a": "model.safetensors", "b": "b.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="stored in two shards"):
        Source.open(folder)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "[" * 100_000, '"config"'], ids=["empty", "list", "cut", "deep", "str"]
)
def test_config_that_is_no_config(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json") as caught:
        Source.open(folder)
    one_line(caught.value)


def test_already_quantized(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="is quantized already") as caught:
        Source.open(folder)
    assert caught.value.exit_code == 4


def test_sink_writes_files_the_library_reads(tmp_path: Path) -> None:
    from safetensors import safe_open

    generator = torch.Generator().manual_seed(3)
    tensors = {
        "b.bytes": torch.randint(0, 255, (3, 5), dtype=torch.uint8, generator=generator),
        "a.half": torch.randn(7, 3, generator=generator).to(torch.bfloat16),
        "c.fp8": torch.randn(4, 4, generator=generator).to(torch.float8_e4m3fn),
        "d.long": torch.tensor([5, -7]),
        "e.scalar": torch.tensor(2.5),
        "f.empty": torch.zeros(0, 4),
    }
    sink = Sink(tmp_path, {name: Slot(t.dtype, tuple(t.shape)) for name, t in tensors.items()})
    (tmp_path / ".compress-work").mkdir()
    sink.allocate()
    assert not (tmp_path / "model.safetensors").exists()
    hashes = [sink.write({name: tensor}) for name, tensor in tensors.items()]
    assert hashes == [sink.unit_hash([name]) for name in tensors]
    sink.publish()
    with safe_open(tmp_path / "model.safetensors", framework="pt") as handle:
        assert handle.metadata() == {"format": "pt"}
        assert set(handle.keys()) == set(tensors)
        for name, tensor in tensors.items():
            assert (
                torch.equal(handle.get_tensor(name).view(torch.uint8), tensor.view(torch.uint8))
                if tensor.ndim
                else (handle.get_tensor(name) == tensor)
            )
    assert hashes == [sink.unit_hash([name]) for name in tensors]  # found under the final name too


def test_sink_notices_a_small_disk_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    (tmp_path / ".compress-work").mkdir()
    with pytest.raises(ResourceError, match="the disk is full"):
        Sink(tmp_path, {"a": Slot(torch.float32, (1000,))}).allocate()
    assert not list((tmp_path / ".compress-work").iterdir())


def test_journal_drops_a_torn_line(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    assert journal.read() == []
    journal.append({"unit": 1})
    journal.append({"unit": 2})
    with journal.path.open("ab") as file:
        file.write(b'{"unit": 3')
    assert journal.read() == [{"unit": 1}, {"unit": 2}]
    journal.append({"unit": 3})
    assert journal.read() == [{"unit": 1}, {"unit": 2}, {"unit": 3}]
