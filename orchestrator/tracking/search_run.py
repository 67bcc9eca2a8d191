"""The run of a whole search in MLflow: what was asked, how the front grows while the search runs, what came out.

search.yaml, cluster.yaml                        what was asked, and where it runs
hypervolume, front_size, num_...                 metrics over the epochs spent
front.png, report.html, results.csv, pareto.json again and again while the search runs, and at its end
"""

import io
import re
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, get_args

import yaml
from mlflow import MlflowClient
from mlflow.entities import Param, Run, RunTag, ViewType
from mlflow.tracking.context.registry import resolve_tags

from orchestrator.config.cluster import ClusterConfig
from orchestrator.config.metrics import Status
from orchestrator.config.search import SearchConfig
from orchestrator.errors import RunDirError
from orchestrator.masking import masked_values
from orchestrator.reporting.figures import front_png
from orchestrator.reporting.outcome import Outcome
from orchestrator.reporting.page import report_page
from orchestrator.reporting.table import csv_text, numbers_text
from orchestrator.storage.files import read_text, write_atomic
from orchestrator.storage.paths import RunPaths
from orchestrator.tracking.store import flatten, points
from orchestrator.tracking.views import front_view, run_link, view_link, view_tags

NUM_IN_NOTE = 20
"""Networks that the description lists: MLflow cuts it at 8,000 characters, and a network takes about 180."""


class SearchRun:
    """The parent run of a search, and how its children are made and found; writes are unguarded, the Tracker guards them."""

    def __init__(self, client: MlflowClient, experiment_id: str, config: SearchConfig, run: RunPaths) -> None:
        """Find or create the run, and write what is known before the first trial."""
        self.client = client
        self.experiment_id = experiment_id
        self.search_id = _search_id(run, config.name)
        self.config = config
        self.run = run
        self._context_tags = resolve_tags()  # user, program and git commit, as MLflow's own API would set them
        if found := self._search("AND tags.`gator.kind` = 'search'", max_results=1):
            self.run_id = str(found[0].info.run_id)
            recorded = found[0].data.params
            client.update_run(self.run_id, status="RUNNING")
        else:
            self.run_id, recorded = str(self._create(self.search_id, "search").info.run_id), {}
        self._describe(recorded)

    def _describe(self, recorded: Mapping[str, str]) -> None:
        """Write the config, and install the saved view.

        recorded: parameters that MLflow has. It refuses other values for them: search.yaml and a tag hold those of a search that
        was given more trials since.
        """
        values = self.config.model_dump(mode="json")
        params = [Param(name, value) for name, value in flatten(values).items() if name not in recorded]
        tags = [RunTag("gator.num_trials", str(self.config.search.num_trials))]
        self.client.log_batch(self.run_id, params=params, tags=tags)
        self.client.log_text(self.run_id, yaml.safe_dump(masked_values(values), sort_keys=False), "search.yaml")
        for key, view in view_tags(self.search_id, self.config).items():
            self.client.set_experiment_tag(self.experiment_id, key, view)
        link = view_link("", self.experiment_id, self.search_id)
        self.client.set_tag(self.run_id, "mlflow.note.content", f"[Networks of this search]({link})")
        self.client.set_experiment_tag(
            self.experiment_id, "mlflow.note.content", f"[Networks of the latest search, {self.search_id}]({link})"
        )

    def write_cluster(self, facts: Mapping[str, Any], config: ClusterConfig) -> None:
        """Write what the search runs on: facts as tags named gator.<name>, and the config without secrets."""
        for name, value in facts.items():
            self.client.set_tag(self.run_id, f"gator.{name}", str(value))
        self.client.log_text(self.run_id, yaml.safe_dump(config.shown(), sort_keys=False), "cluster.yaml")

    def write_progress(self, outcome: Outcome, run_ids: Mapping[str, str], num_epochs: int) -> None:
        """Write the front as it is now.

        run_ids: trial id -> run. num_epochs: epochs that all trials have spent so far, the step of the metrics.
        """
        statuses = Counter(row["status"] for row in outcome.trials)
        values = {"front_size": len(outcome.front), "hypervolume": outcome.hypervolume}
        values |= {f"num_{status}": statuses[status] for status in get_args(Status)}
        self.client.log_batch(self.run_id, points(values, int(time.time() * 1000), step=num_epochs))
        self.client.log_stream(self.run_id, io.BytesIO(front_png(outcome)), self.run.front_png.name)
        self.client.log_text(self.run_id, report_page(outcome, self.run), self.run.report.name)
        self.client.log_text(self.run_id, csv_text(outcome), "results.csv")
        self.client.log_text(self.run_id, outcome.pareto_json, self.run.pareto.name)
        self.client.set_tag(self.run_id, "mlflow.note.content", self._note(outcome, run_ids))

    def write_end(self, outcome: Outcome, run_ids: Mapping[str, str], num_epochs: int) -> None:
        """Write the front as it is at the end, and into the children which of them are on it."""
        for trial_id, run_id in run_ids.items():
            self.client.set_tag(run_id, "gator.front", "true" if trial_id in outcome.front_ids else "false")
        self.write_progress(outcome, run_ids, num_epochs)

    def _note(self, outcome: Outcome, run_ids: Mapping[str, str]) -> str:
        """Return the run's description as Markdown: the links and networks from all along the front, then the picture."""
        chart, table = (view_link("", self.experiment_id, self.search_id, mode) for mode in ("CHART", "TABLE"))
        front = view_link("", self.experiment_id, front_view(self.search_id))
        step = max(1, -(-len(outcome.front) // NUM_IN_NOTE))
        lines = [
            f"- [{row['trial_id']}]({run_link('', self.experiment_id, run_ids[row['trial_id']])}): "
            f"{numbers_text(row, outcome)}"
            for row in outcome.front[::step]
            if row["trial_id"] in run_ids
        ]
        heading = "The front:" if step == 1 else f"One in {step} of the {len(outcome.front)} networks of the front:"
        return "\n\n".join(
            [
                f"{outcome.question}. [Open the networks as a chart]({chart}), [as a table]({table}), [the front alone]({front})",
                f"{outcome.counts}. {outcome.why_empty or heading}",
                "\n".join(lines),
                f"![front](get-artifact?path=front.png&run_uuid={self.run_id})",
            ]
        )

    # ---- children

    def create_child(self, trial_id: str, kind: str) -> Run:
        """Create the run of a trial."""
        return self._create(trial_id, kind, **{"gator.trial_id": trial_id, "mlflow.parentRunId": self.run_id})

    def find_child(self, trial_id: str) -> str | None:
        """Return the id of a trial's run; None if it has none."""
        found = self._search(f"AND tags.`gator.trial_id` = '{trial_id}'", max_results=1)
        return str(found[0].info.run_id) if found else None

    def children(self) -> dict[str, Run]:
        """Return the runs of all trials by trial id."""
        page = self._search("AND tags.`gator.kind` != 'search'")
        found = list(page)
        while page.token:
            page = self._search("AND tags.`gator.kind` != 'search'", token=page.token)
            found += page
        return {child.data.tags["gator.trial_id"]: child for child in found}

    def kill(self, run_ids: Iterable[str]) -> None:
        """End the runs of trials that will not end by themselves."""
        for run_id in run_ids:
            self.client.set_tag(run_id, "gator.status", "killed")
            self.client.set_terminated(run_id, "KILLED")

    def _create(self, name: str, kind: str, **tags: str) -> Run:
        shared = {"gator.kind": kind, "gator.search_id": self.search_id, "gator.run_dir": str(self.run.root.resolve())}
        return self.client.create_run(self.experiment_id, run_name=name, tags={**self._context_tags, **shared, **tags})

    def _search(self, condition: str, max_results: int = 1000, token: str | None = None) -> Any:
        """Return a page of this search's runs."""
        query = f"tags.`gator.search_id` = '{self.search_id}' {condition}"
        order = ["attributes.start_time ASC"]
        return self.client.search_runs([self.experiment_id], query, ViewType.ACTIVE_ONLY, max_results, order, token)


def _search_id(run: RunPaths, name: str) -> str:
    """Return the id that ties this run directory to its parent run; drawn once and kept in the run directory."""
    if not run.search_id.exists():
        write_atomic(run.search_id, f"{name}-{uuid.uuid4().hex[:8]}\n")
    advice = "restore it from a copy, or delete it: the search gets another run in MLflow then"
    search_id = read_text(run.search_id, RunDirError, advice).strip()
    if not re.fullmatch(rf"{re.escape(name)}-[0-9a-f]{{8}}", search_id):
        raise RunDirError(f"{run.search_id} is damaged: found {search_id!r:.60}, expected {name}-<8 digits>; {advice}")
    return search_id
