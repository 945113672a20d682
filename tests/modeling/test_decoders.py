"""Decoders against Detectron2's head and against their definitions spelled out."""

from __future__ import annotations

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead
from torch.nn import functional as F

from multiseg_d2.modeling.decoders import ConcatDecoder, DeepLabV3PlusDecoder, FPNDecoder, PSPDecoder, build_decoder

RESNET = {f"res{i}": ShapeSpec(channels=c, stride=s) for i, c, s in ((2, 8, 4), (3, 16, 8), (4, 32, 8), (5, 64, 8))}


def features(shapes, size=(48, 80), seed=0):
    torch.manual_seed(seed)
    return {k: torch.rand(2, s.channels, -(-size[0] // s.stride), -(-size[1] // s.stride)) for k, s in shapes.items()}


def test_psp_is_its_definition():
    decoder = PSPDecoder({"res5": RESNET["res5"]}, channels=12, norm="BN").eval()
    x = features(RESNET, (48, 64))["res5"]  # 6 x 8 cells: 1, 2, 3 divide the height, windows of 6 are single rows
    parts = [x]
    for cells, branch in zip((1, 2, 3, 6), decoder.branches):
        pooled = torch.zeros(2, 64, cells, cells)
        for i in range(cells):
            for j in range(cells):
                rows = slice(i * 6 // cells, -(-(i + 1) * 6 // cells))
                columns = slice(j * 8 // cells, -(-(j + 1) * 8 // cells))
                pooled[:, :, i, j] = x[:, :, rows, columns].mean((2, 3))
        scored = F.relu(branch.norm(F.conv2d(pooled, branch.weight)))
        parts.append(F.interpolate(scored, size=(6, 8), mode="bilinear", align_corners=False))
    joined = torch.cat(parts, 1)
    expected = F.relu(decoder.bottleneck.norm(F.conv2d(joined, decoder.bottleneck.weight, padding=1)))
    torch.testing.assert_close(decoder({"res5": x}), expected)
    assert decoder.in_features == ["res5"]


def test_psp_reads_the_deepest_of_several():
    assert PSPDecoder(RESNET, channels=4, norm="BN").in_features == ["res5"]


@pytest.mark.parametrize("norm", ["BN", "SyncBN"])
def test_one_image_under_batch_norm_says_what_to_do(norm):
    decoder = PSPDecoder({"res5": RESNET["res5"]}, channels=4, norm=norm)
    with pytest.raises(ValueError, match="at least two images.*GN"):
        decoder({"res5": torch.rand(1, 64, 6, 8)})
    decoder.eval()
    assert decoder({"res5": torch.rand(1, 64, 6, 8)}).shape == (1, 4, 6, 8)


def test_one_image_under_group_norm_is_fine():
    decoder = PSPDecoder({"res5": RESNET["res5"]}, channels=64, norm="GN")  # 32 groups of two channels
    assert decoder({"res5": torch.rand(1, 64, 6, 8)}).shape == (1, 64, 6, 8)


@pytest.mark.parametrize(("stride", "rates"), [(16, (6, 12, 18)), (8, (12, 24, 36)), (32, (3, 6, 9))])
def test_deeplab_rates_follow_the_output_stride(stride, rates):
    shapes = {"res2": ShapeSpec(channels=8, stride=4), "res5": ShapeSpec(channels=64, stride=stride)}
    decoder = DeepLabV3PlusDecoder(shapes, channels=16, norm="BN")
    assert tuple(conv.dilation[0] for conv in decoder.aspp.convs[1:4]) == rates
    assert decoder.low_level.out_channels == 48
    assert decoder(features(shapes)).shape == (2, 16, 12, 20)


def test_deeplab_needs_two_features():
    with pytest.raises(ValueError, match=r"\[res2, res5\]"):
        DeepLabV3PlusDecoder({"res5": RESNET["res5"]}, channels=16, norm="BN")


def test_fpn_equals_detectron2s_head():
    shapes = {f"p{i}": ShapeSpec(channels=32, stride=2**i) for i in (2, 3, 4, 5)}
    decoder = FPNDecoder(shapes, channels=32, norm="GN").eval()
    assert decoder.laterals is None
    theirs = SemSegFPNHead(shapes, num_classes=7, conv_dims=32, common_stride=4, norm="GN").eval()
    for name, level in zip(("p2", "p3", "p4", "p5"), decoder.levels):
        their_convs = [m for m in getattr(theirs, name) if hasattr(m, "weight")]
        assert len(their_convs) == len(level)
        for mine, other in zip(level, their_convs):
            mine.load_state_dict(other.state_dict())
    x = features(shapes, (64, 96))
    torch.testing.assert_close(theirs.predictor(decoder(x)), theirs.layers(x))


@pytest.mark.parametrize("size", [(48, 80), (50, 71), (33, 1)])
def test_fpn_on_a_plain_backbone_at_any_size(size):
    decoder = FPNDecoder(RESNET, channels=16, norm="BN").eval()
    x = features(RESNET, size)
    out = decoder(x)
    assert out.shape == (2, 16, *x["res2"].shape[-2:])
    changed = dict(x, res5=x["res5"] + 1)
    assert not torch.equal(decoder(changed), out)  # the deepest level reaches the output


def test_top_down_path_is_its_definition():
    decoder = FPNDecoder(RESNET, channels=16, norm="BN").eval()
    x = features(RESNET)
    laterals = [conv(x[name]) for conv, name in zip(decoder.laterals, decoder.in_features)]
    top = laterals[3] + laterals[2]
    next_one = laterals[1] + top
    finest = laterals[0] + next_one.repeat_interleave(2, 2).repeat_interleave(2, 3)
    expected = [conv(y) for conv, y in zip(decoder.outputs, (finest, next_one, top, laterals[3]))]
    for mine, other in zip(decoder._top_down([x[n] for n in decoder.in_features]), expected):
        torch.testing.assert_close(mine, other)


def test_features_that_the_backbone_lacks_are_named(make_cfg):
    with pytest.raises(ValueError, match=r"\['p2', 'res5'\].*\['res2', 'res3'"):
        build_decoder(make_cfg("MODEL.SEM_SEG_HEAD.IN_FEATURES", ["p2", "res5"]), RESNET)


def test_concat_is_its_definition():
    decoder = ConcatDecoder(RESNET, channels=12, norm="BN").train()
    inputs = features(RESNET)
    size = inputs["res2"].shape[-2:]
    side_by_side = [
        F.interpolate(inputs[f"res{i}"], size=size, mode="bilinear", align_corners=False) for i in range(2, 6)
    ]
    mixed = F.conv2d(torch.cat(side_by_side, 1), decoder.mix.weight)
    mean, var = mixed.mean((0, 2, 3), keepdim=True), mixed.var((0, 2, 3), unbiased=False, keepdim=True)
    expected = F.relu((mixed - mean) / (var + decoder.mix.norm.eps).sqrt())  # scale 1 and shift 0 at first
    torch.testing.assert_close(decoder(inputs), expected, rtol=1e-4, atol=1e-5)
    assert decoder.in_features == ["res2", "res3", "res4", "res5"] and decoder.out_channels == 12
