"""Every mutant still applies, and (slow) every mutant is noticed by its tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from mutate import ROOT, read_mutants

MUTANTS = read_mutants()


def test_every_mutant_applies_and_names_tests_that_exist():
    for mutant in MUTANTS:
        assert mutant.applied() != (ROOT / mutant.file).read_text(encoding="utf-8")
        for test in mutant.tests:
            file, _, name = test.partition("::")
            assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8") if name else (ROOT / file).is_file(), (
                test
            )
    assert len({mutant.what for mutant in MUTANTS}) == len(MUTANTS)


def test_a_mutant_whose_text_has_changed_says_so(tmp_path):
    mutant = MUTANTS[0]
    (tmp_path / mutant.file).parent.mkdir(parents=True)
    (tmp_path / mutant.file).write_text("")
    with pytest.raises(ValueError, match=r"has its old text 0 times, not once: .*mutants.yaml"):
        mutant.applied(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_mutant_is_noticed():
    done = subprocess.run([sys.executable, str(ROOT / "tests/mutants/mutate.py")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
