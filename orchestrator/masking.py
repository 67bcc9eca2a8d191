"""Secrets stay out of what people read: error messages, logs, MLflow."""

import logging
import os
import re

_NAMES_A_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_?KEY|CREDENTIAL", re.IGNORECASE)
_SHORTEST_SECRET = 8
"""Characters; a shorter value ("true", "aws") would be masked in the middle of ordinary words."""


def masked(text: str) -> str:
    """Return the text without the users and passwords of the URIs in it, and without this process's secrets.

    Secrets are the values of environment variables whose names say so, such as MLFLOW_TRACKING_TOKEN; one that names a
    place to look for a secret (..._FILE, ..._PATH, ..._MODE) holds none.

    >>> masked("no answer from postgresql+psycopg2://me:secret@db:5432/mlflow?password=secret")
    'no answer from postgresql+psycopg2://db:5432/mlflow?password=...'
    """
    for value in _secrets():
        text = text.replace(value, "...")
    return re.sub(r"(password=)[^&\s]*", r"\1...", re.sub(r"://[^/\s]*@", "://", text))


class MaskingFormatter(logging.Formatter):
    """Formats log records, tracebacks included, without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        return masked(super().format(record))


def _secrets() -> list[str]:
    """Return the values to hide, longest first: one may be a part of another."""
    found = {
        value
        for name, value in os.environ.items()
        if _NAMES_A_SECRET.search(name)
        and not name.endswith(("_FILE", "_PATH", "_MODE"))
        and len(value) >= _SHORTEST_SECRET
    }
    return sorted(found, key=len, reverse=True)
