"""Config files: nothing in them is run, and a slip of the pen is an error that says what was meant."""

from __future__ import annotations

import pytest
import yaml

from multiseg_d2.engine.config_file import default_config, load_config
from multiseg_d2.user_error import ConfigError


@pytest.fixture
def load(tmp_path):
    def load(text, *overrides, **others):
        for name, content in others.items():
            (tmp_path / f"{name}.yaml").write_text(content)
        (tmp_path / "cfg.yaml").write_text(text)
        return load_config(str(tmp_path / "cfg.yaml"), overrides)

    return load


def test_values_bases_and_overrides(load):
    cfg = load(
        "_BASE_: [one.yaml, two.yaml]\nSOLVER: {MAX_ITER: 30}\n",
        *("SOLVER.BASE_LR", "3", "DATASETS.TRAIN", "('a', 'b')"),
        one="SOLVER: {MAX_ITER: 10, BASE_LR: 1e-3, MOMENTUM: 1}\nINPUT: {CROP: {SIZE: [1, 2]}}",
        two="_BASE_: three.yaml\nSOLVER: {MAX_ITER: 20}",
        three="DATALOADER: {SCHEDULE: size}",
    )
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR, cfg.SOLVER.MOMENTUM) == (30, 3.0, 1.0)
    assert isinstance(cfg.SOLVER.BASE_LR, float) and isinstance(cfg.SOLVER.MOMENTUM, float)
    assert cfg.INPUT.CROP.SIZE == [1, 2] and cfg.DATALOADER.SCHEDULE == "size" and cfg.DATASETS.TRAIN == ("a", "b")
    assert load_config() == default_config()


@pytest.mark.parametrize(
    ("file", "folder"),
    [
        ("configs/uniseg/cim.yaml", "./output/uniseg/cim"),
        ("configs/top.yaml", "./output/top"),
        ("configs/old/configs/x.yaml", "./output/x"),
        ("mine/v1.2.yaml", "./output/v1.2"),
    ],
)
def test_the_output_folder_follows_from_the_path_of_the_config(tmp_path, monkeypatch, file, folder):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text("SEED: 1")
    assert folder == load_config(str(path)).OUTPUT_DIR
    monkeypatch.chdir(path.parent)
    assert folder == load_config(path.name).OUTPUT_DIR  # wherever it is called from
    assert load_config(str(path), ["OUTPUT_DIR", "here"]).OUTPUT_DIR == "here"
    (path.parent / "base.yaml").write_text("OUTPUT_DIR: ./output")  # said is said, in a base as well
    path.write_text("_BASE_: base.yaml")
    assert load_config(str(path)).OUTPUT_DIR == "./output"


def test_what_detectron2_writes_can_be_read(load):
    cfg = load("DATASETS: {TRAIN: ['x', 'y']}")
    assert yaml.safe_load(load(cfg.dump()).dump()) == yaml.safe_load(cfg.dump())


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir ['{}']", "!!python/object/apply:eval ['{}']"])
def test_a_file_that_would_run_code_is_refused(load, tmp_path, tag):
    victim = tmp_path / "ran"
    with pytest.raises(ConfigError, match=r"(?s)cfg\.yaml: not valid YAML: .*python/object.*line 2"):
        load("SEED: 1\nOUTPUT_DIR: " + tag.format(victim))
    with pytest.raises(ConfigError, match=r"base\.yaml"):
        load("_BASE_: base.yaml", base="OUTPUT_DIR: " + tag.format(victim))
    assert not victim.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("DATASETS: {TRIAN: ['a']}", "there is no key DATASETS.TRIAN .did you mean 'TRAIN'"),
        ("DATALOADER: {SHEDULE: size}", "DATALOADER.SHEDULE .did you mean 'SCHEDULE'"),
        ("INPUT: {SCALE_RNGE: [1, 2]}", "INPUT.SCALE_RNGE .did you mean 'SCALE_RANGE'"),
        ("INPUT: {CROP: {SZE: [1, 2]}}", "INPUT.CROP.SZE .did you mean 'SIZE'"),
        ("MODEL: {RESNETS: {OUTPUT_STRID: 8}}", "did you mean 'OUTPUT_STRIDE'"),
        ("MODEL: {SEM_SEG_HEAD: {DECODR: x}}", "did you mean 'DECODER'"),
        ("MODEL: {DATASET_NORMS: {ENABLED: True}}", "did you mean 'DATASET_NORM'"),
        ("MODEL: {DATASET_NORM: {UNSEN: x}}", "did you mean 'UNSEEN'"),
        ("SOLVER: {POLY_POWER: 1.0}", "did you mean 'POLY_LR_POWER'"),
        ("SOLVER: {AMP: {DTYP: float16}}", "did you mean 'DTYPE'"),
        ("TEST: {AUG: {SCALE: [1.0]}}", "did you mean 'SCALES'"),
        ("SOLVER: {INTERVAL: 2}", "did you mean 'DATALOADER.INTERVAL'"),  # the right name in the wrong section
        ("SOLVR: {BASE_LR: 1.0}", "did you mean 'SOLVER'"),
        ("ZZZZ: 1", "there is no key ZZZZ$"),
        ("SOLVER: 3", "SOLVER is a section, not a value"),
        ("SOLVER: {BASE_LR: fast}", "(?s)Type mismatch.*SOLVER.BASE_LR"),
        ("SOLVER: {BASE_LR: {X: 1}}", "BASE_LR is a value, not a section"),
        ("INPUT: {SCALE_RANGE: (0.3, 0.5)}", r"INPUT.SCALE_RANGE: a tuple falls apart .*write a list, .a, b.*\)$"),
        ("INPUT: {SCALE_RANGE: (0.3, 0.5), RANGE: 1}", "falls apart.*; there is no key INPUT.RANGE"),
        ("DATASETS: {TRAIN: ('a', 'b')}", "(?s)not valid YAML.*Inside {...} write a list"),
        ("SOLVER: {MAX_ITER: 1}\nSOLVER: {BASE_LR: 1.0}", "names twice: .'SOLVER'"),
        ("- a", "a config is a mapping of keys, not a list"),
        ("a: [", "not valid YAML"),
        ("VERSION: 1", "VERSION is 1"),
        ("_BASE_: cfg.yaml", "is its own base"),
        ("_BASE_: nowhere.yaml", "nowhere.yaml: cannot be read: No such file"),
    ],
)
def test_a_wrong_file_is_an_error_that_names_it(load, text, message):
    with pytest.raises(ConfigError, match=message) as problem:
        load(text)
    assert ".yaml" in str(problem.value)


def test_all_wrong_keys_are_told_at_once(load):
    with pytest.raises(ConfigError, match=r"SOLVER\.A; there is no key SOLVER\.B"):
        load("SOLVER: {A: 1, B: 2}")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["SOLVER.BASELR", "1"], "command line: there is no key SOLVER.BASELR .did you mean 'BASE_LR'"),
        (["SOLVER.BASE_LR"], "odd number of them: SOLVER.BASE_LR"),
        (["SOLVER.BASE_LR", "1", "--resume"], "--resume must stand before"),
        (["SOLVER", "1"], "SOLVER is a section"),
        (["SOLVER.MAX_ITER", "many"], "(?s)SOLVER.MAX_ITER many: Type mismatch"),
    ],
)
def test_wrong_overrides(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config("", overrides)
