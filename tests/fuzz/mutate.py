"""Strategies that damage what a user may hand in: a tree of YAML or JSON, a file of bytes, a command line."""

import copy
from typing import Any

from hypothesis import strategies as st

ODD_TEXTS = ("", " ", ".", "..", "../../x", "/", "\0", "a\0b", "é€😀", "-", "--", "=", "a=b", ".inf", "nan", "1e999", "x" * 300, "%n{}$x",
             "digits", "DEFAULT", "none", "latency_ms", "os:system", "builtins:print", "orchestrator.nothing:f", "s3://bucket/x",
             "resnet8_cifar", "resnet9_cifar", "resnet99999999_cifar", "\ud800")  # fmt: skip
ODD_YAML = ("2024-13-45", "2024-11-28", "!!int x", '!!float ""', "!!bool x", "!!timestamp x", "!!binary x", "!!set {a}", "0b_", "9" * 5000,
            "0x" + "f" * 5000, "[" * 3000, "{a: " * 3000, "- " * 3000, "&a [&b [*a], *b]", "*a", "<<: x", "{<<: {a: 1}}", "=", "? [a]",
            "{1: 2, null: 3}", "%YAML 9.9", "[[[[[[[[1]]]]]]]]", "1:1:1", "\x1b[2J")  # fmt: skip
"""Values as YAML text that a tree of plain values does not have: tags, dates, references, deep nesting."""
ODD_NUMBERS = (0, -1, 1, 2, 3, 10**9, 10**30, -(10**30), 0.0, -0.0, 0.5, 1e-300, 1e300, float("inf"), float("nan"))

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(ODD_NUMBERS),
    st.sampled_from(ODD_TEXTS),
    st.integers(-5, 50),
    st.floats(),
    st.text(max_size=12),
)
trees = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=6,
)


@st.composite
def damaged_trees(draw: st.DrawFn, valid: Any, most_changes: int = 3) -> Any:
    """Return the valid tree after a few changes: a part replaced, left out, given a stranger or another's value."""
    tree = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, most_changes))):
        places = list(_places(tree))
        if not places:
            return draw(trees)
        parent, key = draw(st.sampled_from(places))
        change = draw(st.sampled_from(("replace", "replace", "leave out", "add", "another's", "rename")))
        if change == "leave out":
            del parent[key]
        elif change == "add" and isinstance(parent, dict):
            parent[draw(st.text(max_size=8))] = draw(trees)
        elif change == "another's":
            other, other_key = draw(st.sampled_from(places))
            if other_key in other if isinstance(other, dict) else other_key < len(other):
                parent[key] = copy.deepcopy(other[other_key])
        elif change == "rename" and isinstance(parent, dict):
            parent[draw(st.sampled_from(ODD_TEXTS))] = parent.pop(key)
        else:
            parent[key] = draw(trees)
    return tree


def _places(tree: Any) -> Any:
    """Yield (container, key) of every part of a tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(items):
        yield tree, key
        yield from _places(value)


@st.composite
def damaged_bytes(draw: st.DrawFn, valid: bytes) -> bytes:
    """Return the bytes cut short, with bits flipped, with a piece overwritten, or others altogether."""
    kind = draw(st.sampled_from(("cut", "flip", "overwrite", "other", "doubled")))
    if kind == "cut":
        return valid[: draw(st.integers(0, len(valid)))]
    if kind == "other":
        return draw(st.binary(max_size=64))
    if kind == "doubled":
        return valid + valid
    changed = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(valid) - 1))
        changed[place] = (
            changed[place] ^ (1 << draw(st.integers(0, 7))) if kind == "flip" else draw(st.integers(0, 255))
        )
    return bytes(changed)
