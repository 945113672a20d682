#!/usr/bin/env python3
"""Decodes datasets once, so that training need not: python datasets/cache.py camvid_train --cache FOLDER.

Training and evaluation read from the folder when MULTISEG_CACHE names it; samples are the same to the bit:

    MULTISEG_CACHE=FOLDER python train_net.py --config-file ...

Pixels are not compressed: 3 bytes for one of an image, 1 to 3 for one of a label (Cityscapes, train: 25 GB), so put
them on a fast disk. A run that was interrupted is taken up again. Files that have changed are refused until this ran
again. --remove deletes the pixels of what is named, or, without names, all.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import multiseg_d2  # noqa: F401  first: it makes Detectron2 importable where parts of it are missing

# isort: split
from detectron2.data import DatasetCatalog, MetadataCatalog

from multiseg_d2.data.cache import CACHE_VARIABLE, IMAGE, PixelCache
from multiseg_d2.data.decode import BadFileError, EncodedFile, decode_color
from multiseg_d2.data.files import data_root
from multiseg_d2.data.labels import decode_label, label_path
from multiseg_d2.data.pairing import DATA_ROOT_VARIABLE
from multiseg_d2.data.parallel import default_workers, map_files
from multiseg_d2.data.register import register_dataset
from multiseg_d2.data.spec import packaged_specs
from multiseg_d2.data.views import register_views
from multiseg_d2.user_error import run_script

#: Problems shown.
SHOWN = 10


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs it; returns the exit code."""
    options = parse(arguments)
    os.environ[DATA_ROOT_VARIABLE] = options.root or data_root()
    cache = PixelCache(Path(options.cache).expanduser())
    try:
        files = list(dict.fromkeys(file for name in options.names for file in files_of(name)))
    except (ValueError, KeyError, OSError) as problem:
        print(problem.args[0] if isinstance(problem, KeyError) else problem, file=sys.stderr)
        return 1
    if options.remove:
        print(f"{cache.remove(files if options.names else None)} files removed from {cache.folder}")
        return 0
    done = map_files(functools.partial(store, cache, options.verify), files, options.workers, "decoding")
    results = list(done)
    problems = [problem for _, problem in results if problem]
    written = [size for size, _ in results if size]
    print(f"{len(written)} files decoded ({sum(written) / 1e9:.2f} GB) into {cache.folder}, ", end="")
    print(f"{len(files) - len(written) - len(problems)} were there. Use them: {CACHE_VARIABLE}={cache.folder}")
    for problem in problems[:SHOWN]:
        print(problem, file=sys.stderr)
    if len(problems) > SHOWN:
        print(f"and {len(problems) - SHOWN} more", file=sys.stderr)
    return 1 if problems else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line -> options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = "entry (camvid_train), view of one (camvid_train[:30]), or spec (camvid, my.yaml) with all its splits"
    parser.add_argument("names", nargs="*", metavar="NAME", help=names)
    folder = os.environ.get(CACHE_VARIABLE)
    parser.add_argument("--cache", default=folder, help=f"the folder (default: ${CACHE_VARIABLE})")
    parser.add_argument("--remove", action="store_true", help="delete instead of decoding")
    parser.add_argument("--verify", action="store_true", help="compare contents on both sides, not only size and time")
    parser.add_argument("--root", help=f"data root (default: ${DATA_ROOT_VARIABLE}, else ./datasets)")
    parser.add_argument("--workers", type=int, default=default_workers(), help="processes (default: %(default)s)")
    options = parser.parse_args(arguments)
    if not options.cache:
        parser.error(f"say where: --cache FOLDER, or set {CACHE_VARIABLE}")
    if not options.names and not options.remove:
        parser.error("name at least one entry of the catalog")
    return options


def files_of(name: str) -> list[tuple[str, str]]:
    """(path, role) of the images and label maps of an entry, a view or all splits of a spec.

    Raises:
        ValueError, KeyError: there is no such entry, or its files do not fit.
    """
    spec = name in packaged_specs() or name.endswith((".yaml", ".yml"))
    entries = register_dataset(name) if spec else [name]
    register_views(entries)
    files = []
    for record in (record for entry in entries for record in DatasetCatalog.get(entry)):
        files.append((record["file_name"], IMAGE))
        if label_path(record):
            files.append((label_path(record), MetadataCatalog.get(record["entry"]).spec.encoding))
    return files


def store(cache: PixelCache, verify: bool, file: tuple[str, str]) -> tuple[int, str]:
    """Decodes one file into the cache: (bytes written, what is wrong with it)."""
    path, role = file
    try:
        return cache.store(path, role, functools.partial(decode, role), verify), ""
    except BadFileError as problem:
        return 0, str(problem)


def decode(role: str, file: EncodedFile) -> object:
    """Pixels as the mapper wants them."""
    return decode_color(file, "RGB") if role == IMAGE else decode_label(file, role)


if __name__ == "__main__":
    sys.exit(run_script(main))
