"""Which processes of a run are still there."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path


def left_in(session: int) -> list[int]:
    """Living processes of a session, once they had time to end."""
    deadline = time.monotonic() + 60
    while (found := living(session)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def living(session: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            state, _parent, _group, own = path.read_text().rpartition(") ")[2].split()[:4]
            found += [int(path.parent.name)] if int(own) == session and state != "Z" else []
    return found
