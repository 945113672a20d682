"""datasets/prepare_sun_rgbd.py: both published forms; test labels come first."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from label_files import ids_in, picture, save

from multiseg_d2.data.files import list_pairs
from multiseg_d2.data.labels import read_label
from multiseg_d2.data.spec import load_spec

FOLDER = Path(__file__).resolve().parent.parent.parent / "datasets"


@pytest.fixture
def sun(script, monkeypatch):
    module = script("prepare_sun_rgbd")
    monkeypatch.setattr(module, "TEST_COUNT", 2)
    return module


@pytest.fixture
def sun_archives(tmp_path):
    """2 test and 3 training images; label i holds i everywhere."""
    rng = np.random.default_rng(0)
    for number in range(1, 6):
        save(tmp_path / f"down/labels/img-{number:06d}.png", np.full((6, 8), number, np.uint8))
    for split, count in (("test", 2), ("train", 3)):
        for number in range(1, count + 1):
            save(tmp_path / f"down/{split}/img-{number:06d}.jpg", picture(rng))
    options = ["--labels", "labels", "--train-images", "train", "--test-images", "test"]
    options[1::2] = [str(tmp_path / "down" / name) for name in options[1::2]]
    return ["archives", *options, "--root", str(tmp_path), "--workers", "1"]


def test_sun_archives_pair_test_first(sun, sun_archives, tmp_path):
    assert sun.main(sun_archives) == 0
    spec = load_spec("sun_rgbd")
    found = {}
    for name in ("train", "test"):
        for record in list_pairs(spec.splits[name], str(tmp_path)):
            found[name, record["image_id"]] = np.unique(read_label(record)).tolist()
            original = tmp_path / f"down/{name}/img-{record['image_id']}.jpg"
            assert Path(record["file_name"]).read_bytes() == original.read_bytes()
    assert found == {
        ("test", "000001"): [1],
        ("test", "000002"): [2],
        ("train", "000001"): [3],
        ("train", "000002"): [4],
        ("train", "000003"): [5],
    }


@pytest.mark.parametrize("missing", ["labels/img-000004.png", "train/img-000003.jpg", "test/img-000002.jpg"])
def test_sun_archives_with_gaps_are_refused_before_anything_is_written(sun, sun_archives, tmp_path, capsys, missing):
    (tmp_path / "down" / missing).unlink()
    assert sun.main(sun_archives) == 1
    assert "no partner" in capsys.readouterr().err and not (tmp_path / "sun_rgbd").exists()


def test_sun_numbers_that_stand_twice_are_refused(sun, sun_archives, tmp_path, capsys):
    (tmp_path / "down/train/copy").mkdir()
    (tmp_path / "down/train/copy/img-000002.jpg").write_bytes((tmp_path / "down/train/img-000003.jpg").read_bytes())
    assert sun.main(sun_archives) == 1
    assert "two files of number 2" in capsys.readouterr().err and not (tmp_path / "sun_rgbd").exists()


def test_sun_ids_beyond_37_are_refused(sun, sun_archives, tmp_path, capsys):
    save(tmp_path / "down/labels/img-000005.png", np.full((6, 8), 40, np.uint8))
    assert sun.main(sun_archives) == 1
    assert "id 40" in capsys.readouterr().err


def test_sun_official_matlab_files(sun, tmp_path):
    """HDF5 of transposed maps behind references, metadata and split as MATLAB structs."""
    import h5py
    import scipy.io

    rng = np.random.default_rng(0)
    before = "/n/fs/sun3d/data/SUNRGBD/"
    scenes = ["kv1/NYUdata/NYU0001", "kv2/align/scene_b", "xtion/c", "realsense/d"]
    maps = [rng.integers(0, 38, (6, 8), np.uint8) for _ in scenes]
    meta = np.empty(len(scenes), dtype=[("rgbpath", object), ("rgbname", object)])
    for number, name in enumerate(scenes):
        meta[number] = (f"{before}{name}/image/frame{number}.jpg", f"frame{number}.jpg")
        save(tmp_path / f"SUNRGBD/{name}/image/frame{number}.jpg", picture(rng))
    toolbox = tmp_path / "SUNRGBDtoolbox"
    for folder in ("Metadata", "traintestSUNRGBD"):
        (toolbox / folder).mkdir(parents=True)
    scipy.io.savemat(toolbox / "Metadata/SUNRGBDMeta.mat", {"SUNRGBDMeta": meta})
    both = {"alltrain": [0, 2], "alltest": [1, 3]}
    lists = {key: np.array([f"{before}/{scenes[i]}" for i in members], object) for key, members in both.items()}
    scipy.io.savemat(toolbox / "traintestSUNRGBD/allsplit.mat", lists)
    with h5py.File(toolbox / "Metadata/SUNRGBD2Dseg.mat", "w") as file:
        references = file.create_dataset("SUNRGBD2Dseg/seglabel", (len(maps), 1), h5py.ref_dtype)
        for number, ids in enumerate(maps):
            references[number, 0] = file.create_dataset(f"#refs#/{number}", data=ids.T).ref
    arguments = ["official", "--images", str(tmp_path / "SUNRGBD"), "--toolbox", str(toolbox), "--root", str(tmp_path)]
    assert sun.main([*arguments, "--workers", "1"]) == 0
    for split, number, source in (("train", 1, 0), ("test", 1, 1), ("train", 2, 2), ("test", 2, 3)):
        np.testing.assert_array_equal(ids_in(tmp_path / f"sun_rgbd/label37/{split}/{number:08d}.png"), maps[source])
        image = (tmp_path / f"sun_rgbd/image/{split}/img-{number:06d}.jpg").read_bytes()
        assert image == (tmp_path / f"SUNRGBD/{scenes[source]}/image/frame{source}.jpg").read_bytes()


def test_sun_missing_options_are_named(sun, capsys):
    with pytest.raises(SystemExit):
        sun.main(["official", "--images", "somewhere"])
    assert "--toolbox" in capsys.readouterr().err
