"""What a run or an evaluation starts from: what fits is loaded, what does not is said."""

from __future__ import annotations

import pickle

import pytest
import torch
from detectron2.modeling import build_model

from multiseg_d2.checkpoint.file import CheckpointError
from multiseg_d2.checkpoint.weights import load_weights
from multiseg_d2.engine.step import seed_step

THREE = ["DATASETS.TRAIN", "('tiny_a_train', 'tiny_b_train', 'tiny_c_train')"]


@pytest.fixture
def trained(tiny_train):
    """Checkpoint of a model of tiny_a and tiny_b."""
    return tiny_train("SOLVER.MAX_ITER", "2", out="trained") / "model_final.pth"


@pytest.fixture
def model_of(tiny_cfg):
    def make(*keys):
        seed_step(99, 0, 0)
        return build_model(tiny_cfg(*keys, out="other"))

    return make


def loaded_keys(model, path, **options) -> set[str]:
    before = {k: v.clone() for k, v in model.state_dict().items()}
    load_weights(model, str(path), **options)
    return {k for k, v in model.state_dict().items() if not torch.equal(before[k], v)}


def test_a_whole_model_is_loaded(trained, model_of):
    model = model_of()
    load_weights(model, str(trained), complete=True)
    expected = torch.load(trained, weights_only=True)["model"]
    assert all(torch.equal(expected[k], v) for k, v in model.state_dict().items())


def test_a_new_dataset_keeps_its_new_classifier_and_that_is_told(trained, model_of, caplog):
    model = model_of(*THREE, "MODEL.DATASET_NORM.INIT_FROM", "tiny_b")
    classifier = model.sem_seg_head.classifiers["tiny_c"].weight.clone()
    load_weights(model, str(trained))
    message = next(r.getMessage() for r in caplog.records if "lacks" in r.getMessage())
    assert "classifiers.tiny_c.weight" in message and "tiny_a" not in message and r"branches" not in message
    assert torch.equal(model.sem_seg_head.classifiers["tiny_c"].weight, classifier)
    norms = [m for m in model.modules() if hasattr(m, "branches") and hasattr(m, "init_from")]
    assert norms and all(torch.equal(n.branches["tiny_c"].weight, n.branches["tiny_b"].weight) for n in norms)


def test_an_evaluation_needs_every_tensor(trained, model_of):
    with pytest.raises(CheckpointError, match=r"lacks \d+ tensors of the model: .*tiny_c"):
        load_weights(model_of(*THREE, "MODEL.DATASET_NORM.INIT_FROM", "tiny_b"), str(trained), complete=True)


@pytest.mark.parametrize("complete", [False, True])
def test_other_classes_are_refused_with_both_lists(trained, model_of, complete):
    """Also where their number is the same, and the tensors would fit."""
    content = torch.load(trained, weights_only=True)
    content["run"]["classes"]["tiny_a"] = ["dark", "light", "grey"]
    torch.save(content, trained)
    message = r"(?s)'tiny_a' has other classes.*'dark', 'light', 'grey'.*'dark', 'grey', 'light'"
    with pytest.raises(CheckpointError, match=message):
        load_weights(model_of(), str(trained), complete=complete)


def test_other_shapes_are_refused(trained, model_of):
    with pytest.raises(CheckpointError, match=r"tiny_a.weight is \(3, 8, 1, 1\) in the file, \(3, 9, 1, 1\) in"):
        load_weights(model_of("MODEL.SEM_SEG_HEAD.CONVS_DIM", "9"), str(trained))


def test_norms_per_dataset_are_not_read_into_plain_ones(trained, model_of):
    """Their plain keys hold what training began with: loading them would look fine and be wrong."""
    with pytest.raises(CheckpointError, match=r"norms per dataset \(tiny_a, tiny_b\), the model has plain ones"):
        load_weights(model_of("MODEL.DATASET_NORM.ENABLED", "False"), str(trained))


def test_plain_norms_reach_every_branch(tiny_train, model_of):
    plain = tiny_train("MODEL.DATASET_NORM.ENABLED", "False", "SOLVER.MAX_ITER", "2", out="plain") / "model_final.pth"
    model = model_of()
    load_weights(model, str(plain), complete=True)
    expected = torch.load(plain, weights_only=True)["model"]
    for branch in model.backbone.res4[1].branches.values():
        assert torch.equal(branch.running_mean, expected["backbone.res4.1.running_mean"])


def test_a_backbone_file_is_no_trained_model(tmp_path, model_of):
    state = {f"backbone.{k}": v for k, v in model_of().backbone.state_dict().items()}
    torch.save(state, tmp_path / "backbone.pth")
    with pytest.raises(CheckpointError, match="holds a backbone only"):
        load_weights(model_of(), str(tmp_path / "backbone.pth"), complete=True)


def test_a_detectron2_file_goes_into_the_backbone(tmp_path, tiny_cfg):
    cfg = tiny_cfg("MODEL.BACKBONE.NAME", "build_dilated_resnet_backbone", "MODEL.RESNETS.DEPTH", "18")
    cfg.defrost()
    cfg.MODEL.SEM_SEG_HEAD.AUX_LOSS_WEIGHT = 0.0
    model = build_model(cfg)
    plain = {k: v for k, v in model.backbone.state_dict().items() if ".branches." not in k}
    state = {k: torch.full_like(v, 2).numpy() for k, v in plain.items() if not k.endswith("tracked")}
    path = tmp_path / "R-18.pkl"
    path.write_bytes(pickle.dumps({"model": state, "__author__": "torchvision"}))
    changed = loaded_keys(model, path, cfg=cfg)
    assert {"backbone.stem.conv1.weight", "backbone.res2.0.conv1.norm.branches.tiny_a.running_mean"} <= changed
    assert not [key for key in changed if not key.startswith("backbone.")]


def test_no_weights_are_no_model_to_evaluate(model_of):
    load_weights(model_of(), "")
    with pytest.raises(CheckpointError, match="no trained model"):
        load_weights(model_of(), "", complete=True)
    with pytest.raises(CheckpointError, match="there is no file"):
        load_weights(model_of(), "nowhere/model.pth")


def test_a_broken_file_is_named(trained, model_of):
    trained.write_bytes(trained.read_bytes()[:-500])
    with pytest.raises((CheckpointError, ValueError), match=r"model_final\.pth"):
        load_weights(model_of(), str(trained))
