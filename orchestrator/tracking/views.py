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


def view_link(server: str, experiment_id: str, search_id: str, mode: str = "CHART") -> str:
    """Return the link to the search's saved view.

    server: "http://127.0.0.1:5000", or "" for a link inside MLflow's own pages. mode: "CHART" (the scatter) or "TABLE".
    """
    query = f"workflowType=machine_learning&compareRunsMode={mode}&viewStateShareKey={view_key(search_id)}"
    return f"{_page(server)}#/experiments/{experiment_id}/runs?{query}"


def run_link(server: str, experiment_id: str, run_id: str) -> str:
    """Return the link to one run, with `server` as in view_link()."""
    return f"{_page(server)}#/experiments/{experiment_id}/runs/{run_id}?workflowType=machine_learning"


def view_key(search_id: str) -> str:
    """Return the key of the search's saved view: its id with nothing in it that a link would have to escape."""
    return re.sub(r"[^A-Za-z0-9]", "", search_id)


def view_tag(search_id: str, config: SearchConfig) -> tuple[str, str]:
    """Return the experiment tag (key, value) that installs the saved view."""
    now_ms = int(time.time() * 1000)
    x, y = axes(config.objectives)
    state = base64.b64encode(zlib.compress(json.dumps(_view_state(search_id, config)).encode())).decode()
    view = {
        "name": f"{search_id}: {y} against {x}",
        "createdAt": now_ms,
        "updatedAt": now_ms,
        "state": f"deflate;{state}",
    }
    return f"mlflow.sharedViewState.{view_key(search_id)}", json.dumps(view)


def _view_state(search_id: str, config: SearchConfig) -> dict[str, Any]:
    metrics = list(dict.fromkeys([*(objective.metric for objective in config.objectives), *used_as("headline")]))
    return {
        "searchFilter": f"tags.`gator.search_id` = '{search_id}' AND tags.`gator.kind` != 'search'",
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
