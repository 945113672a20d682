"""Which part may import which: parsed from the source, so that imports inside functions count as well."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "multiseg_d2"

#: Pure parts: torch, numpy, yaml and the standard library, and each other.
PURE = (
    "multiseg_d2.label_space",
    "multiseg_d2.taxonomy",
    "multiseg_d2.unified",
    "multiseg_d2.class_relations",
    "multiseg_d2.array_file",
    "multiseg_d2.atomic_file",
    "multiseg_d2.hierarchy",
    "multiseg_d2.json_file",
    "multiseg_d2.text_file",
    "multiseg_d2.user_error",
    "multiseg_d2.view_name",
    "multiseg_d2.yaml_file",
    "multiseg_d2.data.schedule",
    "multiseg_d2.modeling.interpolation",
    "multiseg_d2.modeling.threads",
    "multiseg_d2.modeling.losses",
    "multiseg_d2.evaluation.confusion",
)
#: Imported before everything, by the package itself.
FIRST = "multiseg_d2.compat"
PURE_LIBRARIES = {"torch", "numpy", "yaml"} | set(sys.stdlib_module_names)
#: Parts that a part must not import.
FORBIDDEN = {
    "multiseg_d2.data": ("multiseg_d2.modeling", "multiseg_d2.engine", "multiseg_d2.evaluation"),
    "multiseg_d2.toy": ("multiseg_d2.modeling", "multiseg_d2.engine", "multiseg_d2.evaluation"),
    "multiseg_d2.modeling": ("multiseg_d2.toy", "multiseg_d2.data", "multiseg_d2.engine", "multiseg_d2.evaluation"),
    "multiseg_d2.checkpoint": ("multiseg_d2.data", "multiseg_d2.engine", "multiseg_d2.evaluation"),
    "multiseg_d2.evaluation": ("multiseg_d2.modeling", "multiseg_d2.engine"),
    "multiseg_d2.config": ("multiseg_d2.data", "multiseg_d2.modeling", "multiseg_d2.engine", "multiseg_d2.evaluation"),
    "multiseg_d2.compat": ("multiseg_d2.data", "multiseg_d2.modeling", "multiseg_d2.engine", "multiseg_d2.evaluation"),
    "multiseg_d2": ("tools", "tests", "benchmarks", "train_net"),
}
#: What train_net.py may import beside the standard library.
ENTRY_POINT = ("multiseg_d2", "multiseg_d2.engine", "multiseg_d2.config")


def within(module: str, part: str) -> bool:
    return module == part or module.startswith(part + ".")


class _AtRunTime(ast.NodeTransformer):
    """Drops what only type checkers see."""

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        return node.orelse if ast.unparse(node.test).endswith("TYPE_CHECKING") else self.generic_visit(node)


def imports(source: str, module: str, is_package: bool, packages: set[str], at_run_time: bool = False) -> set[str]:
    """Full names of everything that ``source`` imports; ``from a import b`` gives ``a.b`` where that is a module."""
    found: set[str] = set()
    here = module.split(".") if is_package else module.split(".")[:-1]
    tree = ast.parse(source)
    for node in ast.walk(_AtRunTime().visit(tree) if at_run_time else tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            target = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{target}.{alias.name}"
                found.add(full if full in packages else target)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found.update(a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str))
    return found


def violations(module: str, imported: set[str]) -> list[str]:
    """The rules that ``module`` breaks by importing ``imported``."""
    broken = []
    for name in sorted(imported):
        if any(within(module, part) for part in PURE):
            pure = name.split(".")[0] in PURE_LIBRARIES or any(within(name, part) for part in (*PURE, FIRST))
            if not pure:
                broken.append(f"{module} imports {name}; it may only import torch, numpy, yaml and pure parts")
        if module == "train_net":
            ours_or_std = name in ENTRY_POINT or name.split(".")[0] in sys.stdlib_module_names
            if not (ours_or_std or within(name, "multiseg_d2.engine")):
                broken.append(f"{module} imports {name}; it may only import multiseg_d2.engine and multiseg_d2.config")
        for part, others in FORBIDDEN.items():
            if within(module, part) and any(within(name, other) for other in others):
                broken.append(f"{module} imports {name}; {part} must not")
    return broken


def modules() -> dict[str, Path]:
    """Every module of the package, and train_net: full name -> file."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = list(path.relative_to(ROOT).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found | {"train_net": ROOT / "train_net.py"}


def test_imports_respect_the_layers():
    table = modules()
    assert {"multiseg_d2.data.schedule", "multiseg_d2.label_space", "multiseg_d2.evaluation.confusion"} <= set(table)
    broken = []
    for module, path in table.items():
        if path.exists():
            broken += violations(module, imports(path.read_text(), module, path.name == "__init__.py", set(table)))
    assert not broken, "\n".join(broken)


def test_nothing_imports_in_a_circle():
    """Import cycles within the package hide which part is below which."""
    table = modules()
    graph = {}
    for module, path in table.items():
        if path.exists():
            found = imports(path.read_text(), module, path.name == "__init__.py", set(table), at_run_time=True)
            graph[module] = {name for name in found if name in table and name not in (module, PACKAGE)}
    graph.pop(PACKAGE)  # the package itself imports its public names at the end of its own import
    state: dict[str, int] = {}

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert state.get(module) != 1, " -> ".join([*trail[trail.index(module) :], module])
        if module not in state:
            state[module] = 1
            for name in sorted(graph.get(module, ())):
                visit(name, (*trail, module))
            state[module] = 2

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("multiseg_d2.data.mapper", "import multiseg_d2.modeling"),
        ("multiseg_d2.data.mapper", "from multiseg_d2.engine import Trainer"),
        ("multiseg_d2.data.mapper", "def f():\n    from ..modeling.batch import Batch"),
        ("multiseg_d2.data.mapper", "from .. import engine"),
        ("multiseg_d2.data.mapper", "import importlib\nimportlib.import_module('multiseg_d2.modeling.heads')"),
        ("multiseg_d2.modeling.heads.per_dataset", "from ...data.register import register_dataset"),
        ("multiseg_d2.evaluation.evaluator", "from ..modeling import segmentor"),
        ("multiseg_d2.data.schedule", "import detectron2"),
        ("multiseg_d2.modeling.losses.cross_entropy", "from ..batch import Batch"),
        ("multiseg_d2.label_space", "from PIL import Image"),
        ("train_net", "from multiseg_d2.data import register_dataset"),
        ("train_net", "import torch"),
    ],
)
def test_the_check_sees_each_form(module, source):
    known = set(modules()) | {"multiseg_d2.engine"}
    assert violations(module, imports(source, module, False, known))


def test_the_check_allows_what_it_should():
    known = set(modules())
    assert not violations("multiseg_d2.data.schedule", imports("import math\nimport numpy as np", "x.y", False, known))
    source = "from ..label_space import IGNORE\nfrom ..data.labels import read_label\nfrom . import confusion"
    module = "multiseg_d2.evaluation.evaluator"
    assert not violations(module, imports(source, module, False, known))
    assert not violations("train_net", {"multiseg_d2.engine", "multiseg_d2.config", "sys"})
