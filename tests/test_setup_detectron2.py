"""tools/setup_detectron2.py: hash before execution, no network, interruptions, what is there is left alone."""

from __future__ import annotations

import base64
import csv
import hashlib
import importlib.metadata
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
SPEC = importlib.util.spec_from_file_location("setup_detectron2", ROOT / "tools/setup_detectron2.py")
setup_detectron2 = sys.modules["setup_detectron2"] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(setup_detectron2)

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
    for name in ("pip", "setuptools"):
        there = Path(str(importlib.metadata.distribution(name).locate_file("")))
        for path in (there / name, *there.glob(f"{name}-*.dist-info")):  # with its entry points
            (packages / path.name).symlink_to(path)
    (packages / "_distutils_hack").symlink_to(there / "_distutils_hack")  # a part of setuptools
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


def test_the_copy_has_stand_ins_and_an_older_copy_gets_them(machine):
    assert machine.set_up().returncode == 0
    init, record = machine.site / "detectron2/__init__.py", machine.site / setup_detectron2.DIST_INFO / "RECORD"
    added, stand_ins = setup_detectron2._ADDED_LINE, machine.site / setup_detectron2.STAND_INS
    assert init.read_bytes() == added + SDIST_FILES["detectron2/__init__.py"].encode()
    assert stand_ins.read_bytes() == setup_detectron2.STAND_INS_SOURCE
    # As it was made before: the published files, and a RECORD of these.
    init.write_bytes(init.read_bytes().removeprefix(added))
    stand_ins.unlink()
    rows = [row for row in csv.reader(record.open()) if row[0] != setup_detectron2.STAND_INS]
    digest = setup_detectron2._digest(init.read_bytes())
    rows = [[n, digest if n == "detectron2/__init__.py" else d, size] for n, d, size in rows]
    record.write_text("".join(",".join(row) + "\n" for row in rows))
    assert setup_detectron2.damaged_files(machine.site) == []

    again = machine.set_up(PIP_FIND_LINKS="")
    assert again.returncode == 0 and "stand-ins added" in again.stdout and "used as it is" in again.stdout
    assert init.read_bytes().startswith(added) and stand_ins.is_file()
    assert setup_detectron2.damaged_files(machine.site) == [] and not (machine.site / setup_detectron2.MARKER).exists()
    assert machine.run("import detectron2").returncode == 0  # without multiseg_d2 it is as it was
    assert "stand-ins added" not in machine.set_up(PIP_FIND_LINKS="").stdout


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
    local = {"DETECTRON2_SDIST": str(machine.sdist)}
    done = machine.set_up(before=KILLED_IN_THE_MIDDLE.strip(), **local)
    assert done.returncode == 9
    assert machine.run("import detectron2").returncode == 0  # the half that lies there would pass for a whole one
    done = machine.set_up(**local)
    assert done.returncode == 0 and "half-finished" in done.stdout
    assert machine.run("import detectron2.projects.deeplab").returncode == 0
    assert machine.left() == ["detectron2", "detectron2-0.5+python.dist-info"]


def test_a_failing_pip_leaves_nothing(machine):
    before = "s.build_wheel = lambda sdist, folder: folder / 'detectron2-0.5+python-py3-none-any.whl'"
    done = machine.set_up(before=before, DETECTRON2_SDIST=str(machine.sdist))
    assert done.returncode == 1 and "could not be installed" in done.stderr and machine.left() == []


def test_a_damaged_installation_is_repaired(machine):
    local = {"DETECTRON2_SDIST": str(machine.sdist)}
    assert machine.set_up(**local).returncode == 0
    victim = machine.site / "detectron2/projects/deeplab/__init__.py"
    harms = {
        "changed": lambda: victim.write_text("broken = 1"),
        "gone": lambda: victim.unlink(),
        "no list": lambda: (machine.site / setup_detectron2.DIST_INFO / "RECORD").unlink(),
    }
    for harm in harms.values():
        harm()
        done = machine.set_up(**local)
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
    done = machine.set_up(PYTHONPATH=str(tmp_path / "clone"), DETECTRON2_SDIST=str(machine.sdist))
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
            *(
                "detectron2/_stand_ins.py",
                "detectron2/projects/deeplab/__init__.py",
                "detectron2/projects/point_rend/__init__.py",
            ),
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
