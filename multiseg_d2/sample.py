"""The two dicts that travel from disk to loss: an entry of a dataset, and what a mapper makes of it. No code.

They are plain dicts, as everywhere in Detectron2; these types say which keys there are, in what form, and when.
Axes: H, W of the sample (the crop); h, w of the file; C local classes; B boxes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypedDict

if TYPE_CHECKING:
    from detectron2.structures import Instances
    from torch import Tensor

    from .label_space import LabelSpace

__all__ = ["Annotation", "DatasetDict", "Sample"]

#: What is known of an image: a label map, boxes, the classes that it shows, or nothing.
Annotation = Literal["pixel", "box", "tag", "none"]


class _Known(TypedDict):
    """What dataset dicts and samples share.

    Attributes:
        file_name: of the image.
        image_id: unique within the entry; the ``{id}`` of a spec's pattern.
        dataset: whose classes and norms, for example ``"camvid"``.
        entry: name in Detectron2's catalogs, for example ``"camvid_train"`` or ``"camvid_train[:30]"``.
        annotation: what is known of the image.
    """

    file_name: str
    image_id: str
    dataset: str
    entry: str
    annotation: Annotation


class DatasetDict(_Known, total=False):
    """One image as ``DatasetCatalog.get(entry)`` lists it: file names and small things, nothing that was read.

    Attributes:
        sem_seg_file_name: label map; annotation ``pixel`` with encoding ``index`` or ``color``.
        pan_seg_file_name, segments_info: label map of segment ids, and COCO's list of segments, whose ``category_id``
            are raw ids; annotation ``pixel`` with encoding ``panoptic``.
        annotations: annotation ``box``: ``bbox`` in pixels of the file, ``bbox_mode``, ``category_id`` (local id),
            ``iscrowd``.
        image_tags: annotation ``tag``: ascending local ids of the classes that the image shows.
        soft_label_file_name: shares of the classes per pixel, beside or instead of a label map, see
            :mod:`multiseg_d2.data.soft_labels`.
        height, width: size after the EXIF turn, where an annotation file states it; checked on reading.
    """

    sem_seg_file_name: str
    pan_seg_file_name: str
    segments_info: list[dict[str, Any]]
    annotations: list[dict[str, Any]]
    image_tags: list[int]
    soft_label_file_name: str
    height: int
    width: int


class _Read(_Known):
    """What every sample has.

    Attributes:
        image: (3, H, W) uint8, channels in the order of ``INPUT.FORMAT``; the mean colour where ``content`` is False.
        height, width: h, w of the file after the EXIF turn; in evaluation the size of the wanted scores.
    """

    image: Tensor
    height: int
    width: int


class Sample(_Read, total=False):
    """One image as it reaches the model. What is per pixel has the size of ``image``.

    Attributes:
        sem_seg: (H, W) uint8 local ids, ``IGNORE`` where nothing is scored; absent where ``annotation`` is not
            ``pixel``, and in evaluation, where the evaluator reads the label.
        content: (H, W) bool, True where the image is real; absent where all of it is. False are the padding of images
            smaller than the crop and the corners that a rotation lays bare.
        soft_label: (C, H, W) float32 shares of the classes; all zero where nothing is said.
        confidence: (H, W) float32 in [0, 1], 0 where nothing is said; only if the file of soft labels has it.
        instances: boxes that lie in the sample, in its coordinates: ``gt_boxes``, ``gt_classes`` (local ids).
        image_tags: ascending local ids; those of the whole image, whatever the crop shows.
        draw: of the schedule, training only: which image in which step (:class:`multiseg_d2.data.schedule.Draw`).
        label_space: classes of the wanted scores, a name or the space itself; evaluation only, default: the dataset's.
        sem_seg_file_name, pan_seg_file_name: as in the dataset dict, for messages and previews.
    """

    sem_seg: Tensor
    content: Tensor
    soft_label: Tensor
    confidence: Tensor
    instances: Instances
    image_tags: list[int]
    draw: tuple[int, int, int]
    label_space: str | LabelSpace
    sem_seg_file_name: str
    pan_seg_file_name: str
