"""The run of a whole search in MLflow: what was asked, how the front grows while the search runs, what came out.

search.yaml, cluster.yaml           what was asked, and where it runs
hypervolume, front_size, num_...    metrics over the epochs spent
front.png, front.html, results.csv  again and again while the search runs; pareto.json and report.html at its end
"""

import io
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any, get_args

import yaml
from mlflow import MlflowClient
from mlflow.entities import Param

from orchestrator.config.cluster import ClusterConfig
from orchestrator.config.metrics import Status
from orchestrator.config.search import SearchConfig
from orchestrator.masking import masked_values
from orchestrator.reporting.figures import figure_page, front_figure, front_png
from orchestrator.reporting.outcome import Outcome, load_architectures
from orchestrator.reporting.table import csv_text, numbers_text
from orchestrator.storage.paths import RunPaths
from orchestrator.tracking.store import flatten, points
from orchestrator.tracking.views import run_link, view_link, view_tag

NUM_IN_NOTE = 20
"""Networks that the description lists: MLflow cuts it at 8,000 characters, and a network takes about 180."""


class SearchRun:
    """The parent run of a search; writes are unguarded, the Tracker guards them."""

    def __init__(self, client: MlflowClient, experiment_id: str, run_id: str, search_id: str, run: RunPaths) -> None:
        self.run_id = run_id
        self._client = client
        self._experiment_id = experiment_id
        self._search_id = search_id
        self._run = run

    def describe(self, config: SearchConfig) -> None:
        """Write what is known before the first trial, and install the saved view."""
        values = config.model_dump(mode="json")
        self._client.log_batch(self.run_id, params=[Param(name, value) for name, value in flatten(values).items()])
        self._client.log_text(self.run_id, yaml.safe_dump(masked_values(values), sort_keys=False), "search.yaml")
        self._client.set_experiment_tag(self._experiment_id, *view_tag(self._search_id, config))
        link = view_link("", self._experiment_id, self._search_id)
        self._client.set_tag(self.run_id, "mlflow.note.content", f"[Networks of this search]({link})")
        self._client.set_experiment_tag(
            self._experiment_id, "mlflow.note.content", f"[Networks of the latest search, {self._search_id}]({link})"
        )

    def tag(self, tags: Mapping[str, Any]) -> None:
        """Set tags of this run, named gator.<name>."""
        for name, value in tags.items():
            self._client.set_tag(self.run_id, f"gator.{name}", str(value))

    def write_cluster(self, config: ClusterConfig) -> None:
        """Write where the search runs, without secrets."""
        self._client.log_text(self.run_id, yaml.safe_dump(config.shown(), sort_keys=False), "cluster.yaml")

    def write_progress(self, outcome: Outcome, run_ids: Mapping[str, str], num_epochs: int) -> None:
        """Write the front as it is now.

        run_ids: trial id -> run. num_epochs: epochs that all trials have spent so far, the step of the metrics.
        """
        statuses = Counter(row["status"] for row in outcome.trials)
        values = {"front_size": len(outcome.front), "hypervolume": outcome.hypervolume}
        values |= {f"num_{status}": statuses[status] for status in get_args(Status)}
        self._client.log_batch(self.run_id, points(values, int(time.time() * 1000), step=num_epochs))
        page = figure_page(front_figure(outcome, load_architectures(outcome, self._run)))
        self._client.log_stream(self.run_id, io.BytesIO(front_png(outcome)), "front.png")
        self._client.log_text(self.run_id, page, "front.html")
        self._client.log_text(self.run_id, csv_text(outcome), "results.csv")
        self._client.set_tag(self.run_id, "mlflow.note.content", self._note(outcome, run_ids))

    def write_end(self, outcome: Outcome, run_ids: Mapping[str, str], num_epochs: int) -> None:
        """Write the front as it is at the end, the report, and into the children which of them stand on it."""
        on_front = {row["trial_id"] for row in outcome.front}
        for trial_id, run_id in run_ids.items():
            self._client.set_tag(run_id, "gator.front", "true" if trial_id in on_front else "false")
        self.write_progress(outcome, run_ids, num_epochs)
        for path in (self._run.pareto, self._run.report):
            if path.is_file():
                self._client.log_artifact(self.run_id, str(path))

    def _note(self, outcome: Outcome, run_ids: Mapping[str, str]) -> str:
        """Return the run's description as Markdown: the links and networks from all along the front, then the picture."""
        chart, table = (view_link("", self._experiment_id, self._search_id, mode) for mode in ("CHART", "TABLE"))
        step = max(1, -(-len(outcome.front) // NUM_IN_NOTE))
        lines = [
            f"- [{row['trial_id']}]({run_link('', self._experiment_id, run_ids[row['trial_id']])}): "
            f"{numbers_text(row, outcome)}"
            for row in outcome.front[::step]
            if row["trial_id"] in run_ids
        ]
        heading = "The front:" if step == 1 else f"One in {step} of the {len(outcome.front)} networks of the front:"
        return "\n\n".join(
            [
                f"{outcome.question}. [Open the networks as a chart]({chart}), [as a table]({table})",
                f"{outcome.counts}. {outcome.why_empty or heading}",
                "\n".join(lines),
                f"![front](get-artifact?path=front.png&run_uuid={self.run_id})",
            ]
        )
