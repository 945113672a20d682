"""Semantic segmentation over many datasets on Detectron2."""

from __future__ import annotations

from . import compat

compat.install()  # before anything imports detectron2

from . import modeling  # noqa: E402, F401  (registers heads, decoders and backbones with Detectron2)
from .config import add_multiseg_config  # noqa: E402
from .data.register import register_dataset, register_packaged  # noqa: E402
from .label_space import LabelSpace  # noqa: E402

__version__ = "0.1.0"
__all__ = ["LabelSpace", "__version__", "add_multiseg_config", "register_dataset"]

register_packaged()
