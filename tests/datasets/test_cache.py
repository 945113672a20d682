"""The cache of decoded pixels: samples are the same to the bit, and what is out of date is refused."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
import yaml
from detectron2.data import DatasetCatalog
from PIL import Image

from multiseg_d2.data import cache as cache_module
from multiseg_d2.data.cache import CACHE_VARIABLE, IMAGE, PixelCache
from multiseg_d2.data.decode import BadFileError
from multiseg_d2.data.labels import label_targets, read_local_label
from multiseg_d2.data.mapper import EvaluationMapper, TrainMapper
from multiseg_d2.data.register import register_dataset, unregister_dataset

COLORS = [[10, 20, 30], [40, 50, 60], [200, 0, 7]]
ORIENTATION = 0x0112


def write_set(root, name: str, suffix: str, encoding: str, mode: str) -> str:
    """Two images of different sizes with labels, and their spec."""
    rng = np.random.default_rng(2)
    for folder in ("images", "labels"):
        (root / name / folder).mkdir(parents=True)
    for image_id, (height, width) in (("a", (70, 90)), ("b", (41, 53))):
        pixels = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
        exif = Image.Exif()
        exif[ORIENTATION] = 6 if image_id == "b" and suffix == "jpg" else 1
        picture = Image.fromarray(pixels).convert(mode)
        picture.save(root / name / "images" / f"{image_id}.{suffix}", exif=exif.tobytes())
        ids = rng.integers(0, 3, (width, height) if exif[ORIENTATION] == 6 else (height, width)).astype(np.uint8)
        stored = np.array(COLORS, np.uint8)[ids] if encoding == "color" else ids
        Image.fromarray(stored).save(root / name / "labels" / f"{image_id}.png")
    key = "raw_colors" if encoding == "color" else "raw"
    classes = [
        {"name": f"class {i}", "color": COLORS[i], key: [COLORS[i] if encoding == "color" else i]} for i in range(3)
    ]
    split = {"images": f"{name}/images/{{id}}.{suffix}", "labels": f"{name}/labels/{{id}}.png"}
    spec = {"name": name, "encoding": encoding, "classes": classes, "splits": {"train": split}}
    (root / f"{name}.yaml").write_text(yaml.safe_dump(spec))
    return str(root / f"{name}.yaml")


#: Name -> (suffix of the images, encoding of the labels, Pillow's mode of the images).
SETS = {
    "cached_jpg": ("jpg", "index", "RGB"),
    "cached_png": ("png", "color", "RGB"),
    "cached_grey": ("png", "index", "L"),
}


@pytest.fixture
def sets(tmp_path, monkeypatch):
    """Spec files of three datasets, registered."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.delenv(CACHE_VARIABLE, raising=False)
    files = [write_set(tmp_path, name, *kind) for name, kind in SETS.items()]
    for file in files:
        register_dataset(file)
    yield files
    for name in SETS:
        unregister_dataset(name)


@pytest.fixture
def build(script, sets, tmp_path):
    """Runs the script; returns its exit code."""

    def run(*arguments: str) -> int:
        return script("cache").main(
            [*(arguments or sets), "--cache", str(tmp_path / "cache"), "--workers", "1", "--root", str(tmp_path)]
        )

    return run


def records():
    return [record for name in SETS for record in DatasetCatalog.get(f"{name}_train")]


def samples():
    """Crops of all images, scaled, flipped, turned, jittered, in both channel orders, and whole test images."""
    targets = label_targets([f"{name}_train" for name in SETS])
    kinds = [
        {"crop_size": (32, 40), "scale_range": (0.5, 2.0), "flip_probability": 0.5, "color_jitter": 0.3},
        {"crop_size": (32, 40), "single_category_max_area": 0.4, "image_format": "RGB"},
        {"crop_size": (60, 60), "rotation": 20.0, "blur": 2},
        {},
    ]
    result = [
        TrainMapper(targets, **kind)(record, np.random.default_rng(seed))
        for kind in kinds
        for record in records()
        for seed in range(3)
    ]
    return result + [EvaluationMapper(min_size=50, max_size=80, labels=True)(record) for record in records()]


def test_samples_are_the_same_to_the_bit(build, tmp_path, monkeypatch):
    from_files = samples()
    assert build() == 0
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(cache_module, "open_file", lambda path: pytest.fail(f"{path} was opened"))
    for ours, theirs in zip(samples(), from_files):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert torch.equal(ours[key], value) if isinstance(value, torch.Tensor) else ours[key] == value, key


def test_a_second_run_decodes_only_what_has_changed(build, tmp_path, capsys):
    assert build() == 0 and "12 files decoded" in capsys.readouterr().out
    assert build() == 0 and "0 files decoded" in capsys.readouterr().out
    image = tmp_path / "cached_png" / "images" / "a.png"
    before = image.stat()
    Image.fromarray(np.zeros((70, 90, 3), np.uint8)).save(image)
    with image.open("ab") as f:  # as long and as old as before
        f.write(bytes(before.st_size - image.stat().st_size))
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert build() == 0 and "0 files decoded" in capsys.readouterr().out
    assert build("cached_png_train", "--verify") == 0 and "1 files decoded" in capsys.readouterr().out


@pytest.mark.parametrize("change", ["time", "size", "gone", "format"])
def test_what_is_out_of_date_is_refused_until_it_is_built_again(build, tmp_path, monkeypatch, change):
    assert build() == 0
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    record = records()[2]
    label = tmp_path / "cached_png" / "labels" / "a.png"
    expected = read_local_label(record)
    if change == "time":
        os.utime(label, ns=(0, label.stat().st_mtime_ns + 1))
    elif change == "size":
        label.write_bytes(label.read_bytes() + b"\0")
    elif change == "gone":
        label.unlink()
    else:
        monkeypatch.setattr(cache_module, "_FORMAT", 99)
    with pytest.raises(BadFileError, match=r"a\.png: its decoded pixels .* out of date: .*datasets/cache\.py"):
        read_local_label(record)
    if change != "gone":
        assert build() == 0
        np.testing.assert_array_equal(read_local_label(record), expected)


def test_broken_files_are_named_and_the_others_kept(build, tmp_path, capsys):
    path = tmp_path / "cached_png" / "images" / "a.png"
    path.write_bytes(path.read_bytes()[:-200])
    assert build() == 1
    printed = capsys.readouterr()
    assert "11 files decoded" in printed.out and "a.png: broken or truncated" in printed.err


def test_a_cut_file_of_the_cache_is_named(build, tmp_path):
    assert build() == 0
    cache = PixelCache(tmp_path / "cache")
    path = records()[0]["file_name"]
    place = cache.place(path, IMAGE)
    for length in (5000, 100):
        place.write_bytes(place.read_bytes()[:length])
        with pytest.raises(BadFileError, match=rf"{place.name}: .*Remove it"):
            cache.open(path, IMAGE)


def test_changed_pixels_are_found_and_decoded_again(build, tmp_path, capsys):
    assert build() == 0
    cache, path = PixelCache(tmp_path / "cache"), records()[2]["file_name"]
    place = cache.place(path, IMAGE)
    whole = place.read_bytes()
    place.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert build() == 0 and ", 12 were there" in capsys.readouterr().out.split("\n")[-2]
    assert build("cached_png_train", "--verify") == 0 and "1 files decoded" in capsys.readouterr().out
    assert place.read_bytes() == whole


def test_it_is_removed_by_one_command(build, tmp_path, script, capsys):
    assert build() == 0
    (tmp_path / "cache" / "mine.txt").write_text("not the cache's")
    assert build("cached_png_train", "--remove") == 0 and "4 files removed" in capsys.readouterr().out
    assert build("--remove") == 0 and "8 files removed" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "cache").rglob("*")] == ["mine.txt"]


def test_what_is_no_entry_is_said(build, capsys):
    assert build("cached_nowhere_train") == 1
    assert "cached_nowhere_train" in capsys.readouterr().err
