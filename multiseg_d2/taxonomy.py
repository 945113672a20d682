"""The universal taxonomy: which dataset class covers which universal classes. numpy and yaml only.

A taxonomy file is a directed acyclic graph of named concepts::

    concepts:
      road:        {parents: [ground], classes: {cityscapes: road, camvid: Road}}
      crosswalk:   {parents: [road], classes: {mapillary_vistas: Crosswalk - Plain}}

A class of a dataset stands for the concept it is listed under (for several concepts: for their union). The *universal
classes* are the leaves of the graph, and a dataset class covers the leaves below its concepts. So two classes are
equal, nested, overlapping or disjoint exactly as their leaf sets are.

``main`` of a concept names the concept below it that holds the most pixels, and through that one's own `main` a leaf.
The leaf with the most pixels of a wide concept also has the most of every narrower one that it is in: a `main` is said
once and holds for all classes inside; statements that contradict each other by this rule are an error. What holds for
one dataset only (and classes that stand for several concepts) has a second top-level key::

    main_of_classes:
      idd_level2: {2-wheeler: motorcycle}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .user_error import UserError
from .yaml_file import Place, did_you_mean, fields_of, list_of, mapping_of, read_yaml, text

__all__ = ["BY_NAME", "PACKAGED", "Concept", "Taxonomy", "TaxonomyError"]

#: The taxonomy of the packaged datasets.
PACKAGED = Path(__file__).resolve().parent / "data" / "taxonomy.yaml"
#: Taxonomies that have a name: the packaged one and MSeg's 194 classes.
BY_NAME = {"": PACKAGED, "packaged": PACKAGED, "mseg": PACKAGED.with_name("taxonomy_mseg.yaml")}


class TaxonomyError(UserError, ValueError):
    """A taxonomy, or a dataset's place in it, contradicts itself."""


@dataclass(frozen=True)
class Concept:
    """A node of the taxonomy.

    Attributes:
        parents: names of the concepts that contain this one.
        classes: dataset name -> names of its classes that mean this concept.
        main: the concept below this one that holds the most of its pixels, where a source says so; "" otherwise.
        note: for the reader.
    """

    parents: tuple[str, ...] = ()
    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    main: str = ""
    note: str = ""


class Taxonomy:
    """Concepts, their order, and the universal classes (leaves) in file order.

    Attributes:
        concepts: name -> :class:`Concept`.
        universal: the U leaf names; a taxonomy only ever grows at the end of this list (:meth:`extend`).
        by_name: True for a union by exact class name, in which every class is a universal class of its own name.
    """

    def __init__(
        self,
        concepts: Mapping[str, Concept],
        *,
        main_of_classes: Mapping[str, Mapping[str, str]] | None = None,
        by_name: bool = False,
        where: str = "taxonomy",
    ) -> None:
        self.concepts = dict(concepts)
        self.main_of_classes = dict(main_of_classes or {})
        self.by_name = by_name
        self._where = where
        children = self._children()
        self.universal = tuple(name for name in self.concepts if name not in children)
        self._index = {name: u for u, name in enumerate(self.universal)}
        self._leaves: dict[str, frozenset[int]] = {}
        for name in self.concepts:
            self._find_leaves(name, children, ())
        self._classes = self._classes_by_dataset()
        self._mains = self._stated_mains()

    @classmethod
    def load(cls, path: str | Path) -> Taxonomy:
        """Reads a taxonomy file.

        Raises:
            TaxonomyError: unknown keys or parents, cycles, doubled names, a ``main`` that is not below its concept or
                contradicts another.
        """
        content = read_yaml(path, TaxonomyError)
        given = _TOP(content, Place(str(path), error_type=TaxonomyError))
        return cls(given["concepts"], main_of_classes=given.get("main_of_classes", {}), where=str(path))

    @classmethod
    def exact_names(cls, vocabularies: Mapping[str, Sequence[str]]) -> Taxonomy:
        """Union by exact class name, sorted: two classes are the same if and only if their names are equal.

        Args:
            vocabularies: dataset name -> its class names.

        Source: UniSeg (ECCV 2022), unified label space.
        """
        names = sorted({name for classes in vocabularies.values() for name in classes})
        concepts = {n: Concept(classes={d: (n,) for d, c in vocabularies.items() if n in c}) for n in names}
        return cls(concepts, by_name=True, where="union by exact names")

    def extend(self, dataset: str, covers: Mapping[str, Sequence[str] | None]) -> Taxonomy:
        """Adds a dataset that the file does not list.

        Args:
            dataset: its name.
            covers: class name -> concepts that the class stands for. A plain name must exist; ``prefix/name`` is made,
                as a new leaf, if it does not. None: the class gets a leaf of its own, ``dataset/class`` (by exact name:
                its own name), because no meaning is guessed.

        Returns:
            A larger taxonomy; the leaves of this one keep their places.
        """
        concepts = dict(self.concepts)
        for name, given in covers.items():
            own = name if self.by_name else f"{dataset}/{name}"
            for concept in [own] if given is None or self.by_name else given:
                self._check_known(concept, dataset, name, made=concept == own or "/" in concept)
                old = concepts.get(concept, Concept())
                listed = old.classes.get(dataset, ())
                classes = {**old.classes, dataset: tuple(dict.fromkeys([*listed, name]))}
                concepts[concept] = Concept(old.parents, classes, old.main, old.note)
        return Taxonomy(concepts, main_of_classes=self.main_of_classes, by_name=self.by_name, where=self._where)

    def datasets(self) -> tuple[str, ...]:
        """Names of the datasets whose classes are listed."""
        return tuple(self._classes)

    def concepts_of(self, dataset: str, class_name: str) -> tuple[str, ...]:
        """Concepts that a class stands for.

        Raises:
            TaxonomyError: the class is not listed; near names are proposed.
        """
        known = self._classes.get(dataset, {})
        if class_name not in known:
            raise TaxonomyError(
                f"{self._where} does not list class {class_name!r} of {dataset!r}{did_you_mean(class_name, known)}. "
                "Add it there, or give the class `covers` in the dataset's spec."
            )
        return known[class_name]

    def leaves(self, concept: str) -> frozenset[int]:
        """Universal ids below (or equal to) a concept."""
        return self._leaves[concept]

    def meaning(self, covers: Mapping[str, Sequence[str] | None], dataset: str = "") -> np.ndarray:
        """What is known of classes, also of a dataset that is not listed; nothing is made up for what is not.

        Args:
            covers: class name -> concepts that the class stands for; None: nobody has said so.
            dataset: if it is listed, the taxonomy's word counts and not that of ``covers``.

        Returns:
            (C, U) bool: universal classes that each class covers; all False where that is not or only partly known.
        """
        if dataset in self._classes:
            return self.membership(dataset, list(covers))
        matrix = np.zeros((len(covers), len(self.universal)), bool)
        for row, concepts in zip(matrix, covers.values()):
            if concepts and all(concept in self._leaves for concept in concepts):
                row[sorted(frozenset().union(*(self._leaves[concept] for concept in concepts)))] = True
        return matrix

    def membership(self, dataset: str, classes: Sequence[str]) -> np.ndarray:
        """(C, U) bool: which universal classes each class covers.

        Raises:
            TaxonomyError: a class is not listed.
        """
        matrix = np.zeros((len(classes), len(self.universal)), bool)
        for row, name in zip(matrix, classes):
            for concept in self.concepts_of(dataset, name):
                row[sorted(self._leaves[concept])] = True
        return matrix

    def main_universal(self, dataset: str, classes: Sequence[str]) -> np.ndarray:
        """(C,) int64: universal id of each class's main content, -1 where no statement reaches it."""
        return np.array([self._main_of(dataset, name) for name in classes], np.int64)

    def _covered(self, dataset: str, class_name: str) -> frozenset[int]:
        return frozenset().union(*(self._leaves[c] for c in self.concepts_of(dataset, class_name)))

    def _main_of(self, dataset: str, class_name: str) -> int:
        """A leaf is its own main content; the class's own statement comes before that of a wider concept."""
        leaves = self._covered(dataset, class_name)
        if len(leaves) == 1:
            return next(iter(leaves))
        own = self.main_of_classes.get(dataset, {}).get(class_name)
        if own:
            return self._main_leaf(own, leaves, f"class {class_name!r} of {dataset!r}")
        return next((main for wide, main, _ in self._mains if main in leaves and leaves <= wide), -1)

    # ---- checks ----

    def _children(self) -> dict[str, list[str]]:
        children: dict[str, list[str]] = {}
        for name, concept in self.concepts.items():
            for parent in concept.parents:
                if parent not in self.concepts:
                    hint = did_you_mean(parent, self.concepts)
                    raise TaxonomyError(f"{self._where}: parent {parent!r} of {name!r} does not exist{hint}")
                children.setdefault(parent, []).append(name)
        return children

    def _find_leaves(self, name: str, children: Mapping[str, list[str]], path: tuple[str, ...]) -> frozenset[int]:
        if name in path:
            raise TaxonomyError(f"{self._where}: concepts contain themselves: {' > '.join([*path, name])}")
        if name not in self._leaves:
            below = [self._find_leaves(child, children, (*path, name)) for child in children.get(name, ())]
            self._leaves[name] = frozenset().union(*below) if below else frozenset([self._index[name]])
        return self._leaves[name]

    def _classes_by_dataset(self) -> dict[str, dict[str, tuple[str, ...]]]:
        found: dict[str, dict[str, tuple[str, ...]]] = {}
        for name, concept in self.concepts.items():
            for dataset, classes in concept.classes.items():
                for class_name in classes:
                    listed = found.setdefault(dataset, {})
                    listed[class_name] = (*listed.get(class_name, ()), name)
        return found

    def _stated_mains(self) -> list[tuple[frozenset[int], int, str]]:
        """(leaves of a concept, its main leaf, its name) of every `main`, checked for conflicts."""
        given = [(self._leaves[n], c.main, n) for n, c in self.concepts.items() if c.main]
        stated = [(leaves, self._main_leaf(main, leaves, f"concept {name!r}"), name) for leaves, main, name in given]
        for leaves, main, name in stated:
            for others, other, also in stated:
                if main != other and {main, other} <= leaves & others:
                    raise TaxonomyError(
                        f"{self._where}: concepts {name!r} and {also!r} share {self.universal[main]!r} and "
                        f"{self.universal[other]!r}, but each calls another of the two its main content"
                    )
        for dataset, mains in self.main_of_classes.items():
            self.main_universal(dataset, list(mains))
        return stated

    def _main_leaf(self, main: str, leaves: frozenset[int], what: str) -> int:
        """Follows `main` of a set of leaves down to a leaf."""
        if main not in self.concepts:
            raise TaxonomyError(
                f"{self._where}: main {main!r} of {what} does not exist{did_you_mean(main, self.concepts)}"
            )
        if main in self._index and self._index[main] in leaves:
            return self._index[main]
        if not self._leaves[main] < leaves:
            raise TaxonomyError(f"{self._where}: main {main!r} of {what} is not one of its parts")
        if not self.concepts[main].main:
            raise TaxonomyError(f"{self._where}: main {main!r} of {what} has parts, but no `main` of its own")
        return self._main_leaf(self.concepts[main].main, self._leaves[main], what)

    def _check_known(self, concept: str, dataset: str, class_name: str, made: bool) -> None:
        if concept not in self.concepts and not made:
            raise TaxonomyError(
                f"class {class_name!r} of {dataset!r} covers {concept!r}, which {self._where} does not have"
                f"{did_you_mean(concept, self.concepts)}. A new universal class is written with a prefix, as "
                f"'{dataset}/{concept}'."
            )


_CONCEPT = fields_of(
    {
        "parents": list_of(text),
        "classes": mapping_of(list_of(text, single=str)),
        **dict.fromkeys(("main", "note"), text),
    }
)
_TOP = fields_of(
    {
        "concepts": mapping_of(lambda content, place: Concept(**_CONCEPT({} if content is None else content, place))),
        "main_of_classes": mapping_of(mapping_of(text)),
    },
    required=("concepts",),
)
