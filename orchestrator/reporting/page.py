"""Writes report.html, and with it pareto.json and front.png.

The page is one self-contained file that opens in a browser without a network; plotly's JavaScript is inside (4.6 MB). Top to
bottom: what was sought and found, the front to hover over, all networks, the widths of those on the front, how it was
measured, and how to load a network.
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from orchestrator.errors import RunDirError
from orchestrator.reporting.figures import front_figure, front_png, widths_figure
from orchestrator.reporting.outcome import Outcome, load_architectures, sort_best_first
from orchestrator.reporting.table import (
    ESTIMATE_MARK,
    FRONT_MARK,
    TEXT_COLUMNS,
    difference_text,
    metric_text,
    number_text,
    speedup_text,
    table_cells,
)
from orchestrator.storage.files import num_bytes, write_atomic
from orchestrator.storage.paths import RunPaths
from orchestrator.storage.records import Row

if TYPE_CHECKING:
    from gator.graph.architecture import Architecture

STYLE = """
:root { color-scheme: light dark; --ink: #1f2937; --soft: #6b7280; --line: #e5e7eb; --accent: #c2410c; --warm: #fff4ec;
  --page: #f7f7f5; --card: #fff; --ended: #9ca3af; }
@media (prefers-color-scheme: dark) { :root { --ink: #e5e7eb; --soft: #9ca3af; --line: #374151; --accent: #fb923c; --warm: #3b2a1e;
  --page: #111827; --card: #1f2937; --ended: #6b7280; } }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", sans-serif; }
main { max-width: 1400px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 26px; margin: 0 0 2px; }
h2 { font-size: 17px; margin: 36px 0 8px; }
p { margin: 4px 0; }
.soft { color: var(--soft); }
.notice { background: var(--warm); border-left: 4px solid var(--accent); padding: 10px 14px; margin: 16px 0 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(225px, 1fr)); gap: 12px; margin: 20px 0 0; }
.tile, .panel, pre { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.tile { padding: 12px 16px; }
.tile .name { font-size: 12px; color: var(--soft); }
.tile .big { font-size: 22px; font-weight: 600; }
.tile code { display: block; margin-top: 6px; font-size: 12px; overflow-wrap: anywhere; user-select: all; }
.panel { padding: 8px 12px; overflow-x: auto; }
.figure { background: #fff; }
table { border-collapse: collapse; width: 100%; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 10px; text-align: right; white-space: nowrap; }
th { border-bottom: 1px solid var(--line); color: var(--soft); font-weight: 600; }
td { border-bottom: 1px solid var(--line); }
th.text, td.text { text-align: left; }
tr.front td { background: var(--warm); }
tr.front td.text { color: var(--accent); font-weight: 600; }
tr.ended td { color: var(--ended); }
dl { display: grid; grid-template-columns: 170px 1fr; gap: 4px 16px; margin: 8px 4px; }
dt { color: var(--soft); }
dd { margin: 0; }
pre { padding: 12px 16px; overflow-x: auto; font-size: 13px; }
"""


def write_report(run: RunPaths) -> Outcome:
    """Write pareto.json, front.png and report.html from results.parquet and search.json; return what they show.

    Nothing is written unless all of them can be made. Raises: RunDirError if the run directory is damaged, or a folder is where
    a file belongs.
    """
    outcome = Outcome.load(run)
    contents: dict[Path, str | bytes] = {
        run.pareto: outcome.pareto_json,
        run.front_png: front_png(outcome),
        run.report: report_page(outcome, run),
    }
    for path in contents:
        if path.is_dir():
            raise RunDirError(f"{path} is a folder, expected a file; move it away")
    for path, content in contents.items():
        write_atomic(path, content)
    return outcome


def report_page(outcome: Outcome, run: RunPaths) -> str:
    """Return the page as HTML. Raises RunDirError for a damaged architecture of the front, or a link."""
    architectures = load_architectures(outcome, run)
    title = escape(f"{outcome.config.name}: pruning search")
    sections = (
        _summary(outcome, run),
        _section("Accuracy and cost", _panel(front_figure(outcome, architectures), "front")),
        _section("All networks", _table_panel(outcome)),
        _section("Widths of the networks on the front", _widths_panel(architectures)),
        _section("How it was measured", _measured_panel(outcome, run)),
        _section("Load a network", _usage(outcome, run)),
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}</style>\n'
        f"<script>{get_plotlyjs()}</script></head>\n<body><main>\n{''.join(sections)}</main></body></html>\n"
    )


def _section(heading: str, body: str) -> str:
    return f"<section><h2>{escape(heading)}</h2>\n{body}\n</section>\n" if body else ""


def _summary(outcome: Outcome, run: RunPaths) -> str:
    tiles = [("before pruning", outcome.unpruned)]
    if outcome.front:
        first, last = outcome.config.objectives[0], outcome.config.objectives[-1]
        tiles += [
            (f"best {first.metric}", outcome.front[0]),
            ("best balance (the knee of the front)", outcome.knee),
            (f"best {last.metric}", sort_best_first(outcome.front, [last])[0]),
        ]
    notice = f'<p class="notice">{escape(outcome.why_empty)}</p>' if outcome.why_empty else ""
    names: dict[str, list[str]] = {}  # of each network, which may be the best in several ways
    for name, row in tiles:
        if row is not None:
            names.setdefault(row["trial_id"], []).append(name)
    rows = {row["trial_id"]: row for _, row in tiles if row is not None}
    cards = "".join(_tile(", ".join(names[trial_id]), row, outcome, run) for trial_id, row in rows.items())
    return (
        f"<h1>{escape(outcome.config.name)}</h1>\n<p>Sought: {escape(outcome.question)}.</p>\n"
        f'<p class="soft">{escape(outcome.counts)}; {len(outcome.front)} on the Pareto front.</p>\n'
        f'{notice}<div class="tiles">{cards}</div>\n'
    )


def _tile(name: str, row: Row, outcome: Outcome, run: RunPaths) -> str:
    """Return what a network is, what it costs, and how large its weights are and how it is exported."""
    top1, latency = number_text(row, "top1"), number_text(row, "latency_ms")
    lines, command = [f"{metric_text('params', row.get('params'))} parameters"], ""
    if row is not outcome.unpruned:
        difference, speedup = difference_text(row, outcome.unpruned), speedup_text(row, outcome.unpruned)
        kept = "-" if row.get("macs_ratio") is None else f"{100 * row['macs_ratio']:.0f} %"
        lines = [f"{difference} points, {speedup} as fast, {kept} of the MACs", *lines]
        if (size := num_bytes(run.trial(row["trial_id"]).weights)) > 0:
            lines[-1] += f", weights {size / 1000:,.0f} kB"
        line = f"python -m orchestrator.export {shlex.quote(str(run.root))} --trial {row['trial_id']} --format onnx"
        command = f"<code>{escape(line)}</code>"
    about = "".join(f'<div class="soft">{escape(line)}</div>' for line in lines)
    return (
        f'<div class="tile"><div class="name">{escape(row["trial_id"])}: {escape(name)}</div>'
        f'<div class="big">{top1} % · {latency} ms</div>{about}{command}</div>'
    )


def _table_panel(outcome: Outcome) -> str:
    header, *lines = table_cells(outcome)
    classes = [' class="text"' if name in TEXT_COLUMNS else "" for name in header]
    head = "".join(f"<th{kind}>{escape(name)}</th>" for kind, name in zip(classes, header, strict=True))
    body = "\n".join(_table_line(line, classes) for line in lines)
    return (
        f'<div class="panel"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>\n'
        f'<p class="soft">{FRONT_MARK} on the front. top1 in percent, top1_diff in points, latency in milliseconds; '
        "speedup is the unpruned network's latency divided by this one's, if both were timed under the same conditions. "
        f"{ESTIMATE_MARK} marks an estimate. A trial that was stopped early has the accuracy of its last epoch on held-out images, "
        "and is left out of the picture.</p>"
    )


def _table_line(line: Sequence[str], classes: Sequence[str]) -> str:
    mark, _, status = line[:3]
    kind = "front" if mark else "ended" if status != "finished" else ""
    cells = "".join(f"<td{klass}>{escape(text)}</td>" for klass, text in zip(classes, line, strict=True))
    return f'<tr class="{kind}">{cells}</tr>'


def _widths_panel(networks: "Mapping[str, Architecture]") -> str:
    if not networks:
        return ""
    full = next(iter(networks.values())).num_channels
    figure = widths_figure(full, {name: network.widths for name, network in networks.items()})
    removed = "".join(
        f"<p>{escape(name)}: removed {escape(', '.join(network.removed_blocks))}</p>"
        for name, network in networks.items()
        if network.removed_blocks
    )
    return (
        f"{_panel(figure, 'widths')}{removed}\n"
        '<p class="soft">One column per channel group, named by the first layer that writes it: the layers of a group '
        "keep the same channels. Upper number: kept; lower number: before pruning.</p>"
    )


def _measured_panel(outcome: Outcome, run: RunPaths) -> str:
    config = outcome.config
    profile, data, search = config.base.profile, config.base.data, config.search
    sizes = " and ".join(str(size) for size in profile.batch_sizes)
    devices = sorted({row["latency_device"] for row in outcome.rows if row.get("latency_device")})
    clock = {
        "wall": f"median of {profile.num_repeats} forward passes, on a CPU by {profile.num_threads} thread(s)",
        "model": "computed from the MACs; no clock was read, so that the same seed gives the same table",
    }[profile.clock]
    facts = {
        "Latency": f"{clock}; batch size {sizes} at {data.image_size} px",
        "Device": ", ".join(devices) or "not measured yet",
        "Runtime": "; ".join(_runtimes(outcome)) or "not measured yet",
        "Accuracy": f"test split of {data.name}, read once at the end; early stopping saw the validation split only",
        "Model": f"{config.base.model.name}, {config.base.model.num_classes} classes",
        "Search": f"{search.algorithm}, {search.num_trials} trials, seed {search.seed}",
        "Early stopping": config.scheduler.type,
        "Hypervolume": _hypervolume(outcome),
        "Run directory": str(run.root.resolve()),
    }
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(fact)}</dd>" for name, fact in facts.items())
    return f'<div class="panel"><dl>{items}</dl></div>'


def _runtimes(outcome: Outcome) -> list[str]:
    """Return what ran the networks that were timed: more than one text means that their latencies do not compare."""
    held = [json.loads(row["latency_conditions"]) for row in outcome.rows if row.get("latency_conditions")]
    names = ("runtime", "dtype", "layout")
    return sorted({", ".join(str(conditions[name]) for name in names if name in conditions) for conditions in held})


def _hypervolume(outcome: Outcome) -> str:
    volume, corner = outcome.hypervolume, outcome.reference_point
    if volume is None or corner is None:
        return "unknown until the unpruned network is measured"
    point = ", ".join(f"{o.metric} {value:.4g}" for o, value in zip(outcome.config.objectives, corner, strict=True))
    return f"{volume:.5g}, counted from the reference point ({point}): guessing, at the cost of the unpruned network"


def _usage(outcome: Outcome, run: RunPaths) -> str:
    if not outcome.front:
        return ""
    call = f"load_trial({str(run.root)!r}, {outcome.front[0]['trial_id']!r})  # a plain torch.nn.Module"
    text = f"from orchestrator.models import load_trial\n\nnetwork = {call}"
    return f"<pre>{escape(text)}</pre>"


def _panel(figure: go.Figure, name: str) -> str:
    config = {"displayModeBar": False, "responsive": True}  # on a phone the bar would cover the legend
    html = figure.to_html(full_html=False, include_plotlyjs=False, div_id=name, config=config)
    return f'<div class="panel figure">{html}</div>'
