"""tools/label_space.py prints what the label spaces say."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from multiseg_d2.data.spec import load_spec, packaged_specs

TOOL = Path(__file__).resolve().parents[2] / "tools" / "label_space.py"


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    spec = importlib.util.spec_from_file_location("label_space_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "label_space_tool", module)
    spec.loader.exec_module(module)
    return module


def rows(text: str, first: str) -> list[str]:
    return [" ".join(line.replace("│", " ").split()) for line in text.splitlines() if f"│ {first} " in line]


def test_remap_shows_the_table_and_marks_lossy_lines(tool, capsys):
    tool.main(["remap", "camvid", "cityscapes"])
    text = capsys.readouterr().out
    assert rows(text, "Tree") == ["Tree vegetation"]
    assert rows(text, "Car")[0].startswith("Car car lossy")


def test_relate_names_the_relation(tool, capsys):
    tool.main(["relate", "mapillary_vistas", "cityscapes"])
    text = capsys.readouterr().out
    assert rows(text, "Bicyclist") == ["Bicyclist subset rider"]
    assert rows(text, "Bird") == ["Bird in none of cityscapes"]


def test_show_gives_raw_ids(tool, capsys):
    tool.main(["show", "kitti"])
    text = capsys.readouterr().out
    assert rows(text, "0") and "road" in rows(text, "0")[0] and " 7 " in rows(text, "0")[0]


def test_tree_holds_the_classes_of_the_chosen_datasets_only(tool, capsys):
    tool.main(["tree", "--datasets", "cityscapes"])
    text = capsys.readouterr().out
    assert "cityscapes: rider" in text and "camvid:" not in text and "coco_banana" not in text


def test_tree_of_another_taxonomy(tool, capsys):
    tool.main(["tree", "--taxonomy", "mseg", "--datasets", "idd"])
    text = capsys.readouterr().out
    assert "sidewalk_pavement" in text and "idd: sidewalk, curb" in text and "curb_any" not in text
    with pytest.raises(SystemExit, match="none of packaged, mseg"):
        tool.main(["tree", "--taxonomy", "msegg"])
    tool.main(["tree", "--datasets", "idd"])
    assert "curb_any" in capsys.readouterr().out


def test_list_and_own_specs(tool, capsys, tmp_path):
    spec = tmp_path / "mine.yaml"
    spec.write_text(
        "name: mine_listed\nclasses:\n  - {name: a, raw: [0], covers: [road]}\n  - {name: b, raw: [1]}\n"
        'splits:\n  train: {images: "m/{id}.png", labels: "l/{id}.png"}\n'
    )
    tool.main(["list", "--specs", str(spec)])
    assert rows(capsys.readouterr().out, "mine_listed") == ["mine_listed 2 train"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: camvid\nclasses: [{name: a, raw: [0]}]\nsplits: {x: {images: 'm/{id}.png'}}\n", "registered already"),
        ("name: mine\nclasses: [{name: a, raw: [0], covers: [raod]}]\nsplits: {x: {images: 'm/{id}.png'}}\n", "'road'"),
        ("name: mine\n", "classes"),
    ],
)
def test_specs_that_cannot_be_registered_end_with_one_line(tool, tmp_path, text, message):
    spec = tmp_path / "mine.yaml"
    spec.write_text(text)
    with pytest.raises(SystemExit) as ended:
        tool.main(["list", "--specs", str(spec)])
    assert str(spec) in ended.value.code and message in ended.value.code


def test_the_readme_has_the_table_of_all_datasets(tool):
    """datasets/README.md holds what the command prints, between two comments."""
    lines = tool.markdown(load_spec(name) for name in packaged_specs())
    text = (TOOL.parents[1] / "datasets" / "README.md").read_text()
    _, _, after = text.partition("<!-- python tools/label_space.py list --markdown -->\n")
    table, _, _ = after.partition("<!-- end of the table -->")
    assert table.splitlines() == lines, "put the output of the command there"
    assert len(lines) - 2 == len([name for name in packaged_specs() if not name.startswith("toy_")])
    assert "| `cityscapes` | 19 | train 2975, val 500, test 1525*, train_extra 19998 | own terms:" in table


def test_unknown_dataset_is_named(tool):
    with pytest.raises(SystemExit, match="no dataset 'camvidd'"):
        tool.main(["show", "camvidd"])


def test_a_spec_may_be_named_as_well_as_its_dataset(tool, capsys):
    """camvid_full and camvid are two layouts of one dataset."""
    tool.main(["relate", "camvid_full", "cityscapes"])
    by_spec = capsys.readouterr().out
    tool.main(["relate", "camvid", "cityscapes"])
    assert capsys.readouterr().out == by_spec
    with pytest.raises(SystemExit, match="no dataset 'camvid_ful'.*did you mean 'camvid_full'"):
        tool.main(["show", "camvid_ful"])
