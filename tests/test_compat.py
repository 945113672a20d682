"""compat.py: stands in for what is missing, refuses when used, leaves alone what works."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from multiseg_d2 import compat

COMPAT = Path(compat.__file__)

# Loads compat.py alone (the package would import the real Detectron2) with only the fake packages of a folder visible
# under the names that matter.
PRELUDE = """
import importlib.machinery, importlib.util, sys
HIDDEN = ("torchvision", "detectron2")
class Fakes:
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.PathFinder.find_spec(name, path or [FAKES]) if name.split(".")[0] in HIDDEN else None
class Others:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in HIDDEN else self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Fakes(), *map(Others, sys.meta_path)]
spec = importlib.util.spec_from_file_location("compat", COMPAT)
compat = importlib.util.module_from_spec(spec)
sys.modules["compat"] = compat
spec.loader.exec_module(compat)
"""


@pytest.fixture
def fakes(tmp_path):
    """A function that writes fake modules ({path: source}) and runs code beside them, returning its output."""

    def run(files: dict[str, str], code: str) -> str:
        for name, source in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(source))
        head = f"FAKES, COMPAT = {str(tmp_path)!r}, {str(COMPAT)!r}\n" + PRELUDE
        done = subprocess.run(
            [sys.executable, "-c", head + textwrap.dedent(code)], capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


DETECTRON2 = {"detectron2/__init__.py": ""}


def test_present_modules_are_left_alone(fakes):
    files = DETECTRON2 | {
        "detectron2/_C.py": "def nms_rotated(): return 'compiled'",
        "torchvision/__init__.py": "__version__ = '9.9'",
        "torchvision/ops/__init__.py": "def nms(): return 'real'",
    }
    out = fakes(
        files,
        """
        compat.install(); compat.install()
        import torchvision.ops, detectron2._C
        print(torchvision.__version__, torchvision.ops.nms(), detectron2._C.nms_rotated(), compat.stand_ins())
        """,
    )
    assert out.split(maxsplit=3) == ["9.9", "real", "compiled", "[]\n"]


def test_missing_modules_get_stand_ins_that_refuse(fakes):
    out = fakes(
        DETECTRON2,
        """
        compat.install()
        first = sys.modules["torchvision"]
        compat.install()
        assert sys.modules["torchvision"] is first
        from torchvision.ops import RoIPool, boxes as box_ops, nms
        from torchvision.ops.boxes import batched_nms
        import detectron2
        from detectron2 import _C
        assert _C is detectron2._C and not hasattr(first, "__file__")
        class Pool(RoIPool):
            pass
        uses = [nms, batched_nms, box_ops.batched_nms, RoIPool, Pool, _C.deform_conv_forward, first.models.resnet50]
        for use in uses:
            try:
                use(1)
            except compat.MissingDependencyError as error:
                print(error)
        print(_C.get_compiler_version(), _C.has_cuda())
        print(compat.stand_ins())
        """,
    ).splitlines()
    assert len(out) == 9
    for line, what in zip(
        out,
        ["torchvision.ops.nms", "boxes.batched_nms", "boxes.batched_nms", "RoIPool", "Pool", "_C.deform_conv_forward"],
        strict=False,
    ):
        assert what in line and "not available here (it is not installed)" in line and "To get it: install" in line
    assert out[7] == "none: not compiled False"
    assert out[8] == str(["detectron2._C", "torchvision", "torchvision.ops", "torchvision.ops.boxes"])


def test_broken_torchvision_is_replaced_and_its_error_told(fakes):
    files = DETECTRON2 | {
        "detectron2/_C.py": "",
        "torchvision/__init__.py": "from torchvision import extension",
        "torchvision/extension.py": "raise RuntimeError('operator torchvision::nms does not exist')",
    }
    out = fakes(
        files,
        """
        compat.install()
        assert "torchvision.extension" not in sys.modules  # no half of the broken package stays behind
        from torchvision.ops import nms
        try:
            nms()
        except compat.MissingDependencyError as error:
            print(error)
        print(any(name.startswith("detectron2") for name in compat.stand_ins()))
        """,
    )
    assert "RuntimeError: operator torchvision::nms does not exist" in out and out.endswith("False\n")


def test_compiled_ops_for_another_torch_count_as_missing(fakes):
    files = DETECTRON2 | {"detectron2/_C.py": "raise ImportError('undefined symbol: _ZN3c10')"}
    out = fakes(
        files,
        """
        compat.install()
        from detectron2 import _C
        try:
            _C.nms_rotated()
        except ImportError as error:
            print(error)
        """,
    )
    assert "undefined symbol: _ZN3c10" in out


@pytest.mark.parametrize("files", [{}, {"detectron2/README.md": "a clone without the package"}])
def test_without_detectron2_the_error_says_what_to_do(fakes, files):
    out = fakes(
        files,
        """
        try:
            compat.install()
        except ImportError as error:
            print(error, "torchvision" in sys.modules)
        """,
    )
    assert "make setup" in out and "README.md" in out and out.endswith("False\n")


def test_a_detectron2_that_fails_to_import_is_not_hidden(fakes):
    """A broken Detectron2 must show its own error at the import, never a stand-in's."""
    out = fakes(
        {"detectron2/__init__.py": "raise ImportError('needs torch 3')"},
        """
        compat.install()
        try:
            import detectron2.config
        except ImportError as error:
            print(error)
        """,
    )
    assert out == "needs torch 3\n"


def test_pillow_names_are_added_only_where_missing(monkeypatch):
    monkeypatch.delattr(Image, "LINEAR", raising=False)
    monkeypatch.setattr(Image, "ANTIALIAS", "kept", raising=False)
    compat.install()
    assert Image.LINEAR == Image.BILINEAR
    assert Image.ANTIALIAS == "kept"
    assert Image.CUBIC == Image.BICUBIC


def test_stand_ins_lists_only_ours():
    """torch.ops and torch.classes answer to any attribute name: they are no stand-ins."""
    assert not [name for name in compat.stand_ins() if name.split(".")[0] not in ("torchvision", "detectron2")]


def test_detectron2_parts_that_we_use_work_here():
    """Environment report (default_setup prints it), projects, model, checkpoint, visualizer on this Detectron2."""
    import detectron2.projects  # noqa: F401
    from detectron2.utils.collect_env import collect_env_info

    assert "PyTorch" in collect_env_info()


def test_visualizer_draws_label_maps():
    from detectron2.data import Metadata
    from detectron2.utils.visualizer import ColorMode, Visualizer

    metadata = Metadata().set(stuff_classes=["a", "b"], stuff_colors=[(255, 0, 0), (0, 0, 255)], ignore_label=255)
    label = torch.zeros(40, 60, dtype=torch.long)
    label[:, 30:] = 1
    picture = Visualizer(np.zeros((40, 60, 3), np.uint8), metadata, instance_mode=ColorMode.SEGMENTATION)
    drawn = picture.draw_sem_seg(label).get_image()
    assert drawn.shape == (40, 60, 3)
    assert drawn[30, 5, 0] > drawn[30, 5, 2] and drawn[30, 55, 2] > drawn[30, 55, 0]


def test_transforms_and_events_work(tmp_path):
    from detectron2.data import transforms as T
    from detectron2.utils.events import CommonMetricPrinter, EventStorage, JSONWriter, TensorboardXWriter

    image = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    inputs = T.AugInput(image, sem_seg=image[..., 0])
    T.AugmentationList(
        [T.ResizeShortestEdge(20, 60), T.RandomCrop("absolute", (16, 16)), T.RandomExtent((1, 1), (0, 0))]
    )(inputs)
    assert inputs.image.shape == (16, 16, 3) and inputs.sem_seg.shape == (16, 16)
    with EventStorage(0) as storage:
        writers = [CommonMetricPrinter(10), JSONWriter(str(tmp_path / "m.json")), TensorboardXWriter(str(tmp_path))]
        storage.put_scalars(total_loss=1.0, lr=0.1)
        storage.put_image("picture", image.transpose(2, 0, 1))
        for writer in writers:
            writer.write()
            writer.close()
    assert '"total_loss": 1.0' in (tmp_path / "m.json").read_text()
    assert list(tmp_path.glob("events.out.tfevents*"))


def test_model_builds_and_its_checkpoint_loads(tmp_path):
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "SemanticSegmentor"
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 3
    model = build_model(cfg)
    DetectionCheckpointer(model, str(tmp_path)).save("model", iteration=7)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    extra = DetectionCheckpointer(model, str(tmp_path)).resume_or_load("", resume=True)
    assert extra["iteration"] == 7
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_the_package_reports_its_environment(capsys):
    from multiseg_d2.__main__ import main

    main()
    out = capsys.readouterr().out
    assert torch.__version__ in out and "Detectron2" in out and "stand-ins" in out


def test_other_libraries_can_be_imported_beside_the_stand_ins():
    """A library that finds a torchvision, here torchmetrics, imports parts of it that Detectron2 does not."""
    code = (
        "import multiseg_d2, torchvision.models.feature_extraction as f, torchmetrics, torch\n"
        "metric = torchmetrics.JaccardIndex(task='multiclass', num_classes=2)\n"
        "print(float(metric(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]))))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(0.5)
