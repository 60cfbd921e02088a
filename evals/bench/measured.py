"""Run one command and write down how long it took and how much memory it and its children needed.

    python measured.py REPORT COMMAND...

A separate small program, because on Linux a child counts the memory of the process that started it as its own peak:
started from here that is a few megabytes, started from a process that holds models it would be theirs. Nothing but the
standard library is imported for the same reason.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time


def main() -> int:
    """Run the command; the exit code is the command's own, and its signals are passed on."""
    report, *command = sys.argv[1:]
    started = time.perf_counter()
    child = subprocess.Popen(command)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda signum, frame: child.send_signal(signum))
    code = child.wait()
    seconds = time.perf_counter() - started
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    unit = 1 if sys.platform == "darwin" else 1024
    measured = {
        "returncode": code,
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_rss": usage.ru_maxrss * unit,
    }
    with open(f"{report}.part", "w", encoding="utf-8") as file:
        json.dump(measured, file)
    os.replace(f"{report}.part", report)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
