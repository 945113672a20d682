"""Stand-ins for what Detectron2 needs but this machine lacks, installed before Detectron2 is first imported.

Nothing that is present and works is touched: a real torchvision, a compiled ``detectron2._C`` and an older Pillow stay
as they are. A stand-in can be imported and looked into, but *using* it raises :class:`MissingDependencyError` with the
name of what is missing and how to get it.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import logging
import sys
import types

logger = logging.getLogger(__name__)

__all__ = ["MissingDependencyError", "install", "stand_ins"]

_HOW_TO_GET = {
    "torchvision": "install the torchvision release that matches your torch",
    "detectron2._C": "install a compiled Detectron2 (see its INSTALL.md)",
}
_PILLOW_NAMES = {"LINEAR": "BILINEAR", "CUBIC": "BICUBIC", "ANTIALIAS": "LANCZOS"}


class MissingDependencyError(ImportError):
    """A stand-in for a missing optional dependency was used."""


class _Missing:
    """Any attribute of a stand-in module: may be imported and named, not used."""

    def __init__(self, path: str, module: _StandInModule) -> None:
        self.__name__ = self.__qualname__ = path.rsplit(".", 1)[-1]
        self.__module__ = module.__name__
        self._path, self._module = path, module

    def _refuse(self, *_args, **_kwargs):
        raise self._module.refusal(self._path)

    __call__ = _refuse

    def __mro_entries__(self, bases):
        module, path = self._module, self._path

        class _Base:  # a class derived from a stand-in may be defined, not instantiated
            def __init__(self, *_args, **_kwargs):
                raise module.refusal(f"{path}, a base class of {type(self).__name__},")

        return (_Base,)

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Missing(f"{self._path}.{name}", self._module)

    def __repr__(self) -> str:
        return f"<stand-in for missing {self._path}>"


class _StandInModule(types.ModuleType):
    """A module whose every attribute is a :class:`_Missing`."""

    __version__ = "0.0.0"
    __path__: tuple[str, ...] = ()  # lets `import torchvision.ops` find the stand-ins below it

    def __init__(self, name: str, owner: str, reason: str) -> None:
        super().__init__(name, doc=f"Stand-in for the missing module {name}.")
        self.__dict__.update(_owner=owner, _reason=reason)

    def refusal(self, used: str) -> MissingDependencyError:
        """The error that using ``used`` raises."""
        owner, reason = self.__dict__["_owner"], self.__dict__["_reason"]
        return MissingDependencyError(
            f"{used} was used, but {owner} is not available here ({reason}). To get it: {_HOW_TO_GET[owner]}."
        )

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Missing(f"{self.__name__}.{name}", self)


def _why_not(module: str) -> str | None:
    """Why ``module`` cannot be imported, or None where it can; a half-working one (built for another torch) cannot."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a torchvision built for another torch raises RuntimeError or OSError, not ImportError
        for name in [n for n in sys.modules if n == module or n.startswith(module + ".")]:
            del sys.modules[name]
        if isinstance(error, ModuleNotFoundError) and error.name == module:
            return "it is not installed"
        reason = f"importing it raised {type(error).__name__}: {error}"
        logger.warning("%s is installed but does not work here (%s); a stand-in takes its place", module, reason)
        return reason
    return None


class _StandInFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the submodules of stand-ins, whichever are asked for: other libraries import more than Detectron2 does."""

    def find_spec(self, name, path=None, target=None):
        parent = sys.modules.get(name.rpartition(".")[0])
        return importlib.util.spec_from_loader(name, self) if isinstance(parent, _StandInModule) else None

    def create_module(self, spec):
        parent = sys.modules[spec.name.rpartition(".")[0]]
        return _StandInModule(spec.name, parent.__dict__["_owner"], parent.__dict__["_reason"])

    def exec_module(self, module):
        module.__path__ = ()


def _stand_in_unless_works(module: str) -> None:
    if module in sys.modules:  # the real one, or our stand-in from an earlier call
        return
    reason = _why_not(module)
    if reason is None:
        return
    made = sys.modules[module] = _StandInModule(module, module, reason)
    made.__spec__ = importlib.util.spec_from_loader(module, loader=None)
    parent, _, child = module.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], child, made)
    if not any(isinstance(finder, _StandInFinder) for finder in sys.meta_path):
        sys.meta_path.append(_StandInFinder())


def _answer_version_queries() -> None:
    """Lets Detectron2's environment report (part of ``default_setup``) ask the stand-in how it was compiled."""
    module = sys.modules["detectron2._C"]
    if isinstance(module, _StandInModule):
        module.get_compiler_version = module.get_cuda_version = lambda: "none: not compiled"
        module.has_cuda = lambda: False


def _install_pillow_names() -> None:
    if not _installed("PIL"):  # Detectron2 says so itself where it needs it
        return
    from PIL import Image

    for old, new in _PILLOW_NAMES.items():
        if not hasattr(Image, old):
            setattr(Image, old, getattr(Image, new))


def _installed(package: str) -> bool:
    if package in sys.modules:
        return True
    spec = importlib.util.find_spec(package)
    # A folder without __init__.py (a clone of the repository in the current folder) is no installed package.
    return spec is not None and spec.origin is not None


def install() -> None:
    """Makes ``import detectron2.*`` work here; safe to call any number of times.

    Raises:
        ImportError: Detectron2 itself is not installed.
    """
    if not _installed("detectron2"):
        raise ImportError(
            "Detectron2 is not installed. Run `make setup`, or install it as README.md (Installation) describes."
        )
    _stand_in_unless_works("torchvision")
    _stand_in_unless_works("detectron2._C")
    _answer_version_queries()
    _install_pillow_names()


def stand_ins() -> list[str]:
    """Names of the stand-in modules in use, sorted."""
    return sorted(name for name, module in sys.modules.items() if isinstance(module, _StandInModule))
