"""Drawn street scenes with conflicting label spaces: the data that demo and tests need no download for.

A scene is drawn once, region by region, in a fine vocabulary (``CONCEPTS``); what a toy set calls the regions is in
its spec (``specs/toy_*.yaml``), by the universal taxonomy. Sets differ in look (``LOOKS``): viewpoint, what is about,
colours, light, weather, sensor. Every picture is a pure function of (seed, set, split, index).
"""

from __future__ import annotations

from .canvas import CONCEPTS
from .looks import LOOKS, Look, blend
from .scene import Drawing, draw_scene
from .write import FOLDER, SPLITS, ToyFilesError, ToySplit, draw_split_scene, write_toy

__all__ = [
    "CONCEPTS",
    "FOLDER",
    "LOOKS",
    "SPLITS",
    "Drawing",
    "Look",
    "ToyFilesError",
    "ToySplit",
    "blend",
    "draw_scene",
    "draw_split_scene",
    "write_toy",
]
