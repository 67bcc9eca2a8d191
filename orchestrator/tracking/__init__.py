"""MLflow, and the only room that imports it. Imports: config, storage, reporting, models, gator."""

import os

# MLflow reads these on import and at every request; what the user has set wins. With them a server that is down costs
# 4 s (one that hangs, 35 s) once instead of 4 minutes, and a terminal shows no progress bars or links.
for _name, _value in {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}.items():
    os.environ.setdefault(_name, _value)
