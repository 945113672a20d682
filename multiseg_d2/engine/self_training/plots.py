"""What the rounds look like: curves of thresholds, kept shares and scores, and some of the labels over their images."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from detectron2.data import DatasetCatalog
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from ...atomic_file import write_atomically
from ...data.decode import read_image
from ...evaluation import pictures
from ...json_file import parse_json
from ...label_space import LabelSpace
from .folder import PseudoLabels

__all__ = ["round_curves", "round_table", "write_label_pictures", "write_round_plots"]


def round_table(root: str | Path, target: str) -> list[dict[str, Any]]:
    """What is known of each round of a target: its manifest, and the scores after it.

    Args:
        root: folder of the rounds, in the output folder of the run, whose ``metrics.json`` has the scores.
        target: catalog entry.

    Returns:
        Per round the manifest without its lists of files and images, and ``scores``: name -> mIoU before the round's
        first step.
    """
    scores = _scores(Path(root).parent / "metrics.json")
    rounds: list[dict[str, Any]] = []
    while (manifest := PseudoLabels(root, len(rounds), target).manifest()) is not None:
        kept = {k: v for k, v in manifest.items() if k not in ("files", "confidence_of_images")}
        rounds.append({**kept, "scores": scores.get(manifest["step"] - 1, {})})
    return rounds


def write_round_plots(root: str | Path, targets: Sequence[str]) -> None:
    """Draws ``<target>.png`` beside the rounds, on the main process."""
    if not comm.is_main_process():
        return
    for target in targets:
        rounds = round_table(root, target)
        if rounds:
            scores = _scores(Path(root).parent / "metrics.json")
            after = [step for step in scores if step >= rounds[-1]["step"]]
            picture = _plot(rounds, scores[max(after)] if after else {}, target)
            write_atomically(Path(root, f"{PseudoLabels(root, 0, target).slug}.png"), picture)


def round_curves(storage: EventStorage, rounds: Sequence[PseudoLabels]) -> None:
    """Puts portion, thresholds and kept shares of a round into the event storage: for TensorBoard, by step.

    Args:
        storage: of the trainer.
        rounds: the labels of the round, one per target; whole ones only are shown.
    """
    for labels in rounds:
        manifest = labels.manifest()
        if manifest is None:
            continue
        prefix, pixels = f"self_training/{labels.slug}", max(manifest["pixels"], 1)
        storage.put_scalar(f"{prefix}/portion", manifest["settings"]["portion"], smoothing_hint=False)
        for name, threshold in manifest["thresholds"].items():
            storage.put_scalar(f"{prefix}/threshold/{name}", threshold, smoothing_hint=False)
            kept = manifest["kept_pixels"][name] / pixels
            storage.put_scalar(f"{prefix}/kept/{name}", kept, smoothing_hint=False)


def write_label_pictures(labels: PseudoLabels, space: LabelSpace, images: Sequence[str], number: int) -> None:
    """Draws some of the labels over their images into the unfinished folder's ``pictures``, on the main process.

    Args:
        labels: whose label files are written, on all processes.
        space: of the labels.
        images: ids of the labelled images.
        number: how many are drawn, spread evenly.
    """
    if not comm.is_main_process() or not number:
        return
    files = {record["image_id"]: record["file_name"] for record in DatasetCatalog.get(labels.target)}
    for k in pictures.spread(len(images), number):
        content = np.frombuffer((labels.partial / "labels" / f"{images[k]}.png").read_bytes(), np.uint8)
        shown = {"pseudo-label": np.asarray(cv2.imdecode(content, cv2.IMREAD_UNCHANGED))}
        picture = pictures.comparison(read_image(files[images[k]], "RGB"), shown, space.classes, space.colors)
        pictures.save(picture, labels.partial / "pictures" / f"{images[k].replace('/', '_')}.png")


def _scores(metrics: Path) -> dict[int, dict[str, float]]:
    """Step -> name -> mIoU of the evaluations that ``metrics.json`` records."""
    found: dict[int, dict[str, float]] = {}
    for line in metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else ():
        try:
            values = parse_json(line, str(metrics), finite=False)
        except ValueError:  # the last line of a run that was killed
            continue
        named = {name: value for name, value in values.items() if name.endswith("/sem_seg/mIoU")}
        if named:
            found.setdefault(values["iteration"], {}).update(named)
    return found


def _plot(rounds: Sequence[dict[str, Any]], last: dict[str, float], target: str) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no global state, no display
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    numbers = [r["round"] for r in rounds]
    for i, name in enumerate(rounds[0]["thresholds"]):
        style = {"color": f"C{i % 10}", "linestyle": ("-", "--", ":")[i // 10 % 3], "marker": ".", "label": name}
        left.plot(numbers, [r["thresholds"][name] for r in rounds], **style)
        middle.plot(numbers, [100 * r["kept_pixels"][name] / max(r["pixels"], 1) for r in rounds], **style)
    for name in sorted({name for r in [*rounds, {"scores": last}] for name in r["scores"]}):
        points = [(r["round"], r["scores"][name]) for r in rounds if name in r["scores"]]
        points += [(len(rounds), last[name])] if name in last else []
        right.plot(*zip(*points), marker="o", label=name.removesuffix("/sem_seg/mIoU"))
    left.set_title("threshold of each class")
    middle.set_title("pixels kept, % of all")
    middle.set_yscale("symlog", linthresh=0.1)
    right.set_title("mIoU before each round, and at the end")
    if right.lines:
        right.legend(fontsize="small")
    for axes in (left, middle, right):
        axes.set_xlabel("round")
        axes.set_xticks(numbers)
    middle.legend(fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle(f"Self-training on {target}")
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()
