"""Every script, and every file of a user, starts: whichever of Detectron2 and multiseg_d2 is imported first."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import detectron2
import pytest

from multiseg_d2 import compat

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("tools", "datasets", "benchmarks")
SCRIPTS = [ROOT / "train_net.py", *(path for name in FOLDERS for path in sorted((ROOT / name).glob("*.py")))]
#: Runs scripts with --help, each in a process of its own that has imported neither package yet; what all of them need
#: anyway is imported once, before. Prints the scripts that failed.
RUN_ALL = """
import os, runpy, sys, traceback
import cv2, numpy, torch, matplotlib, rich.console, yaml, PIL.Image, pycocotools.mask, fvcore.common.config
assert not {"detectron2", "multiseg_d2"} & set(sys.modules)
for script in sys.argv[1:]:
    child = os.fork()
    if not child:
        sys.argv[:] = [script, "--help"]
        sys.path.insert(0, os.path.dirname(script))
        code, out = 9, os.open(os.devnull, os.O_WRONLY)
        os.dup2(out, 1)
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        print(script)
"""
USER_FILE = """
import os
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, transforms
from detectron2.engine import DefaultTrainer
from detectron2.modeling import build_model

from multiseg_d2 import add_multiseg_config, compat
cfg = get_cfg()
add_multiseg_config(cfg)
print(len(DatasetCatalog.list()) > 20, compat.stand_ins(), compat.MissingDependencyError.__module__)
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """That of a user whose Detectron2 is the copy that the set-up makes, or one of his own."""
    folder, installed = tmp_path_factory.mktemp("site"), Path(detectron2.__file__).parent
    paths = [str(ROOT), *sys.path]
    if detectron2.__version__ == "0.5":
        spec = importlib.util.spec_from_file_location("setup_detectron2", ROOT / "tools" / "setup_detectron2.py")
        setup = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(setup)
        shutil.copytree(installed, folder / "detectron2", ignore=shutil.ignore_patterns("__pycache__"))
        for name, content in setup.mended({"detectron2/__init__.py": (installed / "__init__.py").read_bytes()}).items():
            (folder / name).write_bytes(content)
        paths.insert(0, str(folder))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def run(code, environment, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=220)


def test_every_script_explains_itself(environment):
    assert len(SCRIPTS) > 15
    done = run(RUN_ALL, environment, *SCRIPTS)
    assert done.returncode == 0 and not done.stdout, f"{done.stdout}\n{done.stderr}"


def prepared_by_our_set_up() -> bool:
    """Whether Detectron2 itself asks for stand-ins, so that it can be imported first."""
    return (Path(detectron2.__file__).parent / "_stand_ins.py").is_file()


@pytest.mark.parametrize("first", ["", "import multiseg_d2\n", "import detectron2\n"])
def test_a_user_file_may_import_in_any_order(environment, first):
    if first != "import multiseg_d2\n" and "torchvision" in compat.stand_ins() and not prepared_by_our_set_up():
        pytest.skip("this Detectron2 was not put here by tools/setup_detectron2.py, and needs torchvision")
    done = run(first + USER_FILE, environment)
    assert done.returncode == 0, done.stderr
    registered, *stand_ins, module = done.stdout.split()
    assert registered == "True" and module == "multiseg_d2.compat"
    assert ("torchvision" in "".join(stand_ins)) == ("torchvision" in compat.stand_ins())


def test_tools_have_no_options_of_the_training_script():
    """They neither resume nor start processes: what means nothing must not be offered."""
    scripts = [path for path in SCRIPTS if path.name != "train_net.py" and path.parent.name != "benchmarks"]
    assert [path.name for path in scripts if "argument_parser()" in path.read_text(encoding="utf-8")] == []
