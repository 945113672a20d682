"""Progress: a bar with the time that is left on a terminal, lines elsewhere, and a log that is useful in both cases."""

from __future__ import annotations

import logging
import os
import re
import sys

import pytest
from rich.console import Console

from multiseg_d2 import progress as module
from multiseg_d2.progress import progress

logger = logging.getLogger("multiseg_d2.some_job")


@pytest.fixture
def terminal(monkeypatch):
    """Standard error is a terminal; returns what it has been sent so far."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    ours, theirs = os.openpty()
    os.set_blocking(ours, False)
    with os.fdopen(theirs, "w") as stream, os.fdopen(ours, "rb") as screen:
        monkeypatch.setattr(module, "CONSOLE", Console(file=stream))

        def sent() -> str:
            stream.flush()
            return (screen.read() or b"").decode()

        yield sent


def plain(text: str) -> str:
    """Without the codes that move the cursor and colour."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_a_terminal_has_a_bar_and_the_log_its_ends(terminal, caplog, monkeypatch):
    monkeypatch.setattr(module, "_PICTURES", 0.0)
    streams = sys.stdout, sys.stderr
    with caplog.at_level("INFO"), progress("street_val", 5, "images", logger) as step:
        for done in range(1, 6):
            step()
            shown = plain(terminal())
            assert "street_val" in shown and f"{done}/5 ETA " in shown
            assert re.search(r"ETA (0:00:0\d|-:--:--)", shown)
    first, last = caplog.messages
    assert first == "street_val: 5 images"
    assert re.fullmatch(r"street_val: 5 of 5 images, \d\.\d{3} s each, ETA 0:00:00", last)
    assert (sys.stdout, sys.stderr) == streams


def test_the_bar_goes_whatever_happens(terminal):
    streams = sys.stdout, sys.stderr
    with pytest.raises(ZeroDivisionError), progress("job", 3, "files") as step:
        step()
        raise ZeroDivisionError
    assert (sys.stdout, sys.stderr) == streams
    assert terminal().endswith("\x1b[?25h")  # the cursor is seen again
    with progress("next", 1, "files") as step:
        step()
    assert "next" in terminal()


def test_another_process_of_several_writes_lines(terminal, caplog):
    with caplog.at_level("INFO"), progress("job", 2, "files", logger, bar=False) as step:
        step()
        step()
    assert terminal() == "" and len(caplog.messages) == 2


def test_elsewhere_lines_say_when_it_will_be_done(caplog, capsys, monkeypatch):
    """Every part takes four seconds, so that every third is told."""
    now = [0.0]
    monkeypatch.setattr(logging, "raiseExceptions", False)  # Detectron2's handlers write to an earlier test's stream
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    with caplog.at_level("INFO"), progress("job", 7, "files", logger) as step:
        for _ in range(7):
            now[0] += 4
            step()
    assert caplog.messages == [
        "job: 7 files",
        "job: 3 of 7 files, 4.000 s each, ETA 0:00:16",
        "job: 6 of 7 files, 4.000 s each, ETA 0:00:04",
        "job: 7 of 7 files, 4.000 s each, ETA 0:00:00",
    ]
    assert capsys.readouterr().err == ""


def test_without_a_log_lines_go_to_standard_error(capsys):
    with progress("frames of a film", None, "frames") as step:
        step()
        step()
    with progress("nothing", 0, "files"):
        pass
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "frames of a film: frames" and lines[2:] == ["nothing: 0 files"]
    assert re.fullmatch(r"frames of a film: 2 frames, \d\.\d{3} s each", lines[1])
