"""A trained model of one dataset as one file for other programs: ONNX or TorchScript, with its classes beside it."""

from __future__ import annotations

import copy
import inspect
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..atomic_file import write_atomically
from ..label_space import LabelSpace
from ..modeling.norm.conversion import dataset_norms, single_dataset_model
from ..modeling.segmentor import MultiDatasetSegmentor
from ..user_error import UserError

__all__ = ["FORMATS", "TOLERANCE", "DeployedSegmentor", "ExportError", "compare", "describe", "export"]

#: Format -> ending of its files.
FORMATS = {"onnx": ".onnx", "torchscript": ".pt"}
#: Version of ONNX's operators, which every runtime of the last years knows.
OPSET = 18
#: Largest difference between the scores of a file and of the model, as a share of the largest score.
TOLERANCE = 1e-4


class ExportError(UserError, RuntimeError):
    """A model cannot be exported, or what was exported computes something else."""


class DeployedSegmentor(nn.Module):
    """One dataset's branch of a model as a plain function of images, without datasets and samples.

    Args:
        model: a trained segmentor; it is copied, not changed.
        dataset: whose norms are used.
        space: whose classes are scored.
        size: (height, width) of the images.
    """

    def __init__(self, model: MultiDatasetSegmentor, dataset: str, space: LabelSpace, size: tuple[int, int]) -> None:
        super().__init__()
        model = single_dataset_model(model, dataset) if any(dataset_norms(model)) else copy.deepcopy(model)
        self.model, self.dataset, self.space = model, dataset, space
        step = max(int(model.backbone.size_divisibility), 1)
        self.size = size
        self.padded = tuple(-(-side // step) * step for side in size)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) float on the scale 0 to 255, channels as in training -> (N, C, H, W) scores (logits)."""
        x = (images - self.model.pixel_mean) / self.model.pixel_std
        (height, width), (padded_height, padded_width) = self.size, self.padded
        if self.size != self.padded:
            x = F.pad(x, (0, padded_width - width, 0, padded_height - height))
        logits = self.model.sem_seg_head.logits(self.model.backbone(x), self.space)
        logits = F.interpolate(logits, size=self.padded, mode="bilinear", align_corners=False)
        return logits[..., :height, :width]


def export(network: DeployedSegmentor, path: Path, kind: str) -> None:
    """Writes a network.

    Args:
        network: see :class:`DeployedSegmentor`; the size of its images is part of what is written.
        path: of the file.
        kind: one of :data:`FORMATS`.

    Raises:
        ExportError: a format that there is not, or the exporter's own error.
    """
    if kind not in FORMATS:
        raise ExportError(f"{kind!r} is no format: choose of {', '.join(FORMATS)}")
    example = torch.zeros(1, 3, *network.size, device=network.model.device)
    with torch.no_grad(), _fixed_pooling(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warns of what depends on the size, which is fixed here
        try:
            if kind == "torchscript":
                traced = torch.jit.trace(network, example, check_trace=False)
                write_atomically(path, lambda file: torch.jit.save(traced, file))
            else:
                write_atomically(path, _onnx(network, example))
        except (RuntimeError, ImportError) as problem:
            needs = " (pip install multiseg-d2[export])" if kind == "onnx" else ""
            raise ExportError(f"{path}: {kind} cannot be written{needs}: {problem}") from problem


def compare(network: DeployedSegmentor, path: Path, kind: str, image: Tensor) -> float:
    """Runs an exported file on a picture beside the model, which goes the way of an evaluation.

    Args:
        network: what was exported.
        path: the file.
        kind: its format.
        image: (3, H, W) uint8, channels as in training.

    Returns:
        The largest difference between two scores, as a share of the largest score.

    Raises:
        ExportError: it is more than :data:`TOLERANCE`.
    """
    (output,) = network.model([{"image": image, "dataset": network.dataset, "label_space": network.space}])
    expected, found = output["sem_seg"].cpu(), _run(path, kind, image[None].float())[0]
    difference = float((found - expected).abs().max() / expected.abs().max().clamp_min(1.0))
    if not difference <= TOLERANCE:
        raise ExportError(
            f"{path} does not compute what the model does: scores differ by {difference:.1e} of the largest, more than "
            f"{TOLERANCE:.0e}. Do not use it; another version of torch or onnxruntime may export the model rightly"
        )
    return difference


def _run(path: Path, kind: str, images: Tensor) -> Tensor:
    if kind == "torchscript":
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore", DeprecationWarning)
            return torch.jit.load(str(path), map_location="cpu")(images)
    try:
        import onnxruntime
    except ModuleNotFoundError as problem:
        raise ExportError(
            f"{path} was written, but not compared: pip install multiseg-d2[export] ({problem})"
        ) from problem
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (scores,) = session.run(None, {"images": images.numpy()})
    return torch.from_numpy(scores)


def describe(network: DeployedSegmentor, input_format: str) -> dict[str, Any]:
    """What a program needs to know to use the file: its input, and names and colours of its classes, in their order."""
    space, head = network.space, network.model.sem_seg_head
    return {
        "label_space": space.name,
        "classes": [
            {"name": name, "color": [int(value) for value in color]} for name, color in zip(space.classes, space.colors)
        ],
        "void_channel": bool(head.scores_void),
        "activation": head.activation,
        "input": {
            "shape": [1, 3, *network.size],
            "channels": input_format,
            "range": [0, 255],
            "normalisation": "inside",
        },
        "output": "scores (logits); the label of a pixel is the class with the largest",
    }


def _onnx(network: nn.Module, example: Tensor) -> bytes:
    buffer = io.BytesIO()
    names = {"input_names": ["images"], "output_names": ["scores"], "opset_version": OPSET}
    # The exporter that traces, which needs no further library; where it is the only one it has no switch.
    choice = {"dynamo": False} if "dynamo" in inspect.signature(torch.onnx.export).parameters else {}
    torch.onnx.export(network, (example,), buffer, **names, **choice)
    return buffer.getvalue()


@contextmanager
def _fixed_pooling() -> Iterator[None]:
    """Adaptive pooling as two matrix products: exporters know it only where the cells divide the image."""
    with mock.patch.object(F, "adaptive_avg_pool2d", _pool):
        yield


def _pool(x: Tensor, cells: int | tuple[int, int]) -> Tensor:
    rows, columns = (cells, cells) if isinstance(cells, int) else cells
    height, width = int(x.shape[-2]), int(x.shape[-1])
    return _averages(height, rows).to(x) @ x @ _averages(width, columns).to(x).T  # (N, C, rows, columns)


def _averages(length: int, cells: int) -> Tensor:
    """(cells, length) weights of the mean over each cell, as torch cuts them: from floor to ceiling, overlapping."""
    weights = np.zeros((cells, length), np.float32)
    for i in range(cells):
        start, stop = i * length // cells, -(-(i + 1) * length // cells)
        weights[i, start:stop] = 1 / (stop - start)
    return torch.from_numpy(weights)
