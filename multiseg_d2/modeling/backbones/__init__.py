"""Backbones beside Detectron2's own, registered in its BACKBONE_REGISTRY."""

from __future__ import annotations

from .resnet import DeepStem, DilatedBasicBlock, build_deep_stem_resnet_backbone, build_dilated_resnet_backbone

__all__ = ["DeepStem", "DilatedBasicBlock", "build_deep_stem_resnet_backbone", "build_dilated_resnet_backbone"]
