"""The folder in which Ray Train keeps the checkpoints of its runs, on a disk or in an object store: what it says about a trial."""

from fnmatch import fnmatchcase
from pathlib import Path

from orchestrator.errors import ClusterError
from orchestrator.storage.addresses import AddressedFolder, joined
from orchestrator.storage.paths import CHECKPOINTS, TRAIN_RECORD
from orchestrator.training.checkpoint import is_whole, readable_states


class TrainRuns:
    """A folder per Ray Train run, named after the trial. place: its path or address."""

    def __init__(self, place: str | Path) -> None:
        self.place = str(place)
        self._folder = AddressedFolder(self.place)

    def checkpoints(self, name: str) -> set[str]:
        """Return the names of a run's checkpoints, which contain the time; some may be incomplete."""
        return {found for found in self._folder.names(name) if fnmatchcase(found, CHECKPOINTS)}

    def has_new(self, name: str, earlier: set[str]) -> bool:
        """Return whether there is a new complete checkpoint; on a full disk each attempt leaves a part of one."""
        return any(is_whole(self._folder, f"{name}/{one}") for one in self.checkpoints(name) - earlier)

    def unrecorded_checkpoint(self, name: str) -> str | None:
        """Return the place of the newest complete checkpoint of a run without Ray Train's record of it; None where there is a record.

        The record is missing if another minor version of Ray wrote it, if it was damaged, or if the run was killed before the first.
        """
        if TRAIN_RECORD in self._folder.names(name):
            return None
        for one in sorted(self.checkpoints(name), reverse=True):
            if is_whole(self._folder, f"{name}/{one}"):
                return joined(self.place, f"{name}/{one}")
        return None

    def set_record_aside(self, name: str) -> None:
        """Rename Ray Train's record of a run, which this version of Ray cannot read."""
        record = f"{name}/{TRAIN_RECORD}"
        self._folder.write(f"{record}.unreadable", self._folder.read(record))
        self._folder.remove_file(record)

    def remove(self, name: str) -> None:
        """Remove the checkpoints of a run that is over."""
        self._folder.remove_below(name)

    def remove_leftovers(self, names: set[str]) -> None:
        """Remove the checkpoints of runs that are over, where a process that was killed has left some."""
        for name in names.intersection(self._folder.names(only_folders=True)):
            self.remove(name)

    def check_world_size(self, world_size: int) -> None:
        """Raise ClusterError if a trial under way, one with a checkpoint, has another number of workers.

        Called before anything starts, so that no trial fails and all can be resumed once the number is set back.
        """
        for trial in self._folder.names(only_folders=True):
            states = list(readable_states(self._folder, trial))
            if any(state["stage"] == "done" for state in states):
                continue
            for state in states:
                if state["world_size"] != world_size:
                    raise ClusterError(
                        f"{trial} is in epoch {state['epochs_done']} of stage {state['stage']!r}, trained by "
                        f"{state['world_size']} workers, but the cluster now gives {world_size}; set workers_per_trial back to "
                        f"{state['world_size']}, or start the search under another name: --set name=..."
                    )
