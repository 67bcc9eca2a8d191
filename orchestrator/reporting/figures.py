"""The pictures of a search: its front, and the widths of its networks.

PNGs are drawn by matplotlib without a display; the interactive ones are plotly figures, put into a page with plotly's
JavaScript inside, so that they open without a network.
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, get_args

import plotly.graph_objects as go
from matplotlib.figure import Figure

from orchestrator.config.metrics import BY_NAME, FINISHED, REFERENCE, TRIAL, used_as
from orchestrator.config.search import Objective
from orchestrator.config.trial import Baseline
from orchestrator.reporting.outcome import Outcome
from orchestrator.storage.records import Row

if TYPE_CHECKING:
    from gator.graph.architecture import Architecture

FRONT_COLOR = "#c2410c"
REFERENCE_LABEL = "other network, as published"
STOPPED_LABEL = "stopped early: last epoch"
TRIAL_COLOR = "#5b7fa6"
BASELINE_COLOR = "#7c3aed"
UNPRUNED_COLOR = "#1f2937"
WIDTHS_A_LINE = 12
KEPT_COLORS = [[0.0, "#7f1d1d"], [0.25, "#dd6b3d"], [0.6, "#f3d9b8"], [1.0, "#dbe7f3"]]


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
    axis.scatter(*_xy(layers["trial"], x, y), s=26, color=TRIAL_COLOR, alpha=0.75, label="finished trial", zorder=2)
    axis.scatter(
        *_xy(layers["stopped"], x, y), s=26, facecolors="none", edgecolors=TRIAL_COLOR, label=STOPPED_LABEL, zorder=2
    )
    if layers["baseline"]:
        axis.scatter(*_xy(layers["baseline"], x, y), s=34, marker="x", color=BASELINE_COLOR, label="plain baseline")
    if layers["reference"]:
        axis.scatter(*_xy(layers["reference"], x, y), s=34, marker="^", color=UNPRUNED_COLOR, label=REFERENCE_LABEL)
    for row in (*layers["baseline"], *layers["reference"]):
        axis.annotate(_short(row), (row[x], row[y]), xytext=(5, -10), textcoords="offset points", fontsize=7)
    xs, ys = _xy(layers["front"], x, y)
    if len(objectives) == 2:  # with more, the front is no line in this plane
        axis.step(xs, ys, where="post" if _is_minimised(x, objectives) else "pre", color=FRONT_COLOR, lw=1.3, zorder=2)
    axis.scatter(xs, ys, s=36, color=FRONT_COLOR, label="Pareto front", zorder=3)
    axis.scatter(
        *_xy(layers["unpruned"], x, y), s=60, marker="D", color=UNPRUNED_COLOR, label="unpruned network", zorder=4
    )
    for row in layers["front"]:
        axis.annotate(
            _short(row), (row[x], row[y]), xytext=(5, -10), textcoords="offset points", fontsize=7, color=FRONT_COLOR
        )
    axis.set(xlabel=BY_NAME[x].label, ylabel=BY_NAME[y].label)
    axis.grid(color="#e5e7eb", linewidth=0.7)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, loc="best")
    return _png(figure)


def front_figure(outcome: Outcome, architectures: "Mapping[str, Architecture]") -> go.Figure:
    """Return the front as a plotly figure; hovering over a network shows its numbers, its searched parameters and its widths.

    architectures: of the networks whose widths are shown, by trial id.
    """
    objectives = outcome.config.objectives
    x, y = axes(objectives)

    def traced(rows: Sequence[Row]) -> dict[str, object]:
        names = dict.fromkeys([y, x, *used_as("headline"), *outcome.params])
        hover = [_hover_text(row, names, architectures.get(row["trial_id"])) for row in rows]
        xs, ys = _xy(rows, x, y)
        return {"x": xs, "y": ys, "hovertext": hover, "hoverinfo": "text"}

    layers = _layers(outcome, x, y)
    shape = "hv" if _is_minimised(x, objectives) else "vh"
    mode = "lines+markers+text" if len(objectives) == 2 else "markers+text"
    figure = go.Figure()
    figure.add_scatter(
        mode="markers",
        name="finished trial",
        marker={"size": 9, "color": TRIAL_COLOR, "opacity": 0.75},
        **traced(layers["trial"]),
    )
    figure.add_scatter(
        mode="markers",
        name=STOPPED_LABEL,
        marker={"size": 9, "color": TRIAL_COLOR, "symbol": "circle-open"},
        **traced(layers["stopped"]),
    )
    if layers["baseline"]:
        figure.add_scatter(
            mode="markers",
            name="plain baseline",
            marker={"size": 9, "color": BASELINE_COLOR, "symbol": "x"},
            **traced(layers["baseline"]),
        )
    if layers["reference"]:
        figure.add_scatter(
            mode="markers",
            name=REFERENCE_LABEL,
            marker={"size": 9, "color": UNPRUNED_COLOR, "symbol": "triangle-up"},
            **traced(layers["reference"]),
        )
    figure.add_scatter(
        mode=mode,
        name="Pareto front",
        marker={"size": 11, "color": FRONT_COLOR},
        line={"shape": shape, "width": 1.5},
        text=[_short(row) for row in layers["front"]],
        textposition="bottom right",
        **traced(layers["front"]),
    )
    figure.add_scatter(
        mode="markers",
        name="unpruned network",
        marker={"size": 13, "symbol": "diamond", "color": UNPRUNED_COLOR},
        **traced(layers["unpruned"]),
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
    figure = go.Figure(
        go.Heatmap(
            x=groups,
            y=list(networks),
            z=share,
            text=text,
            customdata=kept,
            texttemplate="%{text}",
            xgap=2,
            ygap=2,
            zmin=0,
            zmax=1,
            colorscale=KEPT_COLORS,
            colorbar={"title": "kept", "tickformat": ".0%", "thickness": 12},
            hovertemplate="%{y}<br>%{x}<br>%{customdata} channels kept, %{z:.0%}<extra></extra>",
        )
    )
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


def figure_page(figure: go.Figure) -> str:
    """Return a whole HTML page with the figure and plotly's JavaScript inside (4.6 MB): it draws without a network."""
    page: str = figure.to_html(full_html=True, include_plotlyjs=True, div_id="front")
    return page


def _layers(outcome: Outcome, x: str, y: str) -> dict[str, list[Row]]:
    """Return the drawable rows, split into the layers of the picture, each sorted along x."""
    unpruned, on_front = outcome.unpruned, {row["trial_id"] for row in outcome.front}
    measured = (row for row in outcome.rows if row.get(x) is not None and row.get(y) is not None)
    drawable = sorted(measured, key=lambda row: float(row[x]))
    others = [row for row in drawable if row["trial_id"] not in on_front and row is not unpruned]
    return {
        "front": [row for row in drawable if row["trial_id"] in on_front],
        "unpruned": [row for row in drawable if row is unpruned],
        "trial": [row for row in others if row["status"] == FINISHED and row["kind"] == TRIAL],
        "baseline": [row for row in others if row["status"] == FINISHED and row["kind"] in get_args(Baseline)],
        "reference": [row for row in others if row["kind"] == REFERENCE],
        "stopped": [row for row in others if row["status"] != FINISHED],
    }


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
