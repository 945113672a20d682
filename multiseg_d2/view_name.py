"""Names of views: a part of a catalog entry, or an entry without its labels. Standard library only.

``camvid_train[:30]`` are the first 30 images, ``camvid_train[30:]`` the others, ``camvid_train/unlabelled`` all of them
without labels, ``camvid_train[30:]/unlabelled`` both at once. What "first" means is said in
:mod:`multiseg_d2.data.views`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .user_error import UserError

__all__ = ["UNLABELLED", "ViewName", "ViewNameError", "base_entry", "parse_view"]

UNLABELLED = "/unlabelled"
_FORMS = "ENTRY[:30], ENTRY[30:], ENTRY[30:60], ENTRY/unlabelled or ENTRY[30:]/unlabelled"


class ViewNameError(UserError, ValueError):
    """A name looks like that of a view and is none; the message says what views are called."""


@dataclass(frozen=True)
class ViewName:
    """A parsed name.

    Attributes:
        entry: of the catalog, for example ``"camvid_train"``.
        start: position of the first image.
        stop: position behind the last image, None = to the end.
        labelled: whether labels are read.
    """

    entry: str
    start: int = 0
    stop: int | None = None
    labelled: bool = True

    @property
    def sliced(self) -> bool:
        """Whether only some of the images belong to it."""
        return self.start > 0 or self.stop is not None


def parse_view(name: str) -> ViewName | None:
    """What a name says, None where it is a plain one.

    Raises:
        ViewNameError: brackets or a suffix that mean nothing, or a slice that holds nothing.
    """
    if "[" not in name and "]" not in name and not re.search(r"/un?lab\w*$", name):
        return None
    match = re.fullmatch(r"(?P<entry>[^\[\]]+?)(\[(?P<start>\d*):(?P<stop>\d*)\])?(?P<unlabelled>/unlabelled)?", name)
    if match is None or match["entry"].endswith((UNLABELLED, "/unlabeled")):
        raise ViewNameError(f"{name!r} is no view of a dataset. Views are called {_FORMS}, with whole numbers from 0.")
    start, stop = int(match["start"] or 0), int(match["stop"]) if match["stop"] else None
    if stop is not None and stop <= start:
        raise ViewNameError(f"{name!r} holds no image: it ends at {stop}, where it begins at {start}")
    return ViewName(match["entry"], start, stop, labelled=match["unlabelled"] is None)


def base_entry(name: str) -> str:
    """The catalog entry behind a name, which may be that of a view."""
    view = parse_view(name)
    return name if view is None else view.entry
