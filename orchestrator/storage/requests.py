"""What a person asks a running search for: `orchestrator steer` adds lines to a file of its run directory, the search reads them."""

import logging
from typing import Self

from pydantic import ValidationError, model_validator

from orchestrator.config.base import Config, Count
from orchestrator.storage.paths import RunDirPaths

logger = logging.getLogger(__name__)


class Request(Config):
    """One request: exactly one of its fields is set."""

    end: str | None = None
    """The trial to end."""
    drain: bool = False
    """Whether to start no further trial."""
    max_concurrent: Count | None = None
    """Most trials at once from now on."""

    @model_validator(mode="after")
    def _asks_for_one_thing(self) -> Self:
        if sum((self.end is not None, self.drain, self.max_concurrent is not None)) != 1:
            raise ValueError("expected end, drain or max_concurrent")
        return self


class Requests:
    """The requests to the process that holds a run directory; claim() removes those to earlier ones."""

    def __init__(self, run: RunDirPaths) -> None:
        self._path = run.requests
        self._num_read = 0
        """Bytes read."""

    def add(self, request: Request) -> None:
        """Add a request."""
        with open(self._path, "ab") as file:
            file.write(request.model_dump_json(exclude_defaults=True).encode() + b"\n")

    def read(self) -> list[Request]:
        """Return the requests that have come since the last call, oldest first; log invalid lines."""
        try:
            with open(self._path, "rb") as file:
                file.seek(self._num_read)
                added = file.read()
        except OSError:  # no request has come, or the storage is away
            return []
        whole, newline, _ = added.rpartition(b"\n")  # the last line may be half-written
        self._num_read += len(whole + newline)
        found = []
        for line in whole.splitlines():
            try:
                found.append(Request.model_validate_json(line))
            except ValidationError:
                logger.warning("%s: %.60r is not a request; use `orchestrator steer`", self._path, line)
        return found
