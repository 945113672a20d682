"""tools/analyze_model.py counts what there is, and reproduces the published numbers."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

TOOL = Path(__file__).resolve().parents[2] / "tools" / "analyze_model.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("analyze_model_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules["analyze_model_tool"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["analyze_model_tool"]


def config(tool, *options):
    cfg = tool.paper_config(18, 32, False)
    cfg.merge_from_list(["DATASETS.TRAIN", ("cityscapes_train", "camvid_train"), *options])
    return cfg


def test_counts_equal_those_of_every_convolution_that_runs(tool):
    """Multiply-adds from the shapes that hooks see, on real tensors."""
    cfg = config(tool, "MODEL.DEVICE", "cpu", "MODEL.DATASET_NORM.ENABLED", True)
    parts, others = tool.count(tool.build(cfg), (64, 96), "camvid")
    model, seen = tool.build_model(cfg).eval(), []

    def hook(conv, inputs, output):
        seen.append(output[0].numel() * conv.in_channels // conv.groups * conv.kernel_size[0] * conv.kernel_size[1])

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(hook)
    model([{"image": torch.zeros(3, 64, 96, dtype=torch.uint8), "dataset": "camvid"}])
    assert sum(parts.values()) == sum(seen)
    assert parts["sem_seg_head.classifiers.camvid"] == 32 * 11 * 8 * 12
    assert {"backbone.stem", "backbone.res5", "sem_seg_head.trunk"} <= set(parts)
    assert "(elsewhere)" not in parts
    assert "max_pool2d_with_indices" in others and "convolution" not in others


@pytest.mark.parametrize(("depth", "width", "deep_stem", "auxiliary"), [(18, 256, False, 0), (101, 512, True, 1)])
def test_published_gflops(tool, depth, width, deep_stem, auxiliary):
    model = tool.build(tool.paper_config(depth, width, deep_stem))
    with tool.ceil_pooling():
        macs = tool._total(model, (512, 1024), "cityscapes")
        macs += auxiliary * tool.count_auxiliary(model, (512, 1024), "cityscapes")
    assert 4 * macs / 1e9 == pytest.approx(tool.PUBLISHED[depth], rel=5e-4)


def test_multi_scale_factor(tool):
    model = tool.build(config(tool))
    totals = [tool._total(model, (512, 1024), "cityscapes", scale) for scale in tool.PAPER_SCALES]
    assert sum(totals) / totals[2] == pytest.approx(3.375, abs=2e-3)  # pyramid cells do not shrink with the image


def test_parameters_belong_to_their_datasets(tool):
    model = tool.build(config(tool, "MODEL.DATASET_NORM.ENABLED", True))
    totals = tool.parameters(model)
    assert sum(totals.values()) == sum(p.numel() for p in model.parameters())
    plain = tool.build(config(tool))
    norms = sum(p.numel() for m in plain.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters())
    classifier = {"cityscapes": 2 * 19 * (32 + 1), "camvid": 2 * 11 * (32 + 1)}  # and its auxiliary twin
    for dataset, own in classifier.items():
        assert totals[dataset] == own + norms
    assert totals["auxiliary"] == 9 * 256 * 32


def test_command_line(tool, tmp_path, capsys):
    path = tmp_path / "model.yaml"
    path.write_text(config(tool, "MODEL.DATASET_NORM.ENABLED", True).dump())
    tool.main(["--config-file", str(path), "--size", "64", "128", "--dataset", "camvid", "TEST.AUG.ENABLED", "True"])
    text = capsys.readouterr().out
    for expected in ("dataset camvid", "backbone.res5", "auxiliary branch", "Not counted", "with flips", "cityscapes"):
        assert expected in " ".join(text.split())


def test_nothing_to_do_is_an_error(tool, capsys):
    with pytest.raises(SystemExit):
        tool.main([])
    assert "--config-file or --paper" in capsys.readouterr().err
