"""The hierarchy: small cases by hand, invariants over the packaged datasets, files, and what is refused."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import yaml
from detectron2.data import MetadataCatalog

from multiseg_d2.hierarchy import Hierarchy, HierarchyError, Node, build_nodes, read_nodes, write_nodes
from multiseg_d2.label_space import LabelSpace, raw_to_local_table

UNIVERSAL = ("road", "marking", "sidewalk", "car", "van", "bus", "cat", "dog")
NINE = ["cityscapes", "bdd100k", "camvid", "idd", "mapillary_vistas", "coco_stuff", "sun_rgbd", "kitti", "wilddash2"]


def space(name: str, **classes: str) -> LabelSpace:
    """A label space whose classes cover the universal classes that are named."""
    membership = np.zeros((len(classes), len(UNIVERSAL)), bool)
    for row, members in zip(membership, classes.values()):
        row[[UNIVERSAL.index(m) for m in members.split()]] = True
    colors = np.arange(3 * len(classes), dtype=np.uint8).reshape(-1, 3)
    return LabelSpace(name, tuple(classes), colors, raw_to_local_table([[i] for i in range(len(classes))]), membership)


def build(*spaces: LabelSpace, weak=()) -> Hierarchy:
    return Hierarchy.build({s.name: s for s in spaces}, UNIVERSAL, weak)


def path_of(tree: Hierarchy, dataset: str, class_name: str) -> list[tuple[str, list[str]]]:
    """The path in names: (node that decides, the children that it may answer)."""
    local_id = tree._classes[dataset].index(class_name)
    return [
        (
            tree.nodes[tree.classifiers[s.classifier]].name,
            [tree.nodes[tree.children[s.classifier][k]].name for k in s.children],
        )
        for s in tree.paths[dataset][local_id]
    ]


COARSE = dict(street="road marking", sidewalk="sidewalk", vehicle="car van bus")
FINE = dict(road="road", marking="marking", sidewalk="sidewalk", car="car", van="van", bus="bus")


def test_nested_classes_are_a_path():
    tree = build(space("coarse", **COARSE), space("fine", **FINE))
    assert path_of(tree, "coarse", "street") == [("root", ["street"])]
    assert path_of(tree, "fine", "marking") == [("root", ["street"]), ("street", ["marking"])]
    assert path_of(tree, "fine", "sidewalk") == [("root", ["sidewalk"])]
    assert [tree.nodes[i].name for i in tree.classifiers] == ["root", "street", "vehicle"]
    assert tree.left_out == []
    assert tree.untrained == []


def test_equal_classes_are_one_node():
    tree = build(space("a", Auto="car", Bus="bus"), space("b", car="car", bus="bus"))
    assert [n.name for n in tree.nodes] == ["root", "Auto", "Bus"]
    assert path_of(tree, "b", "car") == [("root", ["Auto"])]


def test_an_overlap_whose_parts_are_classes_is_a_union():
    """`flat` and `walkable` share the sidewalk; a third dataset has the parts."""
    tree = build(
        space("a", flat="road sidewalk", bus="bus"),
        space("b", walkable="sidewalk marking", bus="bus"),
        space("c", road="road", sidewalk="sidewalk", marking="marking", bus="bus"),
    )
    assert "flat" not in [n.name for n in tree.nodes]
    (node,) = [n.name for n in tree.nodes[1:] if "|" in n.name]
    assert path_of(tree, "a", "flat")[0] == ("root", [node])
    assert path_of(tree, "c", "road") == [("root", [node]), (node, ["road"])]
    assert path_of(tree, "a", "bus") == [("root", ["bus"])]
    # all that a knows of this node is one union, so it is left out of the node's classifier
    assert path_of(tree, "a", "flat") == [("root", [node])]
    assert {dataset for dataset, _, _ in tree.left_out} == {"a", "b"}


def test_a_union_teaches_that_the_answer_is_among_its_parts():
    tree = build(
        space("a", flat="road sidewalk", marking="marking", bus="bus"),
        space("b", walkable="sidewalk marking", road="road", bus="bus"),
        space("c", road="road", sidewalk="sidewalk", marking="marking", bus="bus"),
    )
    (node,) = [n.name for n in tree.nodes[1:] if "|" in n.name]
    assert path_of(tree, "a", "flat") == [("root", [node]), (node, ["road", "sidewalk"])]
    assert path_of(tree, "b", "walkable") == [("root", [node]), (node, ["marking", "sidewalk"])]


def test_overlaps_that_nobody_separates_are_alternatives():
    tree = build(
        space("a", flat="road sidewalk", marking="marking", bus="bus"),
        space("b", walkable="sidewalk marking", road="road", bus="bus"),
    )
    names = [n.name for n in tree.nodes]
    assert "flat" in names
    assert "walkable" in names
    assert path_of(tree, "a", "flat")[-1][1] == ["flat"]
    assert path_of(tree, "b", "walkable")[-1][1] == ["walkable"]


def test_an_only_child_is_not_told_apart():
    """Only `fine` knows markings, and nothing else of the street: nobody could teach marking against the rest."""
    tree = build(space("coarse", street="road marking", bus="bus"), space("fine", marking="marking", bus="bus"))
    assert [n.name for n in tree.nodes] == ["root", "street", "bus"]
    assert path_of(tree, "fine", "marking") == [("root", ["street"])]


def test_a_dataset_with_one_child_is_left_out():
    tree = build(space("a", **FINE), space("b", car="car", road="road"), space("c", **COARSE))
    assert path_of(tree, "b", "car") == [("root", ["vehicle"])]
    listed = {(d, tree.nodes[tree.classifiers[j]].name, tree.nodes[ks[0]].name) for d, j, ks in tree.left_out}
    assert listed == {("b", "vehicle", "car"), ("b", "street", "road")}
    assert any("'b'" not in line and "b is left out" in line for line in tree.problems())


def test_the_root_is_not_taught_by_weak_datasets():
    strong = space("strong", street="road marking", vehicle="car van")
    weak = space("weak", car="car", van="van", cat="cat")
    tree = build(strong, weak, weak=["weak"])
    cat = [i for i, n in enumerate(tree.nodes) if n.name == "cat"]
    assert tree.untrained == [(0, cat[0])]
    assert build(strong, weak).untrained == []
    assert path_of(tree, "weak", "van") == [("root", ["vehicle"]), ("vehicle", ["van"])]


def test_a_classifier_that_nobody_teaches_is_not_built():
    tree = build(
        space("a", flat="road sidewalk", bus="bus"), space("b", walkable="sidewalk marking", bus="bus")
    )  # each has one of two alternatives
    assert [tree.nodes[i].name for i in tree.classifiers] == ["root"]
    assert all(tree.taught(j) for j in range(len(tree.classifiers)))


def test_answers_in_another_label_space():
    tree = build(space("fine", **FINE), space("coarse", **COARSE))
    table, missing = tree.answers(space("asked", driveable="road marking", car="car", animal="cat dog"))
    by_name = {node.name: int(table[i]) for i, node in enumerate(tree.nodes)}
    assert by_name["street"] == by_name["road"] == by_name["marking"] == 0
    assert by_name["car"] == 1
    assert by_name["van"] == by_name["vehicle"] == by_name["sidewalk"] == by_name["root"] == -1
    assert missing == (2,)


def test_of_classes_in_each_other_a_node_is_the_narrowest():
    tree = build(space("fine", **FINE), space("coarse", **COARSE))
    for asked in ({"vehicle": "car van", "car": "car"}, {"car": "car", "vehicle": "car van"}):
        table, _ = tree.answers(space("asked", **asked))
        found = {node.name: list(asked)[table[i]] for i, node in enumerate(tree.nodes) if table[i] >= 0}
        assert found["car"] == "car" and found["van"] == "vehicle"


@pytest.fixture(scope="module")
def nine():
    entries = [n for n in MetadataCatalog.list() if hasattr(MetadataCatalog.get(n), "label_space")]
    spaces = {}
    for name in entries:
        metadata = MetadataCatalog.get(name)
        if metadata.dataset in NINE:
            spaces.setdefault(metadata.dataset, metadata.label_space)
            universal = metadata.universal_classes
    assert sorted(spaces) == sorted(NINE)
    return {name: spaces[name] for name in NINE}, universal


def test_nine_datasets_build_one_hierarchy(nine):
    spaces, universal = nine
    tree = Hierarchy.build(spaces, universal)
    distinct = {row.tobytes() for s in spaces.values() for row in s.membership}
    assert 30 <= len(tree.classifiers) < len(tree.nodes) <= len(distinct) + 20
    assert all(tree.taught(j) for j in range(len(tree.classifiers)))
    for j, i in enumerate(tree.classifiers):  # siblings share no leaf, unless they are alternatives
        for a, b in itertools.combinations(tree.children[j], 2):
            shared = tree.nodes[a].leaves & tree.nodes[b].leaves
            assert not shared or not (tree.nodes[a].leaves < tree.nodes[b].leaves), tree.nodes[i].name


def test_the_page_says_how_large_these_trees_are(nine):
    page = " ".join((Path(__file__).parents[1] / "docs" / "methods" / "htss.md").read_text(encoding="utf-8").split())
    spaces, universal = nine
    tree = Hierarchy.build(spaces, universal)
    sets = {row.tobytes() for s in spaces.values() for row in s.membership}
    size = f"{len(tree.nodes)} nodes and {len(tree.classifiers)} classifiers ({len(tree.left_out)} times)"
    assert f"nine real datasets ({len(sets)} different sets of leaves) {size}" in page
    toys = {n: MetadataCatalog.get(f"toy_{n}_train").label_space for n in ("day", "dusk", "rain", "box", "tag")}
    tree = Hierarchy.build(toys, universal, weak=("box", "tag"))
    times = f"({len(tree.left_out)} times a dataset is left out)"
    assert f"{len(tree.nodes)} nodes and {len(tree.classifiers)} classifiers {times}" in page


def test_paths_of_nine_datasets_say_what_the_classes_say(nine):
    """The children that a path allows hold the whole class, and the ones that it excludes nothing of it."""
    spaces, universal = nine
    tree = Hierarchy.build(spaces, universal)
    for dataset, label_space in spaces.items():
        for local_id, row in enumerate(label_space.membership):
            leaves = set(np.flatnonzero(row).tolist())
            for step in tree.paths[dataset][local_id]:
                children = tree.children[step.classifier]
                allowed = set().union(*(tree.nodes[children[k]].leaves for k in step.children))
                assert leaves <= allowed, (dataset, label_space.classes[local_id])
                excluded = [tree.nodes[c].leaves for k, c in enumerate(children) if k not in step.children]
                alternatives = any(e & allowed for e in excluded)
                assert alternatives or not any(e & leaves for e in excluded), (dataset, label_space.classes[local_id])


def test_no_dataset_of_the_nine_teaches_a_classifier_one_answer(nine):
    spaces, universal = nine
    tree = Hierarchy.build(spaces, universal)
    for dataset, paths in tree.paths.items():
        answers: dict[int, set] = {}
        for step in itertools.chain(*paths):
            answers.setdefault(step.classifier, set()).add(step.children)
        assert all(len(a) > 1 for a in answers.values()), dataset
    assert tree.left_out  # there are such pairs, so the rule did something


def test_the_file_can_be_written_edited_and_read(tmp_path):
    spaces = {s.name: s for s in (space("fine", **FINE), space("coarse", **COARSE))}
    tree = Hierarchy.build(spaces, UNIVERSAL)
    path = tmp_path / "hierarchy.yaml"
    path.write_text(write_nodes(tree.nodes, UNIVERSAL))
    again = Hierarchy(read_nodes(path, UNIVERSAL), spaces, where=str(path))
    assert again.nodes == tree.nodes
    assert again.paths == tree.paths
    text = path.read_text().replace("parent: vehicle", "parent: street", 1)
    path.write_text(text)
    with pytest.raises(HierarchyError, match=r"hierarchy.yaml: 'car' covers more than its parent 'street'"):
        Hierarchy(read_nodes(path, UNIVERSAL), spaces, where=str(path))


@pytest.mark.parametrize(
    ("node", "change", "message"),
    [
        ("street", {"parent": "road"}, "nodes contain themselves: street > road > street"),
        ("root", {"parent": "road"}, "nodes contain themselves: root > road > street > root"),
        ("road", {"parent": "road"}, "nodes contain themselves: road > road"),
        ("car", {"covers": []}, "node 'car' covers no universal class"),
        ("car", {"covers": None}, "node 'car' covers no universal class"),
        ("sidewalk", None, "class 'sidewalk' of 'fine' lies in no node below the root"),
    ],
)
def test_an_edited_file_that_is_no_tree_is_refused(node, change, message, tmp_path):
    """Cycles, also through the root, and nodes or classes that cover nothing; the file is named."""
    spaces = {s.name: s for s in (space("fine", **FINE), space("coarse", **COARSE))}
    content = yaml.safe_load(write_nodes(Hierarchy.build(spaces, UNIVERSAL).nodes, UNIVERSAL))
    if change is None:
        del content["nodes"][node]
    else:
        content["nodes"][node] |= change
    path = tmp_path / "tree.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(HierarchyError, match=f"tree.yaml: {message}"):
        Hierarchy(read_nodes(path, UNIVERSAL), spaces, where=str(path))


def test_printed_tree():
    lines = list(build(space("fine", **FINE), space("coarse", **COARSE)).lines())
    assert lines[0].startswith("root  [3 + void]")
    assert "    car  (fine: car)" in lines
    assert len(lines) == 9


ALL = frozenset(range(len(UNIVERSAL)))


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([Node("a", ALL, "b"), Node("b", ALL, "a")], "contain themselves: a > b > a"),
        ([Node("a", ALL, "a")], "contain themselves: a > a"),
        ([Node("root", ALL, ""), Node("a", frozenset([0]), "b"), Node("b", frozenset([0]), "a")], "contain themselves"),
        ([Node("root", ALL, ""), Node("a", frozenset([0]), "rot")], "did you mean 'root'"),
        ([Node("root", ALL, ""), Node("other", ALL, "")], "one root"),
        ([Node("root", ALL, ""), Node("a", frozenset(), "root")], "covers no universal class"),
        ([Node("root", ALL, ""), Node("root", ALL, "root")], "unique"),
        ([Node("root", frozenset([1, 2]), "")], "lies outside the root"),
    ],
)
def test_refused_trees(nodes, message):
    with pytest.raises(HierarchyError, match=message):
        Hierarchy(nodes, {"fine": space("fine", **FINE)})


def test_a_class_that_covers_nothing_is_named():
    with pytest.raises(HierarchyError, match=r"'odd' cover no universal class: \['nothing'\]"):
        build_nodes({"odd": space("odd", nothing="", car="car")}, UNIVERSAL)


def test_files_of_another_form(tmp_path):
    path = tmp_path / "tree.yaml"
    for text, message in [
        ("nodes: {}", "top-level key"),
        ("nodes: {a: {parent: ''}}", "'a' needs `parent` and `covers`"),
        ("nodes: {a: {parent: '', covers: [raod]}}", "did you mean 'road'"),
    ]:
        path.write_text(text)
        with pytest.raises(HierarchyError, match=message):
            read_nodes(path, UNIVERSAL)
