"""What follows from a search's config: how long trials are, after which epochs they are judged, how many run at once."""

from orchestrator.config.search import SearchConfig


def rung_epochs(grace_epochs: int, reduction_factor: float, max_epochs: int) -> list[int]:
    """Return the epochs after which trials are judged; the last epoch is not one, since stopping there saves nothing.

    >>> rung_epochs(grace_epochs=1, reduction_factor=3, max_epochs=9)
    [1, 3]
    """
    rungs: list[int] = []
    epoch: float = grace_epochs
    while round(epoch) < max_epochs:
        rungs.append(round(epoch))
        epoch *= reduction_factor
    return list(dict.fromkeys(rungs))


def expected_num_epochs(config: SearchConfig) -> float:
    """Return the epochs of the average trial if each rung keeps its share; for median stopping, whose share is unknown, the most.

    >>> expected_num_epochs(config)   # rungs 1 and 3 of 9, eta 3: 1 + 2 / 3 + 6 / 9   # doctest: +SKIP
    2.333
    """
    scheduler, longest = config.scheduler, max_num_epochs(config)
    if scheduler.type in ("none", "median"):
        return longest
    bounds = [*rungs_of(config), longest]
    steps = zip([0, *bounds[:-1]], bounds, strict=True)
    return sum((end - start) / scheduler.reduction_factor**rung for rung, (start, end) in enumerate(steps))


def max_num_epochs(config: SearchConfig) -> int:
    """Return the epochs of the search's longest trial, gating and fine-tuning together."""
    return max_gating_epochs(config) + _longest(config, "finetuning", config.base.finetuning.epochs)


def max_gating_epochs(config: SearchConfig) -> int:
    """Return the gating epochs of the trial of the search that has most of them."""
    return _longest(config, "gating", config.base.gating.epochs)


def rungs_of(config: SearchConfig) -> list[int]:
    """Return the epochs after which trials are compared with those before them; empty if the scheduler has no rungs."""
    scheduler = config.scheduler
    if scheduler.type in ("none", "median"):
        return []
    return rung_epochs(num_grace_epochs(config), scheduler.reduction_factor, max_num_epochs(config))


def num_grace_epochs(config: SearchConfig) -> int:
    """Return the epochs before a trial may be stopped.

    >>> num_grace_epochs(config)   # scheduler.grace_epochs is null, gating.epochs 7   # doctest: +SKIP
    8
    """
    given = config.scheduler.grace_epochs
    return max_gating_epochs(config) + 1 if given is None else given


def _longest(config: SearchConfig, stage: str, epochs: int) -> int:
    """Return the most epochs of a stage that a trial can have; epochs: their number if it is not searched."""
    domain = config.params.get(f"{stage}.epochs")
    return epochs if domain is None else max(int(value) for value in domain.corners() if value is not None)


def order_decides(config: SearchConfig) -> bool:
    """Return whether the order in which concurrent trials report would change a table that is promised to be repeatable.

    profile.clock "model" promises the same table for the same seed. Which trials are stopped, what TPE suggests and
    what a trial can start from depend on which trial reports first, and so on time.
    """
    learns = config.search.algorithm in ("tpe", "nsga2") or config.search.descend == "nearest"
    is_sensitive = config.scheduler.type != "none" or learns
    return config.base.profile.clock == "model" and is_sensitive


def num_concurrent(config: SearchConfig, capacity: int) -> int:
    """Return how many trials run at once; capacity: as many as the cluster holds."""
    if order_decides(config) or config.search.descend == "chain":
        return 1
    return min(capacity, config.search.max_concurrent or capacity, config.search.num_trials)
