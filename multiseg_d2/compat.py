"""Stand-ins for what Detectron2 needs but this machine lacks, installed before Detectron2 is first imported.

Nothing that is present and works is touched: a real torchvision, a compiled ``detectron2._C`` and an older Pillow stay
as they are. A stand-in can be imported and looked into, but *using* it raises :class:`MissingDependencyError` with the
name of what is missing and how to get it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types

__all__ = ["MissingDependencyError", "install", "stand_ins"]

#: Modules of torchvision that Detectron2's Python files import at the top level.
_TORCHVISION_MODULES = ("torchvision", "torchvision.ops", "torchvision.ops.boxes", "torchvision.transforms")
_HOW_TO_GET = {
    "torchvision": "install the torchvision release that matches your torch",
    "detectron2._C": "install a compiled Detectron2 (see its INSTALL.md)",
}
_PILLOW_NAMES = {"LINEAR": "BILINEAR", "CUBIC": "BICUBIC", "ANTIALIAS": "LANCZOS"}


class MissingDependencyError(ImportError):
    """A stand-in for a missing optional dependency was used."""


class _Missing:
    """Any attribute of a stand-in module: may be imported and named, not used."""

    def __init__(self, path: str, owner: str) -> None:
        self.__name__ = self.__qualname__ = path.rsplit(".", 1)[-1]
        self._path, self._owner = path, owner

    def _refuse(self, *_args, **_kwargs):
        raise MissingDependencyError(
            f"{self._path} was used, but {self._owner} is not available here: {_HOW_TO_GET[self._owner]}."
        )

    __call__ = _refuse

    def __mro_entries__(self, bases):
        return (_MissingBase,)

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Missing(f"{self._path}.{name}", self._owner)

    def __repr__(self) -> str:
        return f"<stand-in for missing {self._path}>"


class _MissingBase:
    """Base class of classes that were derived from a stand-in."""

    def __init__(self, *_args, **_kwargs):
        raise MissingDependencyError(f"{type(self).__name__} derives from a class that is not available here.")


class _StandInModule(types.ModuleType):
    """A module whose every attribute is a :class:`_Missing`."""

    __version__ = "0.0.0"

    def __init__(self, name: str, owner: str) -> None:
        super().__init__(name, doc=f"Stand-in for the missing module {name}.")
        self.__path__: list[str] = []
        self.__multiseg_stand_in__ = True
        self.__dict__["_owner"] = owner

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Missing(f"{self.__name__}.{name}", self.__dict__["_owner"])


def _works(module: str) -> bool:
    """Whether ``module`` can be imported; a half-working one (wrong build for this torch) counts as missing."""
    try:
        importlib.import_module(module)
    except Exception:  # a torchvision built for another torch raises RuntimeError or OSError, not ImportError
        for name in [n for n in sys.modules if n == module or n.startswith(module + ".")]:
            del sys.modules[name]
        return False
    return True


def _stand_in(name: str, owner: str) -> None:
    module = _StandInModule(name, owner)
    module.__spec__ = importlib.util.spec_from_loader(name, loader=None)
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], child, module)


def _install_pillow_names() -> None:
    from PIL import Image

    for old, new in _PILLOW_NAMES.items():
        if not hasattr(Image, old):
            setattr(Image, old, getattr(Image, new))


def install() -> None:
    """Makes ``import detectron2.*`` work here; safe to call any number of times.

    Raises:
        ImportError: Detectron2 itself is not installed.
    """
    if importlib.util.find_spec("detectron2") is None:
        raise ImportError(
            "Detectron2 is not installed. Run `make setup`, or install it as README.md (Installation) describes."
        )
    if "torchvision" not in sys.modules and not _works("torchvision"):
        for name in _TORCHVISION_MODULES:
            _stand_in(name, "torchvision")
    if "detectron2._C" not in sys.modules and not _works("detectron2._C"):
        _stand_in("detectron2._C", "detectron2._C")
    _install_pillow_names()


def stand_ins() -> list[str]:
    """Names of the stand-in modules in use, sorted."""
    return sorted(n for n, m in sys.modules.items() if getattr(m, "__multiseg_stand_in__", False))
