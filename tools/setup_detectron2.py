#!/usr/bin/env python3
"""Installs Detectron2 0.5 as a pure-Python package where no Detectron2 can be imported yet.

The distribution ``detectron2-cdo`` 0.5 on the package index carries the Python files of Detectron2's official tag v0.5
without the C++ sources, so that a plain ``pip install`` of it fails to build. This script lets pip download it, has its
sha256 checked *before* anything of it runs, builds a wheel ``detectron2 0.5+python`` from its Python files and installs
that. ``pip uninstall detectron2`` removes it. One line is added to its ``detectron2/__init__.py``: where multiseg_d2 is
installed, its stand-ins for missing libraries are in place before Detectron2 needs them, in whatever order a program
imports the two.

A Detectron2 that this Python can already import is used as it is. What an interrupted earlier run of this script left
behind is removed first: a marker file says that an installation is under way, and RECORD says what belongs to it.

Environment: ``DETECTRON2_SDIST`` names a local copy of the sdist (same sha256), for machines without a package index.
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import io
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

VERSION = "0.5+python"
DIST_INFO = f"detectron2-{VERSION}.dist-info"
MARKER = ".detectron2-is-being-installed"
#: Folders of the sdist and where they go in the wheel; as Detectron2's own setup.py places the projects.
FOLDERS = {
    "detectron2": "detectron2",
    "projects/DeepLab/deeplab": "detectron2/projects/deeplab",
    "projects/PointRend/point_rend": "detectron2/projects/point_rend",
}
#: What is added to Detectron2's own files, see :func:`mended`.
STAND_INS = "detectron2/_stand_ins.py"
STAND_INS_SOURCE = b'''"""Added by tools/setup_detectron2.py of multiseg_d2: its stand-ins for what is missing here.

Without multiseg_d2, Detectron2 is as it was published.
"""

import importlib.util
import os
import sys

if "multiseg_d2.compat" not in sys.modules:
    _package = importlib.util.find_spec("multiseg_d2")
    if _package is not None and _package.submodule_search_locations:
        _spec = importlib.util.spec_from_file_location(
            "multiseg_d2.compat", os.path.join(list(_package.submodule_search_locations)[0], "compat.py")
        )
        _compat = importlib.util.module_from_spec(_spec)
        _spec.loader.exec_module(_compat)
        sys.modules["multiseg_d2.compat"] = _compat  # the package will find it there
if "multiseg_d2.compat" in sys.modules:
    sys.modules["multiseg_d2.compat"].install()
'''
_ADDED_LINE = b"from . import _stand_ins  # added by multiseg_d2, see there\n\n"
#: What the installed Python files import (Detectron2's own pins, of 2021, exclude today's releases).
REQUIREMENTS = (
    "Pillow", "cloudpickle", "fvcore<0.1.6,>=0.1.5", "iopath", "matplotlib", "numpy", "omegaconf>=2.1", "pycocotools",
    "tabulate", "tensorboard", "termcolor", "torch", "tqdm", "yacs",
)  # fmt: skip


@dataclass(frozen=True)
class Pin:
    """One exact source distribution."""

    name: str
    version: str
    sha256: str


PIN = Pin("detectron2-cdo", "0.5", "53c9e79e9cc943e80419c588ea44b5479507a8628ed14a4e06bd093e29311b18")


class SetupError(Exception):
    """The set-up cannot go on; the message says what to do."""


def site_packages() -> Path:
    """Where pip installs pure-Python packages of this interpreter."""
    return Path(sysconfig.get_paths()["purelib"])


def pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs this interpreter's pip, its output captured."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


# ---- What is there ---------------------------------------------------------------------------------------------------


def find_importable() -> str | None:
    """``"0.6 at /path"`` of the Detectron2 that ``import detectron2`` finds, None where it finds none.

    Raises:
        SetupError: One is found but cannot be imported; installing over it would hide the fault.
    """
    probe = (
        "import importlib.util, sys\n"
        "spec = importlib.util.find_spec('detectron2')\n"
        "if spec is None or spec.origin is None: sys.exit(3)\n"  # no origin: a mere folder of that name
        "print(spec.origin, flush=True)\n"
        "import detectron2\n"
        "print(getattr(detectron2, '__version__', 'unknown version'))"
    )
    with tempfile.TemporaryDirectory() as elsewhere:  # `python -c` looks into the current folder first
        done = subprocess.run([sys.executable, "-c", probe], cwd=elsewhere, capture_output=True, text=True)
    if done.returncode == 3:
        return None
    lines = done.stdout.split("\n")
    if done.returncode != 0:
        raise SetupError(
            f"the Detectron2 found at {lines[0] or 'an unknown place'} cannot be imported:\n{done.stderr.strip()}\n"
            "Mend or uninstall it (pip uninstall detectron2) and run the set-up again."
        )
    return f"{lines[1]} at {Path(lines[0]).parent}"


def damaged_files(site: Path) -> list[str]:
    """Files of our installation that are missing or changed; ``["RECORD"]`` where even the list is missing."""
    record = site / DIST_INFO / "RECORD"
    if not record.is_file():
        return ["RECORD"]
    damaged = []
    for name, digest, _size in csv.reader(io.StringIO(record.read_text(encoding="utf-8"))):
        path = site / name
        if not path.is_file() or (digest and digest != _digest(path.read_bytes())):
            damaged.append(name)
    return damaged


def mended(files: dict[str, bytes]) -> dict[str, bytes]:
    """Detectron2's files with the stand-ins: one file more, and one line at the beginning of ``__init__.py``."""
    init = files["detectron2/__init__.py"]
    init = init if init.startswith(_ADDED_LINE) else _ADDED_LINE + init
    return {**files, "detectron2/__init__.py": init, STAND_INS: STAND_INS_SOURCE}


def mend(site: Path) -> bool:
    """Adds the stand-ins to a copy that an earlier version of this script installed; whether there was one to mend."""
    record = site / DIST_INFO / "RECORD"
    init = site / "detectron2" / "__init__.py"
    if not record.is_file() or not init.is_file():
        return False
    there = site / STAND_INS
    if there.is_file() and there.read_bytes() == STAND_INS_SOURCE and init.read_bytes().startswith(_ADDED_LINE):
        return False
    changed = mended({"detectron2/__init__.py": init.read_bytes()})
    rows = [row for row in csv.reader(io.StringIO(record.read_text(encoding="utf-8"))) if row[0] not in changed]
    rows += [[name, _digest(content), str(len(content))] for name, content in changed.items()]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    (site / MARKER).touch()  # a half-mended copy is removed by the next run
    for name, content in {**changed, f"{DIST_INFO}/RECORD": text.getvalue().encode()}.items():
        (site / name).write_bytes(content)
    (site / MARKER).unlink()
    return True


def remove_remains(site: Path) -> None:
    """Removes what a whole or a half installation by this script left in ``site``, the marker last."""
    for path in (site / "detectron2", site / DIST_INFO, *site.glob("~etectron2*")):  # ~...: pip's own temporary names
        if path.is_dir():
            shutil.rmtree(path)
    (site / MARKER).unlink(missing_ok=True)


# ---- Download, build, install ----------------------------------------------------------------------------------------


def download(pin: Pin, folder: Path) -> Path:
    """The pinned sdist, downloaded by pip into ``folder``.

    pip compares the sha256 of the file before it unpacks it or asks it for its metadata (which runs its setup.py).

    Raises:
        SetupError: It cannot be had, or is not the pinned file.
    """
    wanted = folder / "requirement.txt"
    wanted.write_text(f"{pin.name}=={pin.version} --hash=sha256:{pin.sha256}\n")
    done = pip(
        *("download", "--require-hashes", "--no-deps", "--no-build-isolation", "--no-binary", ":all:"),
        *("--no-cache-dir", "--dest", str(folder), "--requirement", str(wanted)),
    )
    if done.returncode != 0:
        if "DO NOT MATCH THE HASHES" in done.stdout:
            raise SetupError(f"{done.stdout.strip()}\n{_refused(f'{pin.name} {pin.version} from the index', pin)}")
        raise SetupError(
            f"{done.stdout.strip()}\npip could not download {pin.name} {pin.version} (its messages are above). Check "
            "the network and pip's index settings, or set DETECTRON2_SDIST to a copy of the file, or install any "
            "Detectron2 yourself; then run the set-up again."
        )
    return next(folder.glob("*.tar.gz"))


def check_hash(sdist: Path, pin: Pin) -> None:
    """Raises SetupError unless ``sdist`` is the pinned file, byte for byte."""
    try:
        found = hashlib.sha256(sdist.read_bytes()).hexdigest()
    except OSError as error:
        raise SetupError(f"the sdist {sdist} cannot be read: {error}") from None
    if found != pin.sha256:
        raise SetupError(f"{_refused(str(sdist), pin)}\n  expected sha256 {pin.sha256}\n  found           {found}")


def build_wheel(sdist: Path, folder: Path) -> Path:
    """A pure-Python wheel ``detectron2 0.5+python`` from the Python files of the sdist; runs nothing of it."""
    files: dict[str, bytes] = {}
    with tarfile.open(sdist) as archive:
        for member in archive:
            target = _target(PurePosixPath(member.name)) if member.isfile() else None
            if target is not None:
                files[target] = archive.extractfile(member).read()
    missing = [f for f in FOLDERS.values() if f"{f}/__init__.py" not in files]
    if missing:
        raise SetupError(f"{sdist.name} has no {', '.join(missing)}: not the sdist this script knows")
    files = mended(files)
    requirements = "".join(f"Requires-Dist: {r}\n" for r in REQUIREMENTS)
    files[f"{DIST_INFO}/METADATA"] = (
        f"Metadata-Version: 2.1\nName: detectron2\nVersion: {VERSION}\n"
        "Summary: Detectron2, its Python files only (no compiled operators)\nLicense: Apache-2.0\n" + requirements
    ).encode()
    files[f"{DIST_INFO}/WHEEL"] = (
        b"Wheel-Version: 1.0\nGenerator: setup_detectron2\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    record = io.StringIO()
    rows = csv.writer(record, lineterminator="\n")
    rows.writerows((name, _digest(content), len(content)) for name, content in files.items())
    rows.writerow((f"{DIST_INFO}/RECORD", "", ""))
    files[f"{DIST_INFO}/RECORD"] = record.getvalue().encode()
    wheel = folder / f"detectron2-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return wheel


def install_wheel(wheel: Path, site: Path) -> None:
    """Installs the wheel with pip and checks the result file by file; the marker stands until all is well.

    Raises:
        SetupError: pip failed, or the result is not what the wheel holds (the remains are removed).
    """
    marker = site / MARKER
    try:
        marker.touch()
    except OSError as error:
        raise SetupError(f"{site} cannot be written ({error}); use a virtual environment, e.g. `make setup`") from None
    done = pip("install", "--no-deps", "--no-index", str(wheel))
    damaged = damaged_files(site) if done.returncode == 0 else []
    if done.returncode != 0 or damaged:
        remove_remains(site)
        about = f"damaged after the installation: {', '.join(damaged[:5])}" if damaged else done.stdout.strip()
        raise SetupError(f"Detectron2 could not be installed into {site}:\n{about}")
    marker.unlink()


def _target(path: PurePosixPath) -> str | None:
    """Name in the wheel of a file of the sdist, None for files that are left out."""
    inside = PurePosixPath(*path.parts[1:])
    if ".." in path.parts or path.is_absolute():
        return None
    if str(inside) == "LICENSE":
        return f"{DIST_INFO}/LICENSE"
    for folder, goal in FOLDERS.items():
        if inside.is_relative_to(folder):
            return str(goal / inside.relative_to(folder))
    return None


def _digest(content: bytes) -> str:
    """Digest in RECORD's notation."""
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def _refused(what: str, pin: Pin) -> str:
    return (
        f"{what} is not the file that this project pins ({pin.name} {pin.version}). It was neither unpacked nor run, "
        "and nothing was installed. A damaged download: try again. Else the index or the copy serves another file: "
        "do not use it."
    )


def main(arguments: list[str] | None = None, pin: Pin = PIN) -> int:
    """Runs the script; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(arguments)
    try:
        print(_install(pin), flush=True)
    except SetupError as error:
        print(f"Detectron2 set-up failed: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def _install(pin: Pin) -> str:
    site = site_packages()
    if (site / MARKER).exists() or ((site / DIST_INFO).exists() and damaged_files(site)):
        print("removing a half-finished installation of Detectron2", flush=True)
        remove_remains(site)
    if mend(site):
        print("stand-ins added to the Detectron2 that an earlier set-up installed", flush=True)
    present = find_importable()
    if present is not None:
        return f"Detectron2 {present} is used as it is"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        local = os.environ.get("DETECTRON2_SDIST")
        sdist = Path(local) if local else download(pin, folder)
        check_hash(sdist, pin)
        install_wheel(build_wheel(sdist, folder), site)
    return f"Detectron2 {find_importable()} installed (Python files only)"


if __name__ == "__main__":
    sys.exit(main())
