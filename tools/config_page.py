#!/usr/bin/env python
"""Writes docs/config.md, all keys of multiseg_d2/config.py, and configs/README.md, the first sentence of every config.

python tools/config_page.py           # write the pages
python tools/config_page.py --check   # exit code 1 if they are not what the files say
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode, get_cfg

from multiseg_d2.atomic_file import write_atomically
from multiseg_d2.config import add_multiseg_config

ROOT = Path(__file__).resolve().parent.parent
SOURCE, PAGE, TABLE = ROOT / "multiseg_d2" / "config.py", ROOT / "docs" / "config.md", ROOT / "configs" / "README.md"
HEAD = """# Configuration keys

Made by `python tools/config_page.py` from `multiseg_d2/config.py`; a test keeps it true. All other keys are
Detectron2's own; those of them that have no effect here are named in the log when they are set. Every key can be set
in a config file or at the end of a command: `python train_net.py --config-file configs/quickstart/toy.yaml SEED 3`.

`OUTPUT_DIR`, where it is not set, follows from the config's path: `configs/cdcl/cs_bdd_r18.yaml` writes to
`output/cdcl/cs_bdd_r18`.
"""
CONFIGS_HEAD = """# Configs

Files called `base` are what others build on; every other one runs as it is. Rows of a table that differ from a file
here by a few keys are overrides in the claims file of that table (`benchmarks/claims/`). A run writes to `output/` and
the config's path below this folder. All keys: [docs/config.md](../docs/config.md). `python tools/config_page.py` writes
this page.
"""


def page() -> str:
    """The page's text.

    Raises:
        ValueError: a key has no comment.
    """
    defaults = get_cfg()
    add_multiseg_config(defaults)
    lines, comment, section = [HEAD.rstrip()], "", ""
    for line in SOURCE.read_text(encoding="utf-8").splitlines():
        text = line.strip()
        if heading := re.fullmatch(r"# -{4} (.+?) -+", text):
            section, comment = heading[1], ""
            lines += _section(section)
        elif text.startswith("# "):
            comment += f" {text[2:]}"
        elif found := re.fullmatch(r"cfg\.([A-Z_.]+) = (.+?)(?:  # (.*))?", text):
            key, value, beside = found.groups()
            if value == "CN()":  # what is said of a section is said of its first key
                continue
            explained = (beside or comment).strip()
            if not explained:
                raise ValueError(f"{SOURCE}: {key} has no comment")
            if not section:
                section = "General"
                lines += _section(section)
            lines.append(f"| `{key}` | `{_value(defaults, key)!r}` | {_cell(explained)} |")
            comment = ""
        elif not text:
            comment = ""
    return "\n".join(lines) + "\n"


def table() -> str:
    """The text of configs/README.md."""
    lines = [CONFIGS_HEAD.rstrip(), "", "| config | what for |", "|---|---|"]
    for path in sorted(TABLE.parent.rglob("*.yaml")):
        name, words = path.relative_to(TABLE.parent).as_posix(), []
        for line in path.read_text(encoding="utf-8").splitlines():
            if not line.startswith("# "):
                break
            words.append(line[2:].strip())
        sentence = re.split(r"(?<=[a-z0-9)])\.(?: |$)", " ".join(words))[0]
        lines.append(f"| [{name}]({name}) | {_cell(sentence)} |")
    return "\n".join(lines) + "\n"


def _section(title: str) -> list[str]:
    return ["", f"## {title}", "", "| key | default | what it does |", "|---|---|---|"]


def _value(cfg: CfgNode, key: str) -> Any:
    node: Any = cfg
    for part in key.split("."):
        node = node[part]
    return node


def _cell(text: str) -> str:
    """Free of what Markdown would take for markup."""
    return re.sub(r"([|<*])", r"\\\1", text[0].upper() + text[1:])


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a page is out of date")
    options = parser.parse_args(argv)
    pages, code = {PAGE: page(), TABLE: table()}, 0
    for path, text in pages.items():
        true = path.is_file() and path.read_text(encoding="utf-8") == text
        if options.check and not true:
            print(f"{path} is out of date: run tools/config_page.py")
            code = 1
        elif not options.check:
            write_atomically(path, text)
            print(f"wrote {path}")
    return code


if __name__ == "__main__":
    sys.exit(main())
