"""Backbones of Detectron2 and timm under the segmentor: one training step and one prediction of each, and sizes."""

from __future__ import annotations

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, build_backbone, build_model

from multiseg_d2.modeling.decoders import build_decoder

FEATURES = ["res2", "res3", "res4", "res5"]
FPN_FEATURES = ["p2", "p3", "p4", "p5"]
RESNET = ("MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64)
NO_AUXILIARY = ("MODEL.SEM_SEG_HEAD.AUX_LOSS_WEIGHT", 0.0)


def timm_options(name: str, decoder: str = "FPNDecoder") -> tuple:
    return (
        *("MODEL.BACKBONE.NAME", "build_timm_backbone", "MODEL.TIMM.NAME", name, "MODEL.SEM_SEG_HEAD.DECODER", decoder),
        *("MODEL.SEM_SEG_HEAD.IN_FEATURES", FEATURES, *NO_AUXILIARY),
    )


MODELS = {
    "Detectron2's ResNet": ("MODEL.BACKBONE.NAME", "build_resnet_backbone", *RESNET),
    "Detectron2's FPN": (
        *("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", *RESNET, "MODEL.FPN.IN_FEATURES", FEATURES),
        *("MODEL.SEM_SEG_HEAD.DECODER", "FPNDecoder", "MODEL.SEM_SEG_HEAD.IN_FEATURES", FPN_FEATURES, *NO_AUXILIARY),
    ),
    "EfficientNet": timm_options("tf_efficientnet_lite0"),
    "EfficientNet, DeepLabV3+": timm_options("tf_efficientnet_lite0", "DeepLabV3PlusDecoder"),
    "HRNet": timm_options("hrnet_w18_small", "ConcatDecoder"),
    "ConvNeXt": timm_options("convnext_atto"),
}


@pytest.fixture
def vitdet():
    """ViTDet's pyramid on a tiny ViT, registered as a user would; in Detectron2's main branch only."""
    vit = pytest.importorskip("detectron2.modeling.backbone.vit", reason="this Detectron2 has no ViT")

    def build_tiny_vitdet_backbone(cfg, input_shape: ShapeSpec):
        net = vit.ViT(
            img_size=64,
            embed_dim=32,
            depth=2,
            num_heads=2,
            window_size=4,
            window_block_indexes=[0],
            use_rel_pos=True,
            out_feature="last_feat",
        )
        return vit.SimpleFeaturePyramid(
            net, in_feature="last_feat", out_channels=32, scale_factors=(4.0, 2.0, 1.0, 0.5), norm="LN"
        )

    if "build_tiny_vitdet_backbone" not in BACKBONE_REGISTRY:
        BACKBONE_REGISTRY.register(build_tiny_vitdet_backbone)
    return (
        *("MODEL.BACKBONE.NAME", "build_tiny_vitdet_backbone", "MODEL.SEM_SEG_HEAD.DECODER", "FPNDecoder"),
        *("MODEL.SEM_SEG_HEAD.IN_FEATURES", FPN_FEATURES, *NO_AUXILIARY),
    )


def trains_and_predicts(make_cfg, make_sample, *options) -> None:
    """One step moves every parameter that is trained; predictions have the size and the classes of their dataset."""
    torch.manual_seed(0)
    model = build_model(make_cfg("MODEL.DATASET_NORM.ENABLED", True, *options))
    samples = [make_sample(0), make_sample(1), make_sample(2, like="beta"), make_sample(3, like="beta")]
    model.train()
    losses = model(samples)
    total = sum(losses.values())
    total.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    without = [name for name, p in trained.items() if p.grad is None]
    assert torch.isfinite(total) and not without, without
    before = {name: p.detach().clone() for name, p in trained.items()}
    torch.optim.SGD(trained.values(), lr=0.01).step()
    moved = [name for name, p in trained.items() if not torch.equal(p, before[name])]
    assert len(moved) > 0.9 * len(trained)
    model.eval()
    for sample, classes in ((samples[0], 5), (samples[2], 3)):
        scores = model([sample])[0]["sem_seg"]
        assert scores.shape == (classes, 48, 64) and torch.isfinite(scores).all()


@pytest.mark.parametrize("name", MODELS)
def test_it_trains_and_predicts(make_cfg, make_sample, name):
    trains_and_predicts(make_cfg, make_sample, *MODELS[name])


def test_vitdet_trains_and_predicts(make_cfg, make_sample, vitdet):
    trains_and_predicts(make_cfg, make_sample, *vitdet)


@pytest.mark.parametrize(
    ("name", "width", "millions"),
    [("hrnet_w18_small", 240, 1.5), ("hrnet_w18_small_v2", 270, 3.9), ("hrnet_w48", 720, 65.9)],
)
def test_hrnets_have_the_published_numbers_of_parameters(make_cfg, name, width, millions):
    """HRNetV2 with its head for Cityscapes' 19 classes, whose 1x1 convolution has a bias beside its norm.

    Source: the authors' table of their small models on Cityscapes; HRNetV2 (arXiv 1904.04514), table 3, for W48.
    """
    cfg = make_cfg(*timm_options(name, "ConcatDecoder"), "MODEL.SEM_SEG_HEAD.CONVS_DIM", width)
    with torch.device("meta"):
        backbone = build_backbone(cfg)
        decoder = build_decoder(cfg, {key: backbone.output_shape()[key] for key in FEATURES})
    count = sum(p.numel() for part in (backbone, decoder) for p in part.parameters())
    assert round((count + width + 19 * width + 19) / 1e6, 1) == millions
