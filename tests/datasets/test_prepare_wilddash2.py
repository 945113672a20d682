"""datasets/prepare_wilddash2.py: the split, and index PNGs against the panoptic maps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from label_files import ids_in, picture, save

from multiseg_d2.data.files import list_pairs
from multiseg_d2.data.labels import read_label, read_local_label
from multiseg_d2.data.spec import load_spec

FOLDER = Path(__file__).resolve().parent.parent.parent / "datasets"


@pytest.fixture
def wilddash(tmp_path):
    """10 images in the form of WildDash 2, two segments each: sky (23) over road (7), and a void corner."""
    rng = np.random.default_rng(0)
    entries = []
    for number in range(10):
        name = f"ae{number:04d}_100000"
        save(tmp_path / f"wilddash2/images/{name}.jpg", picture(rng))
        segments = np.zeros((6, 8, 3), np.uint8)
        segments[:3], segments[3:], segments[5, 7] = (23 + number, 1, 0), (7, 2, 1), 0
        save(tmp_path / f"wilddash2/panoptic/{name}.png", segments)
        info = [{"id": 23 + number + 256, "category_id": 23}, {"id": 7 + 2 * 256 + 65536, "category_id": 7}]
        entries.append({"file_name": f"{name}.png", "image_id": name, "segments_info": info})
    entries.reverse()  # the order in the JSON means nothing
    (tmp_path / "wilddash2/panoptic.json").write_text(
        json.dumps({"annotations": entries, "images": [], "categories": []})
    )
    return tmp_path


def lists(root: Path) -> tuple[list[str], list[str]]:
    return tuple((root / f"wilddash2/{name}.txt").read_text().split() for name in ("train", "val"))


def test_wilddash_split(script, wilddash):
    main = script("prepare_wilddash2").main
    assert main(["--root", str(wilddash), "--workers", "1"]) == 0
    train, val = lists(wilddash)
    everything = sorted(path.stem for path in (wilddash / "wilddash2/images").iterdir())
    assert len(val) == 2 and sorted(train + val) == everything and not set(train) & set(val)
    assert main(["--root", str(wilddash), "--workers", "1"]) == 0 and lists(wilddash) == (train, val)
    assert main(["--root", str(wilddash), "--seed", "7"]) == 1 and lists(wilddash) == (train, val)  # not silently
    assert main(["--root", str(wilddash), "--seed", "7", "--overwrite"]) == 0 and lists(wilddash)[1] != val


def test_wilddash_split_is_fixed_for_all_time(script):
    """Other machines and other versions of Python must draw the same lists."""
    ids = [f"image{number}" for number in range(20)]
    train, val = script("prepare_wilddash2").draw_split(ids[::-1], 0.2, 0)
    assert val == ["image17", "image5", "image8", "image9"] and train == sorted(set(ids) - set(val))


def test_wilddash_given_list_and_benchmark(script, wilddash):
    (wilddash / "mine.txt").write_text("ae0003_100000.jpg\nae0004_100000\n")
    save(wilddash / "both/images/ae0005_100000.jpg", np.zeros((2, 2, 3), np.uint8))
    arguments = [
        "--root",
        str(wilddash),
        "--val-list",
        str(wilddash / "mine.txt"),
        "--benchmark",
        str(wilddash / "both"),
    ]
    assert script("prepare_wilddash2").main(arguments) == 0
    train, val = lists(wilddash)
    assert val == ["ae0003_100000", "ae0004_100000"] and len(train) == 7 and "ae0005_100000" not in train
    (wilddash / "mine.txt").write_text("nobody\n")
    assert script("prepare_wilddash2").main([*arguments, "--overwrite"]) == 1


def test_wilddash_index_equals_the_panoptic_maps(script, wilddash, monkeypatch):
    assert script("prepare_wilddash2").main(["--root", str(wilddash), "--index", "--workers", "1"]) == 0
    monkeypatch.setitem(load_spec("wilddash2").splits["public"].__dict__, "count", 10)
    pairs = [list_pairs(load_spec(name).splits["val"], str(wilddash)) for name in ("wilddash2", "wilddash2_index")]
    assert len(pairs[0]) == len(pairs[1]) == 2
    for panoptic, index in zip(*pairs):
        raw = read_label(index)
        assert raw[0, 0] == 23 and raw[4, 0] == 7 and raw[5, 7] == 0
        np.testing.assert_array_equal(read_local_label(panoptic), read_local_label(index))


def test_wilddash_conversion_on_real_panoptic_maps(script, samples, monkeypatch):
    """The same function on COCO's panoptic maps, which have the same form, against a loop over the segments."""
    module = script("prepare_wilddash2")
    spec = load_spec(FOLDER / "samples/coco_panoptic_sample.yaml")
    monkeypatch.setattr(module, "READER", module.LabelReader.from_spec(spec))
    (split,) = spec.splits.values()
    for record in list_pairs(split, str(samples)):
        index = module.to_index(record)
        colors = ids_in(Path(record["pan_seg_file_name"])).astype(int)
        segment_ids = colors[..., 0] + 256 * colors[..., 1] + 65536 * colors[..., 2]
        expected = np.zeros(segment_ids.shape, int)
        for segment in record["segments_info"]:
            expected[segment_ids == segment["id"]] = segment["category_id"]
        np.testing.assert_array_equal(index, expected)
