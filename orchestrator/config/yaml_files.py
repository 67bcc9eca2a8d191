"""Reads YAML files strictly, follows `extends` and applies --set overrides.

Shared by search spaces and clusters. Every line of a message says where (file and dotted key), what was found, what was expected.
"""

import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml

from orchestrator.config.messages import shown
from orchestrator.errors import ConfigError, did_you_mean

_IN_WHEEL = Path(__file__).resolve().with_name("shipped")
SHIPPED = _IN_WHEEL if _IN_WHEEL.is_dir() else Path(__file__).resolve().parents[2]
"""The folder that holds search_spaces/ and clusters/: within the package where a wheel was installed, else the checkout."""
MAX_DEPTH = 30
"""Most levels of nested mappings and lists, and most parts of a dotted key; no file of this project needs a third of it."""
_PLAIN_TAGS = ("null", "bool", "int", "float", "str", "seq", "map")


def find_file(name_or_path: str, pattern: str, kind: str) -> Path:
    """Return the file of a path, or of a name, which is looked up in the working directory and then in SHIPPED.

    pattern: path of a name, such as "search_spaces/{}.yaml".    kind: what to call it in a message.
    Raises: ConfigError if there is none, listing the names there are.
    """
    if name_or_path.endswith((".yaml", ".yml")):
        path = Path(name_or_path)
        if not _is_file(path):
            raise ConfigError(f"{kind} {name_or_path}: file not found (from {Path.cwd()})")
        return path
    for root in (Path.cwd(), SHIPPED):
        path = root / pattern.format(name_or_path)
        if _is_file(path):
            return path
    raise ConfigError(
        f"{kind} {name_or_path!r} is neither a .yaml file nor a name in {pattern.split('{')[0]}"
        f"{did_you_mean(name_or_path, _known_names(pattern))}"
    )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or has a null byte in it
        return False


def _known_names(pattern: str) -> list[str]:
    before, after = pattern.split("{}")
    found = [path for root in (Path.cwd(), SHIPPED) for path in (root / before).glob(f"**/*{Path(after).name}")]
    names = (path.as_posix().rpartition(before)[2].removesuffix(after) for path in found)
    return sorted(set(names))


def read_yaml(path: Path, source: str) -> dict[str, Any]:
    """Return the mapping that the file holds.

    source: what to call the file in a message.
    Raises: ConfigError, with the line, on a syntax error, a key given twice, or anything but a mapping on top.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{source}: cannot be read: {error}") from error
    content = load_yaml(text, source)
    if not isinstance(content, dict):
        raise ConfigError(f"{source}: found {shown(content)} on top, expected a mapping of keys to values")
    return content


def load_yaml(text: str, source: str) -> Any:
    """Return the content of a YAML text: mappings, lists, strings, numbers, true, false and null, as in JSON.

    source: what to call the text in a message.    Raises: ConfigError, with the line where it is known, for anything else.
    """
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: {_yaml_problem(error)}") from error
    except (ValueError, LookupError) as error:  # PyYAML raises them for values that do not fit their tag: !!int x
        raise ConfigError(f"{source}: a value is not what its tag or its digits say ({error})") from error


def read_extended(path: Path, source: str, descendants: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the mapping of a file, merged over that of the file which its key `extends` names, in the same folder, and so on.

    Mappings are merged key by key; a list or a value replaces what was there.
    descendants: the files that extend this one.    Raises: ConfigError as read_yaml, and for a circle.
    """
    content = read_yaml(path, source)
    name = content.pop("extends", None)
    if name is None:
        return content
    if not isinstance(name, str):
        raise ConfigError(f"{source}: extends: found {shown(name)}, expected a YAML file in the same folder")
    below = (*descendants, path.resolve())
    parent = path.parent / name
    if not _is_file(parent):
        raise ConfigError(f"{source}: extends: {parent} not found")
    if parent.resolve() in below:
        raise ConfigError(f"{source}: extends: {name} extends this file in turn")
    return _merged(read_extended(parent, f"{source} extends {name}", below), content)


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    both = {key: _merged(below[key], above[key]) for key in above if _are_mappings(below.get(key), above[key])}
    return {**below, **above, **both}


def _are_mappings(*values: object) -> bool:
    return all(isinstance(value, dict) for value in values)


def _is_text(value: str) -> bool:
    """Return whether the string can be encoded as UTF-8: half a surrogate pair, from a YAML escape or undecodable bytes, cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _tag(name: str) -> str:
    return f"tag:yaml.org,2002:{name}"


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader for what JSON can hold: a date stays text, 1e-3 is a number; duplicate keys and half characters are refused.

    It also refuses aliases, a few lines of which can expand to gigabytes, and deep nesting, for which the parser raises
    RecursionError.
    """

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Return the node; raises ComposerError for an alias (*name), or for one that is nested too deeply."""
        event = self.peek_event()
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(
                problem=f"found *{event.anchor}, expected the value itself", problem_mark=event.start_mark
            )
        if self.depth == MAX_DEPTH:
            raise yaml.composer.ComposerError(
                problem=f"nested deeper than {MAX_DEPTH} levels", problem_mark=event.start_mark
            )
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Return the number; raises ValueError for one with more digits than Python prints."""
        number = super().construct_yaml_int(node)
        str(number)  # raises; any number of hexadecimal digits can be read
        return number

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        """Return the string; raises ConstructorError if it holds half a character."""
        if isinstance(node.value, str) and not _is_text(node.value):
            raise yaml.constructor.ConstructorError(
                problem=f"{node.value!a} is not valid text: it holds half a character", problem_mark=node.start_mark
            )
        return super().construct_scalar(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Return the mapping; raises ConstructorError, with both lines, if a key is given twice."""
        lines: dict[str, int] = {}
        for key_node, _ in node.value:
            key, line = key_node.value, key_node.start_mark.line + 1
            if isinstance(key, str) and lines.setdefault(key, line) != line:
                problem = f"key {key!r} is given twice, first on line {lines[key]}"
                raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key_node.start_mark)
        return super().construct_mapping(node, deep)


_StrictLoader.yaml_constructors = {
    tag: construct
    for tag, construct in yaml.SafeLoader.yaml_constructors.items()
    if tag in (None, *map(_tag, _PLAIN_TAGS))
}


_StrictLoader.add_constructor(_tag("int"), _StrictLoader.construct_yaml_int)


_StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _tag("timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


# YAML 1.1, which PyYAML follows, requires a dot before the exponent, so 1e-3 would be a string.
_StrictLoader.add_implicit_resolver(_tag("float"), re.compile(r"^[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789"))


def _yaml_problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}: " if mark else ""
    return f"{where}{getattr(error, 'problem', None) or error}"


def apply_overrides(content: dict[str, Any], overrides: Sequence[str]) -> None:
    """Set the dotted keys of "a.b=value" in the mapping, in place; values are YAML, an index addresses a list.

    Raises: ConfigError if an override has no =, is not valid YAML, or leads through something that has no keys.
    """
    for override in overrides:
        if not _is_text(override):
            raise ConfigError(f"--set {override!a}: found bytes that are not UTF-8, expected text")
        dotted, equals, text = override.partition("=")
        if not equals or not dotted:
            raise ConfigError(f"--set {override}: expected key=value, such as search.num_trials=4")
        parts = dotted.split(".")
        if len(parts) > MAX_DEPTH:
            raise ConfigError(f"--set: found a key of {len(parts)} parts, expected at most {MAX_DEPTH}")
        _assign(content, parts, load_yaml(text, f"--set {dotted}: the value is not valid YAML"), override)


def _assign(node: Any, parts: list[str], value: Any, override: str, keys_have_dots: bool = False) -> None:
    key: int | str
    if isinstance(node, list):
        key, rest = _list_index(node, parts[0], override), parts[1:]
    elif isinstance(node, dict):
        length = _key_length(node, parts) or (len(parts) if keys_have_dots else 1)
        key, rest = ".".join(parts[:length]), parts[length:]
        if rest and node.get(key) is None:
            node[key] = {}  # a section that the file leaves out
    else:
        raise ConfigError(f"--set {override}: found {shown(node)} above {'.'.join(parts)!r}, expected a mapping")
    if rest:
        _assign(node[key], rest, value, override, keys_have_dots=key == "params")
    else:
        node[key] = value


def _key_length(node: dict[str, Any], parts: list[str]) -> int:
    """Return how many parts make up the longest key in the mapping, or 0; keys below params contain dots themselves."""
    return next((length for length in range(len(parts), 0, -1) if ".".join(parts[:length]) in node), 0)


def _list_index(node: list[Any], part: str, override: str) -> int:
    if part.isdecimal() and int(part) < len(node):
        return int(part)
    raise ConfigError(f"--set {override}: found {part!r}, expected the index of a list of {len(node)}, counted from 0")
