"""Errors that users can mend: which they are, and how scripts tell them."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
from pathlib import Path

import pytest
from detectron2.modeling import build_backbone

import multiseg_d2
from multiseg_d2.claims.process import RunError, RunStoppedError
from multiseg_d2.compat import MissingDependencyError
from multiseg_d2.data.loader import LoaderWorkerError
from multiseg_d2.engine import load_config
from multiseg_d2.evaluation.confusion import IllegalIdError
from multiseg_d2.user_error import ConfigError, UserError, run_script

ROOT = Path(__file__).resolve().parent.parent
#: Told by the harness of claims itself; a process that was killed; ids that the caller's own arrays hold; in a file
#: that set-up loads by itself, so that ``run_script`` names it (see below).
NOT_THE_USERS = {RunError, RunStoppedError, LoaderWorkerError, IllegalIdError, MissingDependencyError}


def test_every_error_of_the_package_has_the_base():
    found: set[type] = set()
    for info in pkgutil.walk_packages(multiseg_d2.__path__, "multiseg_d2."):
        if not info.name.endswith("__main__"):
            members = vars(importlib.import_module(info.name)).values()
            found.update(m for m in members if inspect.isclass(m) and m.__module__ == info.name)
    errors = {cls for cls in found if issubclass(cls, Exception) and not cls.__name__.startswith("_")}
    assert len(errors) > 20
    assert {cls for cls in errors if not issubclass(cls, UserError)} == NOT_THE_USERS


def test_a_config_error_is_still_a_value_error():
    assert issubclass(ConfigError, ValueError)


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (1, 1), (75, 75)])
def test_the_exit_code_is_that_of_main(returned, code, capsys):
    assert run_script(lambda: returned) == code
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["", "rank 1"])
def test_what_the_user_can_mend_is_one_line(tmp_path, name, capsys):
    def fail() -> None:
        raise ConfigError("there is no key X")

    assert run_script(fail, name) == 2
    assert run_script(lambda: (tmp_path / "absent").read_text(), name) == 2
    out, err = capsys.readouterr()
    before = f"{name}: " if name else ""
    assert (
        not out
        and err == f"{before}error: there is no key X\n{before}error: {tmp_path}/absent: No such file or directory\n"
    )


def test_so_is_a_dependency_that_is_not_installed(monkeypatch, capsys):
    """As of a config whose backbone is timm's, in an environment without it."""
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "timm.models", None)
    cfg = load_config(str(ROOT / "configs" / "quickstart" / "camvid.yaml"), ["MODEL.DEVICE", "cpu"])
    assert run_script(lambda: build_backbone(cfg)) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and "timm" in err and err.count("\n") == 1


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyError("k"), ConnectionResetError(104, "reset by peer")])
def test_anything_else_keeps_its_traceback(error):
    def fail() -> None:
        raise error

    with pytest.raises(type(error)):
        run_script(fail)
