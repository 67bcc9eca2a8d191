import io
from typing import Any

import pytest
from rich.console import Console

from orchestrator.config.search import Constraint, SearchConfig
from orchestrator.reporting.outcome import Outcome
from orchestrator.reporting.progress import Progress, SearchState
from tests.orchestrator import planted


def make_config(num_trials: int = 4, **scheduler: Any) -> SearchConfig:
    return SearchConfig.model_validate(
        {
            "name": "test",
            "base": planted.tiny_base(),
            "objectives": [{"metric": "top1", "mode": "max"}, {"metric": "latency_ms", "mode": "min"}],
            "search": {"num_trials": num_trials},
            "scheduler": scheduler,
        }
    )


def report(epoch: int, **more: Any) -> dict[str, Any]:
    return {"epoch": epoch, "stage": "gate", "top1": 91.5, "latency_ms": 2.0, "macs_ratio": 0.5, **more}


def row(trial_id: str, status: str = "finished", **more: Any) -> dict[str, Any]:
    return {
        "trial_id": trial_id,
        "kind": "trial",
        "status": status,
        "stopped_epoch": None,
        "top1": 91.5,
        "latency_ms": 2.0,
        "macs_ratio": 0.5,
        **more,
    }


UNPRUNED = row("unpruned", kind="unpruned", latency_ms=4.0)


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=120)


def lines(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_off_a_terminal_every_event_is_one_plain_line(console: Console):
    with Progress(make_config(), console) as progress:
        progress.started("unpruned", "unpruned")
        progress.ended(UNPRUNED)
        progress.started("trial_0000", "trial")
        progress.epoch("trial_0000", report(1))
        progress.epoch("trial_0000", report(3, stage="finetune", final=True))
        progress.ended(row("trial_0000"))
    assert lines(console)[:-1] == [
        "Measuring the unpruned network",
        "the unpruned network: top1 91.50 latency_ms 4.000 macs_ratio 0.500",
        "trial_0000 starts",
        "trial_0000 epoch 1/3 gating top1 91.50 latency_ms 2.000 macs_ratio 0.500",
        "trial_0000 finished top1 91.50 latency_ms 2.000 macs_ratio 0.500",
    ]
    # hypervolume from guessing 25 % at 4 ms: (91.5 - 25) * (4 - 2)
    assert lines(console)[-1].startswith("1/4 trials ended, front 1, hypervolume 133")


def test_a_failure_is_told_with_its_reason(console: Console):
    progress = Progress(make_config(), console)
    progress.started("trial_0000", "trial")
    progress.ended(row("trial_0000", "failed", error="loss is nan [red]in[/red] epoch 2"))
    assert lines(console)[1] == "trial_0000 failed: loss is nan [red]in[/red] epoch 2"


def test_the_time_left_counts_the_epochs_to_come():
    state = SearchState(make_config())
    assert state.left_s(0.0) is None
    state.begin(now_s=100.0)
    state.start("trial_0000")
    assert state.left_s(110.0) is None
    state.epoch("trial_0000", report(1))
    # 10 s an epoch; 2 epochs of this trial and 3 of each of the other three
    assert state.left_s(110.0) == pytest.approx(110.0)


def test_a_continued_trials_earlier_epochs_took_no_time():
    state = SearchState(make_config(num_trials=1))
    state.begin(now_s=0.0)
    state.start("trial_0000")
    state.epoch("trial_0000", report(2))
    assert state.left_s(10.0) == pytest.approx(10.0)


def test_the_time_left_of_baselines_counts_their_own_epochs():
    state = SearchState(make_config(num_trials=1).model_copy(update={"baselines": ("uniform",)}))
    state.begin(now_s=0.0)
    state.start("trial_0000")
    for epoch in (1, 2, 3):
        state.epoch("trial_0000", report(epoch))
    state.end(row("trial_0000"))
    state.begin(now_s=100.0)
    state.start("uniform")
    state.epoch("uniform", report(1))
    assert state.left_s(110.0) == pytest.approx(20.0)  # two more epochs of 10 s


def test_the_front_is_computed_once_for_each_new_row():
    state = SearchState(make_config())
    state.load(Outcome(state.config, [UNPRUNED, row("trial_0000")]))
    assert len(state.outcome.front) == 1
    assert state.outcome.front is state.outcome.front
    state.end(row("trial_0001"))
    assert len(state.outcome.front) == 2


def test_it_is_said_once_while_the_search_runs_that_nothing_meets_the_constraints(console: Console):
    constraints = [Constraint(metric="macs_ratio", max=0.4)]
    progress = Progress(make_config(num_trials=9).model_copy(update={"constraints": constraints}), console)
    for number in range(5):
        progress.started(f"trial_{number:04d}", "trial")
        progress.ended(row(f"trial_{number:04d}"))
    said = [line for line in lines(console) if "The front is empty" in line]
    assert said == [
        "The front is empty: none of 3 finished trials meets the constraints (macs_ratio must be at most 0.4, the smallest is 0.5)."
    ]


def test_an_earlier_process_rows_count():
    state = SearchState(make_config())
    rows = [UNPRUNED, row("trial_0000"), row("trial_0001", "stopped", stopped_epoch=1), row("trial_0002", "failed")]
    state.load(Outcome(state.config, rows))
    assert state.num_ended == 3
    assert [front["trial_id"] for front in state.outcome.front] == ["trial_0000"]


def test_on_a_terminal_the_table_shows_every_running_trial_and_the_front():
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    progress = Progress(make_config(grace_epochs=1, reduction_factor=2), console)  # rungs 1 and 2 of 3 epochs
    with progress:
        progress.earlier(Outcome(progress.state.config, [UNPRUNED, row("trial_0000")]))
        progress.started("trial_0001", "trial")
        progress.epoch("trial_0001", report(1))
    plain = Console(file=io.StringIO(), width=120)
    plain.print(progress.table())
    header, first, second, *_, caption = lines(plain)
    assert header.split() == ["trial", "state", "epoch", "rung", "top1", "latency_ms", "macs_ratio"]
    assert first.split() == ["*", "trial_0000", "finished", "3/3", "2/2", "91.50", "2.000", "0.500"]
    assert second.split() == ["trial_0001", "gating", "1/3", "1/2", "91.50", "2.000", "0.500"]
    assert "1/4 trials ended, front 1" in caption


def test_a_long_search_shows_the_trials_that_ended_last():
    progress = Progress(make_config(num_trials=40), Console(file=io.StringIO(), force_terminal=True))
    progress.earlier(Outcome(progress.state.config, [row(f"trial_{i:04d}") for i in range(30)]))
    plain = Console(file=io.StringIO(), width=120)
    plain.print(progress.table())
    assert [line.split()[1] for line in lines(plain)[1:-1]] == [f"trial_{i:04d}" for i in range(18, 30)]
