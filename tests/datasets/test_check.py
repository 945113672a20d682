"""datasets/check.py on small sets with one fault each, and on the real samples."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from PIL import Image

import multiseg_d2.data.check as check_module
from multiseg_d2.data.spec import load_spec

SPEC = """
name: little
encoding: index
ignore: [255]
classes:
  - {name: ground, color: [1, 2, 3], raw: [0, 5]}
  - {name: house,  color: [4, 5, 6], raw: [1]}
  - {name: air,    color: [7, 8, 9], raw: [2]}
splits:
  train: {images: "little/images/train/{id}.jpg", labels: "little/labels/train/{id}.png", count: 4}
  val: {images: "little/images/val/{id}.png", labels: "little/labels/val/{id}.png", count: 1}
"""


@pytest.fixture
def little(tmp_path):
    """A sound dataset: 4 training pairs of 6 x 8, one of validation; returns (spec file, root)."""
    rng = np.random.default_rng(0)
    for split, count, suffix in (("train", 4, ".jpg"), ("val", 1, ".png")):
        for number in range(count):
            image = tmp_path / f"little/images/{split}/city/{number:03d}{suffix}"
            label = tmp_path / f"little/labels/{split}/city/{number:03d}.png"
            for path in (image, label):
                path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (6, 8, 3), np.uint8)).save(image)
            ids = np.full((6, 8), 0, np.uint8)
            ids[2:, :4], ids[4:, 4:], ids[5, 7] = 1, 5, 255
            Image.fromarray(ids).save(label)
    (tmp_path / "little.yaml").write_text(SPEC)
    return tmp_path


@pytest.fixture
def check(script, little, capsys):
    """A function that runs the check on the little set: (exit code, output, report)."""

    def run(*names: str, workers: int = 1):
        report = little / "report.json"
        names = names or (str(little / "little.yaml"),)
        code = script("check").main([*names, "--root", str(little), "--workers", str(workers), "--json", str(report)])
        return code, capsys.readouterr().out, json.loads(report.read_text())["splits"]

    return run


def only_problem(report: dict, kind: str) -> list[str]:
    assert set(report["problems"]) == {kind}
    return [problem["message"] for problem in report["problems"][kind]]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_sound_dataset(check, workers):
    code, out, report = check(workers=workers)
    assert code == 0 and "no errors" in out
    train = report["little_train"]
    assert (train["images"], train["labels"], train["checked"], train["expected"]) == (4, 4, 4, 4)
    # counted by hand: rows 0-1 are 0; rows 2-5 left 1, right rows 2-3 0, rows 4-5 5 but one pixel
    assert train["raw_pixels"] == {"0": 4 * (16 + 8), "1": 4 * 16, "5": 4 * 7, "255": 4}
    assert train["class_pixels"] == {"ground": 4 * 31, "house": 4 * 16, "air": 0} and train["ignored_pixels"] == 4
    share = re.search(r"house\s*│\s*([\d.]+)", out)[1]
    assert float(share) == pytest.approx(100 * 16 / 47, abs=1e-3)
    assert "without any pixel: air" in out


def test_count(check, little):
    (little / "little/images/train/city/003.jpg").unlink()
    (little / "little/labels/train/city/003.png").unlink()
    code, _, report = check()
    assert code == 1 and only_problem(report["little_train"], "count") == [
        "little_train: 3 images found, 4 expected (--part: that is on purpose)"
    ]
    assert check(str(little / "little.yaml"), "--part")[0] == 0
    assert not report["little_val"]["failed"]


def test_strays_on_both_sides_are_named_and_the_rest_is_checked(check, little):
    """Equal numbers on both sides: a loader that pairs by sorted position would not notice."""
    (little / "little/images/train/city/000.jpg").rename(little / "little/images/train/city/zzz.jpg")
    code, out, report = check()
    messages = only_problem(report["little_train"], "stray")
    assert code == 1 and report["little_train"]["checked"] == 3
    assert messages[0].endswith("zzz.jpg: has no label") and messages[1].endswith("000.png: has no image")
    assert "zzz.jpg" in out


@pytest.mark.parametrize(
    "victim",
    ["images/train/city/001.jpg", "labels/train/city/001.png", "images/val/city/000.png", "labels/val/city/000.png"],
)
@pytest.mark.parametrize("harm", ["truncated", "empty", "text"])
def test_unreadable_files_are_named(check, little, victim, harm):
    path = little / "little" / victim
    content = path.read_bytes()
    path.write_bytes({"truncated": content[: len(content) * 6 // 10], "empty": b"", "text": b"<html>404</html>"}[harm])
    code, _, report = check()
    split = report["little_train" if "train" in victim else "little_val"]
    messages = only_problem(split, "file")
    assert code == 1 and len(messages) == 1 and str(path) in messages[0]


def test_sizes_that_do_not_fit(check, little):
    path = little / "little/labels/train/city/002.png"
    Image.open(path).crop((0, 0, 7, 6)).save(path)
    code, _, report = check()
    (message,) = only_problem(report["little_train"], "size")
    assert code == 1 and "8x6" in message and "7x6" in message and str(path) in message


def test_an_exif_turn_counts_for_the_size(check, little):
    path = little / "little/images/train/city/002.jpg"
    turned = Image.Exif()
    turned[274] = 6
    Image.open(path).save(path, exif=turned)
    code, _, report = check()
    (message,) = only_problem(report["little_train"], "size")
    assert code == 1 and "EXIF" in message and "6x8" in message


def test_unknown_ids_with_file_id_and_count(check, little):
    path = little / "little/labels/train/city/003.png"
    ids = np.array(Image.open(path))
    ids[0, :3], ids[1, 0] = 77, 4
    Image.fromarray(ids).save(path)
    code, out, report = check()
    (message,) = only_problem(report["little_train"], "ids")
    assert code == 1 and str(path) in message and "4 (1 pixels)" in message and "77 (3 pixels)" in message
    assert "in no table, of all pixels" in out and report["little_train"]["raw_pixels"]["77"] == 3


@pytest.mark.parametrize("kind", ["rgb", "jpeg"])
def test_a_label_of_another_kind_is_refused_by_name(check, little, kind):
    path = little / "little/labels/train/city/000.png"
    content = io.BytesIO()
    picture = Image.open(path).convert("RGB" if kind == "rgb" else "L")
    picture.save(content, "PNG" if kind == "rgb" else "JPEG")
    path.write_bytes(content.getvalue())
    code, _, report = check()
    (message,) = only_problem(report["little_train"], "file")
    assert code == 1 and str(path) in message


def test_palette_and_16_bit_labels_are_fine(check, little):
    path = little / "little/labels/train/city/000.png"
    palette = Image.open(path).convert("P")
    palette.putdata(list(np.array(Image.open(path)).ravel()))
    palette.save(path)
    other = little / "little/labels/train/city/001.png"
    Image.fromarray(np.array(Image.open(other)).astype(np.uint16)).save(other)
    code, _, report = check()
    assert code == 0 and report["little_train"]["raw_pixels"]["5"] == 28


def test_a_split_that_is_not_there(check, little, script):
    (little / "little/images/val").rename(little / "elsewhere")
    code, out, report = check()
    assert code == 0 and "not there" in out  # the hidden or unneeded split of a dataset that is there otherwise
    (little / "little/images").rename(little / "gone")
    code, out, report = check()
    assert code == 1 and report["little_train"]["failed"] and "does not exist" in out


def test_names(script, little, capsys):
    main = script("check").main
    assert main(["camvid_nowhere", "--root", str(little)]) == 2
    assert "camvid_nowhere" in capsys.readouterr().err
    assert main(["camvid_val", "--root", str(little)]) == 1  # named, so its absence is an error
    assert "camvid_train" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([])
    with pytest.raises(SystemExit):
        main(["camvid", "--all"])


def test_all_looks_only_at_what_is_there(script, tmp_path, capsys):
    main = script("check").main
    assert main(["--all", "--root", str(tmp_path)]) == 0
    assert "no dataset lies below" in capsys.readouterr().out
    for folder, content in (("images/10k/val", np.zeros((8, 8, 3))), ("labels/sem_seg/masks/val", np.zeros((8, 8)))):
        path = tmp_path / "bdd100k" / folder
        path.mkdir(parents=True)
        Image.fromarray(content.astype(np.uint8)).save(path / ("a.jpg" if "images" in folder else "a.png"))
    assert main(["--all", "--root", str(tmp_path), "--workers", "1"]) == 1
    out = capsys.readouterr().out
    assert "bdd100k_val: 1 images found, 1000 expected" in out and "cityscapes" not in out


def cityscapes(root: Path, *kinds: str) -> None:
    """Two training images of Cityscapes, with the given kinds of label files."""
    for name in ("aachen_000000_000019", "aachen_000001_000019"):
        for path, pixels in [
            (f"leftImg8bit/train/aachen/{name}_leftImg8bit.png", np.zeros((4, 6, 3), np.uint8)),
            *((f"gtFine/train/aachen/{name}_gtFine_{kind}.png", np.full((4, 6), 8, np.uint8)) for kind in kinds),
        ]:
            (root / "cityscapes" / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(root / "cityscapes" / path)


@pytest.mark.parametrize(
    ("kinds", "checked"),
    [
        (["labelIds"], {"cityscapes_train", "cityscapes16_train"}),
        (["labelTrainIds"], {"cityscapes_trainids_train"}),
        (["labelIds", "labelTrainIds"], {"cityscapes_train", "cityscapes16_train", "cityscapes_trainids_train"}),
        ([], {"cityscapes_train"}),
    ],
)
def test_all_takes_of_several_layouts_those_that_have_labels(script, tmp_path, kinds, checked):
    """People have one kind of label files; the other kinds are no errors, unless there is none at all."""
    cityscapes(tmp_path, *kinds)
    report = tmp_path / "report.json"
    script("check").main(["--all", "--root", str(tmp_path), "--workers", "1", "--json", str(report)])
    splits = json.loads(report.read_text())["splits"]
    assert set(splits) == checked
    kinds_of_problems = {kind for split in splits.values() for kind in split["problems"]}
    assert kinds_of_problems == ({"count"} if kinds else {"missing"})


def test_files_that_several_splits_read_are_opened_once(little, monkeypatch):
    """As the four levels of IDD do; each split still gets its own counts and problems."""
    (little / "coarse.yaml").write_text(
        "name: coarse\nextends: little.yaml\ndataset: coarse\nclasses: [{name: all, raw: [0, 1, 2, 5]}]\n"
    )
    (little / "strict.yaml").write_text(
        "name: strict\nextends: little.yaml\ndataset: strict\nclasses: [{name: some, raw: [0, 1, 2]}]\n"
    )
    opened = []
    real = check_module.open_file
    monkeypatch.setattr(check_module, "open_file", lambda path: opened.append(path) or real(path))
    specs = [load_spec(little / f"{name}.yaml") for name in ("little", "coarse", "strict")]
    fine, coarse, strict = check_module.check_splits([spec.splits["train"] for spec in specs], str(little))
    assert len(opened) == 2 * 8  # an id is illegal in the third, which is therefore read by itself
    assert fine.checked == coarse.checked == strict.checked == 4
    assert not fine.problems and not coarse.problems and {p.kind for p in strict.problems} == {"ids"}
    np.testing.assert_array_equal(fine.raw_pixels, coarse.raw_pixels)
    assert coarse.class_pixels[0] == fine.class_pixels[:3].sum() == 4 * 47


def test_label_ids_given_for_train_ids(script, samples, tmp_path, capsys):
    """KITTI's real files hold label ids; read with BDD100K's numbering they are suspicious, and the reverse."""
    text = 'name: swapped\nextends: {0}\nsplits:\n  train: {{images: "{1}.{2}", labels: "{3}.png", count: {4}}}\n'
    kitti = (
        "bdd100k",
        samples / "kitti_semantic/images/train/{id}",
        "png",
        samples / "kitti_semantic/labels/train/{id}",
        5,
    )
    bdd = ("kitti", samples / "bdd100k/images/train/{id}", "jpg", samples / "bdd100k/labels/train/{id}", 16)
    for arguments, words in ((kitti, "Cityscapes label ids"), (bdd, "look like train ids")):
        spec = tmp_path / f"{arguments[0]}.yaml"
        spec.write_text(text.format(*arguments))
        report = tmp_path / "report.json"
        assert script("check").main([str(spec), "--json", str(report), "--workers", "1"]) == 1
        (problem,) = json.loads(report.read_text())["splits"]["swapped_train"]["problems"]["numbering"]
        assert words in problem["message"]


@pytest.mark.parametrize(
    "name",
    ["bdd100k", "coco_stuff", "coco_panoptic", "kitti", "comma10k", pytest.param("camvid", marks=pytest.mark.slow)],
)
def test_the_real_samples_are_sound(script, samples, name, tmp_path):
    spec = Path(script("check").__file__).parent / f"samples/{name}_sample.yaml"
    report = tmp_path / "report.json"
    code = script("check").main([str(spec), "--root", str(samples), "--json", str(report), "--workers", "1"])
    splits = json.loads(report.read_text())["splits"]
    assert code == 0, splits
    assert all(split["checked"] == split["expected"] > 0 for split in splits.values())


def test_panoptic_faults_are_told_apart(script, samples, tmp_path):
    """An entry without file, a file whose segments the JSON does not list; the rest is still counted."""
    for part in ("images", "labels", "annotations"):
        os.makedirs(tmp_path / "coco_panoptic" / part)
    source = samples / "coco_panoptic"
    files = [path.relative_to(source) for path in source.rglob("*") if path.is_file() and path.name != "SOURCE.md"]
    for file in files:
        (tmp_path / "coco_panoptic" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "coco_panoptic" / file).write_bytes((source / file).read_bytes())
    labels = sorted((tmp_path / "coco_panoptic/labels").rglob("*.png"))
    pixels = np.array(Image.open(labels[1]))
    pixels[:2, :5] = (1, 2, 3)
    Image.fromarray(pixels).save(labels[1])
    labels[0].unlink()
    spec = Path(script("check").__file__).parent / "samples/coco_panoptic_sample.yaml"
    report = tmp_path / "report.json"
    assert script("check").main([str(spec), "--root", str(tmp_path), "--json", str(report), "--workers", "1"]) == 1
    (split,) = json.loads(report.read_text())["splits"].values()
    assert set(split["problems"]) == {"stray", "missing", "ids"} and split["checked"] == 2
    (problem,) = split["problems"]["ids"]
    assert problem["file"] == str(labels[1]) and f"{1 + 2 * 256 + 3 * 65536}: 10 pixels" in problem["message"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("{name: house,", "{name: house, covers: [buildng],"), "did you mean 'building'"),
        (("name: little", "name: camvid"), "'camvid' is registered already"),
        (
            ("name: little", "name: little\ndataset: idd_level1"),
            "'idd_level1' has, in the spec 'idd_level1', the classes",
        ),
    ],
)
def test_specs_that_training_could_not_register_are_refused(check, script, little, capsys, change, message):
    (little / "little.yaml").write_text(SPEC.replace(*change))
    assert script("check").main([str(little / "little.yaml"), "--root", str(little)]) == 2
    assert message in capsys.readouterr().err
    (little / "little.yaml").write_text(SPEC)  # mended, it is checked
    assert check()[0] == 0 and "little_train" not in DatasetCatalog


def test_a_part_of_a_list_is_enough_with_part(check, little):
    """Ids of a list without an image are no problem; an image without its label still is."""
    text = SPEC.replace("count: 4}", 'count: 4, ids: "little/ids.txt"}')
    (little / "little.yaml").write_text(text)
    (little / "little/ids.txt").write_text("city/000\ncity/001\ncity/999\n")
    spec = str(little / "little.yaml")
    code, _, report = check(spec)
    assert code == 1 and set(report["little_train"]["problems"]) == {"missing"}
    code, _, report = check(spec, "--part")
    assert code == 0 and report["little_train"]["checked"] == 2
    (little / "little/labels/train/city/001.png").unlink()
    code, _, report = check(spec, "--part")
    assert code == 1 and "city/001" in str(report["little_train"]["problems"])


def test_views_of_a_split(script, capsys, tmp_path):
    folder = tmp_path / "CamVid"
    for number in range(5):
        for kind in ("train", "trainannot"):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            array = np.zeros((6, 8, 3) if kind == "train" else (6, 8), np.uint8)
            Image.fromarray(array).save(folder / kind / f"{number}.png")
    report = tmp_path / "report.json"
    split = load_spec("camvid").splits["train"]
    for pattern, kind in ((split.images[0], "train"), (split.labels[0], "trainannot")):
        place = tmp_path / pattern.split("{id}")[0]
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.exists():
            (folder / kind).rename(place)
    arguments = ["--root", str(tmp_path), "--workers", "1", "--json", str(report)]
    assert script("check").main(["camvid_train[:2]", "camvid_train[2:4]/unlabelled", *arguments]) == 0
    found = json.loads(report.read_text())["splits"]
    assert {n: (s["images"], s["labels"], s["checked"]) for n, s in found.items()} == {
        "camvid_train[:2]": (2, 2, 2),
        "camvid_train[2:4]/unlabelled": (2, 0, 2),
    }
    assert script("check").main(["camvid_train[:9]", *arguments]) == 2
    assert "camvid_train has only 5 images" in capsys.readouterr().err
    assert script("check").main(["camvid_train[9]", *arguments]) == 2


def test_what_is_said_of_many_files_is_said_once(check, little):
    for number in range(4):
        Image.fromarray(np.zeros((6, 8, 3), np.uint8)).save(little / f"little/labels/train/city/{number:03d}.png")
    code, out, report = check()
    assert code == 1 and len(only_problem(report["little_train"], "file")) == 4
    assert out.count("one id per pixel") == 1 and "[and of 3 more files the same]" in out


def test_pictures_that_no_pattern_takes_are_noted(check, little):
    (little / "little/images/train/city/000.jpeg").write_bytes(b"")
    code, out, _ = check()
    assert code == 0 and "pictures that no pattern of the spec takes: 1, for example" in out and "000.jpeg" in out
