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
            hint = (
                " A pattern of files is one argument: put it in quotes." if "/" in override or "." in override else ""
            )
            raise ValueError(f"{override!r} is not an override: write key=value, for example seed=1.{hint}")
        try:
            change = OmegaConf.to_container(OmegaConf.from_dotlist([override]))
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            raise ValueError(f"{override!r} is not readable as key=value: {_first_line(error)}") from None
        assert isinstance(change, dict)
        merged = copy.deepcopy(merged)
        if not _drop_named(merged, key.split("."), change, f"{override!r}"):
            merged = _merge(merged, change, f"{override!r}")
    return merged


def _drop_named(base: Any, path: list[str], change: dict[str, Any], origin: str) -> bool:
    """Take out of `base` what an override replaces or drops; whether that is all there is to do.

    A mapping of free names (`phases`, `data.datasets`) is written whole by `KEY={...}`, and loses an entry by
    `KEY.NAME=null`. Sections have fixed keys: there a value in braces changes some of them.
    """
    value: Any = change
    parent, node = None, base
    for depth, name in enumerate(path):
        value = value.get(name) if isinstance(value, dict) else None
        is_last, names = depth == len(path) - 1, list(node) if OmegaConf.is_dict(node) else []
        is_field = parent is not None and is_dataclass(OmegaConf.get_type(parent))  # not a mapping inside `phases`
        if is_field and OmegaConf.get_type(node) is dict and name not in names:
            untyped = node._metadata.element_type is Any
            if (is_last and value is None) or (untyped and not is_last):
                where = ".".join(path[:depth])
                raise ValueError(
                    f"{origin}: {where} has no {name!r}; it has {', '.join(names) or 'none'}."
                    + _nearest(name, names)
                    + (f" Write {where}.{name}={{...}} to add one." if untyped and not is_last else "")
                )
        if name not in names:
            return False
        child = node._get_node(name)
        if is_last and is_field and OmegaConf.get_type(node) is dict and value is None:
            del node[name]
            return True
        if is_last and isinstance(value, dict) and OmegaConf.is_dict(child) and OmegaConf.get_type(child) is dict:
            for entry in list(child):
                del child[entry]
        parent, node = node, child
    return False


def _merge(base: Any, change: dict[str, Any], origin: str) -> Any:
    change = _whole_lists(base, change, origin, prefix="")
    _check_keys(base, change, origin, prefix="")
    change = {key: _whole_numbers(base._get_node(key), value) for key, value in change.items()}
    try:
        base = copy.deepcopy(base)
        return OmegaConf.merge(base, _set_elements(base, change))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", "") or ""
        raise ValueError(f"{origin}: {key}: {_first_line(error)}") from None


def _whole_lists(base: Any, change: dict[str, Any], origin: str, prefix: str) -> dict[str, Any]:
    """Changes of single entries of lists (`filters.0.min_side_px=20`) -> those lists, whole, with the change."""
    result: dict[str, Any] = {}
    for key, value in change.items():
        child = base._get_node(key) if key in base else None
        if OmegaConf.is_list(child) and isinstance(value, dict):
            entries = OmegaConf.to_container(child)
            assert isinstance(entries, list)
            for index, entry in value.items():
                if not str(index).isdecimal() or int(index) >= len(entries):
                    last = f"it has the entries 0 to {len(entries) - 1}" if entries else "it is empty"
                    raise ValueError(
                        f"{origin}: {prefix}{key} is a list, and {index!r} names none of its entries: {last}. To "
                        f"replace it whole, write {prefix}{key}=[...]."
                    )
                old = entries[int(index)]
                both = isinstance(old, dict) and isinstance(entry, dict)
                entries[int(index)] = OmegaConf.to_container(OmegaConf.merge(old, entry)) if both else entry
            result[key] = entries
        elif OmegaConf.is_dict(child) and isinstance(value, dict):
            result[key] = _whole_lists(child, value, origin, f"{prefix}{key}.")
        else:
            result[key] = value
    return result


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
        kinds = {dict: ("mapping", "{}"), list: ("list", "[]")}
        kind = OmegaConf.get_type(child) if OmegaConf.is_config(child) else None
        if kind in kinds and not isinstance(value, kind):
            what, none = kinds[kind]
            example = f" write {prefix}{key}=[{value}], or" if kind is list and value is not None else " write"
            raise ValueError(f"{origin}: {prefix}{key} is a {what}, found {value!r};{example} {none} for none.")
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
        return whole_number(value)
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


def whole_number(value: Any) -> Any:
    """The value as an int where it is a whole number (`1e4`, `10000.0`, `65_536`), also as text; else unchanged."""
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
