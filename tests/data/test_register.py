"""Registration in Detectron2's catalogs."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import yaml
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog

import multiseg_d2
from multiseg_d2.data import register
from multiseg_d2.data.files import DatasetFilesError
from multiseg_d2.data.register import (
    RegistrationError,
    current_taxonomy,
    register_dataset,
    register_from_config,
    register_packaged,
    unregister_dataset,
    use_taxonomy,
)
from multiseg_d2.data.spec import SpecError, load_spec, packaged_specs
from multiseg_d2.label_space import EQUAL, IGNORE, LabelSpace, relation, stack_memberships
from multiseg_d2.taxonomy import PACKAGED, Taxonomy, TaxonomyError

CITY = {
    "name": "my_city",
    "classes": [{"name": "street", "raw": 1, "covers": ["road"]}, {"name": "fountain", "raw": 2}],
    "splits": {"train": {"images": "im/{id}.jpg", "labels": "gt/{id}.png"}, "test": {"images": "test/{id}.jpg"}},
}


@pytest.fixture(autouse=True)
def registry():
    """What a test registers is gone afterwards."""
    before = set(register._state.specs)
    yield
    for name in set(register._state.specs) - before:
        unregister_dataset(name)
    use_taxonomy("")


def write(folder, file="city.yaml", **changes):
    path = folder / file
    path.write_text(yaml.safe_dump({**CITY, **changes}, sort_keys=False))
    return path


def config(train=(), test=(), **datasets):
    cfg = get_cfg()
    multiseg_d2.add_multiseg_config(cfg)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = tuple(train), tuple(test)
    for key, value in datasets.items():
        cfg.DATASETS[key] = value
    return cfg


def space_of(entry) -> LabelSpace:
    return MetadataCatalog.get(entry).label_space


# ---- what an entry has ----


@pytest.mark.parametrize("name", packaged_specs())
def test_packaged_specs_are_registered_at_import(name):
    spec = load_spec(name)
    for split in spec.splits.values():
        assert f"{name}_{split.name}" in DatasetCatalog.list()
        metadata = MetadataCatalog.get(f"{name}_{split.name}")
        assert metadata.name == f"{name}_{split.name}"
        assert metadata.stuff_classes == [c.name for c in spec.classes]
        assert metadata.stuff_colors == [list(c.color) for c in spec.classes]
        assert metadata.ignore_label == IGNORE == 255
        assert metadata.evaluator_type == "multiseg_sem_seg"
        assert (metadata.dataset, metadata.split, metadata.annotation) == (spec.dataset, split.name, split.annotation)
        assert metadata.spec == spec
        space = metadata.label_space
        assert (space.name, space.classes) == (spec.dataset, spec.class_names)
        np.testing.assert_array_equal(space.raw_to_local, spec.raw_to_local)
        assert space.membership.any(1).all()  # every class means something


def test_registering_reads_nothing_below_the_data_root(tmp_path, monkeypatch):
    path = write(tmp_path)
    touched = []
    monkeypatch.setenv("DETECTRON2_DATASETS", "/no/such/root")
    for function in ("stat", "scandir", "listdir", "open"):
        real = getattr(os, function)
        monkeypatch.setattr(
            os, function, lambda p=".", *a, real=real, **k: (touched.append(str(p)), real(p, *a, **k))[1]
        )
    assert register_dataset(path) == ["my_city_train", "my_city_test"]
    register_packaged()
    monkeypatch.undo()
    assert not [p for p in touched if "/no/such/root" in p]


def test_data_root_is_read_when_data_are_loaded(tmp_path, monkeypatch):
    register_dataset(write(tmp_path))
    monkeypatch.setenv("DETECTRON2_DATASETS", "/no/such/root")
    with pytest.raises(DatasetFilesError, match="/no/such/root/im does not exist"):
        DatasetCatalog.get("my_city_train")
    for name in ("im/1.jpg", "gt/1.png", "test/9.jpg"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    (record,) = DatasetCatalog.get("my_city_train")
    assert record["sem_seg_file_name"] == f"{tmp_path}/gt/1.png" and record["entry"] == "my_city_train"
    assert [r["image_id"] for r in DatasetCatalog.get("my_city_test")] == ["9"]
    assert MetadataCatalog.get("my_city_test").annotation == "none"


def test_import_in_an_empty_folder(tmp_path):
    """No data root, no working directory of ours: `import multiseg_d2` registers, twice over, and runs on its own."""
    code = (
        "import multiseg_d2; from multiseg_d2.data.register import register_packaged; a = register_packaged(); "
        "from detectron2.data import DatasetCatalog; assert set(a) <= set(DatasetCatalog.list()); print(len(a))"
    )
    path = os.pathsep.join([os.path.dirname(os.path.dirname(multiseg_d2.__file__)), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "DETECTRON2_DATASETS": str(tmp_path / "absent")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == sum(len(load_spec(name).splits) for name in packaged_specs())


# ---- again, otherwise, in conflict ----


def test_registering_twice_changes_nothing(tmp_path):
    first = register_dataset(write(tmp_path))
    space = space_of("my_city_train")
    assert register_dataset(write(tmp_path, "copy.yaml")) == first  # same content, another file
    assert space_of("my_city_train") is space
    assert register_dataset("camvid") == ["camvid_train", "camvid_val", "camvid_test"]


def test_an_entry_removed_from_the_catalog_comes_back(tmp_path):
    path = write(tmp_path)
    register_dataset(path)
    DatasetCatalog.remove("my_city_train")
    register_dataset(path)
    assert "my_city_train" in DatasetCatalog.list()


def test_other_content_under_the_same_name(tmp_path):
    register_dataset(write(tmp_path))
    changed = write(tmp_path, ignore=[255])
    with pytest.raises(RegistrationError, match=r"'my_city' is registered already, .* unregister_dataset\('my_city'\)"):
        register_dataset(changed)
    assert space_of("my_city_train").raw_to_local[255] != IGNORE
    assert unregister_dataset("my_city") == ["my_city_train", "my_city_test"]
    assert "my_city_train" not in DatasetCatalog.list() and "my_city_train" not in MetadataCatalog.list()
    register_dataset(changed)
    assert space_of("my_city_train").raw_to_local[255] == IGNORE
    with pytest.raises(RegistrationError, match=r"no dataset spec 'my_citi' is registered \(did you mean 'my_city'"):
        unregister_dataset("my_citi")


def test_entry_names_that_are_taken(tmp_path):
    clash = write(tmp_path, name="camvid", extends="camvid")
    with pytest.raises(SpecError, match="the classes differ"):
        register_dataset(clash)
    other = {"name": "cam", "dataset": "cam", "splits": {"vid_train": CITY["splits"]["train"]}}
    with pytest.raises(RegistrationError, match="the entry 'cam_vid_train' is registered already, by other code"):
        DatasetCatalog.register("cam_vid_train", list)
        try:
            register_dataset(write(tmp_path, **other))
        finally:
            DatasetCatalog.remove("cam_vid_train")
    other = {"name": "bdd100k", "splits": {"x": CITY["splits"]["train"]}}
    with pytest.raises(RegistrationError, match="a dataset spec called 'bdd100k' is registered already"):
        register_dataset(write(tmp_path, **other))
    other = {"name": "camvid-x", "dataset": "x", "splits": {"train": CITY["splits"]["train"]}}
    register_dataset(write(tmp_path, **other))
    with pytest.raises(
        RegistrationError, match="the entry 'idd_level1_train' is registered already, by dataset spec 'idd_level1'"
    ):
        unregister_dataset("idd")
        try:
            register_dataset(write(tmp_path, name="idd", dataset="y", splits={"level1_train": CITY["splits"]["train"]}))
        finally:
            register_dataset("idd")


def test_one_dataset_has_one_list_of_classes(tmp_path):
    register_dataset(write(tmp_path))
    with pytest.raises(
        RegistrationError, match=r"'my_city' has, in the spec 'my_city', the classes \['street', 'fountain'\]"
    ):
        register_dataset(write(tmp_path, name="night", dataset="my_city", classes=list(reversed(CITY["classes"]))))
    register_dataset(write(tmp_path, name="night", dataset="my_city", ignore=[0]))  # other label files, same classes
    assert space_of("night_train").name == "my_city" and space_of("night_train").raw_to_local[0] == IGNORE


# ---- taxonomy ----


def test_classes_take_their_place_from_covers_or_get_one_of_their_own(tmp_path):
    before = current_taxonomy()
    register_dataset(write(tmp_path))
    after, space = current_taxonomy(), space_of("my_city_train")
    assert after.universal[: len(before.universal)] == before.universal
    names = [{after.universal[u] for u in np.flatnonzero(row)} for row in space.membership]
    assert names == [{before.universal[u] for u in before.leaves("road")}, {"my_city/fountain"}]
    assert space_of("cityscapes_train").membership.shape[1] == len(before.universal)  # untouched


def test_covers_of_nothing_that_exists(tmp_path):
    path = write(tmp_path, classes=[{"name": "street", "raw": 1, "covers": ["raod"]}])
    with pytest.raises(TaxonomyError, match="covers 'raod', which .* does not have .*'road'") as error:
        register_dataset(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "my_city_train" not in DatasetCatalog.list()
    register_dataset(write(tmp_path))  # nothing of the failed try is left


def test_unregistering_takes_universal_classes_along(tmp_path):
    before = current_taxonomy().universal
    register_dataset(write(tmp_path))
    register_dataset(write(tmp_path, name="other"))
    assert current_taxonomy().universal == (*before, "my_city/fountain", "other/fountain")
    unregister_dataset("my_city")
    assert current_taxonomy().universal == (*before, "other/fountain")
    (row,) = np.flatnonzero(space_of("other_train").membership[1])
    assert current_taxonomy().universal[row] == "other/fountain"
    register_dataset(
        write(tmp_path, classes=[{"name": "street", "raw": 1}])
    )  # other classes under the same name are fine now
    assert current_taxonomy().universal == (*before, "other/fountain", "my_city/street")


def test_covers_are_not_used_where_the_taxonomy_file_speaks(tmp_path, caplog):
    classes = [{"name": c.name, "raw": i, "covers": ["sky"]} for i, c in enumerate(load_spec("camvid").classes)]
    with pytest.raises(RegistrationError, match=r"or other `covers`\)"):
        register_dataset(write(tmp_path, name="cam", dataset="camvid", classes=classes))
    taxonomy = tmp_path / "taxonomy.yaml"
    taxonomy.write_text("concepts: {way: {classes: {my_city: street}}, water: {classes: {my_city: fountain}}}")
    register_from_config(config(["my_city_train"], SPECS=(str(write(tmp_path)),), TAXONOMY=str(taxonomy)))
    assert "`covers` is not used: the taxonomy file lists the classes of 'my_city'" in caplog.text
    np.testing.assert_array_equal(space_of("my_city_train").membership, np.eye(2, dtype=bool))


def test_exact_names_of_the_trained_datasets():
    """UniSeg's CIB: Cityscapes, IDD and BDD100K have 28 classes by name."""
    train = ("cityscapes_train", "idd_train", "bdd100k_train")
    register_from_config(config(train, ("kitti_train", "camvid_test"), TAXONOMY="exact_names"))
    union = sorted({name for entry in train for name in MetadataCatalog.get(entry).stuff_classes})
    assert len(union) == 28
    assert list(current_taxonomy().universal[:28]) == union
    for entry in (*train, "kitti_train"):
        space = space_of(entry)
        expected = np.array([[name == u for u in union] for name in space.classes])
        np.testing.assert_array_equal(space.membership[:, :28], expected)
        assert space.membership.sum() == len(space.classes)
    camvid = space_of("camvid_test")  # spelled otherwise: no name in common
    assert not camvid.membership[:, :28].any() and camvid.membership.any(1).all()


def test_switching_the_taxonomy_replaces_label_spaces_and_keeps_other_metadata(tmp_path):
    register_dataset(write(tmp_path))
    MetadataCatalog.get("camvid_train").my_own = "kept"
    packaged, held = space_of("camvid_train"), MetadataCatalog.get("camvid_train")
    use_taxonomy("exact_names", ["camvid_train"])
    assert space_of("camvid_train").membership.shape == (11, 11)
    assert MetadataCatalog.get("camvid_train").my_own == "kept"
    assert held.label_space is packaged  # who holds on to an old object keeps what it had
    use_taxonomy("exact_names", ["camvid_train", "kitti_train"])
    assert space_of("camvid_train").membership.shape[1] == 30
    use_taxonomy("")
    np.testing.assert_array_equal(*stack_memberships([packaged, space_of("camvid_train")]))
    again = space_of("camvid_train")
    use_taxonomy("")
    assert space_of("camvid_train") is again  # no change, nothing rebuilt
    MetadataCatalog.get("camvid_train").__dict__.pop("my_own")


def test_taxonomy_file_of_the_user(tmp_path):
    path = tmp_path / "taxonomy.yaml"
    path.write_text("concepts: {a: {classes: {my_city: [street, fountain]}}}")
    register_from_config(config(SPECS=(str(write(tmp_path)),), TAXONOMY=str(path)))
    assert current_taxonomy().universal[0] == "a"
    np.testing.assert_array_equal(space_of("my_city_train").membership[:, :1], [[True], [True]])
    assert space_of("kitti_train").membership.any(1).all()  # not in the file: classes of their own
    path.write_text("concepts: {a: {classes: {my_city: street}}}")
    kept = space_of("my_city_train")
    np.testing.assert_array_equal(kept.membership[:, 1:], False)
    with pytest.raises(TaxonomyError, match="does not list class 'fountain' of 'my_city'"):
        register_from_config(config(TAXONOMY=str(path)))
    assert space_of("my_city_train") is kept and current_taxonomy().universal[0] == "a"  # all or nothing


def test_covers_must_fit_a_taxonomy_file_only_where_they_are_used(tmp_path):
    path = tmp_path / "taxonomy.yaml"
    classes = list(load_spec("camvid_strict").class_names)
    path.write_text(yaml.safe_dump({"concepts": {"way": {"classes": {"camvid_strict": classes}}}}))
    register_dataset(write(tmp_path))  # covers: [road], which this file does not have
    register_from_config(config(["camvid_strict_train"], TAXONOMY=str(path)))
    assert {"my_city/street", "my_city/fountain"} <= set(current_taxonomy().universal)
    with pytest.raises(
        TaxonomyError, match="class 'street' of 'my_city' covers 'road', which .*taxonomy.yaml does not have"
    ):
        register_from_config(config(["camvid_strict_train"], ["my_city_train"], TAXONOMY=str(path)))


def test_used_datasets_come_first(tmp_path):
    register_dataset(write(tmp_path))
    use_taxonomy("exact_names", ["kitti_train"], ["my_city_train", "kitti_train"])
    assert current_taxonomy().universal[19:21] == ("street", "fountain")
    assert space_of("kitti_train").membership.shape == (19, 19)


# ---- config ----


def test_register_from_config(tmp_path):
    path = str(write(tmp_path))
    cfg = config(["my_city_train"], ["camvid_val", "my_city_test"], SPECS=(path, "idd_level2"))
    register_from_config(cfg)
    register_from_config(cfg)
    assert "my_city_train" in DatasetCatalog.list() and isinstance(space_of("my_city_train"), LabelSpace)
    reference = Taxonomy.load(PACKAGED)
    expected = reference.membership("camvid", space_of("camvid_val").classes)
    np.testing.assert_array_equal(space_of("camvid_val").membership[:, : len(reference.universal)], expected)


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (
            ["camvid_trian"],
            [],
            r"DATASETS.TRAIN: 'camvid_trian' is not registered with a label space \(did you mean 'camvid_train'",
        ),
        ([], ["my_city_train"], "DATASETS.TEST: 'my_city_train' is not registered with a label space.*DATASETS.SPECS"),
        (["coco_2017_train"], [], "DATASETS.TRAIN: 'coco_2017_train' is not registered with a label space"),
    ],
)
def test_names_in_the_config_that_nobody_registered(train, test, message):
    with pytest.raises(RegistrationError, match=message):
        register_from_config(config(train, test))


def test_mseg_as_the_taxonomy_of_a_config():
    """Label spaces in MSeg's 194 classes: Mapillary's parking is road; datasets that MSeg lacks bring their own."""
    register_from_config(config(["cityscapes_train", "mapillary_vistas_train"], ["idd_val"], TAXONOMY="mseg"))
    spaces = {name: MetadataCatalog.get(f"{name}_train").label_space for name in ("cityscapes", "mapillary_vistas")}
    codes = relation(spaces["cityscapes"], spaces["mapillary_vistas"])
    equal = {n for n, code in zip(spaces["mapillary_vistas"].classes, codes[0]) if code == EQUAL}
    assert spaces["cityscapes"].classes[0] == "road" and {"Road", "Parking", "Service Lane", "Pothole"} <= equal
    assert current_taxonomy().universal[:194][-1] == "window_blind"
    assert "wilddash2/egovehicle" in current_taxonomy().universal
    for name in ("packaged", ""):
        register_from_config(config(["cityscapes_train"], TAXONOMY=name))
        assert current_taxonomy().universal[0] == "road_surface"


@pytest.mark.parametrize("choice", ["exact_name", "nowhere/taxonomy.yaml"])
def test_a_taxonomy_that_is_not_there(choice):
    with pytest.raises(
        RegistrationError, match=rf"DATASETS.TAXONOMY: '{choice}' is none of .*mseg, exact_names, and no file"
    ):
        register_from_config(config(["camvid_train"], [], TAXONOMY=choice))
    assert current_taxonomy().by_name is False


def test_universal_classes_name_the_columns_of_the_membership():
    for name, covered in {
        "kitti_train": {"bicyclist", "motorcyclist"},
        "mapillary_vistas_train": {"motorcyclist"},
    }.items():
        meta = MetadataCatalog.get(name)
        assert len(meta.universal_classes) == meta.label_space.membership.shape[1]
        wanted = {"kitti_train": "rider", "mapillary_vistas_train": "Motorcyclist"}[name]
        row = meta.label_space.membership[meta.stuff_classes.index(wanted)]
        assert covered <= {u for u, inside in zip(meta.universal_classes, row) if inside}
