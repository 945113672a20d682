"""Backbones beside Detectron2's own, registered in its BACKBONE_REGISTRY."""

from .resnet import DeepStem, DilatedBasicBlock, build_dilated_resnet_backbone

__all__ = ["DeepStem", "DilatedBasicBlock", "build_dilated_resnet_backbone"]
