"""Loaders over small sets on disk: same samples whatever the workers, resume, ranks, bad files, dead workers."""

from __future__ import annotations

import gc
import logging
import os
import signal
from collections import Counter
from itertools import islice

import cv2
import numpy as np
import pytest
import torch
import yaml
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from detectron2.utils import comm
from PIL import Image

from multiseg_d2.config import add_multiseg_config
from multiseg_d2.data.decode import BadFileError
from multiseg_d2.data.loader import LoaderWorkerError, build_test_loader, build_train_loader
from multiseg_d2.data.register import register_dataset, unregister_dataset

SETS = {"loader_a": 5, "loader_b": 3}


@pytest.fixture
def quick_end(monkeypatch):
    """Torch waits five seconds for worker processes to end after an error in one of them; here it does not."""
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
    yield
    gc.collect()  # ends them while the above holds


@pytest.fixture
def root(tmp_path):
    """Two labelled sets of 5 and 3 images and an unlabelled one of 2, registered; image i of a set is filled with i."""
    for name, count in {**SETS, "loader_u": 2}.items():
        place = {"images": f"{tmp_path}/{name}/{{id}}.png"}
        for i in range(count):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.fromarray(np.full((24, 32, 3), 10 * i, np.uint8)).save(tmp_path / name / f"{i}.png")
            if name in SETS:
                (tmp_path / f"{name}_labels").mkdir(exist_ok=True)
                label = np.random.default_rng(i).integers(0, 3, (24, 32)).astype(np.uint8)
                Image.fromarray(label).save(tmp_path / f"{name}_labels" / f"{i}.png")
                place["labels"] = f"{tmp_path}/{name}_labels/{{id}}.png"
        spec = {"name": name, "classes": ["x", "y", "z"], "raw_ids": "position", "splits": {"train": place}}
        if name not in SETS:
            spec["annotation"] = "none"
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(spec))
        register_dataset(tmp_path / f"{name}.yaml")
    yield tmp_path
    for name in (*SETS, "loader_u"):
        unregister_dataset(name)


def config(**keys):
    cfg = get_cfg()
    add_multiseg_config(cfg)
    cfg.DATASETS.TRAIN = ("loader_a_train", "loader_b_train")
    cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE = True, "absolute", [16, 16]
    cfg.INPUT.COLOR_JITTER = 0.3
    cfg.INPUT.MIN_SIZE_TEST = 0
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SEED = 3
    cfg.merge_from_list([item for pair in keys.items() for item in pair])
    return cfg


def steps(loader, count: int) -> list[list[dict]]:
    return list(islice(iter(loader), count))


def same(a: list[list[dict]], b: list[list[dict]]) -> bool:
    flat_a, flat_b = [s for step in a for s in step], [s for step in b for s in step]
    return [s["draw"] for s in flat_a] == [s["draw"] for s in flat_b] and all(
        torch.equal(x["image"], y["image"])
        and torch.equal(x["sem_seg"], y["sem_seg"])
        and x["file_name"] == y["file_name"]
        for x, y in zip(flat_a, flat_b)
    )


def test_steps_are_those_of_the_schedule(root):
    loader = build_train_loader(config())
    for number, samples in enumerate(steps(loader, 12)):
        draws = loader.schedule.step(number)
        assert [s["draw"] for s in samples] == draws
        for sample, draw in zip(samples, draws):
            name = list(SETS)[draw.dataset]
            dataset_dict = DatasetCatalog.get(f"{name}_train")[draw.index]
            assert sample["dataset"] == name and sample["file_name"] == dataset_dict["file_name"]
            assert sample["image"].shape == (3, 16, 16) and sample["sem_seg"].shape == (16, 16)
            expected = loader.dataset.mapper(dataset_dict, np.random.default_rng(draw.seed))
            assert torch.equal(sample["image"], expected["image"])


@pytest.mark.parametrize("kind", ["alternation", "fixed", "size", "weights"])
def test_any_number_of_workers_gives_the_same_samples(root, kind):
    keys = {"DATALOADER.SCHEDULE": kind}
    if kind in ("fixed", "weights"):
        keys["DATALOADER.WEIGHTS"] = (2, 1)
    alone = steps(build_train_loader(config(**keys)), 6)
    assert same(alone, steps(build_train_loader(config(**keys, **{"DATALOADER.NUM_WORKERS": 2})), 6))


def test_a_resumed_loader_continues_where_it_stopped(root):
    unbroken = steps(build_train_loader(config()), 11)
    for start in (4, 10):
        resumed = build_train_loader(config(**{"DATALOADER.NUM_WORKERS": 1}), start_step=start)
        assert same(unbroken[start:], steps(resumed, 11 - start))


@pytest.mark.parametrize("kind", ["size", "alternation"])
def test_a_round_from_any_origin_sees_every_image_equally_often(root, kind):
    """Eight images in two sets, two per step: eight steps are two epochs, wherever in the run they begin."""
    cfg = config(**{"DATALOADER.SCHEDULE": kind, "SOLVER.IMS_PER_BATCH": 2})
    entries = ("loader_a_train", "loader_b_train") if kind == "size" else ("loader_a_train",)
    length = 8 if kind == "size" else 5
    orders = []
    for origin in (0, 7, 1001):
        round_ = steps(build_train_loader(cfg, origin, entries=entries, origin=origin), length)
        assert set(Counter(s["file_name"] for step in round_ for s in step).values()) == {2}
        orders.append([s["draw"] for step in round_ for s in step])
        resumed = build_train_loader(cfg, origin + 3, entries=entries, origin=origin)
        assert same(round_[3:], steps(resumed, length - 3))
    assert orders[0] != orders[1] != orders[2]
    with pytest.raises(ValueError, match="step 6 lies before step 7"):
        build_train_loader(cfg, 6, origin=7)


def test_every_iteration_begins_anew_and_leaves_global_generators_alone(root):
    loader = build_train_loader(config(**{"DATALOADER.NUM_WORKERS": 1}))
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    assert same(steps(loader, 3), steps(loader, 3))
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all()  # noqa: NPY002


def test_another_seed_gives_another_order(root):
    assert not same(steps(build_train_loader(config()), 4), steps(build_train_loader(config(SEED=4)), 4))


def test_ranks_share_a_step(root, monkeypatch):
    cfg = config(**{"SOLVER.IMS_PER_BATCH": 4})
    whole = steps(build_train_loader(cfg), 3)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    parts = []
    for rank in range(2):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        parts.append(steps(build_train_loader(cfg), 3))
    for step, first, second in zip(whole, *parts):
        drawn = sorted(s["draw"] for s in first) + sorted(s["draw"] for s in second)
        assert sorted(drawn) == sorted(s["draw"] for s in step)
        assert [[s["dataset"] for s in part] for part in (first, second)] == [["loader_a"] * 2 + ["loader_b"] * 2] * 2
    with pytest.raises(ValueError, match=r"3 images per step.*2 processes.*IMS_PER_BATCH"):
        build_train_loader(config(**{"SOLVER.IMS_PER_BATCH": 3, "DATALOADER.SCHEDULE": "size"}))


def test_labelled_and_unlabelled_streams_share_a_step(root):
    cfg = config(**{"DATALOADER.SCHEDULE": "fixed", "DATALOADER.WEIGHTS": (1, 2)})
    cfg.DATASETS.TRAIN = ("loader_a_train", "loader_u_train")
    for samples in steps(build_train_loader(cfg), 4):
        assert ["sem_seg" in s for s in samples] == [True, False, False]
        assert [s["dataset"] for s in samples] == ["loader_a", "loader_u", "loader_u"]


def test_what_a_config_draws_at_random_all_the_same_goes_on_at_random(root, caplog):
    with caplog.at_level(logging.WARNING):
        first, second = (steps(build_train_loader(config(SEED=-1)), 3) for _ in range(2))
    assert not same(first, second)
    assert "SEED is -1" in caplog.text and "--resume" in caplog.text


# ---- bad files ----


def break_file(path) -> str:
    path.write_bytes(path.read_bytes()[:45])
    return str(path)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("folder", ["loader_a", "loader_a_labels"])
def test_a_broken_file_stops_the_run_by_name(root, quick_end, workers, folder):
    path = break_file(root / folder / "2.png")
    loader = build_train_loader(config(**{"DATALOADER.NUM_WORKERS": workers}))
    with pytest.raises(BadFileError, match=path):
        steps(loader, 5)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_removed_in_the_middle_of_a_run_is_named(root, quick_end, workers):
    loader = build_train_loader(config(**{"DATALOADER.NUM_WORKERS": workers}))
    (root / "loader_b" / "1.png").unlink()
    with pytest.raises(BadFileError, match=r"loader_b/1\.png: cannot be read \(No such file"):
        steps(loader, 5)


def test_few_bad_files_may_be_skipped_the_same_way_with_any_number_of_workers(root, caplog):
    bad = break_file(root / "loader_a" / "2.png")
    with caplog.at_level(logging.WARNING):
        alone = steps(build_train_loader(config(), max_bad_files=1), 8)
    assert caplog.text.count(bad) == 1 and "1 of at most 1" in caplog.text  # drawn several times, told once
    others = steps(build_train_loader(config(**{"DATALOADER.NUM_WORKERS": 2}), max_bad_files=1), 8)
    assert same(alone, others)
    assert all(len(samples) == 4 and "skipped_files" not in samples[0] for samples in alone)
    for sample in (s for samples in alone for s in samples):
        if sample["draw"][:2] == (0, 2):  # the next image stands in for it
            assert sample["file_name"].endswith("loader_a/3.png")


def test_one_bad_file_too_many_stops_the_run_and_names_all(root):
    bad = [break_file(root / "loader_a" / f"{i}.png") for i in (1, 3)]
    with pytest.raises(BadFileError, match="2 files cannot be read, at most 1") as error:
        steps(build_train_loader(config(), max_bad_files=1), 8)
    assert all(path in str(error.value) for path in bad)


def test_a_set_without_any_good_file_stops_the_run(root):
    for i in range(3):
        break_file(root / "loader_b" / f"{i}.png")
    with pytest.raises(BadFileError, match="3 images in a row cannot be read"):
        steps(build_train_loader(config(), max_bad_files=100), 1)


@pytest.mark.parametrize("workers", [0, 1])
def test_wrong_labels_are_never_skipped(root, quick_end, workers):
    path = root / "loader_a_labels" / "4.png"
    Image.fromarray(np.full((24, 32), 99, np.uint8)).save(path)
    loader = build_train_loader(config(**{"DATALOADER.NUM_WORKERS": workers}), max_bad_files=100)
    with pytest.raises((ValueError, RuntimeError), match=rf"{path}(.|\n)*99 \("):
        steps(loader, 5)


class KilledMapper:
    """Kills its own process, as the kernel does when memory runs out."""

    def __call__(self, dataset_dict, rng):
        assert torch.utils.data.get_worker_info() is not None, "would kill the tests"
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_gives_cause_and_remedy(root):
    loader = build_train_loader(config(**{"DATALOADER.NUM_WORKERS": 1}), mapper=KilledMapper())
    with pytest.raises(LoaderWorkerError, match=r"(?s)memory ran out.*DATALOADER\.NUM_WORKERS \(now 1\).*shm"):
        steps(loader, 1)


class ThreadsMapper:
    """Tells how OpenCV is set up where it runs."""

    def __call__(self, dataset_dict, rng):
        return {"threads": cv2.getNumThreads()}


def test_workers_use_one_opencv_thread_each(root):
    loader = build_train_loader(config(**{"DATALOADER.NUM_WORKERS": 1}), mapper=ThreadsMapper())
    assert steps(loader, 1)[0][0]["threads"] <= 1


def test_empty_sets_are_refused_by_name(root, monkeypatch):
    cfg = config()
    cfg.DATASETS.TRAIN = ()
    with pytest.raises(ValueError, match=r"DATASETS\.TRAIN is empty"):
        build_train_loader(cfg)
    monkeypatch.setattr(DatasetCatalog, "get", lambda name: [])
    for build in (lambda: build_train_loader(config()), lambda: build_test_loader(config(), "loader_a_train")):
        with pytest.raises(ValueError, match=r"loader_a_train has no images"):
            build()


# ---- test time ----


@pytest.mark.parametrize("workers", [0, 2])
def test_test_loaders_give_every_image_once_in_order(root, workers):
    loader = build_test_loader(config(**{"DATALOADER.NUM_WORKERS": workers}), "loader_a_train")
    assert len(loader) == 5
    for _ in range(2):
        batches = list(loader)
        assert [len(b) for b in batches] == [1] * 5
        for (sample,), dataset_dict in zip(batches, DatasetCatalog.get("loader_a_train")):
            assert {k: sample[k] for k in dataset_dict} == dataset_dict
            assert sample["image"].shape == (3, 24, 32) and (sample["height"], sample["width"]) == (24, 32)


def test_test_images_are_shared_out_to_ranks(root, monkeypatch):
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    seen = []
    for rank in range(2):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        loader = build_test_loader(config(), "loader_a_train")
        part = [sample["image_id"] for (sample,) in loader]
        assert len(part) == len(loader)
        seen += part
    assert sorted(seen) == ["0", "1", "2", "3", "4"]


def test_a_broken_test_image_is_named(root):
    path = break_file(root / "loader_a" / "2.png")
    with pytest.raises(BadFileError, match=path):
        list(build_test_loader(config(), "loader_a_train"))
