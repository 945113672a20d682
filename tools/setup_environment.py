#!/usr/bin/env python3
"""Makes the project's own virtual environment and installs everything into it: what ``make setup`` runs.

Order: environment, torch (one exact CPU-sized version), this package with its test tools and the weights that need no
download at run time, timm, OpenCV without windows where the usual one cannot be imported, Detectron2
(``setup_detectron2.py``), a trial import. Only when all of it worked is a
stamp written. A stamp that fits what is asked for makes the next run return at once; anything else (interrupted, other
requirements, a moved folder, Detectron2 gone) repeats the steps, which leave alone what is already right.

Environment: ``TORCH`` is what pip installs as torch (default ``torch==2.13.0``), several words allowed. pip's own
variables and settings (index, proxy, certificates, wheels) apply as always.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: two set-ups at once are then not kept apart
    fcntl = None

ROOT = Path(__file__).resolve().parent.parent
TORCH = "torch==2.13.0"
TIMM = "timm>=1.0.31"
STAMP = ".multiseg-setup"
#: The stamp holds a hash of these files: a change in any of them means installing again.
INPUTS = ("pyproject.toml", "tools/setup_environment.py", "tools/setup_detectron2.py")
#: Settings of pip that would send packages somewhere other than into the environment.
FOREIGN = ("PIP_USER", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PYTHONHOME")


class SetupError(Exception):
    """The set-up cannot go on; the message says what to do."""


@dataclass(frozen=True)
class Step:
    """One command of the set-up, what to say when it fails, and Python code that, where it runs, makes it needless."""

    title: str
    command: tuple[str, ...]
    advice: str
    needless_if: str = ""


def python_of(venv: Path) -> Path:
    """The interpreter of a virtual environment."""
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def stamp_text(root: Path, torch: str) -> str:
    """What the stamp of a finished set-up says: a hash over everything that decides what is installed."""
    digest = hashlib.sha256(f"{root}\n{torch}\n".encode())
    for name in INPUTS:
        digest.update((root / name).read_bytes())
    return digest.hexdigest() + "\n"


def is_ready(venv: Path, stamp: str) -> bool:
    """Whether a finished set-up stands in ``venv`` that fits ``stamp``, its interpreter runs and finds Detectron2."""
    try:
        if (venv / STAMP).read_text() != stamp:
            return False
    except OSError:
        return False
    packages = ("torch", "detectron2", "multiseg_d2", "timm")
    find = f"import importlib.util, sys; sys.exit(not all(map(importlib.util.find_spec, {packages})))"
    return _runs(python_of(venv), find)


def make_venv(venv: Path) -> None:
    """Makes the virtual environment; one whose interpreter no longer runs is made anew.

    Raises:
        SetupError: ``venv`` is a folder with other content, or Python cannot make environments.
    """
    if _runs(python_of(venv), "import pip"):
        return
    if venv.exists() and any(venv.iterdir()) and not (venv / "pyvenv.cfg").exists():
        raise SetupError(f"{venv} exists and is no virtual environment; move it away, or set VENV to another folder")
    print(f"== making the virtual environment {venv}", flush=True)
    done = subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)])
    if done.returncode != 0:
        shutil.rmtree(venv, ignore_errors=True)
        raise SetupError(
            f"{sys.executable} could not make a virtual environment (messages above). On Debian and Ubuntu the package "
            "python3.11-venv is needed; or set PYTHON to another Python 3.10 or newer."
        )


def steps(venv: Path, root: Path, torch: str) -> list[Step]:
    """What is run after the environment exists, in order."""
    python = str(python_of(venv))
    pip = (python, "-m", "pip", "--disable-pip-version-check", "install")
    package = ("--quiet", "--no-build-isolation", "--editable", f"{root}[test]")
    network = (
        "pip's message is above. No network, or an index that does not answer: set pip's variables (PIP_INDEX_URL, "
        "PIP_FIND_LINKS, a proxy)."
    )
    return [
        Step("installing torch", (*pip, *shlex.split(torch), "setuptools>=64", "wheel"), network),
        # Without build isolation: setuptools is there now, and pip need not fetch it a second time.
        Step("installing this package", (*pip, *package), network),
        # Without its requirements: torchvision's wheels on the index are CUDA builds and would exchange torch. timm is
        # imported with a stand-in in its place; the other requirements come with this package's test tools.
        Step("installing timm", (*pip, "--no-deps", TIMM), network),
        # opencv-python wants the system's window libraries (libGL.so.1, ...), which servers and containers often lack.
        Step(
            "removing OpenCV, which cannot be imported here (its windows need libraries of the system)",
            (python, "-m", "pip", "--disable-pip-version-check", "uninstall", "--yes", "opencv-python"),
            "See the message above.",
            needless_if="import cv2",
        ),
        Step("installing OpenCV without windows", (*pip, "opencv-python-headless>=4.5.1"), network, "import cv2"),
        Step("setting up Detectron2", (python, str(root / "tools/setup_detectron2.py")), "See the message above."),
        Step("trial import", (python, "-m", "multiseg_d2"), "The installed packages do not work together; see above."),
    ]


def run_step(step: Step) -> None:
    """Runs one step, its output shown; raises SetupError where it fails."""
    print(f"== {step.title}", flush=True)
    environment = {name: value for name, value in os.environ.items() if name not in FOREIGN}
    done = subprocess.run(step.command, env=environment)
    if done.returncode != 0:
        raise SetupError(f"{step.title} failed (exit code {done.returncode}). {step.advice}")


def set_up(venv: Path, root: Path, torch: str) -> None:
    """Brings ``venv`` into the state that the stamp describes, then writes the stamp.

    Raises:
        SetupError: A step failed; no stamp stands, so the next run repeats the steps.
    """
    stamp = stamp_text(root, torch)
    if is_ready(venv, stamp):
        print(f"environment {venv} is ready")
        return
    (venv / STAMP).unlink(missing_ok=True)  # from here on nothing claims that the environment is whole
    make_venv(venv)
    for step in steps(venv, root, torch):
        if not (step.needless_if and _runs(python_of(venv), step.needless_if)):
            run_step(step)
    temporary = venv / f"{STAMP}.{os.getpid()}"
    temporary.write_text(stamp)
    os.replace(temporary, venv / STAMP)
    print(f"environment {venv} is ready")


@contextlib.contextmanager
def only_one(root: Path):
    """Waits until no other set-up of this checkout runs."""
    with open(root / "pyproject.toml", "rb") as held:
        if fcntl is not None:
            fcntl.flock(held, fcntl.LOCK_EX)
        yield


def main(arguments: list[str] | None = None) -> int:
    """Runs the script; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="folder of the environment (default: .venv)")
    options = parser.parse_args(arguments)
    if sys.version_info < (3, 10):  # noqa: UP036 (PYTHON may name an older one)
        print(f"Python 3.10 or newer is needed; this is {sys.version.split()[0]}", file=sys.stderr)
        return 1
    try:
        with only_one(ROOT):
            set_up(options.venv.absolute(), ROOT, os.environ.get("TORCH") or TORCH)
    except SetupError as error:
        print(f"\nSet-up stopped: {error}\nThe environment is not marked as ready; run it again.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nSet-up interrupted. The environment is not marked as ready; run it again.", file=sys.stderr)
        return 130
    return 0


def _runs(python: Path, code: str) -> bool:
    """Whether the interpreter exists and runs the code without error."""
    try:
        return subprocess.run([str(python), "-c", code], cwd=python.parent, capture_output=True).returncode == 0
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(main())
