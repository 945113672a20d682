"""Reading config files: safe YAML only, `_BASE_` files, and errors that say which key was meant."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode, get_cfg

from ..config import add_multiseg_config
from ..user_error import ConfigError
from ..yaml_file import did_you_mean, read_yaml

__all__ = ["default_config", "load_config"]

_BASE_KEY = "_BASE_"


def default_config() -> CfgNode:
    """Detectron2's default config with this project's keys."""
    cfg = get_cfg()
    add_multiseg_config(cfg)
    return cfg


def load_config(path: str = "", overrides: Sequence[str] = ()) -> CfgNode:
    """Reads a config file over the defaults, then the ``KEY VALUE`` pairs of the command line.

    Unlike Detectron2's ``merge_from_file``, which evaluates Python expressions in YAML tags, nothing in a file is run.
    ``OUTPUT_DIR`` follows from the config's path where nobody sets it: ``configs/cdcl/cs_bdd_r18.yaml`` writes to
    ``./output/cdcl/cs_bdd_r18``, a file outside any folder ``configs`` to ``./output/<its name>``.

    Args:
        path: a YAML file; its ``_BASE_`` names one file or a list of them, relative to itself. "" for none.
        overrides: ``["SOLVER.BASE_LR", "0.02", ...]``.

    Returns:
        An unfrozen config.

    Raises:
        ConfigError: a file that cannot be read or that asks for Python objects, a key that does not exist (with the
            likely one), a value of the wrong type.
    """
    cfg = default_config()
    if path:
        cfg.OUTPUT_DIR = _output_dir(Path(path))
        _merge(cfg, _read_with_bases(Path(path).expanduser(), ()), path)
    _merge_overrides(cfg, list(overrides))
    return cfg


def _output_dir(path: Path) -> str:
    """Where a config's run is written: one folder per config, so that two runs never share their metrics."""
    parts = path.expanduser().resolve().with_suffix("").parts
    below = parts[len(parts) - parts[::-1].index("configs") :] if "configs" in parts[:-1] else parts[-1:]
    return "./" + "/".join(("output", *below))


def _read_with_bases(path: Path, below: tuple[Path, ...]) -> dict[str, Any]:
    """The content of ``path`` over the contents of its bases; ``below`` are the files that led here."""
    if path.resolve() in below:
        raise ConfigError(f"{path}: is its own base: {' -> '.join(str(p) for p in (*below, path.resolve()))}")
    try:
        content = read_yaml(path, ConfigError) or {}
    except ConfigError as problem:
        raise ConfigError(f"{problem}{_tuple_hint(path)}") from problem.__cause__
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a config is a mapping of keys, not a {type(content).__name__}")
    bases = content.pop(_BASE_KEY, [])
    merged: dict[str, Any] = {}
    for base in [bases] if isinstance(bases, str) else bases:
        base_path = path.parent / Path(base).expanduser()
        _update(merged, _read_with_bases(base_path, (*below, path.resolve())))
    unknown = list(_unknown_keys(content, default_config()))
    if unknown:
        raise ConfigError(f"{path}: " + "; ".join(unknown))
    _update(merged, content)
    return merged


def _update(target: dict[str, Any], source: dict[str, Any]) -> None:
    for key, value in source.items():
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            _update(target[key], value)
        else:
            target[key] = value


def _flat_keys(node: CfgNode, prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        yield prefix + key
        if isinstance(value, CfgNode):
            yield from _flat_keys(value, f"{prefix}{key}.")


def _tuple_hint(path: Path) -> str:
    """YAML's ``{...}`` ends a plain text at a comma, so that a tuple in it falls apart."""
    in_braces = path.is_file() and re.search(r"\{[^}\n]*:\s*\(", path.read_text(encoding="utf-8", errors="replace"))
    return ". Inside {...} write a list, [a, b], instead of a tuple, (a, b)" if in_braces else ""


def _unknown_keys(content: dict[str, Any], node: CfgNode, prefix: str = "") -> Iterator[str]:
    """One message per key of ``content`` that ``node`` does not have."""
    torn = [key for key, value in content.items() if isinstance(value, str) and re.match(r"\([^)]*$", value)]
    for key, value in content.items():
        if key in torn:
            yield f"{prefix}{key}: a tuple falls apart inside {{...}}: write a list, [a, b], instead of (a, b)"
        elif torn and value is None and str(key).endswith(")"):
            continue  # what was behind the comma
        elif key not in node:
            yield f"there is no key {prefix}{key}{_suggestion(f'{prefix}{key}')}"
        elif isinstance(node[key], CfgNode) and isinstance(value, dict):
            yield from _unknown_keys(value, node[key], f"{prefix}{key}.")
        elif isinstance(node[key], CfgNode):
            yield f"{prefix}{key} is a section, not a value (it was given {value!r})"
        elif isinstance(value, dict):
            yield f"{prefix}{key} is a value, not a section (it was given {value!r})"


def _suggestion(key: str) -> str:
    """The known key that was probably meant: the same name in another section, or a similar one."""
    known = list(_flat_keys(default_config()))
    leaf = key.rsplit(".", 1)[-1]
    elsewhere = [k for k in known if k.rsplit(".", 1)[-1] == leaf]
    if elsewhere:
        return f" (did you mean {', '.join(map(repr, elsewhere[:3]))}?)"
    section = key[: len(key) - len(leaf)]
    siblings = {k[len(section) :]: k for k in known if k.startswith(section) and "." not in k[len(section) :]}
    return did_you_mean(leaf, siblings)


def _merge(cfg: CfgNode, content: dict[str, Any], path: str) -> None:
    version = content.get("VERSION", cfg.VERSION)
    if version != cfg.VERSION:
        raise ConfigError(f"{path}: VERSION is {version!r}; this is a Detectron2 config of version {cfg.VERSION}")
    try:
        cfg.merge_from_other_cfg(CfgNode(_floats_where_floats_belong(content, cfg)))
    except (ValueError, AssertionError, TypeError) as problem:
        raise ConfigError(f"{path}: {problem}") from problem


def _floats_where_floats_belong(content: dict[str, Any], node: CfgNode) -> dict[str, Any]:
    """``BASE_LR: 1`` means 1.0; yacs would refuse the integer."""
    converted: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            converted[key] = _floats_where_floats_belong(value, node[key])
        elif isinstance(node[key], float) and type(value) is int:
            converted[key] = float(value)
        else:
            converted[key] = value
    return converted


def _merge_overrides(cfg: CfgNode, overrides: list[str]) -> None:
    for text in overrides:
        if text.startswith("--"):
            raise ConfigError(f"{text} must stand before the KEY VALUE pairs on the command line")
    if len(overrides) % 2:
        raise ConfigError(f"overrides are KEY VALUE pairs, but there is an odd number of them: {' '.join(overrides)}")
    known = set(_flat_keys(cfg))
    for key, text in zip(overrides[0::2], overrides[1::2], strict=True):
        if key not in known:
            raise ConfigError(f"command line: there is no key {key}{_suggestion(key)}")
        if isinstance(_value_at(cfg, key), CfgNode):
            raise ConfigError(f"command line: {key} is a section, not a value (it was given {text!r})")
        if isinstance(_value_at(cfg, key), float) and str(text).lstrip("+-").isdigit():
            text = str(float(text))
        try:
            cfg.merge_from_list([key, text])
        except (ValueError, AssertionError) as problem:
            raise ConfigError(f"command line: {key} {text}: {problem}") from problem


def _value_at(cfg: CfgNode, key: str) -> Any:
    node: Any = cfg
    for part in key.split("."):
        node = node[part]
    return node
