"""A checkpoint file is whole or not there, its bytes are checked, and nothing in it is run."""

from __future__ import annotations

import builtins
import multiprocessing
import os
import resource
import shutil
from collections import OrderedDict

import numpy as np
import pytest
import torch

from multiseg_d2.checkpoint.file import (
    BrokenCheckpointError,
    CheckpointError,
    UnsafeCheckpointError,
    check_plain,
    read_checkpoint,
    tensor_bytes,
    write_checkpoint,
)

CONTENT = {
    "model": {"weight": torch.arange(3000.0).view(30, 100), "count": torch.tensor(3), "half": torch.ones(7).bfloat16()},
    "trainer": {"iteration": 4, "rate": 0.1, "names": ["a", "b"], "pair": (1, None), "on": True, 0: {"step": 1.0}},
}


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "model_0000004.pth"
    write_checkpoint(path, CONTENT)
    return path


def test_what_is_written_is_read(path):
    assert same(read_checkpoint(path), CONTENT)
    assert same(torch.load(path, weights_only=True), CONTENT)  # any tool can
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("share", [0, 0.01, 0.6, 0.999])
def test_a_file_cut_short_is_broken(path, share):
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(BrokenCheckpointError, match=r"model_0000004\.pth is broken"):
        read_checkpoint(path)


def test_no_changed_byte_goes_unnoticed(path):
    """Any byte, anywhere: either the file is refused or its content is what it was (padding, dates)."""
    whole, rng, refused = path.read_bytes(), np.random.default_rng(0), 0
    positions = [*rng.integers(0, len(whole), 250), *range(len(whole) - 120, len(whole))]
    for position in positions:
        changed = bytearray(whole)
        changed[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed)
        try:
            assert same(read_checkpoint(path), CONTENT), f"byte {position} changed the content silently"
        except CheckpointError:
            refused += 1
    assert refused > 200
    tensor = whole.index(CONTENT["model"]["weight"].numpy().tobytes())
    path.write_bytes(whole[:tensor] + b"\x01" + whole[tensor + 1 :])
    assert torch.load(path, weights_only=True)["model"]["weight"][0, 0] != 0  # torch alone does not notice
    with pytest.raises(BrokenCheckpointError, match="bytes"):
        read_checkpoint(path)


class Malicious:
    def __init__(self, victim):
        self.victim = str(victim)

    def __reduce__(self):
        return os.mkdir, (self.victim,)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_file_is_refused_and_not_run(tmp_path, legacy):
    path, victim = tmp_path / "model.pth", tmp_path / "ran"
    torch.save({"model": {}, "x": Malicious(victim)}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(BrokenCheckpointError if legacy else UnsafeCheckpointError):
        read_checkpoint(path)
    assert not victim.exists()
    torch.load(path, weights_only=False)
    assert victim.exists()  # the file would have run it


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"a": [1, {"b": np.float64(1.0)}]}, r"checkpoint\['a'\]\[1\]\['b'\] is a numpy.float64"),
        ({"a": {1, 2}}, r"checkpoint\['a'\] is a builtins.set"),
        ({"a": torch.float32}, "dtype"),
        ({(1, 2): 3}, "key of type tuple"),
        ({"a": np.zeros(3)}, "numpy.ndarray"),
    ],
)
def test_only_plain_values_are_stored(value, where, tmp_path):
    with pytest.raises(CheckpointError, match=where):
        write_checkpoint(tmp_path / "x.pth", value)
    assert not list(tmp_path.iterdir())


def test_plain_values_are_accepted():
    check_plain(OrderedDict(a=1, b=[True, None, 2.5, b"x", ("y", torch.nn.Parameter(torch.ones(1)))]))


def test_size_of_a_content():
    assert tensor_bytes(CONTENT) == 3000 * 4 + 8 + 7 * 2


class RefusingFile:
    """A file that refuses after some bytes, as on a full disk."""

    def __init__(self, file, limit):
        self.file, self.limit = file, limit

    def write(self, data):
        self.limit -= len(data)
        if self.limit < 0:
            raise OSError(28, "No space left on device")
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


@pytest.mark.parametrize("limit", [0, 100, 5000, 12000])
def test_a_full_disk_leaves_the_old_file(path, monkeypatch, limit):
    real = builtins.open
    monkeypatch.setattr(builtins, "open", lambda *a, **k: RefusingFile(real(*a, **k), limit))
    message = r"No space left on device. It needs 12,022 bytes, [\d,]+ are free"
    with pytest.raises(CheckpointError, match=message) as problem:
        write_checkpoint(path, {**CONTENT, "new": 1})
    monkeypatch.undo()
    assert str(path) in str(problem.value)
    assert same(read_checkpoint(path), CONTENT)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_too_little_space_is_said_before_writing(path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10**9, 10**9 - 12000, 12000))
    with pytest.raises(CheckpointError, match="needs 12,022 bytes, 12,000 are free"):
        write_checkpoint(path, CONTENT)
    assert same(read_checkpoint(path), CONTENT)


def write_under_a_limit(path, answer):
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))
    try:
        write_checkpoint(path, {"w": torch.zeros(5000)})
    except CheckpointError as problem:
        answer.send(str(problem))


def test_a_limit_of_the_operating_system_is_told(path):
    """A write that the kernel refuses: no file larger than 9000 bytes."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=write_under_a_limit, args=(path, send))
    child.start()
    child.join(60)
    assert receive.poll(0), "the write was not refused"
    assert "could not be written: File too large. It needs 20,000 bytes" in receive.recv()
    assert same(read_checkpoint(path), CONTENT)


def test_a_folder_that_cannot_be_written_to(path, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(CheckpointError, match="Permission denied"):
        write_checkpoint(path, {"model": {}})
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="Not a directory"):
        write_checkpoint(path / "inside" / "x.pth", {"model": {}})
    assert same(read_checkpoint(path), CONTENT)


def test_a_missing_file_is_an_error_with_its_name(tmp_path):
    with pytest.raises(CheckpointError, match=r"absent\.pth cannot be read: No such file"):
        read_checkpoint(tmp_path / "absent.pth")
