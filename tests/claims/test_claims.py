"""The claims harness with a runner that runs nothing."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import statistics
from pathlib import Path

import pytest
import yaml
from detectron2.data import DatasetCatalog

from multiseg_d2.claims import ClaimError, collect, identity, load_claim, plan, run_claim
from multiseg_d2.claims.claim import Phase
from multiseg_d2.claims.harness import last_failures
from multiseg_d2.claims.plot import to_png
from multiseg_d2.claims.process import RunStoppedError
from multiseg_d2.claims.progress import estimated_seconds
from multiseg_d2.claims.records import FinishedRun
from multiseg_d2.claims.table import to_csv, to_markdown
from multiseg_d2.data.register import unregister_dataset, use_taxonomy

CONFIG = {
    "DATASETS": {"TRAIN": "('toy_day_train', 'toy_dusk_train')", "TEST": "('toy_day_val', 'toy_dusk_val')"},
    "SOLVER": {"MAX_ITER": 7},
}
CLAIM = {
    "title": "Toy table",
    "source": "a drawn paper",
    "seeds": [0, 1, 2],
    "columns": [{"label": "day", "dataset": "toy_day_val"}, {"label": "dusk", "dataset": "toy_dusk_val"}],
    "rows": [
        {"label": "joint", "config": "a.yaml", "published": {"day": 60.5}},
        {"label": "joint, slow", "config": "a.yaml", "overrides": {"SOLVER.BASE_LR": 0.003}},
    ],
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(CONFIG))
    (tmp_path / "b.yaml").write_text(yaml.safe_dump({"_BASE_": "a.yaml", "TEST": {"EVAL_PERIOD": 3}}))
    return tmp_path


def write_claim(folder, **changes):
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump({**CLAIM, **changes}, sort_keys=False))
    return load_claim(path)


class Runner:
    """Gives scores that depend on the job alone, or fails where it is told to; notes what it was asked for."""

    def __init__(self, fail=None):
        self.jobs, self.fail = [], fail or {}

    def __call__(self, job, on_step):
        self.jobs.append(job)
        on_step(3)
        for part, problem in self.fail.items():
            if part in job.title:
                raise problem
        (job.folder / "model_final.pth").touch()
        return {name: {"mIoU": score(job, name), "IoU": {"Road": 1.0}} for name in job.identity.tested}

    @property
    def titles(self):
        return [job.title for job in self.jobs]


def score(job, dataset):
    return 50 + 3 * job.seed**2 + (10 if "0.003" in job.phase.overrides else 0) + (1 if "dusk" in dataset else 0)


def run(claim, folder, runner=None, **options):
    runner = runner or Runner()
    return runner, run_claim(claim, plan(claim, folder / "runs", **options), runner)


# ---- numbers ------------------------------------------------------------------------------------------------------


def test_mean_spread_and_count(folder):
    claim = write_claim(folder)
    _, table = run(claim, folder)
    values = [51.0, 54.0, 63.0]
    cell = table.cells["joint", "dusk"]
    assert list(cell.values.values()) == values
    assert cell.mean == pytest.approx(statistics.mean(values)) and cell.std == pytest.approx(statistics.stdev(values))
    text = to_markdown(table)
    assert "| joint | 60.50 | 55.00 ± 6.24 (3) |  | 56.00 ± 6.24 (3) |" in text
    assert "a drawn paper" in text and "day, published" in text and "Failed" not in text
    lines = list(csv.DictReader(io.StringIO(to_csv(table))))
    assert [float(line["mean"]) for line in lines] == [55.0, 56.0, 65.0, 66.0]
    assert lines[0]["by_seed"] == "0:50.0000 1:53.0000 2:62.0000" and lines[0]["published"] == "60.5"
    assert to_png(table).startswith(b"\x89PNG")


def test_one_seed_has_no_spread_and_missing_seeds_are_said(folder):
    claim = write_claim(folder)
    _, table = run(claim, folder, seeds=[4])
    assert table.cells["joint", "day"].text() == "98.00 (1)" and math.isnan(table.cells["joint", "day"].std)
    _, table = run(claim, folder, Runner({"seed 2": RuntimeError("x")}))
    assert table.cells["joint", "day"].text() == "51.50 ± 2.12 (2 of 3)"
    empty = collect(claim, plan(claim, folder / "elsewhere"))
    assert empty.cells["joint", "day"].text() == "–"
    assert to_png(empty).startswith(b"\x89PNG")


def test_without_published_numbers_there_is_one_column_each(folder):
    rows = [{"label": "joint | x", "config": "a.yaml"}]
    _, table = run(write_claim(folder, rows=rows), folder)
    assert "| Method | day | dusk |" in to_markdown(table) and "| joint \\| x |" in to_markdown(table)


def test_metrics_by_path(folder):
    claim = write_claim(
        folder, columns=[{"label": "road", "dataset": "toy_day_val", "metric": "IoU.Road"}], rows=CLAIM["rows"][1:]
    )
    assert run(claim, folder)[1].cells["joint, slow", "road"].mean == 1
    claim = write_claim(folder, metric="IoU.Sky", rows=CLAIM["rows"][1:])
    with pytest.raises(ClaimError, match="no 'Sky'.*Road"):
        run(claim, folder)


# ---- what is run, and what is not -----------------------------------------------------------------------------------


def test_a_finished_run_is_not_repeated_and_a_changed_one_is(folder):
    claim = write_claim(folder)
    runner, first = run(claim, folder)
    assert len(runner.jobs) == 6
    again, table = run(claim, folder)
    assert not again.jobs and to_markdown(table) == to_markdown(first)
    rows = [CLAIM["rows"][0], {**CLAIM["rows"][1], "overrides": {"SOLVER.BASE_LR": 0.002}}]
    changed, _ = run(write_claim(folder, rows=rows, seeds=[0, 5]), folder)
    assert changed.titles == ["joint, slow, seed 0", "joint, seed 5", "joint, slow, seed 5"]


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"OUTPUT_DIR": "elsewhere"}, True),
        ({"DATALOADER": {"NUM_WORKERS": 1}}, True),
        ({"SOLVER": {"MAX_ITER": 8}}, False),
        ({"MODEL": {"WEIGHTS": "other.pth"}}, False),
        ({"DATASETS": {"TRAIN": "('toy_day_train',)", "TEST": CONFIG["DATASETS"]["TEST"]}}, False),
    ],
)
def test_a_run_is_known_by_its_content_not_by_its_name(folder, change, same):
    claim = write_claim(folder, rows=CLAIM["rows"][:1], seeds=[0])
    run(claim, folder)
    (folder / "c.yaml").write_text((folder / "a.yaml").read_text())
    (folder / "a.yaml").write_text(yaml.safe_dump({"_BASE_": "c.yaml", **change}))
    assert (not run(claim, folder)[0].jobs) == same


def test_the_weights_file_counts_by_its_bytes(folder):
    weights = folder / "w.pth"
    weights.write_bytes(b"one")
    claim = write_claim(folder, overrides={"MODEL.WEIGHTS": str(weights)}, seeds=[0])
    run(claim, folder)
    assert not run(claim, folder)[0].jobs
    weights.write_bytes(b"two")
    assert len(run(claim, folder)[0].jobs) == 2


def test_another_version_of_the_package_runs_again_unless_it_is_allowed(folder, monkeypatch):
    claim = write_claim(folder, seeds=[0])
    for module in ("jobs", "harness"):
        monkeypatch.setattr(f"multiseg_d2.claims.{module}.source_hash", lambda: "f" * 64)
    run(claim, folder)
    monkeypatch.undo()
    assert len(plan(claim, folder / "runs")) == 2 and not any(j.record for j in plan(claim, folder / "runs"))
    runner, table = run(claim, folder, any_source=True)
    assert not runner.jobs and "same version" not in to_markdown(table)
    runner, table = run(claim, folder, any_source=True, seeds=[0, 1])
    assert len(runner.jobs) == 2 and "Not all runs were made by the same version" in to_markdown(table)
    runner, table = run(claim, folder, seeds=[0, 1])
    assert runner.titles == ["joint, seed 0", "joint, slow, seed 0"] and "same version" not in to_markdown(table)
    _, table = run(claim, folder, any_source=True, seeds=[0, 1])  # this version's are preferred
    assert "same version" not in to_markdown(table)


def test_the_source_hash_is_that_of_the_package_files():
    names = {path.name for path in identity._PACKAGE.rglob("*.py")}
    assert "dataset_norm.py" in names and len(identity.source_hash()) == 64


def test_only_some_rows(folder):
    claim = write_claim(folder)
    runner, table = run(claim, folder, only=["joint, slow"], seeds=[0])
    assert runner.titles == ["joint, slow, seed 0"]
    assert table.cells["joint", "day"].text() == "–"
    with pytest.raises(ClaimError, match="jiont"):
        plan(claim, folder, only=["jiont"])


def test_a_killed_call_goes_on(folder):
    claim = write_claim(folder)
    for problem in (KeyboardInterrupt(), RunStoppedError("stopped")):
        with pytest.raises(type(problem)):
            run(claim, folder, Runner({"seed 1": problem}))
    jobs = plan(claim, folder / "runs")
    assert [job.record is not None for job in jobs] == [True, True, False, False, False, False]
    assert [job.started for job in jobs] == [False, False, True, False, False, False]
    runner, table = run(claim, folder)
    assert [job.folder for job in runner.jobs] == [job.folder for job in jobs[2:]]
    assert table.cells["joint", "day"].text().endswith("(3)")


def test_the_table_is_written_after_every_run(folder):
    claim, seen = write_claim(folder, seeds=[0]), []
    jobs = plan(claim, folder / "runs")
    run_claim(claim, jobs, Runner(), lambda table: seen.append([len(c.values) for c in table.cells.values()]))
    assert seen == [[1, 1, 0, 0], [1, 1, 1, 1]]


def test_a_failure_is_shown_stops_nothing_and_is_tried_again(folder):
    claim = write_claim(folder, seeds=[0, 1])
    runner, table = run(claim, folder, Runner({"slow, seed 0": RuntimeError("loss is nan\ntraceback")}))
    assert len(runner.jobs) == 4
    assert table.failures == ["joint, slow, seed 0: loss is nan\ntraceback"]
    assert "- joint, slow, seed 0: loss is nan\n" in to_markdown(table)
    jobs = plan(claim, folder / "runs")
    assert list(last_failures(jobs).values()) == ["loss is nan\ntraceback"]
    runner, table = run(claim, folder)
    assert runner.titles == ["joint, slow, seed 0"] and not table.failures
    assert not last_failures(plan(claim, folder / "runs"))


def test_two_harnesses_do_not_run_the_same_run(folder):
    claim = write_claim(folder, seeds=[0])

    class Nested(Runner):
        def __call__(self, job, on_step):
            with pytest.raises(ClaimError, match="another process"):
                run(claim, folder, only=[job.cells[0][0]])
            return super().__call__(job, on_step)

    runner, table = run(claim, folder, Nested())
    assert len(runner.jobs) == 2 and not table.failures


def records_of(jobs, seconds):
    """The jobs as if those at the given places had run, for so many seconds."""
    run = {i: FinishedRun(job.folder, {}, seconds[i], "") for i, job in enumerate(jobs) if i in seconds}
    return [dataclasses.replace(job, record=run.get(i)) for i, job in enumerate(jobs)]


def test_the_time_that_is_left_follows_from_runs_that_are_done(folder):
    rows = [CLAIM["rows"][0], {**CLAIM["rows"][1], "overrides": {"SOLVER.MAX_ITER": 34}}]
    jobs = plan(write_claim(folder, rows=rows, seeds=[0, 1, 2]), folder / "runs")  # 7 and 34 steps in turn
    assert estimated_seconds(jobs) is None
    # another seed of the same config takes as long; 34 steps and an evaluation (20) twice as long as 7 and 20
    assert estimated_seconds(records_of(jobs, {0: 30.0})) == pytest.approx(2 * 30 + 3 * 60)
    assert estimated_seconds(records_of(jobs, {0: 30.0, 1: 50.0, 2: 32.0})) == pytest.approx(31 + 2 * 50)
    assert estimated_seconds(records_of(jobs, dict.fromkeys(range(6), 1.0))) == 0


def test_a_log_says_what_runs_what_is_there_and_what_failed(folder, capsys):
    claim = write_claim(folder, seeds=[0])
    run(claim, folder, only=["joint"])
    assert "[1 of 1] joint, seed 0: 7 steps" in capsys.readouterr().err
    run(claim, folder, Runner({"slow": RuntimeError("loss is nan")}))
    told = capsys.readouterr().err
    assert "2 runs, 1 are there already, 1 to do; about 0:00:00 left" in told
    assert "joint, slow, seed 0: FAILED after 0:00:00" in told and "joint, seed 0" not in told
    run(claim, folder)
    assert "joint, slow, seed 0: 7 steps, goes on; log: " in capsys.readouterr().err


def test_where_the_files_lie_does_not_matter(folder, tmp_path_factory, monkeypatch):
    """The same claim, config, spec, list of images and taxonomy in two places, relative to each: one identity."""
    keys, places = set(), [tmp_path_factory.mktemp(name) for name in "xy"]
    spec = {
        "name": "placed",
        "classes": [{"name": "a", "color": [0, 0, 9], "raw": [0]}, {"name": "b", "color": [9, 0, 0], "raw": [1]}],
        "splits": {"train": {"images": "p/{id}.png", "labels": "l/{id}.png", "ids": "ids.txt"}},
    }
    taxonomy = "multiseg_d2/data/taxonomy.yaml"
    for place, ids in [*((place, "one\ntwo\n") for place in places), (places[0], "one\n")]:
        (place / "ids.txt").write_text(ids)
        (place / "spec.yaml").write_text(yaml.safe_dump(spec))
        (place / "taxonomy.yaml").write_text((Path(identity._PACKAGE).parent / taxonomy).read_text())
        keys_of = {"SPECS": "('spec.yaml',)", "TAXONOMY": "taxonomy.yaml", "TRAIN": "('placed_train',)"}
        (place / "a.yaml").write_text(yaml.safe_dump({"DATASETS": {**keys_of, "TEST": "('placed_train',)"}}))
        monkeypatch.chdir(place)
        if "placed_train" in DatasetCatalog.list():
            unregister_dataset("placed")
        keys.add(identity.identify(Phase(place / "a.yaml"), 0, None).key)
        assert len(keys) == (1 if ids.count("\n") == 2 else 2), "another list is another run"
    unregister_dataset("placed")
    use_taxonomy()


# ---- rows of several runs and phases --------------------------------------------------------------------------------

PHASES = {
    "label": "tuned",
    "phases": [{"config": "a.yaml"}, {"config": "b.yaml", "overrides": {"SOLVER.BASE_LR": 0.003}}],
}


def test_phases_hand_their_weights_on_and_are_shared(folder):
    test = {"label": "tested", "phases": [{"config": "a.yaml"}, {"config": "b.yaml", "eval_only": True}]}
    claim = write_claim(folder, rows=[CLAIM["rows"][0], PHASES, test], seeds=[0])
    runner, table = run(claim, folder)
    assert runner.titles == ["joint, seed 0", "tuned, phase 2 of 2, seed 0", "tested, phase 2 of 2, seed 0"]
    first, second, third = runner.jobs
    weights = ["MODEL.WEIGHTS", str(first.folder / "model_final.pth")]
    assert first.weights is None and second.overrides[-2:] == third.overrides[-2:] == weights
    assert third.phase.eval_only and third.identity.steps == 0 and second.identity.steps == 7
    assert ["SEED", "0", "OUTPUT_DIR", str(second.folder)] == second.overrides[-6:-2]
    assert all(len(cell.values) == 1 for cell in table.cells.values())


def test_phases_can_hand_more_than_the_weights(folder):
    rows = [
        {"label": label, "phases": [{"config": "a.yaml"}, {"config": "b.yaml", "weights_as": keys}]}
        for label, keys in (("beside", "MODEL.DATASET_NORM.INIT_FROM"), ("both", ["MODEL.WEIGHTS", "OUTPUT_DIR"]))
    ]
    claim = write_claim(folder, rows=[*rows, PHASES], seeds=[0])
    runner, _ = run(claim, folder)
    first, beside, both, _ = runner.jobs
    weights = str(first.folder / "model_final.pth")
    assert "MODEL.WEIGHTS" not in beside.overrides and beside.overrides[-2:] == [
        "MODEL.DATASET_NORM.INIT_FROM",
        weights,
    ]
    assert both.overrides[-4:] == ["MODEL.WEIGHTS", weights, "OUTPUT_DIR", weights]
    assert len({job.identity.key for job in runner.jobs}) == 4
    assert not run(claim, folder)[0].jobs
    phases = [{"config": "a.yaml", "overrides": {"SOLVER.MAX_ITER": 9}}, rows[0]["phases"][1]]
    again, _ = run(write_claim(folder, rows=[{"label": "beside", "phases": phases}], seeds=[0]), folder)
    assert len(again.jobs) == 2, "what is handed on counts"
    rows[0]["phases"][1]["weights_as"] = "MODEL.WEIGTHS"
    with pytest.raises(ClaimError, match="b.yaml: .*MODEL.WEIGTHS.*did you mean 'WEIGHTS'"):
        plan(write_claim(folder, rows=rows[:1]), folder)


def test_means_are_columns(folder):
    columns = [*CLAIM["columns"], {"label": "mean", "metric": "mean.mIoU"}]
    columns += [{"label": "H unseen", "dataset": "mean", "metric": "unseen.harmonic_mIoU"}]

    class Means(Runner):
        def __call__(self, job, on_step):
            scores = super().__call__(job, on_step)
            return {**scores, "mean": {"mIoU": 12.5, "unseen": {"harmonic_mIoU": None}}}

    _, table = run(write_claim(folder, columns=columns, rows=CLAIM["rows"][1:], seeds=[0]), folder, Means())
    assert table.cells["joint, slow", "mean"].mean == 12.5 and math.isnan(table.cells["joint, slow", "H unseen"].mean)


def test_a_changed_first_phase_changes_the_second(folder):
    claim = write_claim(folder, rows=[PHASES], seeds=[0])
    run(claim, folder)
    phases = [{"config": "a.yaml", "overrides": {"SOLVER.MAX_ITER": 9}}, PHASES["phases"][1]]
    assert len(run(write_claim(folder, rows=[{**PHASES, "phases": phases}], seeds=[0]), folder)[0].jobs) == 2


def test_what_follows_a_failed_phase_is_not_run(folder):
    claim = write_claim(folder, rows=[PHASES], seeds=[0])
    runner, table = run(claim, folder, Runner({"phase 1": RuntimeError("x")}))
    assert len(runner.jobs) == 1 and len(table.failures) == 2 and "left no" in table.failures[1]


def test_one_run_per_column_and_published_rows(folder):
    (folder / "day.yaml").write_text(
        yaml.safe_dump({"DATASETS": {"TRAIN": "('toy_day_train',)", "TEST": "('toy_day_val',)"}})
    )
    single = {
        "label": "single",
        "runs": [{"config": "day.yaml", "columns": ["day"]}, {"config": "a.yaml", "columns": ["dusk"]}],
    }
    claim = write_claim(folder, rows=[single, {"label": "theirs", "published": {"dusk": 1}}], seeds=[0])
    runner, table = run(claim, folder)
    assert runner.titles == ["single [day], seed 0", "single [dusk], seed 0"]
    assert [table.cells["single", c].text() for c in ("day", "dusk")] == ["50.00 (1)", "51.00 (1)"]
    assert "| theirs |  | – | 1.00 | – |" in to_markdown(table)
    single["runs"][0]["columns"] = ["day", "dusk"]
    with pytest.raises(ClaimError, match="twice.*dusk"):
        write_claim(folder, rows=[single])
    single["runs"] = [{"config": "day.yaml"}]
    with pytest.raises(ClaimError, match="'dusk'.*toy_dusk_val.*day.yaml tests"):
        plan(write_claim(folder, rows=[single]), folder)


def test_a_column_with_hidden_labels_is_published_only(folder):
    columns = [*CLAIM["columns"][:1], {"label": "hidden"}]
    rows = [{"label": "joint", "config": "a.yaml", "published": {"hidden": 70.25}}]
    _, table = run(write_claim(folder, columns=columns, rows=rows, seeds=[0]), folder)
    text = to_markdown(table)
    assert "| Method | day, published | day, ours | hidden, published |" in text
    assert "| joint |  | 50.00 (1) | 70.25 |" in text
    assert to_png(table).startswith(b"\x89PNG")


def test_a_record_is_plain_json(folder):
    run(write_claim(folder, seeds=[0]), folder)
    record = json.loads(next(Path(folder, "runs").rglob("claims_result.json")).read_text())
    assert set(record) == {"key", "source", "results", "seconds", "finished", "versions"}
