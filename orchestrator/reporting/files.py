"""pareto.json, front.png, report.html"""

from pathlib import Path

from orchestrator.errors import RunDirError
from orchestrator.reporting.figures import front_png
from orchestrator.reporting.outcome import Outcome
from orchestrator.reporting.page import report_page
from orchestrator.storage.files import write_atomic
from orchestrator.storage.paths import RunPaths


def write_report(run: RunPaths) -> Outcome:
    """Write pareto.json, front.png and report.html from results.parquet and search.json; return what they show.

    Nothing is written unless all of them can be made. Raises: RunDirError if the run directory is damaged, or a folder is in the place
    of a file.
    """
    outcome = Outcome.load(run)
    contents: dict[Path, str | bytes] = {
        run.pareto: outcome.pareto_json,
        run.front_png: front_png(outcome),
        run.report: report_page(outcome, run),
    }
    for path in contents:
        if path.is_dir():
            raise RunDirError(f"{path} is a folder, a file is to be written there: move it")
    for path, content in contents.items():
        write_atomic(path, content)
    return outcome
