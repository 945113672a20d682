"""What the documentation says: every command is understood; every file, config, dataset and key that it names exists.

Commands are looked for in the Markdown files, and in the head of every script and config. Each goes through the
script's own argument parser, without anything being run; a few cheap ones are run.
"""

from __future__ import annotations

import argparse
import ast
import re
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

import multiseg_d2
from multiseg_d2.checkpoint.published import PACKAGE, TIMM, pixels_of
from multiseg_d2.data.labels import read_local_label
from multiseg_d2.data.register import register_from_config, unregister_dataset
from multiseg_d2.data.spec import packaged_specs
from multiseg_d2.engine import Trainer
from multiseg_d2.engine.config_file import default_config, load_config

ROOT = Path(__file__).resolve().parent.parent
#: Not everything below datasets/: that is where people put their data.
PLACES = (
    "*.md",
    "*.py",
    "benchmarks/**/*",
    "configs/**/*",
    "datasets/*",
    "datasets/samples/*",
    "docs/**/*",
    "examples/*",
    "tools/*",
)
FILES = [path for place in PLACES for path in sorted(ROOT.glob(place)) if path.suffix in (".md", ".py", ".yaml")]
DOCUMENTS = [path for path in FILES if path.suffix == ".md"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
#: Programs of others; what they are given is their business.
FOREIGN = {"export", "pip", "tensorboard", "source", "git", "cd"}
#: Options without which a script does not start.
NEEDED = {"predict.py": {"--config-file": "configs/base.yaml", "--weights": "model.pth", "--output": "out"}}


_COMMAND = re.compile(r"(?:[A-Z0-9_]+=\S+ )*(?:python|make|torchrun|pip) ")

# ---- Commands --------------------------------------------------------------------------------------------------------


def said_to_type(path: Path) -> list[str]:
    """The lines of a file that are commands."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        fenced = re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        rest = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
        inline = re.findall(r"`((?:python|make|torchrun|pip) [^`]+)`", rest)
        lines = "".join(fenced).replace("\\\n", " ").splitlines() + inline
        indented = (line.strip() for line in rest.replace("\\\n", " ").splitlines() if line.startswith("    "))
        lines += [part for line in indented if _COMMAND.match(line) for part in line.split(" && ")]
        return [line for line in map(str.strip, lines) if line and not line.startswith("#")]
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    else:
        text = "\n".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines()]
    return [line for line in lines if _COMMAND.match(line)]


COMMANDS = [
    pytest.param(line, id=f"{path.relative_to(ROOT)}: {line[:60]}")
    for path in FILES
    for line in dict.fromkeys(said_to_type(path))
]


class _ParsedError(Exception):
    """Ends a script once its command line is understood."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options


@pytest.fixture
def understand(monkeypatch, capsys):
    """A function: script and its arguments -> options, as the script's own parser reads them; None for --help."""
    parse = argparse.ArgumentParser.parse_args

    def stop_after(parser, args=None, namespace=None):
        raise _ParsedError(parse(parser, args, namespace))

    def run(script: Path, arguments: list[str]) -> argparse.Namespace | None:
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop_after)
        monkeypatch.setattr(sys, "argv", [str(script), *arguments])
        monkeypatch.syspath_prepend(str(script.parent))
        try:
            runpy.run_path(str(script), run_name="__main__")
        except _ParsedError as parsed:
            return parsed.options
        except SystemExit as end:
            assert end.code == 0 and "--help" in arguments, f"not understood: {capsys.readouterr().err}"
            return None
        raise AssertionError(f"{script} does not read its command line with argparse")

    return run


def words_of(command: str) -> list[str]:
    """A command as the shell splits it, without comments and settings of variables."""
    words = shlex.split(command, comments=True)
    while re.fullmatch(r"[A-Z0-9_]+=.*", words[0]):
        words = words[1:]
    return words


def without_dots(script: Path, arguments: list[str]) -> list[str]:
    """Arguments in which "..." stood for something: that is left out, what the script needs in any case is added."""
    if "..." not in arguments:
        return arguments
    pairs = zip(arguments, [*arguments[1:], ""])
    kept = [word for word, after in pairs if word != "..." and not (word.startswith("--") and after == "...")]
    added = [word for pair in NEEDED.get(script.name, {}).items() if pair[0] not in kept for word in pair]
    return [*added, *kept]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command, understand, monkeypatch):
    program, *arguments = words_of(command)
    monkeypatch.chdir(ROOT)
    if program == "make":
        check_make(arguments)
    elif program == "python" and arguments[0] == "-m":
        assert arguments[1] == "pip" or (ROOT / arguments[1] / "__main__.py").is_file()
    elif program in ("python", "torchrun"):
        position = 0 if program == "python" else arguments.index("train_net.py")
        script = ROOT / arguments[position]
        assert script.is_file(), f"{command}: there is no {script.name}"
        if script.parent.name == "examples":  # cells without a command line; test_examples.py runs them
            assert not arguments[position + 1 :], f"{command}: {script.name} takes no arguments"
        else:
            check_options(understand(script, without_dots(script, arguments[position + 1 :])), script, arguments)
    else:
        assert program in FOREIGN, f"{command}: a command that nobody tests"
        check_extras(arguments)


def check_make(arguments: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for word in arguments:
        name, _, value = word.partition("=")
        assert re.search(rf"^{name}:" if not value else rf"\b{name}\b", makefile, re.MULTILINE), word


def check_extras(arguments: list[str]) -> None:
    for extra in (e for word in arguments for e in re.findall(r"^\.\[(\w+)\]$", word)):
        assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text(), extra


def check_options(options: argparse.Namespace | None, script: Path, arguments: list[str]) -> None:
    """Files, configs, keys and datasets that a command names exist, and weights are where the config writes them."""
    given = vars(options) if options is not None else {}
    for word in arguments:
        if re.match(r"(?:configs|datasets|benchmarks|tools)/", word):
            assert (ROOT / word).exists(), f"there is no {word}"
    if (ROOT / (given.get("config_file") or "-")).is_file():
        cfg = load_config(given["config_file"], given.get("opts") or ())
        published = cfg.MODEL.WEIGHTS.startswith((PACKAGE, TIMM))  # by name, not by file
        if published and cfg.MODEL.WEIGHTS.startswith(TIMM):
            pixels = pixels_of(cfg.MODEL.WEIGHTS)  # an error where timm lists no such weights
            assert not list(pixels.problems(cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD))
        if (
            "MODEL.WEIGHTS" in arguments and not published
        ):  # of the run itself, or of another config's that it starts from
            written = {Path(cfg.OUTPUT_DIR)}
            if script.name in ("train_net.py", "prototypes.py") and "--eval-only" not in arguments:
                written |= {Path(load_config(str(path)).OUTPUT_DIR) for path in (ROOT / "configs").rglob("*.yaml")}
            assert Path(cfg.MODEL.WEIGHTS).parent in written, f"no run writes {cfg.MODEL.WEIGHTS}"
    named = {*given.get("names", ()), *(given.get("datasets") or ()), given.get("space")} - {None, ""}
    if script.name in ("label_space.py", "predict.py"):
        assert named <= {MetadataCatalog.get(entry).get("dataset") for entry in DatasetCatalog.list()}
    elif script.name == "check.py":
        entries = {*DatasetCatalog.list(), *packaged_specs()}
        assert all(name in entries or name.endswith(".yaml") for name in named)


@pytest.mark.parametrize(
    "command",
    [
        "python tools/label_space.py shew camvid",
        "python tools/label_space.py show camvit",
        "python datasets/check.py camvid --worker-count 3",
        "python datasets/check.py camvid_vall",
        "python datasets/prepare_idd.py --folders IDD",
        "python train_net.py --config-file configs/nowhere.yaml",
        "python train_net.py --config-file configs/base.yaml SOLVER.LR 3",
        "python train_net.py --config-file configs/base.yaml --eval-only MODEL.WEIGHTS output/elsewhere/model.pth",
        "python train_net.py --config-file configs/cdcl/cs_bdd_r18.yaml MODEL.WEIGHTS output/elsewhere/model.pth",
        "python tools/nowhere.py",
        "make lunch",
        "make setup TORSH=3",
        "pip install -e .[everything]",
        "snakemake all",
    ],
)
def test_a_wrong_command_is_noticed(command, understand, monkeypatch):
    with pytest.raises((AssertionError, ValueError)):
        test_commands_are_understood(command, understand, monkeypatch)


@pytest.mark.parametrize(
    "words", ["list", "show camvid", "relate camvid cityscapes", "remap camvid cityscapes", "tree"]
)
def test_cheap_commands_work(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["label_space.py", *words.split()])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "tools/label_space.py"), run_name="__main__")
    assert ended.value.code == 0 and "camvid" in capsys.readouterr().out


# ---- Names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        linked = (path.parent / file) if file else path
        assert linked.exists(), f"{path.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in headings}, target


def test_every_page_of_the_documentation_is_in_the_menu_of_the_site():
    """A page that the menu names and that is not there is an error of mkdocs itself; here also the reverse."""
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("nav:")[1].split("plugins:")[0]
    named = re.findall(r"([\w/]+\.md)$", menu, re.MULTILINE)
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in sorted((ROOT / "docs").rglob("*.md"))]
    assert sorted(named) == pages


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_keys_in_backquotes_exist(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for name in re.findall(r"`((?:benchmarks|configs|datasets|docs|multiseg_d2|tests|tools)/[\w./-]*)`", text):
        assert (ROOT / name).exists(), f"{path.name} speaks of {name}"
    for key in re.findall(r"`([A-Z][A-Z_0-9]*(?:\.[A-Z_0-9]+)+)[` =]", text):
        node = default_config()
        for part in key.split("."):
            assert part in node, f"{path.name} speaks of the config key {key}"
            node = node[part]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_left_to_fill_in(path):
    assert not re.findall(r"@[A-Z]+@", path.read_text(encoding="utf-8"))


# ---- The recipe for a dataset of one's own ---------------------------------------------------------------------------


@pytest.fixture
def my_city(tmp_path, monkeypatch):
    """The YAML of the README, and two images and label maps of each split; the working directory is theirs."""
    (text,) = [block for block in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL) if "name: my_city" in block]
    (tmp_path / "my_city.yaml").write_text(text)
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for number in range(2):
            image = tmp_path / f"my_city/images/{split}/{number}.jpg"
            label = tmp_path / f"my_city/labels/{split}/{number}.png"
            for path in (image, label):
                path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (12, 16, 3), np.uint8)).save(image)
            ids = np.full((12, 16), 255, np.uint8)
            ids[:4], ids[4:8], ids[8:, :8] = 7, 8, 25
            Image.fromarray(ids).save(label)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    yield tmp_path
    unregister_dataset("my_city")


@pytest.mark.parametrize("way", ["register_dataset", "DATASETS.SPECS"])
def test_the_recipe_for_a_dataset_of_ones_own(my_city, way):
    if way == "register_dataset":
        assert multiseg_d2.register_dataset("my_city.yaml") == ["my_city_train", "my_city_val"]
    else:
        assert """DATASETS.SPECS '("my_city.yaml",)'""" in README
        register_from_config(load_config("", shlex.split("""DATASETS.SPECS '("my_city.yaml",)'""")))
    for entry in ("my_city_train", "my_city_val"):
        local = read_local_label(DatasetCatalog.get(entry)[1])
        assert (local[:8] == 0).all() and (local[8:, :8] == 1).all() and (local[8:, 8:] == 255).all()
    (my_city / "my_city/images/val/0.jpg").rename(my_city / "my_city/images/val/other.jpg")
    with pytest.raises(RuntimeError, match="other"):  # "a file without partner is an error with its name"
        DatasetCatalog.get("my_city_val")


def test_the_recipe_is_checked_by_the_script(my_city, monkeypatch, capsys):
    multiseg_d2.register_dataset("my_city.yaml")
    monkeypatch.setattr(sys, "argv", ["check.py", "my_city.yaml", "--workers", "1"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "datasets/check.py"), run_name="__main__")
    assert end.value.code == 0 and "no errors" in capsys.readouterr().out
    label = my_city / "my_city/labels/val/1.png"
    Image.fromarray(np.full((12, 16), 9, np.uint8)).save(label)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "datasets/check.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert end.value.code == 1 and str(label) in out and "9 (192 pixels)" in out


def test_the_picture_from_python(tmp_path, monkeypatch):
    """The block of the README as it stands, with the model that its config makes and random weights."""
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "Predictor(" in block]
    assert len([line for line in code.splitlines() if line]) == 5
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    cfg = load_config("configs/quickstart/toy.yaml", ["MODEL.DEVICE", "cpu"])
    weights = tmp_path / "output/quickstart/toy/model_final.pth"
    weights.parent.mkdir(parents=True)
    torch.save({"model": Trainer.build_model(cfg).state_dict()}, weights)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 40, 3), np.uint8)).save("street.png")
    names: dict = {}
    exec(code, names)
    assert names["labels"].shape == (24, 40) and names["labels"].max() < names["predictor"].space.num_classes
    assert names["predictor"].space.name == "toy_day" and names["cfg"].INPUT.FORMAT == "RGB"
