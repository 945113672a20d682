"""Measured relations beside the taxonomy's, their picture, crops and taxonomy lines."""

from __future__ import annotations

import numpy as np
import pytest
import yaml

from multiseg_d2.class_relations import NEGATIVE, NULL, POSITIVE
from multiseg_d2.evaluation.relations_report import compare, example_crops, graph_picture, taxonomy_lines
from multiseg_d2.taxonomy import PACKAGED, Taxonomy

CLASSES = ("bicyclist", "rider", "car", "pole")


def relations(*pairs: tuple[int, int], null: tuple[tuple[int, int], ...] = ()) -> np.ndarray:
    matrix = np.full((4, 4), NEGATIVE, np.int8)
    np.fill_diagonal(matrix, POSITIVE)
    for pair in null:
        matrix[pair] = NULL
    for pair in pairs:
        matrix[pair] = POSITIVE
    return matrix


def test_comparison_sorts_every_relation():
    measured = relations((0, 1), (0, 3), (3, 2))
    stated = relations((0, 1), (2, 1), (1, 2), null=((3, 2),))
    result = compare(measured, stated, np.array([5, 0, 5, 5]))  # no rider was seen: nothing of it is missing
    assert result.confirmed == ((0, 1),) and result.missing == ((2, 1),)
    assert result.contradicted == ((0, 3),) and result.new == ((3, 2),)
    text = "\n".join(result.lines(CLASSES))
    assert "contradicted: 1\n    bicyclist -> pole" in text and "new: 1\n    pole -> car" in text


def test_the_graph_has_an_arrow_per_relation():
    """Every relation adds ink; none at all is a picture, too."""
    few, many = relations((0, 1)), relations((0, 1), (2, 3), (3, 1))
    ink = [int((graph_picture(CLASSES, {"a": m}) < 250).any(2).sum()) for m in (relations(), few, many)]
    assert ink[0] < ink[1] < ink[2]
    coloured = graph_picture(CLASSES, {"a": few, "b": relations((2, 3))})
    assert len(np.unique(coloured.reshape(-1, 3), axis=0)) > len(
        np.unique(graph_picture(CLASSES, {"a": few}).reshape(-1, 3), axis=0)
    )


def test_crops_show_the_class(toy_root):
    crops = example_crops("toy_day_train", [0, 12], number=2, size=48)  # road, car
    assert set(crops) == {0, 12}
    for picture in crops.values():
        assert picture.shape == (48, 96, 3) and picture.dtype == np.uint8
        assert (picture[:, :48] == (255, 255, 0)).all(2).any() or picture[:, :48].std() > 1  # outlined
    assert example_crops("toy_day_train", [], number=2) == {}


def test_a_line_makes_the_relation(tmp_path):
    """Replacing a concept's line in the file by the printed one puts its leaves inside the wider class."""
    taxonomy = Taxonomy.load(PACKAGED)
    inner, outer = ("mapillary_vistas", "Trailer"), ("cityscapes", "truck")
    (concept,), (parent,) = taxonomy.concepts_of(*inner), taxonomy.concepts_of(*outer)
    assert not taxonomy.leaves(concept) <= taxonomy.leaves(parent)
    (line,) = taxonomy_lines(taxonomy, inner, outer)
    content = yaml.safe_load(PACKAGED.read_text())
    (changed,) = yaml.safe_load(line).items()
    assert changed[0] == concept
    before, after = ({k: v for k, v in c.items() if k != "parents"} for c in (content["concepts"][concept], changed[1]))
    assert after == before
    content["concepts"][concept] = changed[1]
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    new = Taxonomy.load(tmp_path / "t.yaml")
    assert new.leaves(concept) <= new.leaves(parent)


def test_a_circle_is_refused():
    taxonomy = Taxonomy.load(PACKAGED)
    with pytest.raises(ValueError, match="circle"):
        taxonomy_lines(taxonomy, ("cityscapes", "rider"), ("mapillary_vistas", "Bicyclist"))
