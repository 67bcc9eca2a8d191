"""Syne Tune's MOASHA behind a pipe, for bench_search.py: it runs in an environment of its own and imports nothing of ours.

A line of JSON in, a line out. {"new": [grace epochs, reduction factor, last epoch]} starts a scheduler: "ready".
{"trial": number, "epoch": number, "losses": [two numbers, smaller is better]} is a report: "continue" or "stop".
"""

import json
import sys
from datetime import datetime

from syne_tune.backend.trial_status import Trial
from syne_tune.optimizer.schedulers.multiobjective.moasha import MOASHA  # 0.16 exports it no more


def answer(message: dict, scheduler: MOASHA, trials: dict[int, Trial]) -> str:
    """Return the decision on a report."""
    number = message["trial"]
    if number not in trials:
        trials[number] = Trial(trial_id=number, config={"x": 0}, creation_time=datetime.now())
        scheduler.on_trial_add(trials[number])
    result = {"epoch": message["epoch"], **{f"loss_{i}": loss for i, loss in enumerate(message["losses"])}}
    return "stop" if scheduler.on_trial_result(trials[number], result) == "STOP" else "continue"


for line in sys.stdin:
    message = json.loads(line)
    if "new" in message:
        grace_period, reduction_factor, max_t = message["new"]
        scheduler = MOASHA(
            {"x": 0},
            metrics=["loss_0", "loss_1"],
            time_attr="epoch",
            max_t=max_t,
            grace_period=grace_period,
            reduction_factor=reduction_factor,
        )
        trials: dict[int, Trial] = {}
        print("ready", flush=True)
    else:
        print(answer(message, scheduler, trials), flush=True)
