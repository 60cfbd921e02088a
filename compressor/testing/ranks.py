"""Processes that share one job, forked from a test: what `torchrun` starts, without the seconds a start takes."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence

from compressor.ranks import leave
from compressor.testing.child import Child, Ended, call_main


def start(
    size: int, commands: Sequence[Sequence[object]], *, before: Callable[[int], None] | None = None
) -> list[Child]:
    """Start processes that run `compress` commands together, one after the other until one fails.

    Args:
        size: How many.
        commands: The arguments of each command.
        before: Called in every process with its number, before the first command.
    """
    ports = _free_ports(len(commands))

    def work(rank: int) -> int:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1")
        if before is not None:
            before(rank)
        code = 0
        for port, arguments in zip(ports, commands, strict=True):
            os.environ["MASTER_PORT"] = str(port)
            code = code or call_main(*arguments)
        leave()
        return code

    return [Child(lambda rank=rank: work(rank)) for rank in range(size)]  # type: ignore[misc]


def finish(children: Sequence[Child], seconds: float = 300) -> list[Ended]:
    """Wait for all processes; those still running after so many seconds are killed."""
    return [child.wait(seconds) for child in children]


def _free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(server.getsockname()[1]) for server in sockets]
    for server in sockets:
        server.close()
    return ports
