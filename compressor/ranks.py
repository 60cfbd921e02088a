"""The processes of one job: what `torchrun` and `accelerate launch` start, and how they talk (gloo, on any machine).

Every process runs the same program and must reach the same exchanges in the same order. Process 0 leads: it alone
writes the result, holds the lock and talks to the user. Whatever ends one process ends the job, with one error.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from compressor.errors import CompressorError, RecipeError, ResourceError, UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor

MEETING = timedelta(minutes=10)
"""How long processes wait for each other to start."""

PATIENCE = timedelta(days=1)
"""How long one may compute while the others wait. One that dies is noticed at once: its connections close."""

CHUNK_BYTES = 64 << 20
"""Most bytes that are sent at once."""

_FAILED = "compressor/failed"
_T = TypeVar("_T")


class LostProcessError(ResourceError):
    """Another process of the job ended; what was finished is kept."""


class Ranks:
    """The processes of a job, as one of them sees them. This class stands for a process that is alone.

    Attributes:
        rank: This process's number.
        size: How many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes, and talks to the user."""
        return self.rank == 0

    def share(self, value: _T, root: int = 0) -> _T:
        """Return process `root`'s value; what the others pass does not matter."""
        return value

    def gather(self, value: _T) -> list[_T]:
        """Return every process's value, in the order of their numbers."""
        return [value]

    def send(self, tensor: Tensor, to: int) -> None:
        """Send a tensor to a process that calls `receive`."""
        raise NotImplementedError

    def receive(self, tensor: Tensor, source: int) -> None:
        """Fill a tensor, in CPU memory and contiguous, with what a process sends."""
        raise NotImplementedError

    def broadcast(self, tensor: Tensor, root: int) -> None:
        """Fill every process's tensor, in CPU memory and contiguous, with that of `root`."""

    def share_tensors(self, tensors: Mapping[str, Tensor], root: int) -> dict[str, Tensor]:
        """Return process `root`'s tensors, in CPU memory unless they are one's own."""
        return dict(tensors)

    def claim(self, error: CompressorError) -> CompressorError | None:
        """Say that an error ends the job: return it if this process is to tell the user, None if another one does."""
        return error

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        """Let process 0 run the body before the others do: it may fill a cache."""
        if not self.leads:
            self.share(None)
        yield
        if self.leads:
            self.share(None)


class Group(Ranks):
    """Processes that talk over gloo.

    Attributes:
        rank: This process's number.
        size: How many there are.
        store: Where an error is left for the others; None if somebody else started the processes' group.
        group: Their group.
    """

    def __init__(self, rank: int, size: int, store: Any, group: Any) -> None:
        self.rank, self.size = rank, size
        self.store, self.group = store, group

    def share(self, value: _T, root: int = 0) -> _T:
        """Return process `root`'s value; what the others pass does not matter."""
        from torch import distributed

        box = [value]
        self._do(lambda: distributed.broadcast_object_list(box, root, group=self.group))
        return box[0]

    def gather(self, value: _T) -> list[_T]:
        """Return every process's value, in the order of their numbers."""
        from torch import distributed

        out: list[Any] = [None] * self.size
        self._do(lambda: distributed.all_gather_object(out, value, group=self.group))
        return out

    def send(self, tensor: Tensor, to: int) -> None:
        """Send a tensor to a process that calls `receive`."""
        from torch import distributed

        for part in _chunks(tensor.detach().cpu().contiguous()):
            self._do(lambda part=part: distributed.send(part, to, group=self.group))  # type: ignore[misc]

    def receive(self, tensor: Tensor, source: int) -> None:
        """Fill a tensor, in CPU memory and contiguous, with what a process sends."""
        from torch import distributed

        for part in _chunks(tensor):
            self._do(lambda part=part: distributed.recv(part, source, group=self.group))  # type: ignore[misc]

    def broadcast(self, tensor: Tensor, root: int) -> None:
        """Fill every process's tensor, in CPU memory and contiguous, with that of `root`."""
        from torch import distributed

        for part in _chunks(tensor):
            self._do(lambda part=part: distributed.broadcast(part, root, group=self.group))  # type: ignore[misc]

    def share_tensors(self, tensors: Mapping[str, Tensor], root: int) -> dict[str, Tensor]:
        """Return process `root`'s tensors, in CPU memory unless they are one's own."""
        import torch

        layout = self.share([(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()], root)
        out = {}
        for name, dtype, shape in layout:
            mine = self.rank == root
            buffer = tensors[name].detach().cpu().contiguous() if mine else torch.empty(shape, dtype=dtype)
            self.broadcast(buffer, root)
            out[name] = tensors[name] if mine else buffer
        return out

    def claim(self, error: CompressorError) -> CompressorError | None:
        """Say that an error ends the job: return it if this process is to tell the user, None if another one does."""
        if self.store is None:
            return error
        try:
            return error if self.store.compare_set(_FAILED, "", str(self.rank)) == str(self.rank).encode() else None
        except RuntimeError:
            return error  # the process that kept the store is gone

    def _do(self, exchange: Callable[[], Any]) -> None:
        """Carry an exchange out.

        Raises:
            LostProcessError: Another process is gone.
        """
        try:
            exchange()
        except RuntimeError as error:
            raise LostProcessError(
                f"another of the {self.size} processes of this job ended: killed, out of memory, or machine gone",
                "the same command continues where it was, with as many processes as you like",
            ) from error


ALONE = Ranks()
"""A process without others."""


def announced() -> tuple[int, int]:
    """Return this process's number and how many there are, as its launcher says in the environment.

    Raises:
        RecipeError: RANK or WORLD_SIZE is no such number.
    """
    size, rank = os.environ.get("WORLD_SIZE") or "1", os.environ.get("RANK") or "0"
    if not (size.isdecimal() and rank.isdecimal() and int(rank) < int(size)):
        raise RecipeError(f"RANK is {rank!r} and WORLD_SIZE {size!r}", "start the processes with torchrun")
    return int(rank), int(size)


def join() -> Ranks:
    """Return the processes of this job, which meet when they call this for the first time.

    Raises:
        RecipeError: The environment announces others, but not how to reach them.
        ResourceError: They cannot be reached.
    """
    from torch import distributed

    started = distributed.is_available() and distributed.is_initialized()
    return _meet() if (distributed.get_world_size() if started else announced()[1]) > 1 else ALONE


@cache
def _meet() -> Group:
    from torch import distributed

    if not distributed.is_available():
        raise UnsupportedError("this torch cannot talk to other processes", "unset WORLD_SIZE, or use another build")
    if distributed.is_initialized():
        return Group(distributed.get_rank(), distributed.get_world_size(), None, _new_group())
    from torch.distributed.rendezvous import rendezvous

    rank, size = announced()
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise RecipeError(
            f"WORLD_SIZE is {size}, but {' and '.join(missing)} not set",
            "start the processes with torchrun, or unset WORLD_SIZE for a run in one process",
        )
    try:
        store, rank, size = next(rendezvous("env://", timeout=MEETING))
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=MEETING)
        _pick_gpu()
        return Group(rank, size, store, _new_group())
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = str(error).strip().splitlines()[0]
        raise ResourceError(f"process {rank} of {size} did not meet the others at {where}: {reason}") from error


def leave() -> None:
    """Close the connections `join` made, if it made any; those that somebody else made stay."""
    if not _meet.cache_info().currsize:
        return
    if _meet().store is not None:
        from torch import distributed

        distributed.destroy_process_group()
    _meet.cache_clear()


def joined() -> Ranks:
    """Return the processes this one has met already."""
    return _meet() if _meet.cache_info().currsize else ALONE


def speaks() -> bool:
    """Return whether this process is the one that talks to the user."""
    try:
        return announced()[0] == 0
    except RecipeError:
        return True


def whose_error(error: CompressorError) -> CompressorError | None:
    """Return the error if this process is to tell the user about it, None if another one does."""
    met = joined()
    if met.size > 1:
        return met.claim(error)
    return error if speaks() else None  # nobody was met yet: all of them fail alike


def _new_group() -> Any:
    from torch import distributed

    return distributed.new_group(backend="gloo", timeout=PATIENCE)


def _pick_gpu() -> None:
    """Make `cuda` mean another device in every process of a machine, as far as there are enough."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def _chunks(tensor: Tensor) -> Iterator[Tensor]:
    """Yield a contiguous tensor's bytes in parts: gloo does not know every dtype."""
    import torch

    if tensor.numel():
        yield from tensor.reshape(-1).view(torch.uint8).split(CHUNK_BYTES)
