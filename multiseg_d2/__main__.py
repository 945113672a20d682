"""``python -m multiseg_d2``: which versions are in use and what stands in for missing libraries."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import detectron2
import numpy
import torch

from . import __version__, compat


def _version(package: str) -> str:
    """Version of an installed package, found without importing it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed (pip install multiseg-d2[timm])"


def main() -> None:
    """Prints the environment, for people and bug reports."""
    rows = {
        "multiseg_d2": f"{__version__} ({Path(__file__).parent})",
        "Python": sys.version.split()[0],
        "Detectron2": f"{detectron2.__version__} ({Path(detectron2.__file__).parent})",
        "torch": f"{torch.__version__}, GPUs: {torch.cuda.device_count()}",
        "numpy": numpy.__version__,
        "timm": _version("timm"),
        "stand-ins": ", ".join(compat.stand_ins()) or "none",
    }
    for name, value in rows.items():
        print(f"{name:<12} {value}")


if __name__ == "__main__":
    main()
