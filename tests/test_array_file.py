"""Files of arrays: what is read is what was written, and a list of parts that was damaged is noticed."""

from __future__ import annotations

import io

import numpy as np
import pytest

from multiseg_d2.array_file import read_arrays

ENTRY, COMMENT_LENGTH, FIXED = b"PK\x01\x02", 32, 46  # of an archive's list of parts


def test_arrays_are_read_as_they_were_written(tmp_path):
    arrays = {"a": np.arange(5), "b": np.ones((2, 3), np.float32)}
    np.savez_compressed(tmp_path / "x.npz", **arrays)
    read = read_arrays(tmp_path / "x.npz")
    assert list(read) == ["a", "b"] and all(np.array_equal(read[key], arrays[key]) for key in arrays)


def test_a_part_that_vanished_from_the_list_is_noticed(tmp_path):
    """The first part's comment is said to be so long that it holds the second part: numpy finds one array of two."""
    file = io.BytesIO()
    np.savez(file, a=np.arange(5), b=np.arange(7))
    content = bytearray(file.getvalue())
    first = content.index(ENTRY)
    second = content.index(ENTRY, first + 1)
    length = content.index(b"PK\x05\x06", second) - second
    content[first + COMMENT_LENGTH : first + COMMENT_LENGTH + 2] = length.to_bytes(2, "little")
    assert second - first >= FIXED
    with np.load(io.BytesIO(content)) as damaged:
        assert damaged.files == ["a"]
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.npz: no readable file of arrays, .* \(its list of parts"):
        read_arrays(tmp_path / "x.npz")


def test_python_objects_are_refused(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.array([{}], dtype=object))
    with pytest.raises(KeyError, match="could run code"):
        read_arrays(tmp_path / "x.npz", KeyError)
