"""The set-up scripts: hash before execution, no network, interruptions, what is there is left alone. No downloads."""

from __future__ import annotations

import base64
import csv
import hashlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


setup_detectron2 = load("setup_detectron2")
setup_environment = load("setup_environment")

# ---- Detectron2 ------------------------------------------------------------------------------------------------------

SDIST_FILES = {
    "setup.py": (
        "open({ran!r}, 'w').close()\nfrom setuptools import setup\n"
        "setup(name='detectron2_cdo', version='0.5', packages=[])\n"
    ),
    "LICENSE": "Apache",
    "PKG-INFO": "Metadata-Version: 2.1\nName: detectron2_cdo\nVersion: 0.5\n",
    "detectron2/__init__.py": "__version__ = '0.5'\n",
    "detectron2/layers/__init__.py": "",
    "detectron2/projects/__init__.py": "",
    "projects/DeepLab/deeplab/__init__.py": "NAME = 'deeplab'\n",
    "projects/DeepLab/train_net.py": "left out",
    "projects/PointRend/point_rend/__init__.py": "NAME = 'point_rend'\n",
}


def make_sdist(folder: Path, ran: Path, **changed: str) -> Path:
    """A small sdist of the right shape whose setup.py leaves the file ``ran`` when it is executed."""
    path = folder / "detectron2_cdo-0.5.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, text in (SDIST_FILES | changed).items():
            content = text.replace("{ran!r}", repr(str(ran))).encode()
            member = tarfile.TarInfo(f"detectron2_cdo-0.5/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """An interpreter with pip and setuptools and nothing else: (python, its site-packages)."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    packages = folder / "packages"
    packages.mkdir()
    for name in ("pip", "setuptools", "_distutils_hack"):
        found = importlib.util.find_spec(name)
        if found is not None:
            package = Path(found.origin).parent
            for path in (package, *package.parent.glob(f"{name}-*.dist-info")):  # with its entry points
                (packages / path.name).symlink_to(path)
    site = next((folder / "venv").glob("lib/python*/site-packages"))
    (site / "tools.pth").write_text(f"{packages}\n")
    return folder / "venv/bin/python", site


class Machine:
    """A bare environment, a folder that serves as package index, and the script run in it."""

    def __init__(self, python: Path, site: Path, folder: Path) -> None:
        self.python, self.site, self.index, self.ran = python, site, folder / "index", folder / "setup.py.ran"
        self.index.mkdir()
        self.sdist = make_sdist(self.index, self.ran)
        self.sha256 = hashlib.sha256(self.sdist.read_bytes()).hexdigest()
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON"))
        }
        self.environment |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.index), "PIP_CONFIG_FILE": os.devnull}

    def set_up(self, before: str = "", sha256: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        code = f"""
            import os, shutil, sys
            sys.path.insert(0, {str(ROOT / "tools")!r})
            import setup_detectron2 as s
            {before}
            sys.exit(s.main([], s.Pin("detectron2-cdo", "0.5", {sha256 or self.sha256!r})))
        """
        return self.run(textwrap.dedent(code), **environment)

    def run(self, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.python), "-c", code],
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def left(self) -> list[str]:
        return sorted(path.name for path in self.site.iterdir() if "etectron2" in path.name)


@pytest.fixture
def machine(bare, tmp_path):
    machine = Machine(*bare, tmp_path)
    assert machine.left() == []
    yield machine
    setup_detectron2.remove_remains(machine.site)


def test_installs_the_pinned_sdist_and_uninstalls(machine):
    done = machine.set_up()
    assert done.returncode == 0, done.stderr
    assert machine.ran.exists()  # the probe of the tests below works: pip does run setup.py of a file it trusts
    assert machine.left() == ["detectron2", "detectron2-0.5+python.dist-info"]
    found = machine.run(
        "import detectron2.projects.deeplab as a, detectron2.projects.point_rend as b, importlib.metadata as m\n"
        "print(a.NAME, b.NAME, m.version('detectron2'))"
    )
    assert found.stdout.split() == ["deeplab", "point_rend", "0.5+python"]

    again = machine.set_up(PIP_FIND_LINKS="")
    assert again.returncode == 0 and "used as it is" in again.stdout

    removed = machine.run(
        "import sys; from pip._internal.cli.main import main; sys.exit(main(['uninstall', '-y', 'detectron2']))"
    )
    assert removed.returncode == 0 and machine.left() == []


@pytest.mark.parametrize("way", ["index", "file"])
def test_wrong_hash_runs_nothing_and_installs_nothing(machine, tmp_path, way):
    make_sdist(machine.index, machine.ran, **{"detectron2/__init__.py": "tampered = True"})
    done = machine.set_up(**({"DETECTRON2_SDIST": str(machine.sdist)} if way == "file" else {}))
    assert done.returncode == 1
    assert "is not the file that this project pins" in done.stderr and machine.sha256 in done.stderr
    assert not machine.ran.exists() and machine.left() == []


def test_no_network_is_a_clear_error(machine):
    done = machine.set_up(PIP_FIND_LINKS="")
    assert done.returncode == 1
    assert "could not download detectron2-cdo 0.5" in done.stderr and "DETECTRON2_SDIST" in done.stderr
    assert "Traceback" not in done.stderr and machine.left() == []


def test_a_local_copy_serves_without_an_index(machine):
    done = machine.set_up(PIP_FIND_LINKS="", DETECTRON2_SDIST=str(machine.sdist))
    assert done.returncode == 0 and not machine.ran.exists()
    missing = machine.set_up(PIP_FIND_LINKS="", DETECTRON2_SDIST="nowhere.tar.gz")
    assert missing.returncode == 0  # installed already: nothing is read
    setup_detectron2.remove_remains(machine.site)
    missing = machine.set_up(PIP_FIND_LINKS="", DETECTRON2_SDIST="nowhere.tar.gz")
    assert missing.returncode == 1 and "nowhere.tar.gz" in missing.stderr and "Traceback" not in missing.stderr


KILLED_IN_THE_MIDDLE = """
            def half(*arguments, pip=s.pip):
                if arguments[0] != "install":
                    return pip(*arguments)
                (s.site_packages() / "detectron2").mkdir()
                (s.site_packages() / "detectron2/__init__.py").write_text("__version__ = '0.5'")
                os._exit(9)
            s.pip = half
"""


def test_a_killed_installation_is_noticed_and_repeated(machine):
    done = machine.set_up(before=KILLED_IN_THE_MIDDLE.strip())
    assert done.returncode == 9
    assert machine.run("import detectron2").returncode == 0  # the half that lies there would pass for a whole one
    done = machine.set_up()
    assert done.returncode == 0 and "half-finished" in done.stdout
    assert machine.run("import detectron2.projects.deeplab").returncode == 0
    assert machine.left() == ["detectron2", "detectron2-0.5+python.dist-info"]


def test_a_failing_pip_leaves_nothing(machine):
    before = "s.build_wheel = lambda sdist, folder: folder / 'detectron2-0.5+python-py3-none-any.whl'"
    done = machine.set_up(before=before)
    assert done.returncode == 1 and "could not be installed" in done.stderr and machine.left() == []


@pytest.mark.parametrize("harm", ["changed", "gone", "record"])
def test_a_damaged_installation_is_repaired(machine, harm):
    assert machine.set_up().returncode == 0
    victim = machine.site / "detectron2/projects/deeplab/__init__.py"
    if harm == "changed":
        victim.write_text("broken = 1")
    elif harm == "gone":
        victim.unlink()
    else:
        (machine.site / setup_detectron2.DIST_INFO / "RECORD").unlink()
    done = machine.set_up()
    assert done.returncode == 0 and "half-finished" in done.stdout
    assert "NAME = 'deeplab'" in victim.read_text()


def test_another_detectron2_is_left_alone(machine, tmp_path):
    own = tmp_path / "own/detectron2/__init__.py"
    own.parent.mkdir(parents=True)
    own.write_text("__version__ = '0.6'")
    done = machine.set_up(PYTHONPATH=str(tmp_path / "own"), PIP_FIND_LINKS="")
    assert done.returncode == 0 and "0.6" in done.stdout and str(own.parent) in done.stdout
    assert machine.left() == []
    (machine.site / "detectron2").mkdir()  # the same inside the environment: somebody else's, without our marker
    shutil.copy(own, machine.site / "detectron2/__init__.py")
    done = machine.set_up(PIP_FIND_LINKS="")
    assert done.returncode == 0 and machine.left() == ["detectron2"]


def test_a_broken_detectron2_is_named_not_covered(machine, tmp_path):
    own = tmp_path / "own/detectron2/__init__.py"
    own.parent.mkdir(parents=True)
    own.write_text("import something_that_is_not_there")
    done = machine.set_up(PYTHONPATH=str(tmp_path / "own"))
    assert done.returncode == 1
    assert str(own) in done.stderr and "something_that_is_not_there" in done.stderr and machine.left() == []


def test_a_folder_named_detectron2_is_no_detectron2(machine, tmp_path):
    (tmp_path / "clone/detectron2/configs").mkdir(parents=True)
    done = machine.set_up(PYTHONPATH=str(tmp_path / "clone"))
    assert done.returncode == 0 and "installed" in done.stdout


def test_wheel_holds_the_python_files_and_a_true_record(tmp_path):
    sdist = make_sdist(tmp_path, tmp_path / "ran")
    with tarfile.open(sdist) as good, tarfile.open(tmp_path / "bad.tar.gz", "w:gz") as bad:
        for member in good:
            bad.addfile(member, good.extractfile(member))
        bad.addfile(tarfile.TarInfo("detectron2_cdo-0.5/detectron2/../../outside.py"))
        link = tarfile.TarInfo("detectron2_cdo-0.5/detectron2/link.py")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        bad.addfile(link)
    sdist = tmp_path / "bad.tar.gz"
    with zipfile.ZipFile(setup_detectron2.build_wheel(sdist, tmp_path)) as wheel:
        names = set(wheel.namelist())
        info = "detectron2-0.5+python.dist-info"
        assert names == {
            *("detectron2/__init__.py", "detectron2/layers/__init__.py", "detectron2/projects/__init__.py"),
            *("detectron2/projects/deeplab/__init__.py", "detectron2/projects/point_rend/__init__.py"),
            *(f"{info}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "LICENSE")),
        }
        rows = list(csv.reader(io.StringIO(wheel.read(f"{info}/RECORD").decode())))
        assert {row[0] for row in rows} == names
        for name, digest, size in rows:
            if name != f"{info}/RECORD":
                content = wheel.read(name)
                expected = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
                assert (digest, int(size)) == (f"sha256={expected}", len(content))
    assert not (tmp_path / "ran").exists() and not (tmp_path.parent / "outside.py").exists()


def test_an_sdist_of_another_shape_is_refused(tmp_path):
    path = tmp_path / "other.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("other-1/detectron2/__init__.py"))
    with pytest.raises(setup_detectron2.SetupError, match="deeplab"):
        setup_detectron2.build_wheel(path, tmp_path)


def test_the_pin_is_the_documented_one():
    assert setup_detectron2.PIN.sha256 == "53c9e79e9cc943e80419c588ea44b5479507a8628ed14a4e06bd093e29311b18"


# ---- The environment -------------------------------------------------------------------------------------------------


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


ALL_STEPS = ["installing torch", "installing this package", "setting up Detectron2", "trial import"]


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
    assert subprocess.run([str(venv / "bin/python"), "-c", "import pip"]).returncode == 0 and ran == ALL_STEPS


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
    make.write_text('#!/bin/sh\necho "$@ in $(pwd) with [$MULTISEG_SAMPLES]"\nexit 3\n')
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
