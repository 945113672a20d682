"""The universal hierarchy: one tree of classes out of the label spaces of several datasets. numpy and yaml only.

Every class of every dataset is a set of universal classes (leaves of the taxonomy). Equal sets are one node, a set
inside another is a node below it, and each inner node owns a softmax over its children. What sets that overlap without
nesting become is our reading, because the paper's rule is not public: see :func:`build_nodes`.

Source: HTSS (2023) and its predecessor, "Training of Convolutional Networks on Multiple Heterogeneous Datasets for
Street Scene Semantic Segmentation" (IV 2018).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from .label_space import LabelSpace, stack_memberships
from .user_error import UserError
from .yaml_file import did_you_mean, read_yaml

__all__ = ["Hierarchy", "HierarchyError", "Node", "Step", "build_nodes", "read_nodes", "write_nodes"]

ROOT = "root"
Leaves = frozenset[int]


class HierarchyError(UserError, ValueError):
    """A hierarchy, or a dataset's place in it, contradicts itself."""


@dataclass(frozen=True)
class Node:
    """A set of universal classes with a place in the tree.

    Attributes:
        name: unique; that of the first class with this set, or "a | b | ..." for a node that no class stands for.
        leaves: universal ids that it covers.
        parent: name of the node above; "" for the root.
    """

    name: str
    leaves: Leaves
    parent: str


@dataclass(frozen=True)
class Step:
    """What one class says about one classifier: the answer is among these children.

    Attributes:
        classifier: index in :attr:`Hierarchy.classifiers`.
        children: indices of the classifier's children; one where the class decides, several where it is a union.
    """

    classifier: int
    children: tuple[int, ...]


class Hierarchy:
    """A tree of nodes, its classifiers, and the path of every (dataset, class).

    A node with two or more children owns a classifier over them and one void output. A dataset whose classes reach only
    one child of a node is left out of that node's classifier: it would teach it to answer that child everywhere.

    Args:
        nodes: the tree, in any order, with one root.
        spaces: label space of each dataset.
        weak: datasets without pixel labels (boxes, tags); the root never learns from them.

    Attributes:
        nodes: in depth-first order, the root first.
        classifiers: indices of the nodes that own a classifier, in order.
        children: for each classifier the indices of its children.
        paths: dataset -> for each class the :class:`Step` s from the root down.
        left_out: (dataset, classifier, children) where all that a dataset says is that the answer is among these.
        untrained: (classifier, child) that no dataset names: training never makes the model predict it.

    Raises:
        HierarchyError: not a tree (cycle, several roots, unknown parent), a node that covers nothing or more than its
            parent, or a class that covers nothing, here or of the nodes below the root.
    """

    def __init__(
        self,
        nodes: Sequence[Node],
        spaces: Mapping[str, LabelSpace],
        weak: Collection[str] = (),
        where: str = "hierarchy",
    ) -> None:
        self._where = where
        by_name = {node.name: node for node in nodes}
        if len(by_name) != len(nodes):
            doubles = sorted({n.name for n in nodes if [m.name for m in nodes].count(n.name) > 1})
            raise HierarchyError(f"{where}: names of nodes must be unique, these are not: {doubles}")
        self._check_parents(by_name)
        self.nodes = self._in_depth_first_order(by_name)
        self._index = {node.name: i for i, node in enumerate(self.nodes)}
        below: list[list[int]] = [[] for _ in self.nodes]
        for i, node in enumerate(self.nodes[1:], 1):
            below[self._index[node.parent]].append(i)
        self.classifiers = tuple(i for i, children in enumerate(below) if len(children) > 1)
        self.children = tuple(tuple(below[i]) for i in self.classifiers)
        self._below = below
        self.weak = frozenset(weak)
        self.paths: dict[str, tuple[tuple[Step, ...], ...]] = {}
        self.left_out: list[tuple[str, int, tuple[int, ...]]] = []
        self._place(spaces)
        self.untrained = self._untrained()

    @classmethod
    def build(cls, spaces: Mapping[str, LabelSpace], universal: Sequence[str], weak: Collection[str] = ()) -> Hierarchy:
        """The hierarchy of the datasets' label spaces, see :func:`build_nodes`.

        Where no dataset could teach a classifier, its node is made a leaf, or takes its grandchildren.

        Args:
            spaces: label space of each dataset.
            universal: names of the universal classes.
            weak: datasets without pixel labels.
        """
        nodes = build_nodes(spaces, universal)
        while True:
            tree = cls(nodes, spaces, weak)
            lost = {child for j, children in enumerate(tree.children) if tree.taught(j) == 0 for child in children}
            if not lost:
                return tree
            sets = [node.leaves for i, node in enumerate(tree.nodes) if i not in lost]
            nodes = _named(_without_only_children(sets), _class_names(spaces), universal)

    # ---- reading the tree ----

    def classifier_of(self, node: int) -> int:
        """Which classifier decides below a node; -1 for a leaf."""
        return self.classifiers.index(node) if node in self.classifiers else -1

    def parent_of(self, node: int) -> int:
        """Index of the node above; the root has none."""
        return self._index[self.nodes[node].parent]

    def taught(self, classifier: int) -> int:
        """How many datasets teach a classifier; weak ones do not teach the root's."""
        teachers = [
            dataset
            for dataset, paths in self.paths.items()
            if any(step.classifier == classifier for path in paths for step in path)
        ]
        at_root = self.classifiers[classifier] == 0
        return sum(not (at_root and dataset in self.weak) for dataset in teachers)

    def answers(self, space: LabelSpace) -> tuple[np.ndarray, tuple[int, ...]]:
        """What each node means in a dataset's own classes.

        A node inside a class is that class (the narrowest). A wider node is none: the decision below it tells.

        Returns:
            (nodes,) int64: local class id or -1 (void); and the ids of the classes that no leaf of the tree answers.
        """
        rows = [frozenset(np.flatnonzero(row).tolist()) for row in space.membership]
        table = np.full(len(self.nodes), -1, np.int64)
        for i, node in enumerate(self.nodes):
            holding = [c for c, row in enumerate(rows) if node.leaves <= row]
            if holding:
                table[i] = min(holding, key=lambda c: len(rows[c]))
        ends = {int(table[i]) for i, children in enumerate(self._below) if not children}
        return table, tuple(c for c in range(space.num_classes) if c not in ends)

    def standing_for(self, node: int) -> list[tuple[str, str]]:
        """(dataset, class) that a node is; none for a virtual node."""
        leaves = self.nodes[node].leaves
        return [
            (dataset, name)
            for dataset, rows in self._rows.items()
            for name, row in zip(self._classes[dataset], rows)
            if row == leaves
        ]

    def depth(self, node: int) -> int:
        """Number of nodes above."""
        return 0 if node == 0 else 1 + self.depth(self.parent_of(node))

    def lines(self) -> Iterator[str]:
        """The tree for reading: one line per node, with the classes that stand for it."""
        for i, node in enumerate(self.nodes):
            own = "" if i not in self.classifiers else f"  [{len(self._below[i])} + void]"
            classes = "; ".join(f"{dataset}: {name}" for dataset, name in self.standing_for(i)) or "no class: virtual"
            yield f"{'  ' * self.depth(i)}{node.name}{own}  ({classes})"

    def problems(self) -> Iterator[str]:
        """What a reader should know: who is left out of which classifier, and which children nobody teaches."""
        for dataset, classifier, children in self.left_out:
            node, known = self.nodes[self.classifiers[classifier]].name, [self.nodes[c].name for c in children]
            yield f"{dataset} is left out of the classifier {node!r}: it cannot tell {known} from the rest of it"
        for classifier, child in self.untrained:
            node = self.nodes[self.classifiers[classifier]].name
            yield f"no dataset teaches {self.nodes[child].name!r} to the classifier {node!r}"

    # ---- checks and construction ----

    def _check_parents(self, by_name: Mapping[str, Node]) -> None:
        for node in by_name.values():
            if not node.leaves:
                raise HierarchyError(f"{self._where}: node {node.name!r} covers no universal class")
            if node.parent and node.parent not in by_name:
                hint = did_you_mean(node.parent, by_name)
                raise HierarchyError(f"{self._where}: parent {node.parent!r} of {node.name!r} does not exist{hint}")
            seen, above = [node.name], node.parent
            while above:
                if above in seen:
                    raise HierarchyError(f"{self._where}: nodes contain themselves: {' > '.join([*seen, above])}")
                seen.append(above)
                above = by_name[above].parent
            if node.parent and not node.leaves <= by_name[node.parent].leaves:
                raise HierarchyError(f"{self._where}: {node.name!r} covers more than its parent {node.parent!r}")
        roots = [node.name for node in by_name.values() if not node.parent]
        if len(roots) != 1:
            raise HierarchyError(f"{self._where}: a tree has one root (a node without a parent), not {roots}")

    def _in_depth_first_order(self, by_name: Mapping[str, Node]) -> tuple[Node, ...]:
        children: dict[str, list[Node]] = {}
        for node in by_name.values():
            children.setdefault(node.parent, []).append(node)
        ordered, stack = [], list(children[""])
        while stack:
            node = stack.pop()
            ordered.append(node)
            stack += reversed(children.get(node.name, []))
        return tuple(ordered)

    def _place(self, spaces: Mapping[str, LabelSpace]) -> None:
        """Finds the path of every class, and leaves datasets out of classifiers of which they know one child only."""
        self._rows = dict(zip(spaces, _leaf_sets(spaces, self._where)))
        self._classes = {dataset: space.classes for dataset, space in spaces.items()}
        everything = self.nodes[0].leaves
        below = frozenset().union(*(self.nodes[i].leaves for i in self._below[0])) or everything
        for dataset, rows in self._rows.items():
            for name, row in zip(self._classes[dataset], rows):
                if not row <= everything:
                    raise HierarchyError(f"{self._where}: class {name!r} of {dataset!r} lies outside the root")
                if not (row <= below or row == everything):
                    raise HierarchyError(
                        f"{self._where}: class {name!r} of {dataset!r} lies in no node below the root, or in part "
                        "only, so that no classifier would learn it: add a node that covers it"
                    )
            steps = [self._steps(row) for row in rows]
            reached: dict[int, set[tuple[int, ...]]] = {}
            for step in (s for path in steps for s in path):
                reached.setdefault(step.classifier, set()).add(step.children)
            alone = {j: next(iter(sets)) for j, sets in reached.items() if len(sets) == 1}
            self.left_out += [(dataset, j, tuple(self.children[j][k] for k in ks)) for j, ks in sorted(alone.items())]
            self.paths[dataset] = tuple(tuple(s for s in path if s.classifier not in alone) for path in steps)

    def _steps(self, leaves: Leaves) -> list[Step]:
        steps: list[Step] = []
        for node in self._chain(leaves):
            children = self._below[node]
            if leaves >= self.nodes[node].leaves or not children:
                break
            touching = [k for k, child in enumerate(children) if leaves & self.nodes[child].leaves]
            exact = [k for k in touching if children[k] in self._on_way(leaves)]
            chosen = exact or touching
            covered = frozenset().union(*(self.nodes[children[k]].leaves for k in chosen)) if chosen else frozenset()
            if leaves <= covered and len(chosen) < len(children) and len(children) > 1:
                steps.append(Step(self.classifiers.index(node), tuple(chosen)))
        return steps

    def _on_way(self, leaves: Leaves) -> set[int]:
        """The nodes from the root to the one with exactly these leaves; empty where there is none."""
        for i, node in enumerate(self.nodes):
            if node.leaves == leaves:
                way = {i}
                while node.parent:
                    way.add(self._index[node.parent])
                    node = self.nodes[self._index[node.parent]]
                return way
        return set()

    def _chain(self, leaves: Leaves) -> Iterator[int]:
        """The nodes that hold all of these leaves, from the root down."""
        way = self._on_way(leaves)
        node: int | None = 0
        while node is not None:
            yield node
            inside = [c for c in self._below[node] if leaves <= self.nodes[c].leaves]
            node = next((c for c in inside if c in way), inside[0] if inside else None)

    def _untrained(self) -> list[tuple[int, int]]:
        named = {
            (step.classifier, self.children[step.classifier][k])
            for dataset, paths in self.paths.items()
            for path in paths
            for step in path
            for k in step.children
            if not (step.classifier == 0 and self.classifiers[0] == 0 and dataset in self.weak)
        }
        pairs = [(j, child) for j, children in enumerate(self.children) for child in children]
        return [pair for pair in pairs if pair not in named]


def build_nodes(spaces: Mapping[str, LabelSpace], universal: Sequence[str]) -> list[Node]:
    """Nodes out of the classes of several datasets.

    1. Classes with equal sets are one node.
    2. A class that overlaps others without nesting, and whose common and own parts are classes of some dataset, is no
       node: it is the union of these, and teaches that the answer is among them. If nobody separates the parts, the
       overlapping classes stay, as alternatives.
    3. Classes that overlap, directly or through others, lie below one node, made where no class stands for it.
    4. The parent of a node is its smallest strict superset.
    5. A node with one child only is a leaf for us, or takes the child's children: nothing tells the two apart.

    Args:
        spaces: label space of each dataset.
        universal: names of the universal classes.

    Returns:
        The nodes; the first is the root.
    """
    names = _class_names(spaces)
    sets = list(names)
    partners = {s: [t for t in sets if s & t and s - t and t - s] for s in sets}
    kept = [s for s in sets if not (partners[s] and _has_parts(s, partners[s], sets))]
    kept += [g for g in _groups(partners) if g not in kept]
    everything = frozenset().union(*sets)
    kept = [everything] + [s for s in dict.fromkeys(kept) if s != everything]
    kept = _without_only_children(kept)
    return _named(kept, names, universal)


def _class_names(spaces: Mapping[str, LabelSpace]) -> dict[Leaves, str]:
    """Every distinct class -> its first name, with the dataset where another class has taken the name."""
    names: dict[Leaves, str] = {}
    for (dataset, space), rows in zip(spaces.items(), _leaf_sets(spaces, "label spaces")):
        for name, row in zip(space.classes, rows):
            if row not in names:
                names[row] = f"{name} ({dataset})" if name in names.values() else name
    return names


def _leaf_sets(spaces: Mapping[str, LabelSpace], where: str) -> list[list[Leaves]]:
    result = []
    for (dataset, space), matrix in zip(spaces.items(), stack_memberships(list(spaces.values()))):
        rows = [frozenset(np.flatnonzero(row).tolist()) for row in matrix]
        empty = [name for name, row in zip(space.classes, rows) if not row]
        if empty:
            raise HierarchyError(
                f"{where}: classes of {dataset!r} cover no universal class: {empty}. Give them a place in the taxonomy "
                "or `covers` in the dataset's spec."
            )
        result.append(rows)
    return result


def _has_parts(s: Leaves, partners: Sequence[Leaves], sets: Sequence[Leaves]) -> bool:
    """Whether both what ``s`` shares with each partner and what it does not are unions of classes."""
    return all(_is_union(part, sets) for other in partners for part in (s & other, s - other))


def _is_union(part: Leaves, sets: Sequence[Leaves]) -> bool:
    return frozenset().union(*(s for s in sets if s <= part)) == part


def _groups(partners: Mapping[Leaves, Sequence[Leaves]]) -> list[Leaves]:
    """Union of each set of classes that are linked by overlaps."""
    groups, seen = [], set()
    for start in partners:
        if start in seen or not partners[start]:
            continue
        members, stack = set(), [start]
        while stack:
            s = stack.pop()
            if s not in members:
                members.add(s)
                stack += partners[s]
        seen |= members
        groups.append(frozenset().union(*members))
    return groups


def _parent(s: Leaves, sets: Sequence[Leaves]) -> Leaves | None:
    above = [t for t in sets if s < t]
    return min(above, key=len) if above else None


def _without_only_children(sets: list[Leaves]) -> list[Leaves]:
    while True:
        parents = [_parent(s, sets) for s in sets]
        alone = {s for s, parent in zip(sets, parents) if parent is not None and parents.count(parent) == 1}
        if not alone:
            return sets
        sets = [s for s in sets if s not in alone]


def _named(sets: Sequence[Leaves], names: Mapping[Leaves, str], universal: Sequence[str]) -> list[Node]:
    largest = max(sets, key=len)
    chosen = {s: names.get(s) or (ROOT if s == largest else _listing(s, universal)) for s in sets}
    return [Node(chosen[s], s, chosen[p] if (p := _parent(s, sets)) is not None else "") for s in sets]


def _listing(leaves: Leaves, universal: Sequence[str]) -> str:
    """Name of a node that no class stands for; unique, as it says its smallest members and how many there are."""
    members = [universal[u] for u in sorted(leaves)]
    return " | ".join(members[:3]) + (f" | ... ({len(members)})" if len(members) > 3 else "")


def write_nodes(nodes: Sequence[Node], universal: Sequence[str]) -> str:
    """The text of a hierarchy file: name -> parent and the universal classes that it covers; made to be edited."""
    content = {n.name: {"parent": n.parent, "covers": [universal[u] for u in sorted(n.leaves)]} for n in nodes}
    return yaml.safe_dump({"nodes": content}, sort_keys=False, width=120, allow_unicode=True)


def read_nodes(path: str | Path, universal: Sequence[str]) -> list[Node]:
    """Nodes of a hierarchy file.

    Raises:
        HierarchyError: another form, or universal classes that the taxonomy does not have.
    """
    content = read_yaml(path, HierarchyError)
    nodes = content.get("nodes") if isinstance(content, dict) and set(content) == {"nodes"} else None
    if not isinstance(nodes, dict) or not nodes:
        raise HierarchyError(f"{path}: the one top-level key is `nodes`: name -> {{parent, covers}}")
    index = {name: u for u, name in enumerate(universal)}
    result = []
    for name, entry in nodes.items():
        if not isinstance(entry, dict) or set(entry) != {"parent", "covers"}:
            raise HierarchyError(f"{path}: node {name!r} needs `parent` and `covers`, and nothing else")
        if not isinstance(entry["covers"] or [], list):
            raise HierarchyError(f"{path}: node {name!r}: `covers` is a list of universal classes")
        for concept in entry["covers"] or ():
            if not isinstance(concept, str) or concept not in index:
                hint = did_you_mean(str(concept), universal)
                raise HierarchyError(f"{path}: node {name!r} covers {concept!r}, no universal class{hint}")
        leaves = frozenset(index[c] for c in entry["covers"] or ())
        result.append(Node(str(name), leaves, str(entry["parent"] or "")))
    return result
