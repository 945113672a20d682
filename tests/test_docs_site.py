"""The documentation's site: every page is in the menu, and one command builds it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"


def menu(entries: list) -> list[str]:
    """Pages of the menu, in its order."""
    values = [value for entry in entries for value in (entry.values() if isinstance(entry, dict) else [entry])]
    return [page for value in values for page in (menu(value) if isinstance(value, list) else [value])]


def pages_in_menu() -> list[str]:
    return menu(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])


def test_every_page_is_in_the_menu_once():
    assert sorted(pages_in_menu()) == sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))


@pytest.mark.slow
def test_one_command_builds_the_site():
    """Strict: a link to a page that is not there ends the build. What builds it is installed the first time."""
    built = subprocess.run(["make", "docs"], cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert built.returncode == 0, built.stderr[-2000:]
    for page in pages_in_menu():
        folder = page.removesuffix(".md").removesuffix("index")
        assert (ROOT / "site" / folder / "index.html").is_file(), page
    reference = re.sub(r"<[^>]+>", "", (ROOT / "site" / "api" / "index.html").read_text(encoding="utf-8"))
    assert (
        "from_checkpoint" in reference and "A predictor out of a file" in reference
    )  # docstrings of the code, not of the page
