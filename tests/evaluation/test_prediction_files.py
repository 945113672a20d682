"""Every picture has a result of its own, finding them is linear, and nothing that is read is written over."""

from __future__ import annotations

import os
import time

import pytest

from multiseg_d2.evaluation.prediction_files import InputError, _distinct_names, check_targets, find_pictures


@pytest.mark.parametrize(
    "names",
    [
        ("a.jpg", "a.png", "a_jpg.png"),
        ("a.jpg", "a.png", "a_jpg.png", "a_png.jpg", "b.tif"),
        ("x/1.jpg", "y/1.jpg", "x/1.png", "A.png", "a.jpg", "a_JPG.png"),
        ("frame.0001", "frame.0002"),
    ],
)
def test_every_picture_has_a_name_of_its_own(names):
    chosen = _distinct_names(names)
    assert len({name.lower() for name in chosen}) == len(names)
    for name, result in zip(names, chosen):  # and it can be seen of which picture it is
        assert result in (os.path.splitext(name)[0], "_".join(name.rsplit(".", 1)), name)


def test_names_that_cannot_be_told_apart_are_refused():
    with pytest.raises(InputError, match=r"a\.jpg.*would have the same name"):
        _distinct_names(["a.jpg", "a.png", "a_jpg.png", "a.jpg.png", "a_jpg.jpg", "a.JPG"])


def test_many_names_take_time_in_proportion():
    def seconds(number):
        names = [f"{i // 100}/{i:06d}{suffix}" for i in range(number) for suffix in (".jpg", ".png")]
        start = time.process_time()
        assert len(set(_distinct_names(names))) == 2 * number
        return time.process_time() - start

    seconds(1000)
    assert seconds(100_000) < 10 * 12 * max(seconds(10_000), 0.001)  # 10 in proportion, 100 if every pair were compared


def test_a_folder_with_links_and_results_in_it(tmp_path):
    (tmp_path / "in/sub").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for name in ("in/1.JPG", "in/sub/2.png", "elsewhere/3.jpg", "in/notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "in/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/sub/loop").symlink_to(tmp_path / "in")
    (tmp_path / "in/out").mkdir()
    (tmp_path / "in/out/1.png").touch()
    found = find_pictures(str(tmp_path / "in"), tmp_path / "in/out")
    assert [item.target for item in found] == ["1", "linked/3", "sub/2"]
    assert len(find_pictures(str(tmp_path / "in"), tmp_path / "in")) == 4  # the output is the input: the next test's


@pytest.mark.parametrize("kind", ["same", "symbolic link", "hard link", "linked folder"])
def test_an_output_that_is_an_input_is_refused(tmp_path, kind):
    source, target = tmp_path / "a.png", tmp_path / "b.png"
    source.write_bytes(b"mine")
    if kind == "same":
        target = tmp_path / "." / "x" / ".." / "a.png"
        (tmp_path / "x").mkdir()
    elif kind == "symbolic link":
        target.symlink_to(source)
    elif kind == "hard link":
        target.hardlink_to(source)
    else:
        (tmp_path / "x").symlink_to(tmp_path)
        target = tmp_path / "x" / "a.png"
    with pytest.raises(InputError, match=r"result of q\.jpg would replace the input .*a\.png.*nothing was written"):
        check_targets({target: "q.jpg"}, ["missing.png", str(source)])
    check_targets({tmp_path / "c.png": "q.jpg"}, [str(source)])


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(InputError, match="no pictures"):
        find_pictures(str(tmp_path), tmp_path / "out")
    with pytest.raises(InputError, match="nor a registered split.*did you mean 'camvid_val'"):
        find_pictures("camvid_vall", tmp_path)
