#!/usr/bin/env python
"""Labels a picture, a folder of pictures, a video or a registered split with a trained model.

    python tools/predict.py --config-file configs/quickstart/toy.yaml --weights output/quickstart/toy/model_final.pth \
        --input street.jpg --output out --space camvid
    python tools/predict.py ... --input folder/ --output out --ids --overlay
    python tools/predict.py ... --input drive.mp4 --output drive_labelled.mp4
    python tools/predict.py ... --input kitti_test --output submission --space kitti --submission

One kind of picture is written to OUTPUT/<path of the input, .png>, several kinds to a folder each: OUTPUT/ids/...
A picture that cannot be read is named, the others are done, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np

import multiseg_d2  # noqa: F401  isort: skip  (first: it lets Detectron2 be imported)
from detectron2.data import MetadataCatalog
from detectron2.utils.logger import setup_logger

from multiseg_d2.data.decode import BadFileError, read_image
from multiseg_d2.data.spec import DatasetSpec
from multiseg_d2.engine import Predictor, load_config, register_config
from multiseg_d2.engine.predictor import wanted_space
from multiseg_d2.evaluation import pictures
from multiseg_d2.evaluation.prediction_files import InputError, Picture, check_targets, find_pictures
from multiseg_d2.evaluation.submission import image_id_of, submission_ids, submission_name
from multiseg_d2.label_space import LabelSpace
from multiseg_d2.progress import CONSOLE, progress
from multiseg_d2.user_error import UserError, run_script

VIDEOS = {".mp4": "mp4v", ".m4v": "mp4v", ".mov": "mp4v", ".mkv": "mp4v", ".avi": "MJPG", ".webm": "VP80"}


def spec_of(space: LabelSpace) -> DatasetSpec:
    """The spec that the label space was registered from."""
    for name in MetadataCatalog.list():
        entry = MetadataCatalog.get(name)
        if getattr(entry, "dataset", None) == space.name:
            return entry.spec
    raise InputError(f"no registered dataset has the label space {space.name!r}")


def painters(
    space: LabelSpace, alpha: float, numbering: tuple[int | None, int | None] = (None, None)
) -> dict[str, Callable[[np.ndarray, np.ndarray, Picture], np.ndarray]]:
    """What each kind of result is made of: RGB image, local ids and input -> pixels."""
    return {
        "overlay": lambda image, ids, _: pictures.overlay(image, ids, space.colors, alpha),
        "page": lambda image, ids, item: pictures.comparison(
            image, {"prediction": ids}, space.classes, space.colors, os.path.basename(item.path)
        ),
        "colors": lambda image, ids, _: pictures.color_map(ids, space.colors),
        "ids": lambda image, ids, _: ids,
        "submission": lambda image, ids, _: submission_ids(ids, spec_of(space), *numbering),
    }


def target_path(item: Picture, kind: str, output: Path, only_kind: bool, space: LabelSpace) -> Path:
    """Where a result goes."""
    if only_kind and output.suffix.lower() == ".png":
        return output
    folder = output if only_kind else output / kind
    if kind == "submission":
        spec = spec_of(space)
        return folder / submission_name(item.path, spec, item.image_id or image_id_of(item.path, spec, item.folder))
    return folder / f"{item.target}.png"


def target_paths(
    items: Sequence[Picture], kinds: list[str], output: Path, space: LabelSpace
) -> dict[tuple[str, Picture], Path]:
    """Where every result goes.

    Raises:
        InputError: two results would go to one file, or a result would replace an input.
    """
    targets, owners = {}, {}
    for kind in kinds:
        for item in items:
            path = targets[kind, item] = target_path(item, kind, output, len(kinds) == 1, space)
            if owners.setdefault(path, item) is not item:
                raise InputError(f"the results of {owners[path].path} and {item.path} would both be {path}")
    check_targets({path: item.path for path, item in owners.items()}, [item.path for item in items])
    return targets


def predict_pictures(
    predictor: Predictor,
    targets: dict[tuple[str, Picture], Path],
    paint: dict[str, Callable[[np.ndarray, np.ndarray, Picture], np.ndarray]],
) -> int:
    """Labels pictures; returns how many could not be read."""
    failed, kinds = 0, list(dict.fromkeys(kind for kind, _ in targets))
    items = list(dict.fromkeys(item for _, item in targets))
    with progress("labelling", len(items), "pictures") as step:
        for item in items:
            step()
            try:
                image = read_image(item.path, "RGB")
            except BadFileError as error:
                CONSOLE.print(f"not labelled: {error}", style="red", markup=False, soft_wrap=True)
                failed += 1
                continue
            labels = predictor(image if predictor.image_format == "RGB" else image[..., ::-1], item.path)
            for kind in kinds:
                pictures.save(paint[kind](image, labels, item), targets[kind, item])
    return failed


def predict_video(predictor: Predictor, source: Path, target: Path, kinds: list[str], alpha: float) -> None:
    """Labels each frame of a video; the result appears under its name when it is complete."""
    paint = painters(predictor.space, alpha)[kinds[0]]
    capture = cv2.VideoCapture(str(source))
    total = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    temporary = target.with_name(f".{target.stem}.{os.getpid()}.tmp{target.suffix}")
    target.parent.mkdir(parents=True, exist_ok=True)
    writer, done = None, 0
    try:
        with progress(source.name, total if total > 0 else None, "frames") as step:
            for frame in frames(capture):
                if writer is None:
                    writer = open_writer(temporary, capture.get(cv2.CAP_PROP_FPS), frame.shape)
                rgb = frame[..., ::-1]
                labels = predictor(frame if predictor.image_format == "BGR" else rgb, f"{source} frame {done}")
                picture = paint(rgb, labels, Picture(str(source), source.stem))
                writer.write(np.ascontiguousarray(picture[..., ::-1]))
                done += 1
                step()
        if not done:
            raise InputError(f"{source}: not a video that OpenCV can read")
        writer.release()
        os.replace(temporary, target)
    finally:
        capture.release()
        if writer is not None:
            writer.release()
        temporary.unlink(missing_ok=True)
    if 0 < done < total:
        CONSOLE.print(f"{source}: {done} of {total} frames could be read", style="red", markup=False, soft_wrap=True)


def frames(capture: cv2.VideoCapture) -> Iterator[np.ndarray]:
    """BGR frames until the end of a video or its first broken frame."""
    while True:
        good, frame = capture.read()
        if not good:
            return
        yield frame


def open_writer(path: Path, rate: float, shape: tuple[int, ...]) -> cv2.VideoWriter:
    """A writer of colour frames of ``shape``; the codec follows from the suffix."""
    codec = cv2.VideoWriter_fourcc(*VIDEOS[path.suffix.lower()])
    writer = cv2.VideoWriter(str(path), codec, rate if rate > 0 else 25.0, shape[1::-1])
    if not writer.isOpened():
        raise InputError(f"OpenCV cannot write {path.suffix} videos here; try an output that ends in .avi")
    return writer


def check_output(output: Path, inputs: int, kinds: list[str], is_video: bool) -> None:
    """Refuses what cannot be written, before the model is built."""
    if not is_video and output.suffix.lower() == ".png" and (inputs > 1 or len(kinds) > 1):
        raise InputError(f"--output {output} is one picture, but there are {inputs} inputs and kinds {kinds}")
    if is_video and kinds not in (["overlay"], ["colors"]):
        raise InputError(f"a video is written as --overlay or as --colors, not as {kinds}: video files alter ids")
    if is_video and output.suffix.lower() not in VIDEOS:
        raise InputError(f"--output {output}: the output of a video must end in {', '.join(VIDEOS)}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, help="the config that the model was trained with")
    parser.add_argument("--weights", default="", help="the trained model; default: MODEL.WEIGHTS of the config")
    parser.add_argument("--input", required=True, help="picture, folder, video or registered split (kitti_test)")
    parser.add_argument("--output", required=True, type=Path, help="folder; or a .png, or a video for a video")
    parser.add_argument("--space", default="", help="dataset whose classes are wanted; needed if there are several")
    parser.add_argument("--norm", default="", help="trained dataset whose batch norm is used; default: that of --space")
    parser.add_argument("--overlay", action="store_true", help="class colours over the picture (the default)")
    parser.add_argument("--page", action="store_true", help="picture and prediction side by side, with a legend")
    parser.add_argument("--colors", action="store_true", help="the dataset's class colours")
    parser.add_argument("--ids", action="store_true", help="local ids, 8-bit grey")
    parser.add_argument("--submission", action="store_true", help="ids and file names as the dataset's server expects")
    parser.add_argument("--first-id", type=int, help="submission: id of the first class (docs/submission.md)")
    parser.add_argument("--void-id", type=int, help="submission: id of pixels without a class")
    parser.add_argument("--alpha", type=float, default=0.55, help="share of the class colour in overlays")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs of the config, last")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    args = parse(argv)
    setup_logger(name="multiseg_d2")
    kinds = [kind for kind in ("overlay", "page", "colors", "ids", "submission") if getattr(args, kind)] or ["overlay"]
    try:
        cfg = load_config(args.config_file, args.opts)
        if args.weights:
            cfg.MODEL.WEIGHTS = args.weights
        register_config(cfg)
        source = Path(args.input)
        is_video = source.is_file() and source.suffix.lower() in VIDEOS
        items = [] if is_video else find_pictures(args.input, args.output)
        output = args.output / source.name if is_video and not args.output.suffix else args.output
        check_output(output, len(items), kinds, is_video)
        space = wanted_space(cfg, args.space, args.norm)  # before the weights are read: that may take long
        if is_video:
            check_targets({output: str(source)}, [str(source)])
            predict_video(Predictor(cfg, args.space, args.norm), source, output, kinds, args.alpha)
            return 0
        targets = target_paths(items, kinds, output, space)
        paint = painters(space, args.alpha, (args.first_id, args.void_id))
        if "submission" in kinds:  # a numbering that is impossible is told at once
            paint["submission"](np.zeros((1, 1, 3), np.uint8), np.zeros((1, 1), np.uint8), items[0])
        return int(predict_pictures(Predictor(cfg, args.space, args.norm), targets, paint) > 0)
    except (UserError, OSError) as error:
        CONSOLE.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return 2


if __name__ == "__main__":
    sys.exit(run_script(main))
