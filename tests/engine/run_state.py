"""What a tiny run has left behind, and comparing two of them."""

from __future__ import annotations

import json

import torch

from multiseg_d2.checkpoint.file import read_checkpoint


def assert_same(a, b, where=""):
    """Equal in every bit, dicts and lists included."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), f"{where}: {(a != b).sum()} of {a.numel()} differ"
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, f"{where}: {a!r} != {b!r}"


def final_state(out) -> dict:
    """Everything in the last checkpoint but the config, which has the output folder in it."""
    content = read_checkpoint(out / "model_final.pth")
    content["trainer"].pop("config")
    return content


def drawn(out, rank=0) -> list:
    """Per step of a process: its number and the [file, seed] of each image."""
    return [json.loads(line) for line in (out / f"draws_{rank}.jsonl").read_text().splitlines()]
