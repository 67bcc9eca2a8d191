"""Removes secrets and control characters from what people read: error messages, logs, MLflow."""

import argparse
import json
import logging
import os
import re
from typing import Any, NoReturn
from urllib.parse import quote, quote_plus

_NAMES_A_SECRET = re.compile(
    r"TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|API_?KEY|ACCESS_?KEY|CREDENTIAL|_(KEY|PASS|PWD|AUTH|SAS)$", re.IGNORECASE
)
_NAMES_A_PLACE = ("_FILE", "_PATH", "_DIR", "_MODE")
_SHORTEST_SECRET = 8
"""Characters; a shorter value ("true", "aws") would be masked in the middle of ordinary words."""
# A password may contain a slash, which otherwise ends the host; after a host's port follows a path, which may contain an @.
_USER = re.compile(r"""://(?:[^/\s:@\[]*:(?!\d+/)[^\s"']*|[^/\s]*)@""")
_PASSWORD = re.compile(
    r"((?:passw(?:or)?d|passphrase|secret|(?:secret|access|private|api)_?key|\btoken)=)[^&\s]*", re.I
)
_QUERY = re.compile(r"([?&][\w.-]*(?:token|key|sig|signature|credential)=)[^&\s]*", re.I)


def masked(text: str) -> str:
    """Return the text without the users and passwords of URIs, and without the secrets of this process.

    Secrets are the values of environment variables with names such as MLFLOW_TRACKING_TOKEN, as they are and as escaped in
    URIs and JSON; a variable that holds the path of a secret (..._FILE, ..._PATH, ...) is not one.

    >>> masked("no answer from postgresql+psycopg2://me:se/cret@db:5432/mlflow?password=secret")
    'no answer from postgresql+psycopg2://db:5432/mlflow?password=...'
    >>> masked("https://host:443/data/a@2.jpg?size=8&sig=ab%2F")
    'https://host:443/data/a@2.jpg?size=8&sig=...'
    """
    for value in _secrets():
        text = text.replace(value, "...")
    return _QUERY.sub(r"\1...", _PASSWORD.sub(r"\1...", _USER.sub("://", text)))


def masked_values(values: Any) -> Any:
    """Return JSON values with every text in them masked; do so before writing them as JSON or YAML, which may break lines."""
    if isinstance(values, dict):
        return {key: masked_values(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [masked_values(value) for value in values]
    return masked(values) if isinstance(values, str) else values


class MaskingFormatter(logging.Formatter):
    """Formats log records, tracebacks included, without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        return masked(super().format(record))


class MaskingParser(argparse.ArgumentParser):
    """Reports errors in a command line without the secrets in it."""

    def error(self, message: str) -> NoReturn:
        """See argparse.ArgumentParser."""
        super().error(masked(message))


def _secrets() -> list[str]:
    """Return the values to hide, longest first, since one may be part of another."""
    found = {value for name, value in os.environ.items() if _is_secret(name, value)}
    written = {form for value in found for form in (value, quote(value), quote(value, safe=""), quote_plus(value))}
    return sorted(written | {json.dumps(value)[1:-1] for value in found}, key=len, reverse=True)


def _is_secret(name: str, value: str) -> bool:
    if not _NAMES_A_SECRET.search(name) or name.upper().endswith(_NAMES_A_PLACE) or len(value) < _SHORTEST_SECRET:
        return False
    return not (value.startswith("/") and os.path.exists(value))  # Google's ..._CREDENTIALS holds a path


def printable(text: str, kept: str = "\n\t") -> str:
    r"""Return the text with its control characters escaped, except those in `kept`.

    They could move the cursor, change colours, or make the terminal type an answer.

    >>> print(printable("\x1b[31mred"))
    \x1b[31mred
    """
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)
