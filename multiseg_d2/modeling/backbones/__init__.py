"""Backbones beside Detectron2's own, registered in its BACKBONE_REGISTRY."""

from __future__ import annotations

from .resnet import DeepStem, DilatedBasicBlock, build_deep_stem_resnet_backbone, build_dilated_resnet_backbone
from .timm_backbone import TimmBackbone, build_timm_backbone

__all__ = [
    "DeepStem",
    "DilatedBasicBlock",
    "TimmBackbone",
    "build_deep_stem_resnet_backbone",
    "build_dilated_resnet_backbone",
    "build_timm_backbone",
]
