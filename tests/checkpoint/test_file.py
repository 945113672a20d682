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
    read_state,
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


@pytest.fixture
def small(tmp_path):
    """The smallest checkpoint with a tensor."""
    path = tmp_path / "small.pth"
    write_checkpoint(path, {"model": {"w": torch.tensor([1.0, 2.0])}, "run": {}})
    return path


def refusal(path) -> str:
    try:
        read_checkpoint(path)
    except BrokenCheckpointError as problem:
        return str(problem)
    return ""


def test_every_flipped_bit_is_noticed(small):
    """All of them: tensors, names, the archive's directory, the checksum."""
    whole = small.read_bytes()
    silent = []
    with open(small, "r+b", buffering=0) as file:
        for position, byte in enumerate(whole):
            for bit in range(8):
                os.pwrite(file.fileno(), bytes([byte ^ (1 << bit)]), position)
                if "small.pth is broken" not in refusal(small):
                    silent.append((position, bit))
            os.pwrite(file.fileno(), bytes([byte]), position)
    assert not silent and len(whole) > 1000
    assert same(read_checkpoint(small)["model"]["w"], torch.tensor([1.0, 2.0]))


def test_every_length_but_the_whole_is_noticed(small):
    whole = small.read_bytes()
    for length in range(len(whole) - 1, -1, -1):
        os.truncate(small, length)
        assert refusal(small), length
    small.write_bytes(whole + b"\0")
    with pytest.raises(BrokenCheckpointError):
        read_checkpoint(small)


def test_torch_alone_does_not_notice(path):
    whole = path.read_bytes()
    tensor = whole.index(CONTENT["model"]["weight"].numpy().tobytes())
    path.write_bytes(whole[:tensor] + b"\x01" + whole[tensor + 1 :])
    assert torch.load(path, weights_only=True)["model"]["weight"][0, 0] != 0
    with pytest.raises(BrokenCheckpointError, match="bytes"):
        read_checkpoint(path)


def test_a_file_that_torch_wrote_without_our_checksum_is_read_and_its_parts_checked(path):
    torch.save(CONTENT, path)
    assert same(read_checkpoint(path), CONTENT)
    whole = path.read_bytes()
    tensor = whole.index(CONTENT["model"]["weight"].numpy().tobytes())
    path.write_bytes(whole[:tensor] + b"\x01" + whole[tensor + 1 :])
    with pytest.raises(BrokenCheckpointError, match="its part .* have changed"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "is a Git LFS pointer.*git lfs pull"),
        (b"\n<!DOCTYPE html><html>", "is a web page"),
        (b"\xef\xbb\xbf<HTML>", "is a web page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code>", "is an XML text"),
        (b'{"epoch": 3}', "is a JSON text"),
        (b"", "is empty"),
        (b"PK\x03\x04 and so on", "cannot be read as torch weights"),
        (b"\x80\x02 no pickle", "holds more than tensors, or is broken|cannot be read as torch weights"),
    ],
)
@pytest.mark.parametrize("name", ["x.pth", "x.pkl"])
def test_what_is_no_file_of_weights_is_told_in_one_line(tmp_path, content, what, name):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=what if name == "x.pth" else f"{what}|broken pickle") as problem:
        read_state(str(path))
    assert str(path) in str(problem.value) and "\n" not in str(problem.value)


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda state: {"model": {f"module.{k}": v for k, v in state.items()}},
        lambda state: {
            "epoch": 3,
            "state_dict": {f"model.module.{k}".removeprefix("model."): v for k, v in state.items()},
        },
        lambda state: {"checkpoint": {"model": {"state_dict": state}}, "epoch": 3},
        lambda state: {f"backbone.module.{k.removeprefix('backbone.')}": v for k, v in state.items()},
        lambda state: {f"_orig_mod.module.{k}": v for k, v in state.items()},
    ],
)
def test_state_dicts_are_taken_out_of_what_is_around_them(tmp_path, wrapped):
    state = {"backbone.conv.weight": torch.ones(2), "backbone.norm.bias": torch.zeros(1)}
    torch.save(wrapped(state), tmp_path / "x.pth")
    assert same(read_state(str(tmp_path / "x.pth"))[0], state)


def test_two_tensors_of_one_name_are_an_error(tmp_path):
    torch.save({"module.w": torch.ones(1), "w": torch.zeros(1)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="two tensors are called 'w'"):
        read_state(str(tmp_path / "x.pth"))


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
