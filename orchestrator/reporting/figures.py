"""The pictures of a search: its front, and the widths of its networks.

PNGs are drawn by matplotlib without a display; the interactive ones, for report.html, are plotly figures.
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import plotly.graph_objects as go
from matplotlib.figure import Figure

from orchestrator.config.metrics import BY_NAME, FINISHED, REFERENCE, TRIAL, UNPRUNED, used_as
from orchestrator.config.search import Objective
from orchestrator.reporting.outcome import Outcome
from orchestrator.storage.records import Row

if TYPE_CHECKING:
    from gator.graph.architecture import Architecture

FRONT_COLOR = "#c2410c"
REFERENCE_LABEL = "other network, as published"
TRIAL_COLOR = "#5b7fa6"
UNPRUNED_COLOR = "#1f2937"
WIDTHS_A_LINE = 12
KEPT_COLORS = [[0.0, "#7f1d1d"], [0.25, "#dd6b3d"], [0.6, "#f3d9b8"], [1.0, "#dbe7f3"]]


class _Layer(NamedTuple):
    """The networks of one kind in a picture, and how they are drawn."""

    label: str
    color: str
    size: int
    """Diameter in plotly's pixels."""
    symbol: str
    """As plotly calls it."""
    marker: str
    """As matplotlib calls it."""


LAYERS = {
    "trial": _Layer("finished trial", TRIAL_COLOR, 9, "circle", "o"),
    "baseline": _Layer("plain baseline", "#7c3aed", 9, "x", "x"),
    "reference": _Layer(REFERENCE_LABEL, UNPRUNED_COLOR, 9, "triangle-up", "^"),
    "front": _Layer("Pareto front", FRONT_COLOR, 11, "circle", "o"),
    "unpruned": _Layer("unpruned network", UNPRUNED_COLOR, 13, "diamond", "D"),
}


def axes(objectives: Sequence[Objective]) -> tuple[str, str]:
    """Return the metrics to draw along x (what a network costs) and y (how good it is).

    x is the first minimised objective, y the first maximised one; when all point one way, the first two. A single
    objective is drawn against latency_ms or top1.
    """
    metrics = [objective.metric for objective in objectives]
    x = next((objective.metric for objective in objectives if objective.mode == "min"), None)
    y = next((objective.metric for objective in objectives if objective.mode == "max"), None)
    if x is None:
        x = next((metric for metric in metrics if metric != y), "latency_ms")
    if y is None:
        y = next((metric for metric in metrics if metric != x), "top1")
    return x, y


def front_png(outcome: Outcome) -> bytes:
    """Return a PNG of all networks, the front and the unpruned network marked."""
    objectives = outcome.config.objectives
    x, y = axes(objectives)
    figure = Figure(figsize=(7, 4.4), dpi=130, layout="constrained")
    axis = figure.subplots()
    layers = _layers(outcome, x, y)
    for zorder, (name, rows) in enumerate(layers.items(), start=3):
        layer = LAYERS[name]
        xs, ys = _xy(rows, x, y)
        shape, size = layer.marker, 0.35 * layer.size**2
        axis.scatter(xs, ys, size, marker=shape, color=layer.color, label=layer.label, zorder=zorder)
        for row in rows if name in ("baseline", "reference", "front") else ():
            at = (row[x], row[y])
            axis.annotate(_short(row), at, (5, -10), textcoords="offset points", fontsize=7, color=layer.color)
    if len(objectives) == 2:  # with more, the front is not a line in this plane
        xs, ys = _xy(layers.get("front", []), x, y)
        axis.step(xs, ys, where="post" if _is_minimised(x, objectives) else "pre", color=FRONT_COLOR, lw=1.3, zorder=2)
    axis.set(xlabel=BY_NAME[x].label, ylabel=BY_NAME[y].label)
    axis.grid(color="#e5e7eb", linewidth=0.7)
    axis.spines[["top", "right"]].set_visible(False)
    if layers:
        axis.legend(frameon=False, fontsize=8, loc="best")
    return _png(figure)


def front_figure(outcome: Outcome, architectures: "Mapping[str, Architecture]") -> go.Figure:
    """Return the front as a plotly figure; hovering over a network shows its numbers, its searched parameters and its widths.

    architectures: of the networks whose widths are shown, by trial id.
    """
    objectives = outcome.config.objectives
    x, y = axes(objectives)
    numbers = dict.fromkeys([y, x, *used_as("headline"), *outcome.config.params])
    figure = go.Figure()
    for name, rows in _layers(outcome, x, y).items():
        layer, xs_ys = LAYERS[name], _xy(rows, x, y)
        line = "lines+" if name == "front" and len(objectives) == 2 else ""
        figure.add_scatter(
            x=xs_ys[0],
            y=xs_ys[1],
            mode=f"{line}markers+text" if name == "front" else "markers",
            name=layer.label,
            marker={"size": layer.size, "color": layer.color, "symbol": layer.symbol},
            line={"shape": "hv" if _is_minimised(x, objectives) else "vh", "width": 1.5},
            text=[_short(row) for row in rows],
            textposition="bottom right",
            hovertext=[_hover_text(row, numbers, architectures.get(row["trial_id"])) for row in rows],
            hoverinfo="text",
        )
    figure.update_layout(
        template="plotly_white",
        margin={"l": 60, "r": 20, "t": 20, "b": 50},
        height=460,
        hovermode="closest",
        legend={"orientation": "h", "y": 1.08, "x": 0},
        font={"family": "system-ui, sans-serif"},
        xaxis_title=BY_NAME[x].label,
        yaxis_title=BY_NAME[y].label,
    )
    return figure


def widths_figure(full: Mapping[str, int], networks: Mapping[str, Mapping[str, int]]) -> go.Figure:
    """Return a table of colours: a row per network, a column per channel group, kept and full width in every cell.

    `full` and every value of `networks`: {group name: number of channels}; a group missing in a network is gone (0).
    """
    groups = list(full)
    kept = [[widths.get(group, 0) for group in groups] for widths in networks.values()]
    share = [[width / full[group] for group, width in zip(groups, row, strict=True)] for row in kept]
    text = [[f"{width}<br>{full[group]}" for group, width in zip(groups, row, strict=True)] for row in kept]
    cells = go.Heatmap(x=groups, y=list(networks), z=share, zmin=0, zmax=1, xgap=2, ygap=2, colorscale=KEPT_COLORS)
    cells.update(
        text=text,
        customdata=kept,
        texttemplate="%{text}",
        colorbar={"title": "kept", "tickformat": ".0%", "thickness": 12},
        hovertemplate="%{y}<br>%{x}<br>%{customdata} channels kept, %{z:.0%}<extra></extra>",
    )
    figure = go.Figure(cells)
    figure.update_layout(
        template="plotly_white",
        height=170 + 46 * len(networks),
        margin={"l": 90, "r": 20, "t": 10, "b": 130},
        font={"family": "system-ui, sans-serif", "size": 11},
    )
    figure.update_xaxes(tickangle=-45, type="category")
    figure.update_yaxes(autorange="reversed", type="category")
    return figure


def widths_png(full: Mapping[str, int], widths: Mapping[str, int]) -> bytes:
    """Return a PNG of one network: a bar per channel group, the kept part filled, the removed part empty."""
    groups = list(full)
    figure = Figure(figsize=(max(5.0, 0.34 * len(groups) + 1.5), 3.6), dpi=130, layout="constrained")
    axis = figure.subplots()
    axis.bar(
        groups, [full[group] for group in groups], color="#f3f4f6", edgecolor="#9ca3af", linewidth=0.6, label="unpruned"
    )
    axis.bar(groups, [widths.get(group, 0) for group in groups], color=TRIAL_COLOR, label="kept")
    for position, group in enumerate(groups):
        axis.annotate(str(widths.get(group, 0)), (position, full[group]), ha="center", va="bottom", fontsize=7)
    axis.set_ylabel("channels")
    axis.set_xticks(range(len(groups)), groups, rotation=60, ha="right", fontsize=7)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, loc="upper left")
    return _png(figure)


def _layers(outcome: Outcome, x: str, y: str) -> dict[str, list[Row]]:
    """Return the drawable rows by the layer they are in, the layers in the order of LAYERS, rows sorted along x."""
    on_front = outcome.front_ids

    def layer_of(row: Row) -> str:
        """Return the layer that a row is drawn in."""
        if row["trial_id"] in on_front:
            return "front"
        if row["kind"] in (UNPRUNED, REFERENCE):
            return str(row["kind"])
        return "trial" if row["kind"] == TRIAL else "baseline"

    # not those that were stopped: their accuracy is of held-out images and their latency an estimate
    finished = (row for row in outcome.rows if row["status"] == FINISHED)
    measured = (row for row in finished if row.get(x) is not None and row.get(y) is not None)
    drawable = sorted(measured, key=lambda row: float(row[x]))
    layers = {name: [row for row in drawable if layer_of(row) == name] for name in LAYERS}
    return {name: rows for name, rows in layers.items() if rows}


def _xy(rows: Sequence[Row], x: str, y: str) -> tuple[list[float], list[float]]:
    return [row[x] for row in rows], [row[y] for row in rows]


def _hover_text(row: Row, names: Iterable[str], architecture: "Architecture | None") -> str:
    """Return the network's id, its numbers, and its widths in the order of its groups, a dozen a line."""
    widths = [] if architecture is None else list(map(str, architecture.widths.values()))
    lines = [" ".join(widths[start : start + WIDTHS_A_LINE]) for start in range(0, len(widths), WIDTHS_A_LINE)]
    shown = [f"widths {lines[0]}", *lines[1:]] if lines else []
    return "<br>".join([f"<b>{row['trial_id']}</b>", *(f"{name} {_number(row.get(name))}" for name in names), *shown])


def _number(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _short(row: Row) -> str:
    return str(row["trial_id"]).removeprefix("trial_")


def _is_minimised(metric: str, objectives: Sequence[Objective]) -> bool:
    return not any(objective.metric == metric and objective.mode == "max" for objective in objectives)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
