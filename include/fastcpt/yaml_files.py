"""Reads YAML files: ``3e-5`` is a number, and duplicate keys are errors.

The project reads every YAML file through ``read_yaml``. Plain YAML lets the last of two equal keys win, so a
section pasted twice would silently erase the first.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

MERGE = "tag:yaml.org,2002:merge"


class YamlError(ValueError):
    """The file is not usable YAML; the message names file, line and problem."""


class _Loader(yaml.SafeLoader):
    """A safe loader that reads ``3e-5`` as a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)$"),
    list("-+0123456789."),
)


def read_yaml(path: Path) -> Any:
    """The content of a YAML file. Raises ``YamlError``, or ``OSError`` if it cannot be read."""
    return read_yaml_lines(path)[0]


def read_yaml_lines(path: Path) -> tuple[Any, dict[tuple[str, ...], int]]:
    """The content of a YAML file, and the line (from 1) of each key by its path."""
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        if node is None:
            return None, {}
        _refuse_twice(node, loader, path.name, "", set())
        return loader.construct_document(node), _lines(node, (), set())
    except UnicodeDecodeError as error:
        raise YamlError(f"{path.name}: not UTF-8 text at byte {error.start}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{path.name}:{mark.line + 1}" if mark else path.name
        raise YamlError(f"{where}: not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise YamlError(f"{path.name}: not valid YAML: {error}") from error


def _refuse_twice(
    node: yaml.Node, loader: _Loader, file: str, section: str, above: set[int]
) -> None:
    """Raise ``YamlError`` if a mapping has a key twice; ``above``: the nodes seen before."""
    if id(node) in above:  # an alias
        return
    above.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_twice(item, loader, file, section, above)
    if not isinstance(node, yaml.MappingNode):
        return
    first: dict[Any, int] = {}
    for key, value in node.value:
        name = f"{section}{key.value}" if isinstance(key, yaml.ScalarNode) else section
        if isinstance(key, yaml.ScalarNode):
            # `yes` and `true` are the same key; merged keys (<<) may be overridden
            known = MERGE if key.tag == MERGE else loader.construct_object(key)
            line = key.start_mark.line + 1
            if known in first:
                raise YamlError(
                    f"{file}:{line}: the key '{name}' stands here again, first in line "
                    f"{first[known]}: put what belongs together under one, or delete one of them"
                )
            first[known] = line
        _refuse_twice(value, loader, file, f"{name}.", above)


def _lines(node: yaml.Node, path: tuple[str, ...], above: set[int]) -> dict[tuple[str, ...], int]:
    found: dict[tuple[str, ...], int] = {}
    if isinstance(node, yaml.MappingNode) and id(node) not in above:
        above.add(id(node))
        for key, value in node.value:
            here = (*path, str(key.value))
            found[here] = key.start_mark.line + 1
            found.update(_lines(value, here, above))
    return found
