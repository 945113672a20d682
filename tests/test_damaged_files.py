"""Every file that is read, damaged in many ways: an error of ours that names it, no wrong result, and no code run."""

from __future__ import annotations

import io
import json
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from multiseg_d2.checkpoint.file import CheckpointError, read_checkpoint, read_state, write_checkpoint
from multiseg_d2.claims.claim import ClaimError, load_claim
from multiseg_d2.claims.records import find_record, read_failure, write_failure, write_record
from multiseg_d2.class_relations import ClassResponses
from multiseg_d2.data.cache import IMAGE, PixelCache
from multiseg_d2.data.decode import BadFileError, decode_color, decode_index, open_file, read_image
from multiseg_d2.data.files import list_pairs
from multiseg_d2.data.labels import decode_label
from multiseg_d2.data.pairing import DatasetFilesError
from multiseg_d2.data.soft_labels import read_soft_label, write_soft_label
from multiseg_d2.data.spec import SpecError, load_spec
from multiseg_d2.data.views import write_view_lists
from multiseg_d2.engine.config_file import ConfigError, load_config
from multiseg_d2.engine.self_training.folder import PseudoLabelError, PseudoLabels
from multiseg_d2.engine.self_training.priors import load_prior, save_prior
from multiseg_d2.hierarchy import HierarchyError, read_nodes
from multiseg_d2.label_space import LabelSpace
from multiseg_d2.modeling.prototypes import Prototypes
from multiseg_d2.taxonomy import Taxonomy, TaxonomyError
from multiseg_d2.toy.write import ToyFilesError, write_toy

#: Damages per reader; each takes a millisecond or two.
TIMES = 150
RANDOM = np.random.default_rng(5)
PIXELS = RANDOM.integers(0, 6, (9, 13)).astype(np.uint8)
PICTURE = cv2.resize(RANDOM.integers(0, 255, (3, 4, 3)).astype(np.uint8), (24, 16))
SPACE = LabelSpace("two", ("road", "car"), np.zeros((2, 3), np.uint8), np.zeros(65536, np.uint8), np.eye(2) > 0)

# ---- what is read ----------------------------------------------------------------------------------------------------
SPEC = """
name: fuzzed
encoding: index
ignore: [255]
classes:
  - {name: road, color: [128, 64, 128], raw: [7, 8], covers: [road]}
  - {name: rider, color: [255, 0, 0], raw: [25], covers: [rider]}
splits:
  val: {images: "images/{id}.png", labels: "labels/{id}.png", ids: "ids.txt", count: 2}
"""
PANOPTIC = """
name: fuzzed
encoding: panoptic
ignore: [0]
classes: [{name: road, color: [128, 64, 128], raw: [7]}, {name: rider, color: [255, 0, 0], raw: [25]}]
splits: {val: {images: "images/{id}.png", labels: "labels/{id}.png", annotation_file: panoptic.json}}
"""
BOXES = """
name: fuzzed
annotation: box
classes: [{name: road, color: [128, 64, 128], raw: [7]}, {name: rider, color: [255, 0, 0], raw: [25]}]
splits: {val: {images: "images/{id}.png", annotation_file: boxes.json}}
"""
TAXONOMY = """
concepts:
  ground: {main: road}
  road: {parents: [ground], classes: {one: street}}
  walk: {parents: [ground], classes: {one: pavement}, note: beside it}
  car: {classes: {two: car, one: vehicle}}
main_of_classes: {two: {car: car}}
"""
CLAIM = """
title: "Fuzzed"
seeds: [0, 1]
columns: [{label: day, dataset: toy_day_val}, {label: dusk, dataset: toy_dusk_val}]
overrides: {TEST.NUM_PICTURES: 0, MODEL.DEVICE: cpu}
rows:
  - {label: one, config: one.yaml, overrides: {SOLVER.STEP_MODE: sequential}, published: {day: 40.2}}
  - {label: two, runs: [{config: one.yaml, columns: [day]}, {config: one.yaml, columns: [dusk]}]}
"""
CONFIG = """
MODEL: {DEVICE: "cpu", SEM_SEG_HEAD: {CONVS_DIM: 8, DROPOUT: 0.3}}
DATASETS: {TRAIN: ["camvid_train"], TEST: []}
INPUT: {SCALE_RANGE: [0.8, 1.5]}
SOLVER: {BASE_LR: 0.05, STEPS: [3, 4]}
"""
NODES = "nodes: {root: {parent: '', covers: [road, car]}, road: {parent: root, covers: [road]}}"


def save(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def encoded(pixels: np.ndarray, suffix: str, *options: int) -> bytes:
    return cv2.imencode(suffix, pixels, options)[1].tobytes()


def gif(pixels: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "GIF")
    return content.getvalue()


def dataset(spec: str, damaged: str, **files: str | bytes) -> Callable[[Path], Path]:
    """Writes two images with labels, a spec, and other files by name; the one called ``damaged`` is the one."""

    def write(folder: Path) -> Path:
        for name in ("a", "b"):
            save(folder / "images" / f"{name}.png", encoded(PICTURE, ".png"))
            save(folder / "labels" / f"{name}.png", encoded(PIXELS, ".png"))
        for name, content in (files | {"fuzzed.yaml": spec}).items():
            save(folder / name, content)
        return folder / damaged

    return write


def files_of(path: Path) -> list:
    """The dataset dicts of the spec beside a file, or of the spec itself."""
    return list_pairs(load_spec(path.with_name("fuzzed.yaml")).splits["val"], str(path.parent))


def coco(**entries: Any) -> str:
    images = [{"id": i, "file_name": f"{n}.png", "width": 24, "height": 16} for i, n in enumerate("ab")]
    return json.dumps({"images": images, **entries})


SEGMENTS = [{"id": 5, "category_id": 7, "area": 4, "iscrowd": 0}, {"id": 6, "category_id": 25}]
BOX = {"id": 1, "image_id": 0, "category_id": 25, "bbox": [1, 2, 5.5, 6], "iscrowd": 0}


def write_torch(path: Path, **options: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.parent.mkdir(exist_ok=True)
    torch.save({"model": {"weight": torch.arange(40.0).view(5, 8), "bias": torch.ones(5)}}, path, **options)
    return path


def write_sealed(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    folder.mkdir(exist_ok=True)
    write_checkpoint(folder / "x.pth", {"model": {"weight": torch.arange(40.0)}, "run": {"seed": 3}, "iteration": 4})
    return folder / "x.pth"


def write_safetensors(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    folder.mkdir(exist_ok=True)
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file({"weight": torch.arange(40.0).view(5, 8)}, str(folder / "x.safetensors"))
    return folder / "x.safetensors"


def write_soft(folder: Path) -> Path:
    shares = np.stack([np.full((5, 6), 0.25), np.full((5, 6), 0.75)])
    write_soft_label(folder / "x.npz", shares, confidence=shares[0])
    return folder / "x.npz"


def write_prototypes(folder: Path) -> Path:
    vectors = {"two": np.ones((2, 1, 3), np.float32)}
    Prototypes({"two": SPACE.classes}, vectors, np.ones((3, 4), np.float32), np.ones(4, np.float32)).save(
        folder / "x.npz"
    )
    return folder / "x.npz"


def write_responses(folder: Path) -> Path:
    two = {"two": np.eye(2)}
    ClassResponses(SPACE.classes, {"two": np.ones(2, bool)}, two, {"two": np.array([3, 4])}).save(folder / "x.npz")
    return folder / "x.npz"


def write_prior(folder: Path) -> Path:
    save_prior(folder / "x.npz", np.full((2, 4, 6), 0.5), SPACE.classes)
    return folder / "x.npz"


def write_cache(folder: Path) -> Path:
    source = save(folder / "x.png", encoded(PICTURE, ".png"))
    PixelCache(folder / "cache").store(str(source), IMAGE, lambda file: decode_color(file, "RGB"))
    return PixelCache(folder / "cache").place(str(source), IMAGE)


def write_run(folder: Path) -> Path:
    write_record(folder / "one-0123456789-s0", "0123456789abc", "src", {"toy": {"mIoU": 3.5}}, 7.0)
    return folder / "one-0123456789-s0" / "claims_result.json"


def write_failed(folder: Path) -> Path:
    write_failure(folder, "out of memory")
    return folder / "claims_failure.json"


def write_manifest(folder: Path) -> Path:
    labels = PseudoLabels(folder, 0, "tiny/unlabelled")
    content = {"weights": "abc", "settings": {"policy": "global"}, "files": {}, "predicted_pixels": {"road": 5}}
    return save(labels.folder / "manifest.json", json.dumps(content, indent=1))


def write_claim(folder: Path) -> Path:
    save(folder / "one.yaml", CONFIG)
    return save(folder / "x.yaml", CLAIM)


def write_views(folder: Path) -> Path:
    write_view_lists(folder, {"toy[:2]": ["a", "b"]}, resumed=False)
    return folder / "views.json"


def plain(value: Any) -> Any:
    """Something that can be compared by ``==``."""
    if isinstance(value, torch.Tensor | np.ndarray):
        return (str(value.dtype), tuple(value.shape), value.tolist())
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return tuple(map(plain, value)) if isinstance(value, list | tuple) else value


@dataclass(frozen=True)
class Reader:
    """What reads a file.

    Args:
        write: makes it, in a folder, and returns it.
        read: the file -> its content.
        error: what may be raised.
        exact: the format has checksums: what is read at all is what was written.
        also: what an error may name instead of the file.
    """

    write: Callable[[Path], Path]
    read: Callable[[Path], Any]
    error: type[Exception]
    exact: bool = False
    also: str = ""


def image(content: bytes, suffix: str, exact: bool = False) -> Reader:
    return Reader(
        lambda folder: save(folder / f"x{suffix}", content), lambda p: read_image(str(p)), BadFileError, exact
    )


def label(read: Callable[[Any], np.ndarray], pixels: np.ndarray = PIXELS, suffix: str = ".png") -> Reader:
    write = lambda folder: save(folder / f"x{suffix}", encoded(pixels, suffix))  # noqa: E731
    return Reader(write, lambda path: read(open_file(str(path))), BadFileError, exact=suffix == ".png")


def weights(suffix: str, content: Callable[[Path], Path], exact: bool = False) -> Reader:
    return Reader(lambda folder: content(folder / f"x{suffix}"), lambda p: read_state(str(p)), CheckpointError, exact)


READERS = {
    "image, png": image(encoded(PICTURE, ".png"), ".png", exact=True),
    "image, jpeg": image(encoded(PICTURE, ".jpg"), ".jpg"),
    "image, tiff": image(encoded(PICTURE, ".tiff"), ".tiff"),
    "image, webp": image(encoded(PICTURE, ".webp"), ".webp"),
    "image, bmp": image(encoded(PICTURE, ".bmp"), ".bmp"),
    "image, 16 bit": image(encoded(PICTURE.astype(np.uint16) * 257, ".png"), ".png", exact=True),
    "label, grey": label(decode_index),
    "label, 16 bit": label(decode_index, PIXELS.astype(np.uint16) * 300),
    "label, tiff": label(decode_index, suffix=".tiff"),
    "label, bmp": label(decode_index, suffix=".bmp"),
    "label, colours": label(lambda file: decode_label(file, "color"), PICTURE),
    "label, panoptic": label(lambda file: decode_label(file, "panoptic"), PICTURE),
    "label, gif": Reader(
        lambda folder: save(folder / "x.gif", gif(PIXELS)), lambda p: decode_index(open_file(str(p))), BadFileError
    ),
    "list of ids": Reader(dataset(SPEC, "ids.txt", **{"ids.txt": "a\nb\n"}), files_of, DatasetFilesError),
    "spec": Reader(dataset(SPEC, "fuzzed.yaml"), load_spec, SpecError),
    "panoptic annotations": Reader(
        dataset(
            PANOPTIC,
            "panoptic.json",
            **{"panoptic.json": coco(annotations=[{"file_name": f"{n}.png", "segments_info": SEGMENTS} for n in "ab"])},
        ),
        files_of,
        DatasetFilesError,
    ),
    "box annotations": Reader(
        dataset(
            BOXES,
            "boxes.json",
            **{"boxes.json": coco(annotations=[BOX, BOX | {"id": 2, "image_id": 1}])},
        ),
        files_of,
        DatasetFilesError,
    ),
    "taxonomy": Reader(lambda folder: save(folder / "x.yaml", TAXONOMY), Taxonomy.load, TaxonomyError),
    "config": Reader(lambda folder: save(folder / "x.yaml", CONFIG), lambda p: load_config(str(p)), ConfigError),
    "hierarchy": Reader(
        lambda folder: save(folder / "x.yaml", NODES), lambda p: read_nodes(p, ("road", "car")), HierarchyError
    ),
    "claim": Reader(write_claim, load_claim, ClaimError),
    "checkpoint": Reader(write_sealed, read_checkpoint, CheckpointError, exact=True),
    "torch's checkpoint": weights(".pth", write_torch, exact=True),
    "old checkpoint": weights(".pth", lambda path: write_torch(path, _use_new_zipfile_serialization=False)),
    "pickled weights": weights(".pkl", lambda path: save(path, pickle.dumps({"model": {"w": np.arange(40.0)}}))),
    "safetensors": Reader(write_safetensors, lambda p: read_state(str(p)), CheckpointError),
    "soft labels": Reader(write_soft, lambda p: vars(read_soft_label(str(p), 5, 6, 2)), BadFileError, exact=True),
    "prototypes": Reader(write_prototypes, lambda p: vars(Prototypes.load(p)), ValueError, exact=True),
    "class responses": Reader(write_responses, lambda p: vars(ClassResponses.load(p)), ValueError, exact=True),
    "spatial prior": Reader(write_prior, lambda p: load_prior(p, SPACE), ValueError, exact=True),
    "decoded pixels": Reader(
        write_cache,
        lambda p: PixelCache(p.parents[1]).open(str(p.parents[2] / "x.png"), IMAGE).pixels,
        BadFileError,
        also="/cache are out of date",
    ),
    "result of a run": Reader(
        write_run, lambda p: find_record(p.parents[1], "0123456789abc", "src", False), ClaimError
    ),
    "failure of a run": Reader(write_failed, lambda p: read_failure(p.parent), ClaimError),
    "manifest of labels": Reader(
        write_manifest, lambda p: PseudoLabels(p.parents[2], 0, "tiny/unlabelled").manifest(), PseudoLabelError
    ),
    "images of views": Reader(
        write_views, lambda p: write_view_lists(p.parent, {"toy[:2]": ["a", "b"]}, resumed=True), DatasetFilesError
    ),
    "toy sets": Reader(
        lambda folder: save(
            folder / "toy" / "manifest.json", json.dumps({"version": 1, "images": 4, "size": [32, 32]})
        ),
        lambda p: write_toy(p.parents[1], images=4, size=(32, 32)),
        ToyFilesError,
        also="/toy ",
    ),
}


# ---- how it is damaged -----------------------------------------------------------------------------------------------
WORDS = [b"null", b"-1", b"1.5", b"[]", b"{}", b'"x"', b"true", b"1e999", b"[[1]]", b'{"a": 1}', b"NaN", b"9" * 5000]
WORDS += [b"[" * 9000, b"2001-99-99", b"*x", b"&x [*x]", b"!!float x", b"? {a: 1}", b"\\ud800", b"0x", b"../..", b"\0"]
WORD = re.compile(rb"\"[^\"\n]*\"|[\w.]+|\[[^][]*\]|\{[^{}]*\}")


def with_another_word(content: bytes, rng: np.random.Generator) -> bytes:
    """A value of a text file exchanged for one of another kind."""
    found = [m.span() for m in WORD.finditer(content)] or [(0, len(content))]
    start, end = found[rng.integers(len(found))]
    return content[:start] + WORDS[rng.integers(len(WORDS))] + content[end:]


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """The content with one of many damages."""
    place, length = int(rng.integers(len(content))), int(rng.integers(1, 40))
    kind = rng.integers(8)
    if kind == 0:
        return content[:place]
    if kind in (1, 2):
        return content[:place] + bytes([content[place] ^ (1 << int(rng.integers(8)))]) + content[place + 1 :]
    if kind == 3:
        return content[:place] + rng.bytes(length) + content[place + length :]
    if kind == 4:
        return content[:place] + bytes(length) + content[place + length :]
    if kind == 5:
        return content[:place] + content[place + length :]
    if kind == 6:
        return content[:place] + content[:length] + content[place:]
    return with_another_word(content, rng)


def outcome(reader: Reader, path: Path) -> Any:
    """What is read, or the error; fails where that is not one of ours that names the file."""
    try:
        return plain(reader.read(path))
    except reader.error as problem:
        named = path.name in str(problem) or (reader.also and reader.also in str(problem))
        assert named, f"{problem!r} does not name {path.name}"
        return problem


@pytest.mark.filterwarnings("ignore")  # Pillow's and torch's, of odd values
@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_an_error_that_names_it(name, tmp_path):
    reader, rng = READERS[name], np.random.default_rng(list(name.encode()))
    path = reader.write(tmp_path)
    whole, before = path.read_bytes(), outcome(reader, path)
    assert not isinstance(before, Exception) or name == "toy sets", before  # that one is of another version
    refused = 0
    for _ in range(TIMES):
        content = damaged(whole, rng)
        path.write_bytes(content)
        try:
            found = outcome(reader, path)
        except Exception as problem:
            pytest.fail(f"{type(problem).__name__}: {problem}\nof the bytes {content[:300]!r}")
        refused += isinstance(found, Exception)
        assert not reader.exact or isinstance(found, Exception) or found == before, content
    assert refused > TIMES / 10 or not reader.exact


class Payload:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self):
        return Path.touch, (self.sentinel,)


def with_code(kind: str, sentinel: Path) -> bytes:
    """A file that runs code in a careless reader."""
    content = io.BytesIO()
    if kind == "pickle":
        pickle.dump({"model": Payload(sentinel)}, content)
    elif kind == "torch":
        torch.save({"model": Payload(sentinel)}, content)
    elif kind == "arrays":
        names = ("prior", "classes", "datasets", "num_classes", "shares", "class_ids", "vectors_two", "classes_two")
        np.savez(content, **{name: np.array([Payload(sentinel)], object) for name in names})
    else:
        content.write(f"{{name: !!python/object/apply:os.mkdir [{sentinel}], x: !!python/name:os.system ''}}".encode())
    return content.getvalue()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["pickle", "torch", "arrays", "yaml"])
def test_no_reader_runs_code_from_a_file(kind, tmp_path):
    for name, reader in READERS.items():
        path, sentinel = reader.write(tmp_path / name), tmp_path / "sentinel"
        path.write_bytes(with_code(kind, sentinel))
        found = outcome(reader, path)
        assert isinstance(found, Exception) and not sentinel.exists(), f"{name}: {found}"


def test_the_payloads_run_in_careless_readers(tmp_path):
    """Otherwise the test above would prove nothing."""
    for kind, careless in {
        "pickle": pickle.load,
        "torch": lambda file: torch.load(file, weights_only=False),
        "arrays": lambda file: np.load(file, allow_pickle=True)["prior"],
        "yaml": yaml.unsafe_load,
    }.items():
        careless(io.BytesIO(with_code(kind, tmp_path / kind)))
        assert (tmp_path / kind).exists(), kind
