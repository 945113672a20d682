"""The claims file: which configs make the rows of a table, and which scores its columns.

    title: "CDCL: Cityscapes + BDD100K"
    source: "arXiv 2103.11351, slides"        # of the published numbers
    seeds: [0, 1, 2]
    metric: mIoU                              # path below the entry in report.json; this is the default
    overrides: {SOLVER.MAX_ITER: 40000}       # for every run
    columns:
      - {label: CS val, dataset: cityscapes_val}
      - {label: BDD val, dataset: bdd100k_val, metric: official.mIoU}
      - {label: CS test}                      # without a dataset: published only, its labels are hidden
      - {label: mean, metric: mean.mIoU}      # or mean.harmonic_mIoU, mean.seen.mIoU, mean.unseen.nameable_mIoU, ...
      - {label: s/step, metric: cost.seconds} # of one processor; or cost.parameters (in millions)
    rows:
      - label: CDCL                           # one run fills all columns
        config: ../../configs/cdcl/cs_bdd_r18.yaml
        published: {CS val: 72.63, BDD val: 60.47}
      - label: Single                         # one run per column
        runs:
          - {config: ../../configs/a.yaml, columns: [CS val]}
          - {config: ../../configs/b.yaml, columns: [BDD val]}
      - label: Fine-tuning                    # each phase starts from the weights of the one before
        phases:
          - {config: ../../configs/pretrain.yaml}
          - {config: ../../configs/finetune.yaml, overrides: {SOLVER.BASE_LR: 0.001}}
      - label: Two files                      # what the phase before left goes to these keys, not to MODEL.WEIGHTS
        phases:
          - {config: ../../configs/teacher.yaml}
          - {config: ../../configs/student.yaml, weights_as: MODEL.SEM_SEG_HEAD.CLASS_STATISTICS}
      - label: CDCL, multi-scale test
        phases:
          - {config: ../../configs/cdcl/cs_bdd_r18.yaml}
          - {config: ../../configs/cdcl/cs_bdd_r18_ms.yaml, eval_only: true}
      - {label: SegNet, published: {CS val: 56.1}}     # published only

Paths are relative to the claims file. Rows that begin with the same phase share its run.

A table whose columns are variants of its rows says so in the columns; a row of such a table may name those it fills::

    columns:
      - {label: shared norm, metric: mean.mIoU, overrides: {MODEL.DATASET_NORM.ENABLED: false}}
      - {label: norm per dataset, metric: mean.mIoU, overrides: {MODEL.DATASET_NORM.ENABLED: true}}
    rows:
      - {label: 200 steps, config: ../../configs/a.yaml}
      - {label: 600 steps, config: ../../configs/a.yaml, overrides: {SOLVER.MAX_ITER: 600}, columns: [shared norm]}

A shorter version of the table, under the name ``<file>_quick``::

    quick: {seeds: [0], rows: [CDCL, Single], overrides: {SOLVER.MAX_ITER: 100}}   # each may be left out
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..user_error import UserError
from ..yaml_file import did_you_mean, read_yaml

__all__ = ["Claim", "ClaimError", "Column", "Phase", "Row", "Run", "load_claim"]

DEFAULT_METRIC = "mIoU"


class ClaimError(UserError, ValueError):
    """A claims file, or what it asks for, cannot be meant; the message says where."""


@dataclass(frozen=True)
class Column:
    """One number per row: a metric of a catalog entry, or of the means over all of them.

    ``dataset`` "mean": the means; "cost": of the run itself; "": published only (a hidden test set). ``overrides``: of
    the runs that fill it.
    """

    label: str
    dataset: str
    metric: str = DEFAULT_METRIC
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Phase:
    """One call of the training script: a config and ``KEY VALUE`` pairs.

    ``weights_as``: keys that are set to the weights of the phase before.
    """

    config: Path
    overrides: tuple[str, ...] = ()
    eval_only: bool = False
    weights_as: tuple[str, ...] = ("MODEL.WEIGHTS",)


@dataclass(frozen=True)
class Run:
    """Phases that follow on each other; the last one's scores fill ``columns``."""

    phases: tuple[Phase, ...]
    columns: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """A line of the table. ``published``: numbers of the source by column label."""

    label: str
    runs: tuple[Run, ...]
    published: Mapping[str, float]
    note: str = ""


@dataclass(frozen=True)
class Claim:
    """A table to be measured. ``name`` is the file's stem; it names the outputs and the README's markers."""

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    seeds: tuple[int, ...]
    source: str = ""
    note: str = ""

    def column(self, label: str) -> Column:
        """The column of this label."""
        return next(column for column in self.columns if column.label == label)


def load_claim(path: str | Path, quick: bool = False) -> Claim:
    """Reads a claims file, see the module's text.

    Args:
        path: the file.
        quick: its shorter version.

    Raises:
        ClaimError: naming the file and the place.
    """
    path = Path(path)
    content = _mapping(read_yaml(path, ClaimError), f"{path}", _CLAIM_KEYS, ("title", "columns", "rows"))
    short = _quick(content, f"{path}: quick") if "quick" in content or quick else {}
    metric = content.get("metric", DEFAULT_METRIC)
    given = {key: enumerate(_list(content[key], f"{path}: {key}")) for key in ("columns", "rows")}
    columns = tuple(_column(item, f"{path}: columns[{i}]", metric) for i, item in given["columns"])
    _unique([c.label for c in columns], f"{path}: columns")
    common = _overrides(content.get("overrides"), f"{path}: overrides")
    last = _overrides(short.get("overrides"), f"{path}: quick: overrides") if quick else ()
    reader = _RowReader(path, columns, common, last)
    rows = tuple(reader.row(item, f"{path}: rows[{i}]") for i, item in given["rows"])
    _unique([row.label for row in rows], f"{path}: rows")
    labels = [row.label for row in rows]
    for label in _list(short.get("rows", []), f"{path}: quick: rows"):
        if label not in labels:
            raise ClaimError(f"{path}: quick: rows: there is no row {label!r}{did_you_mean(label, labels)}")
    if quick and "rows" in short:
        rows = tuple(row for row in rows if row.label in short["rows"])
    seeds = (short if quick and "seeds" in short else content).get("seeds", [0])
    if not isinstance(seeds, list) or not seeds or not all(type(s) is int and s >= 0 for s in seeds):
        raise ClaimError(f"{path}: seeds must be a list of numbers from 0 on, not {seeds!r}")
    texts = {key: str(content.get(key, "")) for key in ("source", "note")}
    name = f"{path.stem}_quick" if quick else path.stem
    return Claim(name, str(content["title"]), columns, rows, tuple(dict.fromkeys(seeds)), **texts)


_CLAIM_KEYS = ("title", "source", "note", "seeds", "metric", "overrides", "columns", "rows", "quick")
_COLUMN_KEYS = ("label", "dataset", "metric", "overrides")
_QUICK_KEYS = ("seeds", "rows", "overrides")
_PHASE_KEYS = ("config", "overrides", "eval_only", "weights_as")
_RUN_KEYS = (*_PHASE_KEYS, "phases", "columns")
_ROW_KEYS = ("label", *_PHASE_KEYS, "phases", "columns", "runs", "published", "note")


class _RowReader:
    """Reads rows; knows what all of them share."""

    def __init__(self, path: Path, columns: tuple[Column, ...], common: tuple[str, ...], last: tuple[str, ...]) -> None:
        self.folder, self.columns, self.common, self.last = path.parent, columns, common, last
        self.labels = tuple(column.label for column in columns)

    def row(self, item: Any, where: str) -> Row:
        item = _mapping(item, where, _ROW_KEYS, ("label",))
        where = f"{where} ({item['label']})"
        if "runs" in item:
            _only_one(item, ("runs", "config", "phases"), where)
            listed = enumerate(_list(item["runs"], where))
            runs = tuple(r for i, run in listed for r in self._runs(run, f"{where}: runs[{i}]"))
        elif "config" in item or "phases" in item:
            runs = self._runs({key: item[key] for key in _RUN_KEYS if key in item}, where)
        else:
            runs = ()
        filled = [label for run in runs for label in run.columns]
        _unique(filled, f"{where}: columns of its runs")
        published = self._published(item.get("published", {}), where)
        if not runs and not published:
            raise ClaimError(f"{where} has neither a config nor published numbers")
        return Row(str(item["label"]), runs, published, str(item.get("note", "")))

    def _runs(self, item: Any, where: str) -> tuple[Run, ...]:
        """One run for all columns that want the same overrides."""
        item = _mapping(item, where, _RUN_KEYS)
        wanted = tuple(_list(item.get("columns", list(self.labels)), f"{where}: columns"))
        for label in wanted:
            self._check_label(label, where)
        groups: dict[tuple[str, ...], list[str]] = {}
        for column in self.columns:
            if column.label in wanted:
                groups.setdefault(column.overrides, []).append(column.label)
        return tuple(Run(self._phases(item, own, where), tuple(labels)) for own, labels in groups.items())

    def _phases(self, item: Mapping[str, Any], column: tuple[str, ...], where: str) -> tuple[Phase, ...]:
        _only_one(item, ("config", "phases"), where)
        if "config" in item:
            return (self._phase({k: v for k, v in item.items() if k in _PHASE_KEYS}, column, where),)
        if not item.get("phases"):
            raise ClaimError(f"{where} needs `config` or `phases`")
        listed = enumerate(_list(item["phases"], where))
        return tuple(self._phase(phase, column, f"{where}: phases[{i}]") for i, phase in listed)

    def _phase(self, item: Any, column: tuple[str, ...], where: str) -> Phase:
        item = _mapping(item, where, _PHASE_KEYS, ("config",))
        if not isinstance(item["config"], str):
            raise ClaimError(f"{where}: config is the path of a file, not {item['config']!r}")
        config = (self.folder / item["config"]).resolve()
        if not config.is_file():
            raise ClaimError(f"{where}: there is no config {config}")
        overrides = self.common + _overrides(item.get("overrides"), where) + column + self.last
        keys = item.get("weights_as", "MODEL.WEIGHTS")
        keys = tuple(_list([keys] if isinstance(keys, str) else keys, f"{where}: weights_as"))
        return Phase(config, overrides, bool(item.get("eval_only", False)), keys)

    def _published(self, item: Any, where: str) -> dict[str, float]:
        if not isinstance(item, Mapping):
            raise ClaimError(f"{where}: published is a mapping of column label to number, not {item!r}")
        for label, value in item.items():
            self._check_label(label, f"{where}: published")
            if type(value) not in (int, float):
                raise ClaimError(f"{where}: published {label}: {value!r} is not a number")
        return {label: float(value) for label, value in item.items()}

    def _check_label(self, label: str, where: str) -> None:
        if label not in self.labels:
            raise ClaimError(f"{where}: there is no column {label!r}{did_you_mean(label, self.labels)}")


def _column(item: Any, where: str, metric: str) -> Column:
    item = _mapping(item, where, _COLUMN_KEYS, ("label",))
    dataset, metric = str(item.get("dataset", "")), str(item.get("metric", metric))
    if metric.startswith(("mean.", "cost.")) and not dataset:
        dataset, metric = metric.split(".", 1)
    return Column(str(item["label"]), dataset, metric, _overrides(item.get("overrides"), f"{where}: overrides"))


def _quick(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    if "quick" not in content:
        raise ClaimError(f"{where}: the file has no shorter version")
    return _mapping(content["quick"], where, _QUICK_KEYS)


def _mapping(item: Any, where: str, known: Sequence[str], needed: Sequence[str] = ()) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise ClaimError(f"{where} must be a mapping, not {item!r}")
    for key in item:
        if key not in known:
            raise ClaimError(f"{where}: there is no key {key!r}{did_you_mean(key, known)}; known: {', '.join(known)}")
    for key in needed:
        if not item.get(key):
            raise ClaimError(f"{where} lacks {key!r}")
    return item


def _list(item: Any, where: str) -> list[Any]:
    if not isinstance(item, list):
        raise ClaimError(f"{where} must be a list, not {item!r}")
    return item


def _overrides(item: Any, where: str) -> tuple[str, ...]:
    if item is None:
        return ()
    if not isinstance(item, Mapping):
        raise ClaimError(f"{where}: overrides are a mapping such as {{SOLVER.MAX_ITER: 100}}, not {item!r}")
    return tuple(text for key, value in item.items() for text in (str(key), str(value)))


def _only_one(item: Mapping[str, Any], keys: Sequence[str], where: str) -> None:
    present = [key for key in keys if key in item]
    if len(present) > 1:
        raise ClaimError(f"{where} has {' and '.join(present)}: only one of them can be meant")


def _unique(labels: Sequence[str], where: str) -> None:
    doubles = sorted({label for label in labels if list(labels).count(label) > 1})
    if doubles:
        raise ClaimError(f"{where}: these occur twice: {doubles}")
