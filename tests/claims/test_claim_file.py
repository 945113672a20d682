"""Mistakes in claims files are named, and tables stand where they belong."""

from __future__ import annotations

import pytest
import yaml

from multiseg_d2.claims import ClaimError, load_claim, plan
from multiseg_d2.claims.table import replace_block

CLAIM = {
    "title": "Toy table",
    "columns": [{"label": "day", "dataset": "toy_day_val"}],
    "rows": [{"label": "joint", "config": "a.yaml", "published": {"day": 60.5}}],
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({"DATASETS": {"TEST": "('toy_day_val',)"}}))
    return tmp_path


def write_claim(folder, **changes):
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump({**CLAIM, **changes}, sort_keys=False))
    return load_claim(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sedes": [1]}, "no key 'sedes'.*seeds"),
        ({"seeds": []}, "seeds must be"),
        ({"seeds": [0.5]}, "seeds must be"),
        ({"rows": [{"label": "x"}]}, "neither a config nor published"),
        ({"rows": [{"label": "x", "config": "none.yaml"}]}, "there is no config"),
        ({"rows": [{"label": "x", "config": "a.yaml", "phases": []}]}, "only one"),
        ({"rows": [{"label": "x", "published": {"dya": 1}}]}, "no column 'dya'.*'day'"),
        ({"rows": [{"label": "x", "published": {"day": "1%"}}]}, "not a number"),
        ({"rows": [{"label": "x", "config": "a.yaml"}] * 2}, "twice"),
        ({"rows": [{"label": "x", "config": "a.yaml", "overrides": ["A", 1]}]}, "overrides are a mapping"),
        ({"columns": [{"dataset": "toy_day_val"}]}, "lacks 'label'"),
        ({"title": ""}, "lacks 'title'"),
        ({"quick": {"rows": ["jiont"]}}, "quick: rows: there is no row 'jiont'.*'joint'"),
        ({"quick": {"seed": [1]}}, "quick: there is no key 'seed'.*'seeds'"),
        ({"rows": [{"label": "x", "config": "a.yaml", "columns": ["dya"]}]}, "no column 'dya'.*'day'"),
    ],
)
def test_mistakes_are_named(folder, changes, message):
    with pytest.raises(ClaimError, match=message) as error:
        write_claim(folder, **changes)
    assert "toy.yaml" in str(error.value)


@pytest.mark.parametrize(
    "overrides", [{"SOLVER.BASELR": 1}, {"DATASETS.TRAIN": "('nosuch_train',)"}, {"SOLVER.BASE_LR": "fast"}]
)
def test_configs_that_cannot_be_resolved_are_named_before_anything_is_run(folder, overrides):
    with pytest.raises(ClaimError, match="a.yaml"):
        plan(write_claim(folder, overrides=overrides), folder)


def test_columns_that_are_variants_of_the_rows(folder):
    """Each row is run once per variant; columns of the same variant share the run."""
    columns = [
        {"label": "day", "dataset": "toy_day_val", "overrides": {"SOLVER.BASE_LR": 0.1}},
        {"label": "mean", "metric": "mean.mIoU", "overrides": {"SOLVER.BASE_LR": 0.1}},
        {"label": "slow", "metric": "mean.mIoU", "overrides": {"SOLVER.BASE_LR": 0.01}},
    ]
    rows = [
        {"label": "short", "config": "a.yaml"},
        {"label": "long", "config": "a.yaml", "overrides": {"SOLVER.MAX_ITER": 9}, "columns": ["slow"]},
    ]
    claim = write_claim(folder, columns=columns, rows=rows)
    found = [(row.label, run.columns, run.phases[0].overrides) for row in claim.rows for run in row.runs]
    assert found == [
        ("short", ("day", "mean"), ("SOLVER.BASE_LR", "0.1")),
        ("short", ("slow",), ("SOLVER.BASE_LR", "0.01")),
        ("long", ("slow",), ("SOLVER.MAX_ITER", "9", "SOLVER.BASE_LR", "0.01")),
    ]
    assert [(job.seed, job.cells) for job in plan(claim, folder)] == [
        (0, (("short", ("day", "mean")),)),
        (0, (("short", ("slow",)),)),
        (0, (("long", ("slow",)),)),
    ]


def test_the_shorter_version_of_a_table(folder):
    quick = {"seeds": [3], "rows": ["fast"], "overrides": {"SOLVER.MAX_ITER": 2}}
    rows = [
        {"label": "slow", "config": "a.yaml"},
        {"label": "fast", "config": "a.yaml", "overrides": {"SOLVER.MAX_ITER": 50}},
    ]
    whole = write_claim(folder, rows=rows, quick=quick, seeds=[0, 1])
    assert (whole.name, whole.seeds, len(whole.rows)) == ("toy", (0, 1), 2)
    short = load_claim(folder / "toy.yaml", quick=True)
    assert (short.name, short.seeds, [row.label for row in short.rows]) == ("toy_quick", (3,), ["fast"])
    (job,) = plan(short, folder)
    assert job.identity.steps == 2 and job.seed == 3
    write_claim(folder)
    with pytest.raises(ClaimError, match="the file has no shorter version"):
        load_claim(folder / "toy.yaml", quick=True)


def test_block_of_the_readme(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("# Title\n<!-- claims:toy begin -->\nold\n<!-- claims:toy end -->\nmore\n")
    text = replace_block(readme, "toy", "new\ntable\n")
    assert text == "# Title\n<!-- claims:toy begin -->\nnew\ntable\n<!-- claims:toy end -->\nmore\n"
    readme.write_text(text)
    assert replace_block(readme, "toy", "new\ntable\n") == text
    for broken in ("", "<!-- claims:toy end --><!-- claims:toy begin -->", text + text):
        readme.write_text(broken)
        with pytest.raises(ClaimError, match="one pair of lines"):
            replace_block(readme, "toy", "x")
