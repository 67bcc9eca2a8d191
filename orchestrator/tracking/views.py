"""Builds links into MLflow's UI, and the saved view that they open.

By default MLflow 3 opens an experiment in its GenAI mode, folds trials under their search and hides their metrics. A
saved view avoids this: an experiment tag that the UI reads and lists under "Views". Its format is not documented
(seen in MLflow 3.17), so nothing depends on it: the search's run also holds the front as a picture and a page.
"""

import base64
import json
import re
import shlex
import sys
import time
import zlib
from collections.abc import Sequence
from typing import Any

from orchestrator.config.metrics import used_as
from orchestrator.config.search import SearchConfig
from orchestrator.reporting.figures import axes


def ui_command(store_uri: str, port: int = 5000) -> str:
    """Return the command that serves the store on this machine's loopback: telemetry and GenAI job runners off."""
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", store_uri, "--host", "127.0.0.1"]
    command += ["--port", str(port), "--workers", "1"]
    return f"MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false {shlex.join(command)}"


def view_link(server: str, experiment_id: str, view: str, mode: str = "CHART") -> str:
    """Return the link to a saved view.

    view: the search's id, for all of its networks, or front_view() of it.
    server: "http://127.0.0.1:5000", or "" for a link inside MLflow's own pages. mode: "CHART" (the scatter) or "TABLE".
    """
    query = f"workflowType=machine_learning&compareRunsMode={mode}&viewStateShareKey={view_key(view)}"
    return f"{_page(server)}#/experiments/{experiment_id}/runs?{query}"


def run_link(server: str, experiment_id: str, run_id: str) -> str:
    """Return the link to one run, with `server` as in view_link()."""
    return f"{_page(server)}#/experiments/{experiment_id}/runs/{run_id}?workflowType=machine_learning"


def front_view(search_id: str) -> str:
    """Return the name of the search's view that shows its front alone: MLflow's charts end at 100 networks."""
    return f"{search_id}-front"


def view_key(view: str) -> str:
    """Return the key of a saved view: its name with nothing in it that a link would have to escape."""
    return re.sub(r"[^A-Za-z0-9]", "", view)


def view_tags(search_id: str, config: SearchConfig) -> dict[str, str]:
    """Return the experiment tags that install the saved views: of all networks, and of the front, which is known at the end."""
    x, y = axes(config.objectives)
    networks = f"tags.`gator.search_id` = '{search_id}' AND tags.`gator.kind` != 'search'"
    front = f"tags.`gator.search_id` = '{search_id}' AND tags.`gator.front` = 'true'"
    views = {
        search_id: _saved(f"{search_id}: {y} against {x}", _view_state(networks, config)),
        front_view(search_id): _saved(f"{search_id}: the front", _view_state(front, config)),
    }
    return {f"mlflow.sharedViewState.{view_key(view)}": text for view, text in views.items()}


def _saved(name: str, view_state: dict[str, Any]) -> str:
    now_ms = int(time.time() * 1000)
    state = base64.b64encode(zlib.compress(json.dumps(view_state).encode())).decode()
    return json.dumps({"name": name, "createdAt": now_ms, "updatedAt": now_ms, "state": f"deflate;{state}"})


def _view_state(search_filter: str, config: SearchConfig) -> dict[str, Any]:
    metrics = list(dict.fromkeys([*(objective.metric for objective in config.objectives), *used_as("headline")]))
    return {
        "searchFilter": search_filter,
        # sorting by a metric is what makes the UI show nested runs one by one
        "orderByKey": f"metrics.`{metrics[0]}`",
        "orderByAsc": config.objectives[0].mode == "min",
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "runsHiddenMode": "SHOW_ALL",
        "columnOrder": [],
        "columnWidths": {},
        "selectedColumns": [
            *(f"metrics.`{metric}`" for metric in metrics),
            *(f"params.`{param}`" for param in config.params),
            *(f"tags.`{tag}`" for tag in ("gator.front", "gator.status")),
        ],
        "compareRunSections": [_section("pareto", "Pareto"), _section("params", "Searched parameters")],
        "compareRunCharts": _charts(config, metrics),
        "viewMaximized": False,
        "runListHidden": False,
        "isAccordionReordered": True,  # else the sections are sorted by name, and "gate" comes before "Pareto"
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
        "groupBy": None,
        "groupsExpanded": {},
        "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
    }


def _charts(config: SearchConfig, metrics: Sequence[str]) -> list[dict[str, Any]]:
    x, y = axes(config.objectives)
    parallel = {"selectedParams": list(config.params), "selectedMetrics": list(metrics[:2]), "showAllRuns": True}
    return [
        _chart("scatter-objectives", "SCATTER", "pareto", xaxis=_axis(x), yaxis=_axis(y)),
        _chart("scatter-macs", "SCATTER", "pareto", xaxis=_axis("macs_ratio"), yaxis=_axis(y)),
        _chart("parallel", "PARALLEL", "params", **parallel),
    ]


def _chart(uuid: str, kind: str, section: str, **more: object) -> dict[str, Any]:
    shared = {"runsCountToCompare": 100, "deleted": False, "isGenerated": False}
    return {"uuid": uuid, "type": kind, "metricSectionId": section, **shared, **more}


def _section(uuid: str, name: str) -> dict[str, Any]:
    state = {"display": True, "isReordered": False, "deleted": False, "isGenerated": False}
    return {"uuid": uuid, "name": name, **state, "columns": 2, "cardHeight": 460}


def _axis(metric: str) -> dict[str, str]:
    return {"key": metric, "type": "METRIC"}


def _page(server: str) -> str:
    return f"{server.rstrip('/')}/" if server else ""
