"""YAML files and key=value overrides -> frozen dataclasses, with errors in the config's own names."""

import copy
import difflib
import re
from collections.abc import Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import IntegerNode, OmegaConf
from omegaconf.errors import OmegaConfBaseException

CONFIGS = Path(__file__).parent
T = TypeVar("T")
_NUMBER = re.compile(r"[+-]?\d[\d_]*(\.\d*)?([eE][+-]?\d+)?")


def config_names(group: str) -> list[str]:
    """Names of the files in configs/<group>/, without suffix, sorted."""
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def find_config(group: str, name_or_path: str) -> Path:
    """The file behind a name in configs/<group>/ or a path to a YAML file.

    Raises:
        ValueError: no such name or file; the message lists the names that exist and the nearest one.
    """
    named = CONFIGS / group / f"{name_or_path}.yaml"
    if named.is_file():
        return named
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path
    names = config_names(group)
    folder = " (that is a folder)" if name_or_path and path.is_dir() else ""
    raise ValueError(
        f"no {group} config named {name_or_path!r}{folder}: neither a YAML file nor one of {', '.join(names)}."
        + _nearest(name_or_path, names)
    )


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that must hold a mapping.

    Raises:
        ValueError: the file is unreadable, no YAML, or something else than a mapping.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path} is not readable as YAML: {' '.join(str(error).split())}") from None
    if content is not None and not isinstance(content, dict):
        raise ValueError(f"{path} must hold `key: value` lines, found a {type(content).__name__}.")
    return content or {}


def load_config(schema: type[T], group: str, name_or_path: str, overrides: Sequence[str] = ()) -> T:
    """Build the dataclass `schema` from its defaults, a YAML file, then `key=value` overrides, in that order.

    Raises:
        ValueError: an unknown file or key, or a value of the wrong type or out of range, named as the user wrote it.
    """
    path = find_config(group, name_or_path)
    merged = _merge(_editable(schema), read_yaml(path), str(path))
    return _built(_override(merged, overrides))


def override_config(config: T, overrides: Sequence[str]) -> T:
    """A built config with `key=value` overrides; errors as `load_config`."""
    return _built(_override(_editable(config), overrides))


def merge_config(config: T, differences: dict[str, Any], origin: str) -> T:
    """A built config with some of its keys changed; `origin` names the place of the change in errors.

    Raises:
        ValueError: as `load_config`.
    """
    return _built(_merge(_editable(config), differences, origin))


def _built(node: Any) -> Any:
    try:
        return OmegaConf.to_object(node)
    except OmegaConfBaseException as error:  # an entry without a value that it needs
        raise ValueError(f"{getattr(error, 'full_key', '') or ''}: {_first_line(error)}") from None


def _override(merged: Any, overrides: Sequence[str]) -> Any:
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key:
            raise ValueError(f"{override!r} is not an override: write key=value, for example execution.workers=2.")
        try:
            change = OmegaConf.to_container(OmegaConf.from_dotlist([override]))
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            raise ValueError(f"{override!r} is not readable as key=value: {_first_line(error)}") from None
        assert isinstance(change, dict)
        merged = _merge(merged, change, f"{override!r}")
    return merged


def _merge(base: Any, change: dict[str, Any], origin: str) -> Any:
    _check_keys(base, change, origin, prefix="")
    change = {key: _whole_numbers(base._get_node(key), value) for key, value in change.items()}
    try:
        base = copy.deepcopy(base)
        return OmegaConf.merge(base, _set_elements(base, change))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", "") or ""
        raise ValueError(f"{origin}: {key}: {_first_line(error)}") from None


def _check_keys(base: Any, change: dict[str, Any], origin: str, prefix: str) -> None:
    for key, value in change.items():
        known = [str(name) for name in base]
        if key not in known:
            where = f"in {prefix.rstrip('.')!r}" if prefix else "at the top"
            raise ValueError(
                f"{origin}: unknown key {prefix + str(key)!r}; known {where}: {', '.join(known)}."
                + _nearest(str(key), known)
            )
        child = base._get_node(key)
        if OmegaConf.is_dict(child) and OmegaConf.get_type(child) not in (dict, None):
            if not isinstance(value, dict):
                raise ValueError(f"{origin}: {prefix}{key} is a section; set one of its keys: {', '.join(child)}.")
            _check_keys(child, value, origin, f"{prefix}{key}.")
        else:
            _check_kind(child, value, f"{origin}: {prefix}{key}")


def _check_kind(node: Any, value: Any, key: str) -> None:
    """Entries by name where a setting has some, a list where it is one; each a section where those are sections."""
    if not OmegaConf.is_config(node):
        return
    if OmegaConf.is_dict(node) and not isinstance(value, dict):
        raise ValueError(f"{key} holds entries by name, {{name: ...}}; found {_said(value)}.")
    if OmegaConf.is_list(node) and not isinstance(value, list):
        raise ValueError(f"{key} is a list, [...]; found {_said(value)}.")
    if is_dataclass(node._metadata.element_type):
        for name, entry in value.items() if isinstance(value, dict) else enumerate(value):
            if not isinstance(entry, dict):
                raise ValueError(f"{key}.{name} is a section, {{key: value}}; found {_said(entry)}.")


def _said(value: Any) -> str:
    return f"a list, {value}" if isinstance(value, list) else f"{value!r}"


def _whole_numbers(node: Any, value: Any) -> Any:
    """The same value, but whole numbers as ints (`1e4`, `10000.0`, `65_536`) where a setting is one."""
    if isinstance(node, IntegerNode):
        return _whole_number(value)
    if not OmegaConf.is_config(node):
        return value
    element = node._metadata.element_type
    # Of an entry that is not there yet, its schema's node; what is neither typed nor there is left alone.
    new = _editable(element) if is_dataclass(element) else IntegerNode() if element is int else None
    if isinstance(value, dict) and OmegaConf.is_dict(node):
        return {key: _whole_numbers(node._get_node(key) if key in node else new, v) for key, v in value.items()}
    if isinstance(value, list) and OmegaConf.is_list(node):
        return [_whole_numbers(new, entry) for entry in value]
    return value


def _whole_number(value: Any) -> Any:
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        value = float(value)  # a word to YAML, which wants a dot before the exponent
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _set_elements(base: Any, change: dict[str, Any]) -> dict[str, Any]:
    """Set the entries of typed dicts and lists in `base`; returns what is left of `change`.

    OmegaConf makes such entries read-only, as frozen dataclasses are, and then refuses to fill them itself.
    """
    left: dict[str, Any] = {}
    for key, value in change.items():
        child = base._get_node(key)
        kind = OmegaConf.get_type(child) if OmegaConf.is_config(child) else None
        element = child._metadata.element_type if kind in (dict, list) else None
        if is_dataclass(element) and isinstance(value, dict) and kind is dict:
            for name, entry in value.items():
                child[name] = _element(element, child._get_node(name), entry)
        elif is_dataclass(element) and isinstance(value, list) and kind is list:
            base[key] = [_element(element, None, entry) for entry in value]
        elif is_dataclass(kind) and isinstance(value, dict):
            left[key] = _set_elements(child, value)
        else:
            left[key] = value
    return left


def _element(schema: Any, present: Any, change: Any) -> Any:
    node = _editable(schema) if present is None else copy.deepcopy(present)
    return OmegaConf.merge(node, change)


def _editable(config: Any) -> Any:
    """The node of a dataclass or of one of its objects."""
    node = OmegaConf.structured(config)
    OmegaConf.set_readonly(node, False)
    _writable(node)
    return node


def _writable(config: Any) -> None:
    """Frozen dataclasses become read-only nodes, which OmegaConf will not merge into."""
    for key in config:
        child = config._get_node(key)
        if OmegaConf.is_config(child):
            OmegaConf.set_readonly(child, False)
        if OmegaConf.is_dict(child):
            _writable(child)


def _nearest(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
