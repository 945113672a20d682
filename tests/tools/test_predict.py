"""tools/predict.py with an untrained two-dataset model: pictures, folders, videos, splits, odd inputs, faults."""

from __future__ import annotations

import importlib.util
import logging
import re
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.layers import ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from PIL import Image
from torch import nn

from multiseg_d2.data.mapper import EvaluationMapper
from multiseg_d2.data.register import unregister_dataset
from multiseg_d2.engine import Trainer, load_config
from multiseg_d2.engine.predictor import Predictor
from multiseg_d2.evaluation import pictures
from multiseg_d2.modeling import MultiDatasetSegmentor

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
_BASE_: "{root}/configs/base.yaml"
DATASETS: {{TRAIN: ["camvid_train", "kitti_train"]}}
MODEL:
  DEVICE: "cpu"
  WEIGHTS: "{weights}"
  BACKBONE: {{NAME: "build_predict_test_backbone"}}
  SEM_SEG_HEAD: {{CONVS_DIM: 16, AUX_LOSS_WEIGHT: 0.0}}
  DATASET_NORM: {{ENABLED: True}}
"""


@BACKBONE_REGISTRY.register()
class build_predict_test_backbone(Backbone):
    """Two convolutions with norms, of strides 4 and 8."""

    def __init__(self, cfg, input_shape):
        super().__init__()
        self.res4 = nn.Sequential(nn.Conv2d(3, 8, 5, stride=4, padding=2), get_norm(cfg.MODEL.RESNETS.NORM, 8))
        self.res5 = nn.Sequential(nn.Conv2d(8, 8, 3, stride=2, padding=1), get_norm(cfg.MODEL.RESNETS.NORM, 8))

    def forward(self, images):
        res4 = self.res4(images).relu()
        return {"res4": res4, "res5": self.res5(res4).relu()}

    def output_shape(self):
        return {"res4": ShapeSpec(channels=8, stride=4), "res5": ShapeSpec(channels=8, stride=8)}


def load_tool(name):
    spec = importlib.util.spec_from_file_location(f"tool_{name}", ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


predict = load_tool("predict")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """A config and the weights of a model with random weights, its branches made different."""
    folder = tmp_path_factory.mktemp("model")
    path = folder / "config.yaml"
    path.write_text(CONFIG.format(root=ROOT, weights=folder / "model.pth"))
    torch.manual_seed(0)
    model = Trainer.build_model(load_config(str(path)))
    state = model.state_dict()
    for key in state:
        if ".branches.kitti.running_mean" in key:
            state[key] -= 0.3
        if "classifiers" in key and key.endswith("weight"):
            state[key] *= 30  # an untrained model's classes differ little
    torch.save({"model": state}, folder / "model.pth")
    return path


@pytest.fixture
def run(config, tmp_path):
    def go(source, *more, out="out", space="camvid") -> int:
        argv = ["--config-file", str(config), "--input", str(source), "--output", str(tmp_path / out)]
        return predict.main([*argv, *(["--space", space] if space else []), *map(str, more)])

    return go


def photo(path: Path, size=(40, 56), seed=0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (size[0] // 8 + 1, size[1] // 8 + 1, 3)).astype(np.uint8)
    pixels = cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_CUBIC).reshape(*size, 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


def expected(config: Path, pixels: np.ndarray, dataset: str, norm: str = "") -> np.ndarray:
    """Labels by the bare model: no wrapper, plain argmax."""
    cfg = load_config(str(config))
    model = Trainer.build_model(cfg).eval()
    model.load_state_dict(torch.load(cfg.MODEL.WEIGHTS, weights_only=True)["model"])
    sample = {"image": torch.from_numpy(pixels.transpose(2, 0, 1).copy()), "dataset": norm or dataset}
    with torch.no_grad():
        return model([{**sample, "label_space": dataset}])[0]["sem_seg"].argmax(0).numpy().astype(np.uint8)


@pytest.mark.parametrize("space, norm", [("camvid", ""), ("kitti", ""), ("kitti", "camvid")])
def test_a_picture_in_either_space_through_either_norm(run, config, tmp_path, space, norm):
    pixels = photo(tmp_path / "a.png")
    options = ["--norm", norm] if norm else []
    assert run(tmp_path / "a.png", "--ids", *options, out="labels.png", space=space) == 0
    labels = np.asarray(Image.open(tmp_path / "labels.png"))
    assert (labels == expected(config, pixels, space, norm)).all() and len(np.unique(labels)) > 1


def test_norms_give_different_labels(config, tmp_path):
    pixels = photo(tmp_path / "a.png")
    assert (expected(config, pixels, "kitti") != expected(config, pixels, "kitti", "camvid")).any()


def test_a_space_that_the_model_was_not_trained_on(run, tmp_path):
    photo(tmp_path / "a.png")
    assert run(tmp_path / "a.png", "--ids", space="bdd100k") == 2  # which norm is not guessed
    assert run(tmp_path / "a.png", "--ids", "--norm", "kitti", out="b.png", space="bdd100k") == 0
    assert run(tmp_path / "a.png", "--ids", out="k.png", space="kitti") == 0
    ours, kitti = (np.asarray(Image.open(tmp_path / name)) for name in ("b.png", "k.png"))
    assert (ours == kitti).all()  # the same 19 classes, by the taxonomy


def test_a_folder_keeps_its_tree_and_names_what_it_cannot_read(run, tmp_path, capsys):
    for name in ("x/1.png", "x/y/2.jpg", "x/y/2.png"):
        photo(tmp_path / name)
    (tmp_path / "x/broken.jpg").write_bytes(b"\xff\xd8\xff nonsense")
    assert run(tmp_path / "x", "--ids", "--overlay", "--colors", "--page") == 1
    assert "broken.jpg" in capsys.readouterr().err
    for kind in ("ids", "overlay", "colors", "page"):
        written = sorted(str(p.relative_to(tmp_path / "out" / kind)) for p in (tmp_path / "out" / kind).rglob("*.png"))
        assert written == ["1.png", "y/2_jpg.png", "y/2_png.png"]
    space = MetadataCatalog.get("camvid_train").label_space
    ids = np.asarray(Image.open(tmp_path / "out/ids/1.png"))
    assert (np.asarray(Image.open(tmp_path / "out/colors/1.png")) == space.colors[ids]).all()
    image = np.asarray(Image.open(tmp_path / "x/1.png"))
    assert (np.asarray(Image.open(tmp_path / "out/overlay/1.png")) == pictures.overlay(image, ids, space.colors)).all()
    # A second run does not take its own results for pictures.
    before = len(list((tmp_path / "x").rglob("*.png")))
    assert run(tmp_path / "x", "--ids", out="x/out") == run(tmp_path / "x", "--ids", out="x/out") == 1
    assert len(list((tmp_path / "x").rglob("*.png"))) == before + 3


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (900, 1), (5, 3)])
def test_odd_sizes(run, tmp_path, size):
    photo(tmp_path / "odd.png", size)
    assert run(tmp_path / "odd.png", "--ids", "--page") == 0
    assert np.asarray(Image.open(tmp_path / "out/ids/odd.png")).shape == size


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16", "1"])
def test_odd_kinds_of_pixels(run, config, tmp_path, mode):
    pixels = photo(tmp_path / "rgb.png")
    if mode == "I;16":
        Image.fromarray(pixels[..., 0].astype(np.uint16) * 256 + 7).save(tmp_path / "odd.png")
    else:
        Image.fromarray(pixels).convert(mode).save(tmp_path / "odd.png")
    assert run(tmp_path / "odd.png", "--ids", out="odd_ids.png") == 0
    seen = np.asarray(Image.open(tmp_path / "odd.png").convert("RGB"))
    if mode in ("L", "I;16"):
        seen = np.repeat(np.asarray(Image.fromarray(pixels).convert("L"))[..., None], 3, 2)
        seen = np.repeat(pixels[..., :1], 3, 2) if mode == "I;16" else seen
    assert (np.asarray(Image.open(tmp_path / "odd_ids.png")) == expected(config, seen, "camvid")).all()


@pytest.mark.parametrize("output", ["itself", "folder", "tree", "link"])
def test_a_picture_is_never_replaced_by_its_result(run, tmp_path, capsys, output):
    photo(tmp_path / "street.png")
    before = (tmp_path / "street.png").read_bytes()
    source, out = tmp_path / "street.png", {"itself": "street.png", "folder": ".", "tree": ".", "link": "x"}[output]
    if output == "link":
        (tmp_path / "x").symlink_to(tmp_path)
    assert run(tmp_path if output == "tree" else source, out=out) == 2
    assert "would replace the input" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "street.png").read_bytes() == before and len(list(tmp_path.glob("*.png"))) == 1


@pytest.mark.parametrize("out", ["in.avi", "."])
def test_a_video_is_never_replaced_by_its_result(run, tmp_path, out):
    writer = cv2.VideoWriter(str(tmp_path / "in.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 12.0, (64, 48))
    writer.write(np.zeros((48, 64, 3), np.uint8))
    writer.release()
    before = (tmp_path / "in.avi").read_bytes()
    assert run(tmp_path / "in.avi", out=out) == 2 and (tmp_path / "in.avi").read_bytes() == before


def test_a_split_is_never_written_over_its_own_images(run, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    photo(tmp_path / "mine/1.png")
    before = (tmp_path / "mine/1.png").read_bytes()
    (tmp_path / "mine.yaml").write_text(
        "name: predicted\nclasses: [{name: a, color: [9, 0, 0]}, {name: b, color: [0, 9, 0]}]\n"
        'splits: {test: {images: "mine/{id}.png", annotation: none}}\n'
    )
    specs = ["DATASETS.SPECS", str((str(tmp_path / "mine.yaml"),))]
    assert run("predicted_test", *specs, out="mine") == 2
    assert (tmp_path / "mine/1.png").read_bytes() == before
    assert run("predicted_test", *specs, out="out") == 0 and (tmp_path / "out/1.png").is_file()
    unregister_dataset("predicted")


def test_two_pictures_that_a_server_knows_by_one_name_are_refused(run, tmp_path, capsys):
    for name in ("x/1.png", "y/1.png"):
        photo(tmp_path / "in" / name)
    assert run(tmp_path / "in", "--submission", space="kitti") == 2
    assert "would both be" in " ".join(capsys.readouterr().err.split()) and not (tmp_path / "out").exists()
    photo(tmp_path / "one/1.png")
    assert run(tmp_path / "one", "--submission", "--first-id", "1", space="kitti") == 2
    assert "list of their own" in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--space", "camvids"], ["--norm", "sun"], ["--space", ""]])
def test_a_wrong_space_is_told_before_the_weights_are_read(run, tmp_path, monkeypatch, option):
    photo(tmp_path / "a.png")
    monkeypatch.setattr("multiseg_d2.engine.predictor.Trainer.build_model", lambda *_: pytest.fail("too late"))
    assert run(tmp_path / "a.png", *option) == 2


def test_a_spec_may_be_named_instead_of_its_dataset(run, tmp_path):
    photo(tmp_path / "a.png")
    for space in ("camvid", "camvid_full"):
        assert run(tmp_path / "a.png", "--ids", out=f"{space}.png", space=space) == 0
    first, second = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("camvid", "camvid_full"))
    assert (first == second).all()


def test_a_split_as_a_submission(run, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    for i in range(2):
        photo(tmp_path / f"kitti/testing/image_2/00000{i}_10.png", seed=i)
    assert run("kitti_test", "--submission", "--ids", space="kitti") == 0
    sent = sorted((tmp_path / "out/submission").rglob("*.png"))
    assert [str(p.relative_to(tmp_path / "out/submission")) for p in sent] == [
        "semantic/000000_10.png",
        "semantic/000001_10.png",
    ]
    label_ids = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]  # Cityscapes' official ones
    ids = sorted((tmp_path / "out/ids").rglob("*.png"))
    for a, b in zip(ids, sent):
        assert (np.array(label_ids)[np.asarray(Image.open(a))] == np.asarray(Image.open(b))).all()


def test_visualize_shows_predictions_beside_labels(config, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    pixels = photo(tmp_path / "kitti/training/image_2/000000_10.png")
    (tmp_path / "kitti/training/semantic").mkdir(parents=True)
    truth = expected(config, pixels, "kitti")
    truth[:20] = (truth[:20] + 1) % 19  # so that half of the pixels are wrong
    label_ids = np.array([7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33], np.uint8)
    Image.fromarray(label_ids[truth]).save(tmp_path / "kitti/training/semantic/000000_10.png")
    headings = []
    page = pictures._page
    monkeypatch.setattr(pictures, "_page", lambda panels, *more: headings.extend(panels) or page(panels, *more))
    argv = ["kitti_train", "--config-file", str(config), "--output", str(tmp_path / "out")]
    assert load_tool("visualize").main(argv) == 0
    assert headings == ["image", "ground truth", "prediction", "errors: 50.0 % of the labelled pixels"]
    assert (tmp_path / "out/kitti_train/000000_000000_10.png").is_file()


def test_a_video(run, config, tmp_path):
    frames = [photo(tmp_path / f"{i}.png", (48, 64), seed=i) for i in range(5)]
    writer = cv2.VideoWriter(str(tmp_path / "in.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 12.0, (64, 48))
    for frame in frames:
        writer.write(frame[..., ::-1].copy())
    writer.release()
    assert run(tmp_path / "in.avi", "--colors", out="out.avi") == 0
    capture = cv2.VideoCapture(str(tmp_path / "out.avi"))
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(12)
    written = list(predict.frames(capture))
    assert len(written) == 5 and written[0].shape == (48, 64, 3)
    colors = MetadataCatalog.get("camvid_train").label_space.colors
    source = cv2.VideoCapture(str(tmp_path / "in.avi"))
    for got, frame in zip(written, predict.frames(source)):
        wanted = colors[expected(config, frame[..., ::-1], "camvid")][..., ::-1].astype(int)
        assert np.abs(got - wanted).mean() < 25  # JPEG's loss at the borders of classes
    assert not list(tmp_path.glob(".*tmp*"))


def test_a_video_that_is_none_leaves_nothing(run, tmp_path, capsys):
    (tmp_path / "in.avi").write_bytes(b"nonsense")
    assert run(tmp_path / "in.avi", out="out.avi") == 2
    assert "not a video" in capsys.readouterr().err and not (tmp_path / "out.avi").exists()
    assert run(tmp_path / "in.avi", "--ids", out="out.avi") == 2
    assert run(tmp_path / "in.avi", out="out.gif") == 2
    assert "must end in .mp4" in capsys.readouterr().err


def test_out_of_memory_falls_back_to_tiles(config, tmp_path, monkeypatch, caplog):
    cfg = load_config(str(config))
    predictor = Predictor(cfg, "camvid")
    pixels = photo(tmp_path / "big.png", (300, 400))
    whole = predictor(pixels)
    inference, sizes = MultiDatasetSegmentor.inference, []

    def limited(self, samples):
        height, width = samples[0]["image"].shape[-2:]
        sizes.append(height * width)
        if height * width > 50_000:
            raise RuntimeError("CUDA out of memory. Tried to allocate 3.00 GiB")
        return inference(self, samples)

    monkeypatch.setattr(MultiDatasetSegmentor, "inference", limited)
    with caplog.at_level(logging.WARNING):
        tiled = predictor(pixels, "big.png")
    assert "big.png" in caplog.text and "tiles" in caplog.text
    assert tiled.shape == whole.shape and max(sizes[1:]) < sizes[0] and len(sizes) > 3
    assert (tiled == whole).mean() > 0.5


@pytest.mark.parametrize(
    "change, message",
    [
        (["--space", "camvids"], "camvids.*did you mean 'camvid'"),
        (["--space", ""], "several label spaces.*camvid.*kitti"),
        (["--norm", "sun"], "trained on.*camvid"),
        (["--weights", "missing.pth"], "missing.pth"),
        (["--config-file", "missing.yaml"], "missing.yaml"),
        (["--input", "nowhere"], "nowhere.*neither"),
    ],
)
def test_errors_say_what_is_wrong(run, tmp_path, capsys, change, message):
    photo(tmp_path / "a.png")
    assert run(tmp_path / "a.png", *change) == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))


def test_labels_equal_those_of_the_evaluation_path(config, tmp_path):
    """The same resize as the test loader's, where the config asks for one."""
    photo(tmp_path / "a.png", (60, 90))
    cfg = load_config(str(config), ["INPUT.MIN_SIZE_TEST", "40", "INPUT.MAX_SIZE_TEST", "50"])
    predictor = Predictor(cfg, "kitti")
    sample = EvaluationMapper(cfg)({"file_name": str(tmp_path / "a.png"), "dataset": "kitti"})
    labels = predictor.model([sample])[0]["sem_seg"].argmax(0).numpy()
    assert (predictor(np.asarray(Image.open(tmp_path / "a.png"))) == labels).all()
