"""Dataset spec files: one YAML file says where a dataset lies, what its label files hold and what its classes are.

A complete one, with its comments::

    name: my_city                  # catalog entries are called my_city_train, my_city_val
    title: "My city, 3 classes"
    homepage: "where to get it"    # for people; as is `licence`
    licence: "CC BY 4.0"
    annotation: pixel              # pixel (default) | box | tag | none
    encoding: index                # what pixels of label files are, see below; default index
    unlisted: error                # a raw id that stands nowhere below is an error (default) or ignored (`ignore`)
    ignore: [0, 255]               # raw ids that are not scored and give no loss
    classes:                       # in local order: the first is local id 0
      - {name: road, color: [128, 64, 128], raw: [7, 8], covers: [road]}
      - {name: sky, color: [70, 130, 180], raw: [23]}
      - {name: thing, raw: [30]}   # without a colour it gets one
    splits:
      train: {images: "my_city/images/train/{id}.jpg", labels: "my_city/labels/train/{id}.png", count: 300}
      val:
        images: ["my_city/a/{id}.jpg", "my_city/b/{id}.png"]   # one pattern or several
        labels: "my_city/labels/{id}.png"
        ids: "my_city/val.txt"     # only these of all files that match
      test: {images: "my_city/images/test/{id}.jpg"}   # no labels: hidden test split, or unlabelled images

**Files.** ``{id}`` stands for any text, slashes included. An image and a label file belong together if and only if
their ids are equal; a file without partner is an error that names it, whatever the other files are called. Files
whose names begin with a dot are not looked at. Paths start from the data root (environment variable
``DETECTRON2_DATASETS``, default ``./datasets``, read when the data are loaded); with ``./`` or ``../`` in front they
start from the folder of the spec file; absolute paths are left alone. ``ids`` (an inline list, or a file with one id
per line) chooses some of the files. ``count`` is the official number of images: ``datasets/check.py`` insists on it,
loading only warns.

**Encodings.** ``index``: grey PNG of 8 or 16 bit, or the indices of a palette PNG. ``color``: exact RGB colours; each
class lists ``raw_colors: [[r, g, b], ...]`` instead of ``raw``, and ``ignore`` lists colours. ``panoptic``: RGB PNG
of segment numbers ``R + 256 G + 65536 B``, ``annotation_file`` is the COCO panoptic JSON, raw ids are category ids,
and raw id 0 is a pixel of no segment. ``raw_ids: position`` instead of ``raw`` says that the raw id of a class is its
position in the list.

**Weak labels.** ``annotation: box`` or ``tag`` (of the spec or of one split): ``annotation_file`` is a JSON in the
form of COCO's instance annotations; ``raw`` are category ids. Tags are the categories that an image has; ``bbox`` is
not needed.

**Other layouts, own label spaces.** ``extends: camvid`` (a packaged spec, or the path of a file, relative to this
one) takes every top-level key that is not given here from that spec, ``dataset`` included. ``dataset`` (default: the
name) is the key of the label space: specs that share it share norm branch and classifier, so their classes must be
the same.

**Universal taxonomy.** The packaged datasets have their places in ``taxonomy.yaml``. A class of another dataset says
with ``covers`` which concepts of that file it stands for; without it the class is a concept of its own,
``my_city/thing``.

**Evaluation.** ``evaluation:`` may hold ``official`` (the rule of the dataset's own benchmark), ``submission_ids``
(one per class, default local ids), ``submission_void``, ``submission_name`` (``{stem}``, ``{id}``) and ``groupings``
(coarser scores: ``{category: {flat: [road, sidewalk], ...}}``).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..yaml_file import did_you_mean, read_yaml
from .spec_model import OFFICIAL_RULES, ClassSpec, DatasetSpec, EvaluationSpec, SpecError, SplitSpec
from .spec_parse import build_spec, check_top_level

__all__ = [
    "OFFICIAL_RULES",
    "ClassSpec",
    "DatasetSpec",
    "EvaluationSpec",
    "SpecError",
    "SplitSpec",
    "load_spec",
    "packaged_specs",
    "spec_path",
]

_PACKAGED = Path(__file__).resolve().parent / "specs"


def load_spec(path_or_name: str | Path) -> DatasetSpec:
    """Reads a spec file, with those that it extends, and checks it.

    Args:
        path_or_name: path of a YAML file, or the name of a packaged spec.

    Raises:
        SpecError: anything wrong with the file; names the file and the key.
    """
    path = spec_path(path_or_name)
    return build_spec(_merged(path, ()), str(path))


def packaged_specs() -> tuple[str, ...]:
    """Names of the specs that come with the package, sorted."""
    return tuple(sorted(path.stem for path in _PACKAGED.glob("*.yaml")))


def spec_path(path_or_name: str | Path, folder: Path | None = None) -> Path:
    """File of a spec.

    Args:
        path_or_name: a path (it has a suffix or a slash) or the name of a packaged spec.
        folder: what a relative path starts from; None: the working directory.
    """
    text = str(path_or_name)
    if text.endswith((".yaml", ".yml")) or "/" in text or isinstance(path_or_name, Path):
        return Path(folder or ".", text).expanduser()
    if text not in packaged_specs():
        raise SpecError(
            f"no packaged dataset spec is called {text!r}{did_you_mean(text, packaged_specs())}; "
            f"there are {', '.join(packaged_specs())}. For a file of your own give its path, with .yaml at the end."
        )
    return _PACKAGED / f"{text}.yaml"


def _merged(path: Path, inner: tuple[Path, ...]) -> Mapping[str, Any]:
    """Content of a spec file on top of the content of the file that it extends."""
    if path.resolve() in inner:
        chain = " > ".join(str(p) for p in (*inner, path))
        raise SpecError(f"specs extend each other in a circle: {chain}")
    content = _packaged_content(path) if path.parent == _PACKAGED else _content(path)
    if "extends" not in content:
        return content
    try:
        base = _merged(spec_path(content["extends"], path.parent), (*inner, path.resolve()))
    except SpecError as problem:
        raise SpecError(f"{path}: extends: {problem}") from None
    merged = {**base, "dataset": base.get("dataset", base["name"]), **content}
    if "dataset" not in content and _names(merged) != _names(base):
        raise SpecError(
            f"{path}: dataset: the classes differ from those of {merged['dataset']!r}, which {content['extends']} "
            f"belongs to: {_names(merged)} against {_names(base)}. Give this spec a `dataset` of its own."
        )
    return merged


def _content(path: Path) -> Mapping[str, Any]:
    return check_top_level(read_yaml(path, SpecError), str(path))


_packaged_content = lru_cache(maxsize=None)(_content)  # several specs extend the same one


def _names(content: Mapping[str, Any]) -> list[Any]:
    return [c.get("name") if isinstance(c, Mapping) else c for c in content.get("classes", ())]
