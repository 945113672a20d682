#!/usr/bin/env python3
"""Draws IDD's polygons, <root>/idd/gtFine/**/*_gtFine_polygons.json, as *_gtFine_labelids.png beside them.

The pixels hold IDD's own ids (0 to 39), from which the specs idd, idd_level1, idd_level2 and idd_level4 take their
levels. Polygons are drawn in the order of the file, as IDD's own createLabels.py (--id-type id) does; deleted objects,
those with fewer than three points and those called "ground" (no class of IDD's) are skipped, so that what lies beneath
stays; "<name>group" counts as <name>, pixels without a polygon are unlabeled (35).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from multiseg_d2.data.convert import ConversionError, Job, conversion_parser, convert_files
from multiseg_d2.json_file import read_json
from multiseg_d2.user_error import run_script

POLYGONS, LABELS = "_gtFine_polygons.json", "_gtFine_labelids.png"
#: IDD's names, by id (AutoNUE public-code, helpers/anue_labels.py).
NAMES = (
    *("road", "parking", "drivable fallback", "sidewalk", "rail track", "non-drivable fallback", "person", "animal"),
    *("rider", "motorcycle", "bicycle", "autorickshaw", "car", "truck", "bus", "caravan", "trailer", "train"),
    *("vehicle fallback", "curb", "wall", "fence", "guard rail", "billboard", "traffic sign", "traffic light", "pole"),
    *("polegroup", "obs-str-bar-fallback", "building", "bridge", "tunnel", "vegetation", "sky", "fallback background"),
    *("unlabeled", "ego vehicle", "rectification border", "out of roi", "license plate"),
)
ID_OF = {name: number for number, name in enumerate(NAMES)}
#: More than any camera of the dataset gives: such a size is a broken file, not a reason to fill the memory.
MAX_PIXELS = 10**8
#: Names outside the table that occur in a few files; IDD's converter draws nothing for them.
SKIPPED = {"ground"}


def draw(path: str) -> np.ndarray | tuple[np.ndarray, str]:
    """Draws the polygons of one file.

    Returns:
        (H, W) uint8 IDD ids, with a remark where polygons were skipped for their name.

    Raises:
        ConversionError: not IDD's form, or a name that is in no table.
    """
    try:
        content = read_json(path, ConversionError)
        picture = Image.new("L", size_of(content, path), ID_OF["unlabeled"])
        pen = ImageDraw.Draw(picture)
        remark = ""
        for item in content["objects"]:
            if item.get("deleted") or len(item["polygon"]) < 3:
                continue
            if item["label"] in SKIPPED:
                remark = f"polygons called {item['label']!r}, which is in no table, were skipped"
                continue
            points = [(float(x), float(y)) for x, y in item["polygon"]]
            if not np.isfinite(points).all():  # 1e999 is a number of JSON, but of nothing else
                raise ConversionError(f"{path}: a polygon of {item['label']!r} has a corner that is no number")
            pen.polygon(points, fill=id_of(item["label"], path))
    except ConversionError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise ConversionError(f"{path}: not a polygon file of IDD ({type(problem).__name__}: {problem})") from None
    ids = np.asarray(picture)
    return (ids, remark) if remark else ids


def size_of(content: dict, path: str) -> tuple[int, int]:
    """(width, height) of a file's picture.

    Raises:
        ConversionError: no picture has that size.
    """
    width, height = content["imgWidth"], content["imgHeight"]
    if not 0 < width * height <= MAX_PIXELS:
        raise ConversionError(f"{path}: imgWidth {width} and imgHeight {height} are not the size of a picture")
    return width, height


def id_of(name: str, path: str) -> int:
    """IDD id of a name, also of a group of such objects."""
    if name not in ID_OF and name.endswith("group"):
        name = name.removesuffix("group")
    if name not in ID_OF:
        raise ConversionError(f"{path}: the name {name!r} is not in IDD's table")
    return ID_OF[name]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the script; returns the exit code."""
    parser = conversion_parser(__doc__)
    parser.add_argument(
        "--folder", default="idd", help="dataset folder below the root; IDD_Segmentation for Part I alone"
    )
    options = parser.parse_args(arguments)
    folder = options.root / options.folder / "gtFine"
    files = sorted(folder.rglob(f"*{POLYGONS}"))
    if not files:
        print(f"no file *{POLYGONS} below {folder}: unpack IDD there (see datasets/README.md)", file=sys.stderr)
        return 1
    jobs = [Job(str(path).removesuffix(POLYGONS) + LABELS, str(path)) for path in files]
    return convert_files(jobs, draw, options, "IDD polygons")


if __name__ == "__main__":
    sys.exit(run_script(main))
