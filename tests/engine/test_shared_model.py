"""Models in one file: the same labels as the model that was trained, without its config, specs and datasets."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from multiseg_d2.checkpoint import CheckpointError
from multiseg_d2.checkpoint.file import read_checkpoint, write_checkpoint
from multiseg_d2.claims import load_claim, plan, run_claim
from multiseg_d2.engine import ConfigError, Predictor, Trainer, load_config, register_config
from multiseg_d2.engine.shared_model import read_shared_model, write_shared_model
from multiseg_d2.hierarchy import write_nodes
from multiseg_d2.modeling.heads.hierarchical import training_hierarchy
from multiseg_d2.user_error import UserError

ROOT = Path(__file__).resolve().parents[2]
FPN = ["MODEL.SEM_SEG_HEAD.DECODER", "FPNDecoder", "MODEL.SEM_SEG_HEAD.IN_FEATURES", "['res4', 'res5']"]
UNION = ["MODEL.SEM_SEG_HEAD.NAME", "UnifiedHead", "MODEL.DATASET_NORM.ENABLED", "False"]
HEADS = {
    "a norm and a classifier per dataset": [],
    "statistics per dataset": ["MODEL.RESNETS.NORM", "BN/shared_affine"],
    "union, softmax": [*UNION, "MODEL.SEM_SEG_HEAD.LOSS_TYPE", "cross_entropy"],
    "union, relations": [*UNION, "MODEL.SEM_SEG_HEAD.LOSS_TYPE", "relational_bce"],
    "hierarchy": ["MODEL.SEM_SEG_HEAD.NAME", "HierarchicalHead", "MODEL.SEM_SEG_HEAD.AUX_LOSS_WEIGHT", "0.0"],
    "prototypes": ["MODEL.SEM_SEG_HEAD.NAME", "EntropyHead", "MODEL.DATASET_NORM.ENABLED", "False"],
    "remapped": ["DATASETS.REMAP_TO", "tiny_a", "DATASETS.TEST", "('tiny_a_val',)"],
}
#: Little that the others have not; left to the slow tests.
ALSO = ("union, softmax", "prototypes")


def picture(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (45, 61, 3), dtype=np.uint8)


def scores(predictor):
    """(C, H, W) of the picture; labels alone could agree by being constant."""
    planes = torch.from_numpy(picture().transpose(2, 0, 1).copy())
    with torch.no_grad():
        return predictor.model([{**predictor._sample, "image": planes}])[0]["sem_seg"]


@pytest.fixture
def trained(tiny_cfg, tmp_path):
    """Makes a config whose weights, all different, lie in a checkpoint as a run leaves it."""

    def make(*keys):
        cfg = tiny_cfg(*FPN, *keys).clone()
        cfg.defrost()
        torch.manual_seed(0)
        model = Trainer.build_model(cfg)
        for key, value in model.state_dict().items():
            if value.is_floating_point():
                value.copy_(torch.rand(value.shape) + 0.5 if "var" in key else torch.randn(value.shape) * 0.3)
        cfg.MODEL.WEIGHTS = str(tmp_path / "model_final.pth")
        content = {"model": dict(model.state_dict()), "run": {"classes": model.class_names()}, "trainer": {"x": 1}}
        write_checkpoint(Path(cfg.MODEL.WEIGHTS), content)
        return cfg

    return make


@pytest.fixture
def no_datasets():
    """Forgets every registered dataset for the time of a ``with``."""

    class Forgotten:
        def __enter__(self):
            self.data, self.metadata = dict(DatasetCatalog), dict(MetadataCatalog)
            DatasetCatalog.clear()
            MetadataCatalog.clear()

        def __exit__(self, *_):
            assert not DatasetCatalog.list() and not MetadataCatalog.list(), "something was left in the catalogs"
            DatasetCatalog.update(self.data)
            MetadataCatalog.update(self.metadata)

    return Forgotten()


@pytest.mark.parametrize("head", [pytest.param(head, marks=pytest.mark.slow if head in ALSO else []) for head in HEADS])
def test_the_labels_are_those_of_the_trained_model(head, trained, tmp_path, no_datasets):
    cfg, path = trained(*HEADS[head]), tmp_path / "shared.pth"
    write_shared_model(cfg, path, half=False)
    for space in ("tiny_a",) if head == "remapped" else ("tiny_a", "tiny_b"):
        whole = Predictor(cfg, space)
        with no_datasets:
            shared = Predictor.from_checkpoint(path, space)
            labels, found = shared(picture()), scores(shared)
        wanted = scores(whole)
        assert torch.equal(found, wanted) and wanted.flatten(1).std(1).min() > 0
        assert np.array_equal(labels, whole(picture()))
        assert shared.space.classes == whole.space.classes
        assert np.array_equal(shared.space.colors, whole.space.colors)
    stored = read_checkpoint(path)["model"]
    assert not [key for key in stored if ".entropy." in key or "auxiliary" in key or "relations" in key]
    assert "trainer" not in read_checkpoint(path)


def test_half_precision_is_half_as_large_and_labels_nearly_all_pixels_alike(trained, tmp_path):
    cfg, half, full = trained(), tmp_path / "half.pth", tmp_path / "full.pth"
    write_shared_model(cfg, half)
    write_shared_model(cfg, full, half=False)
    kinds = {key: (v.dtype, v.ndim) for key, v in read_checkpoint(half)["model"].items() if v.is_floating_point()}
    assert {dtype for dtype, ndim in kinds.values() if ndim > 1} == {torch.float16}
    assert {dtype for dtype, ndim in kinds.values() if ndim < 2} == {torch.float32}
    labels = [Predictor.from_checkpoint(path, "tiny_a")(picture()) for path in (half, full)]
    assert np.mean(labels[0] == labels[1]) > 0.99


def test_a_tree_from_a_file_travels_along(trained, tmp_path, no_datasets):
    tree, keys = tmp_path / "tree.yaml", HEADS["hierarchy"]
    built = trained(*keys)
    universal = max((MetadataCatalog.get(e).universal_classes for e in built.DATASETS.TRAIN), key=len)
    tree.write_text(write_nodes(training_hierarchy(built).nodes, universal))
    cfg, path = trained(*keys, "MODEL.SEM_SEG_HEAD.HIERARCHY", str(tree)), tmp_path / "s.pth"
    write_shared_model(cfg, path, half=False)
    whole = Predictor(cfg, "tiny_a")(picture())
    tree.unlink()
    with no_datasets:
        assert np.array_equal(Predictor.from_checkpoint(path, "tiny_a")(picture()), whole)


def test_what_cannot_be_meant(trained, tmp_path):
    cfg, path = trained(), tmp_path / "shared.pth"
    write_shared_model(cfg, path)
    for keys, message in (
        ({}, r"several label spaces: choose one of \['tiny_a', 'tiny_b'\]"),
        ({"space": "tiny_aa"}, "not in .*shared.pth.*did you mean 'tiny_a'"),
        ({"space": "tiny_a", "norm": "tiny_c"}, "norm 'tiny_c': the model was trained on"),
    ):
        with pytest.raises(ConfigError, match=message):
            Predictor.from_checkpoint(path, **keys)
    with pytest.raises(CheckpointError, match="no model to share: tools/share.py"):
        read_shared_model(cfg.MODEL.WEIGHTS)
    cfg.IMPORTS = ("my_heads.py",)
    with pytest.raises(ConfigError, match="IMPORTS.*code cannot be put"):
        write_shared_model(cfg, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="broken"):
        Predictor.from_checkpoint(path, "tiny_a")


def test_the_tool_and_a_fresh_process(tmp_path, monkeypatch, capsys):
    """Four label spaces in an EfficientNet-Lite0: one command writes it, another process needs the file alone."""
    monkeypatch.chdir(ROOT)
    sys.path.insert(0, str(ROOT / "tools"))
    import label_in_spaces
    import share

    config = "configs/quickstart/four_datasets.yaml"
    cfg = load_config(config, ["MODEL.DEVICE", "cpu"])
    register_config(cfg)
    torch.manual_seed(0)
    model = Trainer.build_model(cfg)
    weights, path = tmp_path / "model_final.pth", tmp_path / "shared.pth"
    write_checkpoint(weights, {"model": dict(model.state_dict()), "run": {"classes": model.class_names()}})
    tested = ["DATASETS.TEST", "('idd_val',)"]
    assert share.main(["--config-file", config, "--weights", str(weights), "--output", str(path), *tested]) == 0
    assert "MB, label spaces bdd100k, camvid, coco_stuff, idd, kitti" in capsys.readouterr().out
    assert path.stat().st_size < 15e6
    Image.fromarray(picture()).save(tmp_path / "street.png")
    options = ["--model", str(path), "--picture", str(tmp_path / "street.png"), "--output", str(tmp_path / "four.png")]
    assert label_in_spaces.main(options) == 0 and "coco_stuff: 171 classes" in capsys.readouterr().out
    assert Image.open(tmp_path / "four.png").width > 2 * 480
    idd = MetadataCatalog.get("idd_val").label_space.num_classes
    code = (
        "import sys, json, numpy as np\nfrom multiseg_d2.engine import Predictor\n"
        "def sizes(**how):\n"
        "    predictor = Predictor.from_checkpoint(sys.argv[1], **how)\n"
        "    labels = predictor(np.zeros((50, 70, 3), np.uint8))\n"
        "    return [labels.shape, len(predictor.space.classes)]\n"
        "print(json.dumps([sizes(space='coco_stuff'), sizes(space='idd', norm='kitti')]))"
    )
    environment = {**os.environ, "DETECTRON2_DATASETS": "/nonexistent", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [[[50, 70], 171], [[50, 70], idd]]


def test_all_models_of_a_table_by_one_command(trained, tiny_root, tmp_path, monkeypatch, capsys):
    sys.path.insert(0, str(ROOT / "tools"))
    import share

    cfg = trained()
    claim_file = tmp_path / "two_rows.yaml"
    keys = {key: yaml.safe_load(value) for key, value in zip(FPN[::2], FPN[1::2], strict=True)}
    keys["DATASETS.TEST"] = ["tiny_a_val"]
    rows = [
        {"label": f"Steps: {n}", "config": f"{tiny_root}/tiny.yaml", "overrides": {"SOLVER.MAX_ITER": n}}
        for n in (1, 2)
    ]
    columns = [{"label": "a", "dataset": "tiny_a_val"}]
    content = {"title": "Two rows", "seeds": [0], "columns": columns, "overrides": keys, "rows": rows}
    claim_file.write_text(yaml.safe_dump(content))
    claim, runs = load_claim(claim_file), tmp_path / "runs"

    def copy_weights(job, on_step):
        shutil.copy(cfg.MODEL.WEIGHTS, job.folder / "model_final.pth")
        return {"tiny_a_val": {"mIoU": 1.0}}

    call = ["--claim", str(claim_file), "--runs", str(runs), "--output", str(tmp_path / "shared")]
    assert share.main(call) == 1 and "0 of 2 models" in capsys.readouterr().out
    run_claim(claim, plan(claim, runs, only=["Steps: 2"]), copy_weights)
    assert share.main(call) == 0 and "1 of 2 models" in capsys.readouterr().out
    (path,) = (tmp_path / "shared").iterdir()
    assert path.name == "steps_2_seed_0.pth"
    wanted = Predictor(cfg, "tiny_a")(picture())
    assert (Predictor.from_checkpoint(path, "tiny_a")(picture()) == wanted).mean() > 0.99  # stored in float16
    run_claim(claim, plan(claim, runs), copy_weights)
    content["rows"][0]["label"] = "Steps - 2"
    claim_file.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match="several rows would be written to steps_2_seed_0.pth"):
        share.main(call)
