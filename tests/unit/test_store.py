"""Hidden states on disk: what is read is what was written, and damage and full disks are noticed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from compressor.calibration.store import Boundary, HiddenStore
from compressor.errors import ResourceError

CPU = torch.device("cpu")
FULL_DEVICE = Path("/dev/full")  # every write to it fails as on a full disk


def states(count: int, shape: tuple[int, ...] = (1, 5, 16), seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def write(store: HiddenStore, boundary: int, samples: list[Tensor]) -> Boundary:
    writer = store.writer(boundary)
    for sample in samples:
        writer.append(sample)
    return writer.close()


@pytest.mark.parametrize("shape", [(1, 5, 16), (1, 1, 1), (2, 3, 4, 5)])
def test_samples_come_back_bit_for_bit_in_any_order(tmp_path: Path, shape: tuple[int, ...]) -> None:
    store = HiddenStore(tmp_path / "new" / "folder", "fp", CPU)
    samples = states(4, shape)
    boundary = write(store, 3, samples)
    assert (boundary.n_samples, boundary.shape) == (4, shape)
    assert [path.name for path in store.folder.iterdir()] == [boundary.file]
    for index in (2, 0, 3, 1):
        again = store.read(boundary, index)
        assert (again.dtype, again.shape) == (torch.float32, torch.Size(shape))
        assert torch.equal(again, samples[index])


def test_special_values_and_strides_survive(tmp_path: Path) -> None:
    store = HiddenStore(tmp_path, "fp", CPU)
    sample = torch.tensor([[0.0, -0.0, 1e-45, float("inf"), float("nan"), 3.4e38]]).repeat(2, 1).T.unsqueeze(0)
    again = store.read(write(store, 0, [sample]), 0)
    assert torch.equal(again.view(torch.int32), sample.contiguous().view(torch.int32))


def test_values_pass_through_float32(tmp_path: Path) -> None:
    """A sample in another dtype reads back as float32 would hold it, so a resumed run sees the same numbers."""
    store = HiddenStore(tmp_path, "fp", CPU)
    wide = states(1)[0].double() + 1e-12
    assert torch.equal(store.read(write(store, 0, [wide]), 0), wide.float())
    narrow = states(1)[0].bfloat16().requires_grad_()
    assert torch.equal(store.read(write(store, 1, [narrow]), 0), narrow.detach().float())


@pytest.mark.parametrize("damage", ["flip", "cut", "grow", "remove"])
def test_damage_is_noticed(tmp_path: Path, damage: str) -> None:
    store = HiddenStore(tmp_path, "fp", CPU)
    boundary = write(store, 0, states(3))
    other = write(store, 1, states(3, seed=1))
    assert store.intact(boundary)
    path = tmp_path / boundary.file
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[17] ^= 1
        path.write_bytes(content)
    elif damage == "cut":
        path.write_bytes(content[:-1])
    elif damage == "grow":
        path.write_bytes(content + b"\0")
    else:
        path.unlink()
    assert not store.intact(boundary)
    assert store.intact(other)


def test_a_description_survives_the_journal(tmp_path: Path) -> None:
    store = HiddenStore(tmp_path, "fp", CPU)
    boundary = write(store, 0, states(2))
    data = boundary.to_json()
    again = Boundary(data["file"], tuple(data["shape"]), data["n_samples"], data["sha256"])
    assert again == boundary
    assert HiddenStore(tmp_path, "fp", CPU).intact(again)


def test_the_hash_depends_on_content_alone(tmp_path: Path) -> None:
    first = write(HiddenStore(tmp_path, "fp", CPU), 0, states(2))
    second = write(HiddenStore(tmp_path, "probe", CPU), 5, states(2))
    assert first.sha256 == second.sha256
    assert first.sha256 != write(HiddenStore(tmp_path, "fp", CPU), 1, states(2, seed=1)).sha256


def test_drop_all_but_keeps_one_file_and_other_streams(tmp_path: Path) -> None:
    store, other = HiddenStore(tmp_path, "fp", CPU), HiddenStore(tmp_path, "compressed", CPU)
    boundaries = [write(store, index, states(1)) for index in range(3)]
    foreign = write(other, 0, states(1))
    (tmp_path / "fp-00007.bin.part").write_bytes(b"left by a run that was killed")
    store.drop_all_but(boundaries[1])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([foreign.file, boundaries[1].file])
    assert store.intact(boundaries[1])
    store.drop_all_but(None)
    assert [path.name for path in tmp_path.iterdir()] == [foreign.file]


def test_an_unfinished_file_never_has_the_final_name(tmp_path: Path) -> None:
    store = HiddenStore(tmp_path, "fp", CPU)
    writer = store.writer(0)
    writer.append(states(1)[0])
    assert [path.suffix for path in tmp_path.iterdir()] == [".part"]
    boundary = writer.close()
    assert [path.name for path in tmp_path.iterdir()] == [boundary.file]


def test_samples_of_different_shapes_are_a_bug(tmp_path: Path) -> None:
    writer = HiddenStore(tmp_path, "fp", CPU).writer(0)
    writer.append(states(1)[0])
    with pytest.raises(AssertionError, match=r"\(1, 6, 16\)"):
        writer.append(states(1, (1, 6, 16))[0])
    writer.close()


@pytest.mark.skipif(not FULL_DEVICE.exists(), reason="needs /dev/full")
@pytest.mark.parametrize("tokens", [2, 5000], ids=["on close", "on append"])
def test_a_full_disk_is_a_resource_error_and_frees_what_was_written(tmp_path: Path, tokens: int) -> None:
    """Small samples fit the write buffer, so the disk is only found full when it is flushed."""
    store = HiddenStore(tmp_path, "fp", CPU)
    (tmp_path / "fp-00000.bin.part").symlink_to(FULL_DEVICE)
    writer = store.writer(0)
    sample = states(1, (1, tokens, 16))[0]
    if tokens == 2:
        writer.append(sample)
    with pytest.raises(ResourceError, match="the disk is full") as error:
        writer.close() if tokens == 2 else writer.append(sample)
    assert "fp-00000.bin" in error.value.message
    assert error.value.hint
    assert list(tmp_path.iterdir()) == [], "a partial file stays behind"


@pytest.mark.skipif(not FULL_DEVICE.exists(), reason="needs /dev/full")
def test_a_full_disk_leaves_finished_files_alone(tmp_path: Path) -> None:
    store = HiddenStore(tmp_path, "fp", CPU)
    samples = states(2)
    finished = write(store, 0, samples)
    (tmp_path / "fp-00001.bin.part").symlink_to(FULL_DEVICE)
    writer = store.writer(1)
    writer.append(samples[0])
    with pytest.raises(ResourceError):
        writer.close()
    assert store.intact(finished)
    assert torch.equal(store.read(finished, 1), samples[1])
    assert write(store, 1, samples).n_samples == 2, "the same boundary can be written once there is space"
