"""Pruning searches on Ray with MLflow, around the method in `gator`: the commands at the top, a folder for each part below."""

import sys
from importlib.util import find_spec
from pathlib import Path

NEEDED = (
    "torchvision", "ray", "optuna", "mlflow", "pyarrow", "pydantic", "yaml", "rich", "matplotlib", "plotly", "numpy", "PIL",
    "psutil", "grpc", "sklearn",
)  # fmt: skip
"""The modules of the extra search in pyproject.toml, except pynvml, without which a GPU's state is not recorded."""

# Here, because Python imports this file before any command. Only for a command (its program, or python -m, whose name is "-m"
# until the module is found): an import from another program ends with that program's own error.
if Path(sys.argv[0]).stem in ("orchestrator", "-m") and (
    missing := [name for name in NEEDED if find_spec(name) is None]
):
    print(
        f"orchestrator: missing packages: {', '.join(missing)}; run pip install 'gator-search[search]'", file=sys.stderr
    )
    sys.exit(2)
