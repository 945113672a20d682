"""make setup: the environment and its stamp; Makefile, .ci/run and pyproject.toml."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SPEC = importlib.util.spec_from_file_location("setup_environment", ROOT / "tools/setup_environment.py")
setup_environment = sys.modules["setup_environment"] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(setup_environment)


@pytest.fixture
def checkout(tmp_path):
    """A folder with the files that the stamp depends on."""
    for name in setup_environment.INPUTS:
        (tmp_path / "repo" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "repo" / name)
    return tmp_path / "repo"


@pytest.fixture
def venv(checkout):
    """A stand-in for an environment: its python is this one, which has everything."""
    (checkout / ".venv/bin").mkdir(parents=True)
    (checkout / ".venv/pyvenv.cfg").touch()
    python = checkout / ".venv/bin/python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}:$PYTHONPATH" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return checkout / ".venv"


@pytest.fixture
def ran(monkeypatch):
    """The titles of the steps that were run; a step named in ``ran.failing`` fails."""

    class Ran(list):
        failing = ""

    ran = Ran()

    def run_step(step):
        ran.append(step.title)
        if step.title == ran.failing:
            raise setup_environment.SetupError(f"{step.title} failed")

    monkeypatch.setattr(setup_environment, "run_step", run_step)
    return ran


ALL_STEPS = ["installing torch", "installing this package", "installing timm", "setting up Detectron2", "trial import"]


def test_a_second_run_installs_nothing(checkout, venv, ran):
    setup_environment.set_up(venv, checkout, "torch==2.13.0")
    assert ran == ALL_STEPS
    setup_environment.set_up(venv, checkout, "torch==2.13.0")
    assert ran == ALL_STEPS


@pytest.mark.parametrize("failing", ALL_STEPS)
def test_no_stamp_until_every_step_worked(checkout, venv, ran, failing):
    ran.failing = failing
    with pytest.raises(setup_environment.SetupError):
        setup_environment.set_up(venv, checkout, "torch==2.13.0")
    assert not (venv / setup_environment.STAMP).exists()
    ran.failing = ""
    ran.clear()
    setup_environment.set_up(venv, checkout, "torch==2.13.0")
    assert ran == ALL_STEPS


@pytest.mark.parametrize("change", ["torch", "pyproject", "moved", "cut", "failed later"])
def test_a_stamp_that_does_not_fit_repeats_the_steps(checkout, venv, ran, change, tmp_path):
    setup_environment.set_up(venv, checkout, "torch==2.13.0")
    torch = "torch==2.13.0"
    if change == "torch":
        torch = "torch==2.12.0"
    elif change == "pyproject":
        with open(checkout / "pyproject.toml", "a") as file:
            file.write("# one more requirement\n")
    elif change == "moved":
        checkout = checkout.rename(tmp_path / "moved")
        venv = checkout / ".venv"
    elif change == "cut":
        (venv / setup_environment.STAMP).write_text("")
    else:  # the stamp of an earlier success must not survive a later failure
        ran.failing = "setting up Detectron2"
        with pytest.raises(setup_environment.SetupError):
            setup_environment.set_up(venv, checkout, "torch==2.12.0")
        ran.failing = ""
    ran.clear()
    setup_environment.set_up(venv, checkout, torch)
    assert ran == ALL_STEPS


def test_missing_detectron2_repeats_the_steps(checkout, venv, ran):
    setup_environment.set_up(venv, checkout, "torch")
    hide = "import sys; sys.modules['detectron2'] = None; exec(sys.argv.pop(1))"
    (venv / "bin/python").write_text(
        f'#!/bin/sh\n[ "$1" = -c ] && shift && exec "{sys.executable}" -c "{hide}" "$@"\nexec "{sys.executable}" "$@"\n'
    )
    ran.clear()
    setup_environment.set_up(venv, checkout, "torch")
    assert ran == ALL_STEPS


def test_opencv_that_lacks_window_libraries_gives_way_to_the_headless_one(checkout, venv, ran):
    """As in a container without libGL.so.1, where `import cv2` fails after opencv-python was installed."""
    hide = "import sys; sys.modules['cv2'] = None; exec(sys.argv.pop(1))"
    (venv / "bin/python").write_text(
        f'#!/bin/sh\n[ "$1" = -c ] && shift && exec "{sys.executable}" -c "{hide}" "$@"\nexec "{sys.executable}" "$@"\n'
    )
    setup_environment.set_up(venv, checkout, "torch")
    position = ran.index("installing timm")
    assert ran[position + 1].startswith("removing OpenCV") and ran[position + 2] == "installing OpenCV without windows"
    assert [*ran[: position + 1], *ran[position + 3 :]] == ALL_STEPS


def test_a_foreign_folder_is_not_overwritten(checkout, ran):
    (checkout / ".venv").mkdir()
    (checkout / ".venv/thesis.txt").write_text("precious")
    with pytest.raises(setup_environment.SetupError, match="no virtual environment"):
        setup_environment.set_up(checkout / ".venv", checkout, "torch")
    assert (checkout / ".venv/thesis.txt").read_text() == "precious" and ran == []


def test_an_environment_whose_python_is_gone_is_made_anew(checkout, venv, ran):
    (venv / "bin/python").unlink()
    (venv / "bin/python").symlink_to("/nowhere/python")
    setup_environment.set_up(venv, checkout, "torch")
    assert subprocess.run([str(venv / "bin/python"), "-c", "import pip"]).returncode == 0
    assert [title for title in ran if "OpenCV" not in title] == ALL_STEPS


def test_interruption_leaves_no_stamp(checkout, venv, monkeypatch, capsys):
    def interrupted(step):
        raise KeyboardInterrupt

    monkeypatch.setattr(setup_environment, "run_step", interrupted)
    monkeypatch.setattr(setup_environment, "ROOT", checkout)
    assert setup_environment.main(["--venv", str(venv)]) == 130
    assert "interrupted" in capsys.readouterr().err and not (venv / setup_environment.STAMP).exists()


def test_without_network_the_error_names_the_step(checkout, venv):
    """The real pip, the real script, no index: fails at torch, says so, and marks nothing as ready."""
    environment = os.environ | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}
    environment["TORCH"] = "torch-that-is-nowhere==1"
    done = subprocess.run(
        [sys.executable, str(checkout / "tools/setup_environment.py")], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert (
        "installing torch failed" in done.stderr and "network" in done.stderr and "not marked as ready" in done.stderr
    )
    assert not (venv / setup_environment.STAMP).exists()


# ---- Makefile, .ci/run, pyproject.toml -------------------------------------------------------------------------------


def test_make_fails_when_the_set_up_fails(tmp_path):
    done = subprocess.run(
        ["make", "-C", str(ROOT), "test", "PYTHON=false", f"VENV={tmp_path / 'venv'}"], capture_output=True, text=True
    )
    assert done.returncode != 0 and "pytest" not in done.stdout


@pytest.mark.parametrize("beside", [True, False])
def test_ci_passes_on_failures_and_finds_the_samples(tmp_path, beside):
    shutil.copytree(ROOT / ".ci", tmp_path / "main/.ci")
    (tmp_path / "bin").mkdir()
    make = tmp_path / "bin/make"
    make.write_text('#!/bin/sh\necho "$@ in $(pwd) with [$MULTISEG_SAMPLES]"\n[ "$1" != test ] || exit 3\n')
    make.chmod(0o755)
    if beside:
        (tmp_path / "shared/data").mkdir(parents=True)
    environment = {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", str(tmp_path / "main/.ci/run")], env=environment, capture_output=True, text=True)
    assert done.returncode == 3
    samples = tmp_path / "shared/data" if beside else ""
    assert f"test in {tmp_path / 'main'} with [{samples}]" in done.stdout


def test_the_package_accepts_any_torch_from_2_1_on_and_lists_no_detectron2():
    from packaging.requirements import Requirement

    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = {r.name: r for r in map(Requirement, project["dependencies"])}
    assert all(v in requirements["torch"].specifier for v in ("2.1.0", "2.6.0+cu124", "2.13.0", "3.0"))
    assert not any("detectron2" in name for name in requirements)
    assert {"fvcore", "pycocotools", "opencv-python", "numpy"} <= set(requirements)


def test_a_built_wheel_carries_the_data_files(tmp_path):
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "multiseg_d2", tmp_path / "multiseg_d2", ignore=shutil.ignore_patterns("__pycache__"))
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        tmp_path,
        tmp_path,
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        carried = {name for name in wheel.namelist() if name.startswith("multiseg_d2/")}
    there = {path.relative_to(tmp_path).as_posix() for path in (tmp_path / "multiseg_d2").rglob("*") if path.is_file()}
    assert carried == there and any(name.endswith(".yaml") for name in carried)
