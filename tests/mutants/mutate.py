"""Puts one small fault after another into a copy of the package, and looks whether the tests notice.

    python tests/mutants/mutate.py                    # all of mutants.yaml, with a table
    python tests/mutants/mutate.py schedule "teacher" # those whose file or description has one of the words

The copy lies in a temporary folder; the working tree is not touched. Exits with 1 if a mutant survives.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
LIST = Path(__file__).with_name("mutants.yaml")
#: What the tests need of the repository.
_COPIED = ("multiseg_d2", "tests", "configs", "tools", "train_net.py", "pyproject.toml")
#: Seconds after which the tests of a mutant are ended: it has made something endless.
LIMIT = 300
#: How tests end: 0 and 1 are pytest's own codes.
_PASSED, _FAILED, _ENDLESS = 0, 1, -signal.SIGKILL


@dataclass(frozen=True)
class Mutant:
    """One fault: in ``file`` the text ``new`` in place of ``old``, which the ``tests`` must notice."""

    what: str
    file: str
    old: str
    new: str
    tests: Sequence[str]

    def applied(self, root: Path = ROOT) -> str:
        """The file's text with the fault.

        Raises:
            ValueError: the old text is not there exactly once, or the new text is no Python.
        """
        path = root / self.file
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if text.count(self.old) != 1:
            raise ValueError(
                f"mutant {self.what!r}: {self.file} has its old text {text.count(self.old)} times, not once: "
                f"{self.old!r}. Adapt it in {LIST.relative_to(ROOT)}"
            )
        changed = text.replace(self.old, self.new)
        try:
            compile(changed, self.file, "exec")
        except SyntaxError as problem:
            raise ValueError(f"mutant {self.what!r}: {self.file} is no Python any more: {problem}") from None
        return changed


def read_mutants(path: Path = LIST) -> list[Mutant]:
    """The mutants of a list."""
    return [Mutant(**entry) for entry in yaml.safe_load(path.read_text(encoding="utf-8"))]


def main(words: Sequence[str] = ()) -> list[Mutant]:
    """Tries mutants with a line each and a table at the end; returns those that survived."""
    mutants = [m for m in read_mutants() if not words or any(word in m.file + m.what for word in words)]
    _import_what_all_need()
    survived, lines = [], []
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        root = _copy_into(Path(folder))
        tests = sorted({test for mutant in mutants for test in mutant.tests})
        print(f"{len(mutants)} mutants; first the {len(tests)} test files without any", flush=True)
        if _run(root, tests) != _PASSED:
            raise SystemExit("the tests fail as they are: mend them first")
        for number, mutant in enumerate(mutants, 1):
            began, path = time.perf_counter(), root / mutant.file
            whole, changed = path.read_text(encoding="utf-8"), mutant.applied(root)
            path.write_text(changed, encoding="utf-8")
            code = _run(root, mutant.tests)
            path.write_text(whole, encoding="utf-8")
            if code not in (_PASSED, _FAILED, _ENDLESS):
                raise SystemExit(f"{mutant.what}: pytest ended with {code}: is {mutant.tests} right?")
            survived += [mutant] if code == _PASSED else []
            result = {_PASSED: "SURVIVED", _FAILED: "noticed", _ENDLESS: "endless"}[code]
            lines.append(f"{result:9} {mutant.file.removeprefix('multiseg_d2/'):42} {mutant.what}")
            print(
                f"[{number:2}/{len(mutants)}] {result} in {time.perf_counter() - began:.1f} s: {mutant.what}",
                flush=True,
            )
    print("\n" + "\n".join(lines) + f"\n\n{len(mutants) - len(survived)} of {len(mutants)} noticed")
    return survived


def _copy_into(folder: Path) -> Path:
    for name in _COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    return folder


def _import_what_all_need() -> None:
    """Imports once what takes seconds; every run of tests is a fork of this process."""
    import cv2  # noqa: F401
    import matplotlib  # noqa: F401
    import pytest  # noqa: F401
    import torch

    torch.set_num_threads(1)
    assert not {"multiseg_d2", "detectron2"} & set(sys.modules), "the copy must be what is imported"


def _run(root: Path, tests: Sequence[str]) -> int:
    """Exit code of pytest on the copy, in a group of processes of its own; see :data:`_ENDLESS`."""
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        code = 99
        try:
            code = _pytest(root, tests)
        finally:
            os._exit(code)
    deadline = time.monotonic() + LIMIT * max(len(tests) // 3, 1)
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return _ENDLESS
        time.sleep(0.05)


def _pytest(root: Path, tests: Sequence[str]) -> int:
    """Runs tests of the copy in this process."""
    import pytest

    log = os.open(root / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(root)
    sys.path[:] = [str(root), *(entry for entry in sys.path if Path(entry or ".").resolve() not in (ROOT, LIST.parent))]
    sys.dont_write_bytecode = True  # a second change within the clock's tick would not be seen
    os.environ |= {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    import multiseg_d2

    assert Path(multiseg_d2.__file__).is_relative_to(root), multiseg_d2.__file__
    return int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--rootdir", str(root), *tests]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("words", nargs="*", help="only mutants with one of these in file or description; default: all")
    sys.exit(1 if main(parser.parse_args().words) else 0)
