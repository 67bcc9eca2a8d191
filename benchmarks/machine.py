"""What a result was measured with: the line on top of each table."""

import importlib.metadata
import os
import platform
import time


def machine(*packages: str) -> str:
    """Return date, CPU, Python and the versions of these packages: "2026-11-24, 2 cores of ..., Python 3.11.7, torch 2.14.1"."""
    with open("/proc/cpuinfo") as lines:
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")
    versions = [f"{package} {importlib.metadata.version(package)}" for package in packages]
    parts = [time.strftime("%Y-%m-%d"), f"{os.cpu_count()} cores of {cpu}", f"Python {platform.python_version()}"]
    return ", ".join([*parts, *versions])
