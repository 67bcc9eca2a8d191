#!/usr/bin/env bash
# MLflow's tracking server for a team: PostgreSQL behind it, files in an object store or a folder. See docs/mlflow.md.
#
#   MLFLOW_BACKEND_STORE_URI=postgresql+psycopg2://mlflow@db/mlflow  MLFLOW_ARTIFACTS_DESTINATION=s3://bucket/mlflow  clusters/mlflow/serve.sh
#
# Settings come from the environment, so that no password stands on a command line. More options are passed on to MLflow.
set -euo pipefail

: "${MLFLOW_BACKEND_STORE_URI:?set it to the data base, postgresql+psycopg2://USER@HOST:5432/NAME; the password goes into PGPASSWORD}"
: "${MLFLOW_ARTIFACTS_DESTINATION:?set it to where files go, s3://BUCKET/PREFIX or a folder}"

# MLflow's plain postgresql:// means the driver psycopg 3, which its own packages do not bring.
if [[ $MLFLOW_BACKEND_STORE_URI == postgresql://* ]]; then
  echo "serve.sh: MLFLOW_BACKEND_STORE_URI begins with postgresql://, expected postgresql+psycopg2://" >&2
  exit 2
fi

host=${MLFLOW_HOST:-127.0.0.1}
if [[ $host != 127.* && $host != localhost ]]; then
  echo "serve.sh: listens on $host: whoever reaches it reads and writes every record; put it behind a proxy that asks who they are," >&2
  echo "serve.sh: and name it in MLFLOW_SERVER_ALLOWED_HOSTS, or clients get 403" >&2
fi

export MLFLOW_DISABLE_TELEMETRY=true          # nothing is told to MLflow's makers
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false # eight helper processes for features that pruning does not use
exec "${PYTHON:-python}" -m mlflow server --host "$host" --port "${MLFLOW_PORT:-5000}" --workers "${MLFLOW_WORKERS:-2}" "$@"
