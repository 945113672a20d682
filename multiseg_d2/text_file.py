"""Reading of text files that people write, with whatever program. Standard library only."""

from __future__ import annotations

import codecs
from pathlib import Path

__all__ = ["read_text"]


def read_text(path: str | Path, error: type[Exception] = ValueError) -> str:
    """Reads a text file: UTF-8 with or without the mark that Windows programs put in front, UTF-16 with its mark.

    Args:
        path: the file.
        error: type of the error for anything wrong with it.

    Returns:
        The text without the mark, lines ending in a newline.

    Raises:
        error: the file cannot be opened, or is in another encoding; the message says file, line and what to do.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as problem:
        raise error(f"{path}: cannot be read: {problem.strerror or problem}") from problem
    marked = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if marked else "utf-8-sig")
    except UnicodeDecodeError as problem:
        line = content.count(b"\n", 0, problem.start) + 1
        raise error(f"{path}: line {line} is not in the encoding UTF-8; save the file as UTF-8") from None
    if "\0" in text:
        raise error(f"{path}: is not in the encoding UTF-8 (it holds zero bytes); save the file as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")
