"""Random small networks, each traced, cut and compared: exact, or refused by gator's own error. Anything else is a defect.

    python -m tests.gator.generator --seeds 0:2000               prints each defect's smallest network, then a summary
    python -m tests.gator.generator --seeds 0:2000 --seconds 200 in pieces: the same command resumes where it stopped
    python -m tests.gator.generator --show 17                    the source of one network, and what is found

The grammar is in grammar.py. gator.verify() compares: pruned, gated, and the unpruned network without the closed channels, in eval and
training mode, the gradients of a training step, and the costs.
"""

import argparse
import json
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

import gator
from gator.checking.verify import verify
from gator.costs.counted import MacsCost
from gator.costs.summary import CostSummary
from gator.errors import GatorError, VerificationError
from tests.gator.grammar import Network, choose, simpler
from tests.gator.grammar_rest import source_of

EXACT, REFUSED, DEFECT, INVALID = "exact", "refused", "defect", "invalid"


@dataclass
class Finding:
    """What was found for one network."""

    seed: int
    verdict: str
    """exact, refused, defect, or invalid: a network that does not run or is not finite."""
    reason: str = ""
    channels: int = 0
    locked: dict[str, int] = field(default_factory=dict)
    """Channels that cannot be pruned by reason, without the network's outputs."""
    reach: float = 0.0


def build(source: str) -> tuple[nn.Module, list[Tensor]]:
    """Return a network and two samples of its inputs, in float64."""
    names: dict[str, object] = {}
    exec(compile(source, "network.py", "exec"), names)
    torch.manual_seed(0)
    net: nn.Module = names["Net"]()  # type: ignore[operator]
    return net.double().eval(), [torch.randn(2, *shape, dtype=torch.float64) for shape in names["SHAPES"]]  # type: ignore[attr-defined]


def examine(source: str, seed: int) -> Finding:
    """Trace a network, cut it, and compare."""
    try:
        net, inputs = build(source)
        if not _runs(net, inputs):
            return Finding(seed, INVALID, "not finite")
    except Exception as error:
        return Finding(seed, INVALID, _line(error))
    try:
        graph = gator.trace(net, inputs)
    except GatorError as error:
        return Finding(seed, REFUSED, _line(error))
    except Exception as error:
        return Finding(seed, DEFECT, f"trace: {_line(error)}")
    finding = Finding(seed, EXACT, channels=graph.num_channels, reach=CostSummary.of(MacsCost(graph)).reachable)
    for group in graph.locked:
        if group.reason != "output of the model":
            finding.locked[group.reason] = finding.locked.get(group.reason, 0) + group.num_channels
    try:
        verify(net, graph, inputs)
    except VerificationError as error:
        is_told = "gates cannot be trained" in str(error)  # it divides by what gates close, and is told so
        finding.verdict, finding.reason = REFUSED if is_told else DEFECT, _line(error)
    except GatorError as error:
        finding.verdict, finding.reason = DEFECT, f"refused after the trace: {_line(error)}"
    except Exception as error:
        finding.verdict, finding.reason = DEFECT, f"verify: {_line(error)}"
    return finding


def _runs(net: nn.Module, inputs: list[Tensor]) -> bool:
    with torch.no_grad():
        outputs = torch.utils._pytree.tree_leaves(net(*inputs))
    trained = torch.utils._pytree.tree_leaves(net.train()(*inputs))
    torch.stack([x.square().mean() for x in trained]).sum().backward()
    outputs += [*trained, *(p.grad for p in net.parameters() if p.grad is not None)]
    net.eval().zero_grad()
    return all(bool(x.isfinite().all()) and float(x.abs().max()) < 1e6 for x in outputs)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


def kind(reason: str) -> str:
    """Return what two findings of one cause have in common."""
    reason = re.sub(r"[0-9][0-9,.]*", "0", reason.partition(" by ")[0].partition("({")[0])
    words = ("'" + part.split("'")[0] + "'" if number % 2 else part for number, part in enumerate(reason.split("'")))
    return "".join(word for number, word in enumerate(words) if number % 2 == 0)[:120]


def shrink(network: Network, fails: Callable[[Network], bool]) -> Network:
    """Return a network from which no step can be dropped while it still fails."""
    while True:
        for smaller in simpler(network):
            if fails(smaller):
                network = smaller
                break
        else:
            return network


def smallest(seed: int, reason: str) -> str:
    """Return the source of the smallest network with the same defect."""

    def fails(network: Network) -> bool:
        finding = examine(source_of(network), seed)
        return finding.verdict == DEFECT and kind(finding.reason) == kind(reason)

    return source_of(shrink(choose(seed), fails))


def main() -> int:
    """Run the command line; exit code 1 if there is a defect."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0:50", metavar="A:B")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="stop after this time; the same command resumes"
    )
    parser.add_argument(
        "--results", type=Path, help="file of findings, a JSON line each; seeds that it holds are skipped"
    )
    parser.add_argument("--show", type=int, metavar="SEED")
    parser.add_argument("--no-shrink", action="store_true")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if arguments.show is not None:
        source = source_of(choose(arguments.show))
        print(source, examine(source, arguments.show), sep="\n")
        return 0
    begin, end = map(int, arguments.seeds.split(":"))
    known = (
        [Finding(**json.loads(line)) for line in arguments.results.read_text().splitlines()]
        if arguments.results and arguments.results.exists()
        else []
    )
    findings = {one.seed: one for one in known if begin <= one.seed < end}
    began = time.perf_counter()
    shown = {kind(one.reason) for one in findings.values()}
    for seed in range(begin, end):
        if seed in findings or time.perf_counter() - began > arguments.seconds:
            continue
        finding = findings[seed] = examine(source_of(choose(seed)), seed)
        if arguments.results:
            with arguments.results.open("a") as file:
                file.write(json.dumps(asdict(finding)) + "\n")
        if finding.verdict == DEFECT:
            print(f"--- seed {seed}: {finding.reason}", flush=True)
            if not arguments.no_shrink and kind(finding.reason) not in shown:
                print(smallest(seed, finding.reason), flush=True)
            shown.add(kind(finding.reason))
    print(summary(list(findings.values())))
    return int(any(one.verdict == DEFECT for one in findings.values()))


def summary(findings: list[Finding]) -> str:
    """Return how many networks were exact and refused, how much of them can be pruned, and why the rest cannot."""
    verdicts = Counter(one.verdict for one in findings)
    valid = [one for one in findings if one.verdict != INVALID]
    supported = [one for one in valid if one.verdict == EXACT]
    lines = [
        f"{len(findings)} networks: "
        + ", ".join(f"{verdicts[name]} {name}" for name in (EXACT, REFUSED, DEFECT, INVALID))
    ]
    lines.append(f"refused: {verdicts[REFUSED] / max(1, len(valid)):.1%} of those that run")
    channels, locked = sum(one.channels for one in supported), sum(sum(one.locked.values()) for one in supported)
    lines.append(
        f"channels that can be pruned: {channels / max(1, channels + locked):.1%} of the exact ones', outputs aside"
    )
    lines.append(
        f"mean reach {sum(one.reach for one in supported) / max(1, len(supported)):.1%}; "
        f"without any group: {sum(not one.channels for one in supported)}"
    )
    reasons = Counter[str]()
    for one in supported:
        reasons.update(one.locked)
    by_kind = Counter[str]()
    for reason, count in reasons.items():
        by_kind[kind(reason)] += count
    lines += [f"{count:6} channels locked: {reason}" for reason, count in by_kind.most_common(25)]
    lines += [
        f"{count:6} {verdict}: {reason}"
        for (verdict, reason), count in Counter(
            (one.verdict, kind(one.reason)) for one in findings if one.verdict != EXACT
        ).most_common(40)
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
