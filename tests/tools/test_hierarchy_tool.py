"""tools/hierarchy.py: the tree as text, as a file that is read back, and as a picture with the datasets' squares."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from multiseg_d2.data.register import use_taxonomy
from multiseg_d2.hierarchy import Hierarchy

ROOT = Path(__file__).resolve().parents[2]
TOYS = ["toy_day", "toy_dusk", "toy_rain", "toy_box", "toy_tag"]


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.chdir(ROOT)
    spec = importlib.util.spec_from_file_location("hierarchy_tool", ROOT / "tools" / "hierarchy.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "hierarchy_tool", module)
    spec.loader.exec_module(module)
    yield module
    use_taxonomy()


def test_datasets_and_config_give_the_same_tree(tool, capsys):
    assert tool.main(TOYS) == 0
    by_name = capsys.readouterr().out
    assert tool.main(["--config-file", "configs/htss/toy.yaml"]) == 0
    assert capsys.readouterr().out == by_name
    assert "  person (toy_rain)  [3 + void]  (toy_rain: person)\n" in by_name
    assert "38 nodes, 14 classifiers" in by_name
    assert "toy_tag is left out of the classifier 'person': it cannot tell ['child'] from the rest of it" in by_name


def test_the_file_is_edited_and_read(tool, tmp_path, capsys):
    path = tmp_path / "tree.yaml"
    assert tool.main([*TOYS, "--write", str(path)]) == 0
    whole = capsys.readouterr().out
    assert tool.main([*TOYS, "--read", str(path)]) == 0
    assert capsys.readouterr().out == whole
    text = path.read_text()
    path.write_text(text.replace("  van:\n", "  delivery van:\n"))
    assert tool.main(["--config-file", "configs/htss/toy.yaml", "--read", str(path)]) == 0
    assert "delivery van  (toy_box: van; toy_tag: van)" in capsys.readouterr().out
    path.write_text(text.replace("parent: nature", "parent: natur", 1))
    assert tool.main([*TOYS, "--read", str(path)]) == 1
    assert "did you mean 'nature'" in capsys.readouterr().err


def squares(picture: np.ndarray, color: str) -> int:
    """Number of connected areas of exactly this colour."""
    rgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
    mask = (picture == rgb).all(axis=-1).astype(np.uint8)
    return sum(row[cv2.CC_STAT_AREA] > 100 for row in cv2.connectedComponentsWithStats(mask)[2][1:])


@pytest.mark.parametrize(
    "names", [TOYS[:3], ["cityscapes", "camvid", "idd", "mapillary_vistas", "coco_stuff", "kitti"]]
)
def test_the_picture_has_a_square_for_every_class(tool, names, tmp_path):
    """One in the legend, one for each node that is a class of the dataset; long trees go on in further columns."""
    assert tool.main([*names, "--picture", str(tmp_path / "tree.png")]) == 0
    picture = cv2.imread(str(tmp_path / "tree.png"))[:, :, ::-1]
    tree, _ = tool.of_datasets(names)
    assert isinstance(tree, Hierarchy) and picture.shape[0] < 1900 and picture.shape[1] < 3500
    for k, dataset in enumerate(tree.paths):
        nodes = [i for i in range(len(tree.nodes)) if dataset in dict(tree.standing_for(i))]
        assert squares(picture, tool._COLORS[k]) == 1 + len(nodes) > 3


def test_what_is_not_there_is_said(tool, capsys):
    assert tool.main(["toy_day", "toy_dask"]) == 1
    assert "did you mean 'toy_dusk'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tool.main([])
