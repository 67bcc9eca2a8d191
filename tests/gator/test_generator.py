"""Random small networks are exact, or refused by gator's own error; what makes and compares them: generator.py."""

import pytest

from tests.gator.generator import DEFECT, examine, kind, shrink, source_of, summary
from tests.gator.grammar import Network, choose


def defects(seeds: range) -> list[str]:
    findings = [examine(source_of(choose(seed)), seed) for seed in seeds]
    return [f"seed {one.seed}: {one.reason}" for one in findings if one.verdict == DEFECT]


def test_random_networks_are_exact_or_refused() -> None:
    found = defects(range(50))
    assert not found, "\n".join(found)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("begin", range(50, 2000, 75))
def test_more_random_networks_are_exact_or_refused(begin: int) -> None:
    found = defects(range(begin, min(begin + 75, 2000)))
    assert not found, "\n".join(found)


def test_a_seed_is_one_network() -> None:
    assert source_of(choose(7)) == source_of(choose(7)) != source_of(choose(8))


def test_a_failing_network_shrinks_to_what_fails() -> None:
    network = next(one for one in map(choose, range(500)) if "gate" in _ops(one) and len(one.image) > 2)
    small = shrink(network, lambda one: "gate" in _ops(one))
    assert _ops(small) == ["gate"]
    assert (small.tokens, small.vector) == (None, None)


def _ops(network: Network) -> list[str]:
    return [step.op for step in network.image]


def test_a_foreign_exception_is_a_defect(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        """Raise what gator must not let through."""
        raise KeyError("conv1")

    monkeypatch.setattr("gator.trace", fail)
    finding = examine(source_of(choose(0)), 0)
    assert (finding.verdict, finding.reason) == (DEFECT, "trace: KeyError: 'conv1'")
    assert "1 defect" in summary([finding])


def test_findings_of_one_cause_are_one_kind() -> None:
    one, other = "group 'a.b' of 3 channels differs by 1e-2 of all", "group 'c' of 17 channels differs by 3e-4 of all"
    assert kind(one) == kind(other)
