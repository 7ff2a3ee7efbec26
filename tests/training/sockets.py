"""Where processes accept connections."""

from __future__ import annotations

import importlib
from contextlib import suppress
from typing import Any

import ray  # noqa: F401  (brings psutil)


def listening_addresses(pid: int | None = None) -> set[str]:
    """Addresses at which a process (by default this one) and its descendants listen."""
    psutil: Any = importlib.import_module("psutil")
    found = set()
    with suppress(psutil.NoSuchProcess):  # it has ended
        process = psutil.Process(pid)
        for each in [process, *process.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                found |= {
                    c.laddr.ip.removeprefix("::ffff:") for c in each.net_connections("inet") if c.status == "LISTEN"
                }
    return found
