"""The reference in docs/reference: every key of a YAML file, every command, metric and public name, as the code states them.

python -m tests.reference       writes the pages; tests/test_docs.py fails if they are not current
"""

import argparse
import importlib
import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gator
from orchestrator.__main__ import COMMANDS
from orchestrator.config.cluster import ClusterConfig
from orchestrator.config.metrics import METRICS
from orchestrator.config.search import SearchConfig
from orchestrator.models import load_trial
from orchestrator.storage.records import METRICS_SCHEMA, RESULTS_SCHEMA

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "reference"
WRITTEN = "Written by `python -m tests.reference`."
BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
Schema = Mapping[str, Any]


def config_page() -> str:
    """Return every key of a search space and of a cluster's file, a table for each mapping."""
    sections = [
        *_mapping("A search space", SearchConfig.model_json_schema()),
        *_mapping("A cluster", ClusterConfig.model_json_schema()),
    ]
    return "\n".join(
        [
            "# Keys of search spaces and clusters",
            "",
            WRITTEN,
            "`-` in the column default: the key is required.",
            *sections,
            "",
        ]
    )


def _mapping(title: str, schema: Schema) -> Iterator[str]:
    parts = {title: schema, **schema.get("$defs", {})}
    for name, part in parts.items():
        if "properties" not in part:
            continue
        yield f"\n## {name}\n"
        yield "| key | type | default | meaning |\n| --- | --- | --- | --- |"
        required = part.get("required", ())
        for key, field in part["properties"].items():
            default = "-" if key in required else _default(field)
            yield f"| `{key}` | {_cell(_type(field))} | {_cell(default)} | {_cell(field.get('description', ''))} |"


def _default(field: Schema) -> str:
    """Return the default; none is repeated for a mapping with a table of its own."""
    value = field.get("default")
    return "" if isinstance(value, dict) and value else f"`{_yaml(value)}`"


def _type(field: Schema) -> str:
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_type(one) for one in field["anyOf"]))
    if "oneOf" in field:
        return " or ".join(dict.fromkeys(_type(one) for one in field["oneOf"]))
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return "any" if name == "JsonValue" else f"[{name}](#{name.lower()})"
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    if field.get("type") == "array":
        return f"list of {_type(field.get('items', field.get('prefixItems', [{}])[0]))}"
    if field.get("type") == "object":
        values = field.get("additionalProperties")
        return f"mapping to {_type(values)}" if isinstance(values, dict) and values else "mapping"
    bounds = [f"{words} {field[key]:g}" for key, words in BOUNDS.items() if key in field]
    name = {"string": "text", "boolean": "true or false"}.get(field.get("type", ""), field.get("type", "any"))
    return f"{name} {' and '.join(bounds)}".rstrip()


def _yaml(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]  # type: ignore[index]
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_yaml(one)}" for key, one in value.items()) + "}"
    return f"[{', '.join(map(_yaml, value))}]" if isinstance(value, list | tuple) else f"{value}"


def cli_page() -> str:
    """Return the arguments of every command."""
    page = [
        "# Commands",
        "",
        WRITTEN,
        "`python -m orchestrator.NAME` and, installed, `orchestrator NAME` are the same.",
    ]
    for name in COMMANDS:
        parser = importlib.import_module(f"orchestrator.{name}")._parser()
        for title, one in _parsers(name, parser):
            page += ["", f"## {title}", "", *_options(one)]
    return "\n".join([*page, ""])


def _parsers(title: str, parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    children = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not children:
        yield title, parser
    for child in children:
        for name, one in child.choices.items():
            yield from _parsers(f"{title} {name}", one)


def _options(parser: argparse.ArgumentParser) -> Iterator[str]:
    yield f"{' '.join((parser.description or '').split(chr(10) + chr(10))[0].split())}\n"
    yield "| argument | default | meaning |\n| --- | --- | --- |"
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction) or action.help == argparse.SUPPRESS:
            continue
        value = action.metavar or (action.dest.upper() if action.nargs != 0 else "")
        words = [*action.option_strings, *([] if isinstance(value, tuple) or not value else [value])]
        has_default = action.default not in (None, False, [], argparse.SUPPRESS)
        default = f"`{action.default}`" if has_default else ""
        text = (action.help or "") % {**vars(action), "prog": parser.prog}
        yield f"| `{' '.join(dict.fromkeys(words))}` | {_cell(default)} | {_cell(text)} |"


def metrics_page() -> str:
    """Return every metric: where it is, and what it means."""
    tables = {"results.parquet": set(RESULTS_SCHEMA.names), "metrics.parquet": set(METRICS_SCHEMA.names)}
    page = [
        "# Metrics", "", WRITTEN,
        "`results.parquet` has a row for each network of a search, `metrics.parquet` of a trial one for each epoch.",
        "Each latency has further columns `latency_ms_b<size>` for the other sizes of `profile.batch_sizes`.",
        "`results.parquet` has a column for each searched parameter.",
        "MLflow has the numbers of a finished network under the first name, those of epochs under the name in the last column.",
        "", "| metric | type | meaning | tables | MLflow, by epoch |", "| --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for metric in METRICS:
        places = ", ".join(f"`{name}`" for name, columns in tables.items() if metric.name in columns)
        mlflow = f"`{metric.mlflow_name}`" if metric.mlflow_name else ""
        page.append(f"| `{metric.name}` | {metric.type} | {_cell(metric.doc)} | {places} | {mlflow} |")
    return "\n".join([*page, ""])


def api_page() -> str:
    """Return the public names of gator, and how a trial's network is loaded."""
    page = ["# Python API", "", WRITTEN]
    for name in gator.__all__:
        page += ["", f"## gator.{name}", "", *_described(getattr(gator, name))]
    return "\n".join([*page, "", "## orchestrator.models.load_trial", "", *_described(load_trial), ""])


def _described(found: Any) -> Iterator[str]:
    is_error = inspect.isclass(found) and issubclass(found, Exception)
    if not is_error:
        yield f"```text\n{found.__name__}{_signature(found)}\n```\n"
    yield f"```text\n{inspect.getdoc(found) or ''}\n```"
    for name, member in sorted(vars(found).items()) if inspect.isclass(found) and not is_error else ():
        function = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        if not name.startswith("_") and inspect.isfunction(function) and function.__doc__:
            yield f"\n- `{name}{_signature(function)}`: {_cell(inspect.cleandoc(function.__doc__).split(chr(10) + chr(10))[0])}"


def _signature(found: Any) -> str:
    text = str(inspect.signature(found))
    return re.sub(
        r"\b(?:torch\.nn\.modules\.module|collections\.abc|gator(?:\.\w+)+|torch|typing|pathlib)\.(?=[A-Z])", "", text
    )


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


PAGES = {"config.md": config_page, "cli.md": cli_page, "metrics.md": metrics_page, "api.md": api_page}

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page(), encoding="utf-8")
