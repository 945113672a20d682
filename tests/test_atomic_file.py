"""Every file that is written is there as a whole or not at all, on a full disk too; nothing else is left."""

from __future__ import annotations

import argparse
import ast
import builtins
import contextlib
import errno
import io
import os
import resource
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from multiseg_d2.atomic_file import write_atomically
from multiseg_d2.checkpoint.file import write_checkpoint
from multiseg_d2.claims.records import write_failure, write_record
from multiseg_d2.class_relations import ClassResponses
from multiseg_d2.data.cache import IMAGE, PixelCache
from multiseg_d2.data.convert import Job, convert_files, write_list
from multiseg_d2.data.decode import decode_color
from multiseg_d2.data.soft_labels import write_soft_label
from multiseg_d2.data.views import write_view_lists
from multiseg_d2.engine.self_training.folder import PseudoLabels
from multiseg_d2.engine.self_training.labelling import LabelWriter
from multiseg_d2.engine.self_training.priors import save_prior
from multiseg_d2.evaluation import pictures
from multiseg_d2.evaluation.evaluator import MultiDatasetEvaluator
from multiseg_d2.evaluation.report import write_report
from multiseg_d2.modeling.prototypes import Prototypes

ROOT = Path(__file__).resolve().parent.parent


# ---- one file --------------------------------------------------------------------------------------------------------
def refuse(code: int):
    def refused(*_args, **_kwargs):
        raise OSError(code, os.strerror(code))

    return refused


FAILURES = {
    "no space at the end": ("fsync", errno.ENOSPC),
    "no space for the name": ("replace", errno.ENOSPC),
    "read-only file system": ("open", errno.EROFS),
}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize(
    "content", ["text", b"bytes", lambda file: file.write(b"by a function")], ids=["text", "bytes", "function"]
)
def test_what_cannot_be_written_leaves_the_old_file(failure, content, tmp_path, monkeypatch):
    path = tmp_path / "x.txt"
    write_atomically(path, "old")
    name, code = FAILURES[failure]
    monkeypatch.setattr(builtins if name == "open" else os, name, refuse(code))
    with pytest.raises(OSError, match=os.strerror(code)):
        write_atomically(path, content)
    monkeypatch.undo()
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["x.txt"]


def test_a_folder_that_was_removed_is_made_again(tmp_path):
    path = tmp_path / "run" / "inference" / "report.json"
    write_atomically(path, "first")
    shutil.rmtree(tmp_path / "run")
    write_atomically(path, "second")
    assert path.read_text() == "second"


def test_a_folder_that_is_removed_while_it_is_written_to(tmp_path):
    path = tmp_path / "run" / "x.txt"

    def write(file) -> None:
        file.write(b"half")
        shutil.rmtree(path.parent)

    with pytest.raises(FileNotFoundError):
        write_atomically(path, write)
    assert not list(tmp_path.iterdir())


# ---- every writer ----------------------------------------------------------------------------------------------------
SPACE = ("road", "car")


def report(folder: Path, version: int) -> None:
    evaluator = MultiDatasetEvaluator("kitti_train", distributed=False)
    evaluator._matrices["plain"][:, :19] = np.arange(19) * version + 1
    evaluator._images = 3
    write_report({"kitti_train": evaluator.evaluate()}, folder, Console(file=io.StringIO()))


def matrix(folder: Path, version: int) -> None:
    MultiDatasetEvaluator("kitti_train", output_dir=str(folder))._write_matrix(np.full((20, 20), version))


def picture(folder: Path, version: int) -> None:
    pictures.save(np.full((8, 9, 3), version, np.uint8), folder / "x.png")


def checkpoint(folder: Path, version: int) -> None:
    write_checkpoint(folder / "model_final.pth", {"model": {"w": torch.full((5,), float(version))}})


def soft_label(folder: Path, version: int) -> None:
    write_soft_label(folder / "x.npz", np.full((2, 4, 5), 0.5 / version))


def pseudo_labels(folder: Path, version: int) -> None:
    scores = torch.zeros(2, 4, 5)
    scores[version - 1] = 5.0
    LabelWriter(folder, np.array([0.5, 0.5])).process([{"image_id": "a"}], [{"sem_seg": scores}])


def manifest(folder: Path, version: int) -> None:
    labels = PseudoLabels(folder, 0, "toy_day_val")
    labels.begin()
    labels.finish({"weights": str(version), "files": {}}, [{"name": "road"}], ["a"], soft=False)


def prior(folder: Path, version: int) -> None:
    save_prior(folder / "x.npz", np.full((2, 4, 6), 0.1 * version), SPACE)


def prototypes(folder: Path, version: int) -> None:
    vectors = {"two": np.full((2, 1, 3), version, np.float32)}
    Prototypes({"two": SPACE}, vectors, np.ones((3, 4)), np.ones(4)).save(folder / "x.npz")


def responses(folder: Path, version: int) -> None:
    values = {"two": np.eye(2) * version}
    ClassResponses(SPACE, {"two": np.ones(2, bool)}, values, {"two": np.array([3, 4])}).save(folder / "x.npz")


def finished_run(folder: Path, version: int) -> None:
    write_record(folder, "key", "source", {"toy": {"mIoU": version}}, 7.0)


def failed_run(folder: Path, version: int) -> None:
    write_failure(folder, f"failure {version}")


def views(folder: Path, version: int) -> None:
    write_view_lists(folder, {f"toy[:{version}]": ["a", "b"]}, resumed=False)


def decoded_pixels(folder: Path, version: int) -> None:
    source = folder.with_name("source.png")
    pictures.save(np.full((8, 9, 3), version, np.uint8), source) if not source.exists() or version == 1 else None
    os.utime(source, ns=(version, version))
    PixelCache(folder).store(str(source), IMAGE, lambda file: decode_color(file, "RGB"))


OPTIONS = argparse.Namespace(workers=1, verify=False, overwrite=True)


def conversion(folder: Path, version: int) -> None:
    jobs = [Job(str(folder / f"{name}.png"), "source") for name in "ab"]
    if convert_files(jobs, lambda _source: np.full((4, 5), version, np.uint8), OPTIONS, "test"):
        raise OSError("exit code 1")


def list_of_ids(folder: Path, version: int) -> None:
    write_list(folder / "ids.txt", ["first", f"second{version}"], OPTIONS)


WRITERS = [report, matrix, picture, checkpoint, soft_label, pseudo_labels, manifest, prior, prototypes, responses]
WRITERS += [finished_run, failed_run, views, decoded_pixels, conversion, list_of_ids]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but what an interrupted round of self-training may leave: the next one removes that folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and ".partial" not in str(path))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@contextlib.contextmanager
def full_disk():
    """The kernel refuses whatever makes a file longer than three bytes, whoever writes it in whichever way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        resource.setrlimit(resource.RLIMIT_FSIZE, (3, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_a_writer_on_a_full_disk_leaves_what_was_there(write, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    write(folder, 1)
    before = contents(folder)
    assert before
    with pytest.raises((OSError, RuntimeError)), full_disk():
        write(folder, 2)
    assert contents(folder) == before
    write(folder, 2)  # and it was the disk that kept it from writing
    assert contents(folder) != before


def test_the_disk_is_full_for_whoever_writes(tmp_path):
    with full_disk():
        for write in (Path.write_text, lambda path, text: np.save(path, np.zeros(9))):
            with pytest.raises(OSError, match="File too large"):
                write(tmp_path / "x.npy", "longer than three bytes")


# ---- nobody writes in another way ------------------------------------------------------------------------------------
DIRECT = {"write_text", "write_bytes", "imwrite", "savefig", "savez", "savez_compressed", "tofile", "dump", "print_png"}
#: File -> functions that write directly, with the reason.
ALLOWED = {
    "multiseg_d2/atomic_file.py": {"open"},  # this is how
    "multiseg_d2/toy/write.py": {"write_bytes"},  # into a folder that is renamed when it is whole
    "multiseg_d2/engine/shared_model.py": {"write_text"},  # into a temporary folder, to be read at once
    "multiseg_d2/claims/process.py": {"open"},  # appends to a log
    "multiseg_d2/claims/harness.py": {"open"},  # a lock, which is empty
    "tools/setup_environment.py": {"write_text"},  # a temporary file, renamed
    "tools/setup_detectron2.py": {"write_bytes", "write_text"},  # a folder that a stamp makes valid; what pip reads
}


def writes(tree: ast.AST) -> list[tuple[int, str]]:
    """(line, name) of calls that write a file themselves; what goes into a buffer is passed a name like one."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        strings = [a.value for a in [*node.args, *(k.value for k in node.keywords)] if isinstance(a, ast.Constant)]
        modes = [s for s in strings if isinstance(s, str) and s.strip("rbt+") in ("w", "a", "x")]
        buffered = node.args and isinstance(node.args[0], ast.Name) and node.args[0].id in BUFFERS
        if name == "dump" and len(node.args) < 2:
            continue  # a config's, which returns text
        if (name == "open" and modes) or (name in DIRECT and not buffered):
            found.append((node.lineno, name))
    return found


BUFFERS = {"content", "buffer", "arrays", "out", "text", "file", "figure"}


def test_files_are_written_by_one_function_only():
    problems = []
    for part in ("multiseg_d2", "tools", "datasets"):
        for path in sorted((ROOT / part).rglob("*.py") if part == "multiseg_d2" else (ROOT / part).glob("*.py")):
            name = str(path.relative_to(ROOT))
            for line, function in writes(ast.parse(path.read_text(encoding="utf-8"))):
                if function not in ALLOWED.get(name, ()):
                    problems.append(f"{name}:{line}: {function}: write by write_atomically")
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("line", ["open(p, 'w')", "Path(p).open(mode='ab')", "cv2.imwrite(p, x)", "np.savez(p, x)"])
def test_other_ways_are_seen(line):
    assert writes(ast.parse(line)) and not writes(ast.parse("open(p); np.savez(buffer, x); open(p, 'rb')"))


def test_the_permissions_are_those_of_any_new_file(tmp_path):
    write_atomically(tmp_path / "x", "x")
    (tmp_path / "y").write_text("y")
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == stat.S_IMODE((tmp_path / "y").stat().st_mode)
