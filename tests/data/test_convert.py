"""Conversions: resumable, atomic, never over other content."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from multiseg_d2.data.convert import (
    ConversionError,
    Job,
    conversion_parser,
    convert_files,
    encode_label,
    write_list,
)


def convert(number):
    if number == 3:
        raise ConversionError("source 3 is broken")
    if number == 7:
        raise MemoryError("source 7 is too large")  # none of the errors that a reader is expected to raise
    ids = np.full((2, 3), number, np.uint16 if number > 255 else np.uint8)
    return (ids, "it is odd") if number % 2 else ids


@pytest.fixture
def run(tmp_path):
    """A function: numbers and options -> exit code; the files are <number>.png."""

    def run(numbers, *arguments):
        options = conversion_parser("test").parse_args([*arguments, "--root", str(tmp_path)])
        return convert_files([Job(str(tmp_path / f"out/{n}.png"), n) for n in numbers], convert, options, "numbers")

    run.folder = tmp_path / "out"
    return run


def value(path):
    return np.unique(np.array(Image.open(path))).tolist()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_writes_what_is_missing_and_keeps_the_rest(run, workers, capsys):
    assert run([0, 1, 2, 300], "--workers", workers) == 0
    assert [value(run.folder / f"{n}.png") for n in (0, 1, 2, 300)] == [[0], [1], [2], [300]]
    assert "4 written" in capsys.readouterr().out
    (run.folder / "1.png").unlink()
    (run.folder / "2.png").write_bytes(b"")  # what a plain copy leaves behind when the disk is full
    before = (run.folder / "0.png").stat().st_mtime_ns
    assert run([0, 1, 2, 300], "--workers", workers) == 0
    out = capsys.readouterr().out
    assert "2 kept, 2 written" in out and "in 1 files: it is odd" in out
    assert value(run.folder / "2.png") == [2] and (run.folder / "0.png").stat().st_mtime_ns == before


def test_other_content_is_kept_reported_and_replaced_only_on_demand(run, capsys):
    run.folder.mkdir()
    Image.fromarray(np.full((2, 3), 9, np.uint8)).save(run.folder / "0.png")
    Image.fromarray(np.full((2, 3), 2, np.uint8)).save(run.folder / "2.png", optimize=True)  # same pixels, other bytes
    assert run([0, 2], "--workers", "1") == 0 and value(run.folder / "0.png") == [9]
    capsys.readouterr()
    assert run([0, 2], "--verify", "--workers", "1") == 1
    captured = capsys.readouterr()
    assert "1 different, 1 the same" in captured.out and "0.png" in captured.err and value(run.folder / "0.png") == [9]
    assert run([0, 2], "--overwrite", "--workers", "1") == 0
    assert "1 replaced, 1 the same" in capsys.readouterr().out and value(run.folder / "0.png") == [0]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_bad_file_is_named_and_the_others_are_converted(run, workers, capsys):
    assert run([1, 2, 3, 7, 4], "--workers", workers) == 1
    captured = capsys.readouterr()
    assert "2 failed, 3 written" in captured.out
    for number in ("3 is broken", "7 is too large"):
        assert f"source {number}" in captured.err and f"{number[0]}.png" in captured.err
    assert sorted(path.name for path in run.folder.iterdir()) == ["1.png", "2.png", "4.png"]


def test_an_interrupted_write_leaves_nothing(run, monkeypatch):
    def interrupted(_file):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run([2], "--workers", "1")
    assert list(run.folder.iterdir()) == []


@pytest.mark.parametrize("ids", [np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2), np.int64)])
def test_only_label_maps_are_encoded(ids):
    with pytest.raises(TypeError):
        encode_label(ids)


def test_lists(tmp_path):
    parse = conversion_parser("test").parse_args
    path = tmp_path / "val.txt"
    assert write_list(path, ["a", "b"], parse(["--verify"])) == 1 and not path.exists()
    assert write_list(path, ["a", "b"], parse([])) == 0 and path.read_text() == "a\nb\n"
    assert write_list(path, ["a", "b"], parse(["--verify"])) == 0
    assert write_list(path, ["c"], parse([])) == 1 and path.read_text() == "a\nb\n"
    assert write_list(path, ["c"], parse(["--overwrite"])) == 0 and path.read_text() == "c\n"
    path.write_bytes("f\u00fcnf\n".encode("latin-1"))  # of another program: another list, not an error
    assert write_list(path, ["c"], parse([])) == 1 and path.read_bytes() == "f\u00fcnf\n".encode("latin-1")


def test_what_is_read_is_never_written_over(tmp_path, capsys):
    source = tmp_path / "1.png"
    source.write_bytes(b"the only copy")
    options = conversion_parser("test").parse_args(["--overwrite", "--root", str(tmp_path), "--workers", "1"])
    (tmp_path / "link.png").symlink_to(source)
    for target in (source, tmp_path / "link.png"):
        job = Job(str(target), str(source))
        assert convert_files([job], lambda _path: np.zeros((2, 2), np.uint8), options, "files") == 1
        assert "it would be lost" in capsys.readouterr().err and source.read_bytes() == b"the only copy"
