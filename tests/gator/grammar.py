"""A seeded grammar of small networks, written as the source of real nn.Modules.

A network is a tree of steps. Each step has its own seed, so one step can be dropped or unwrapped while the others stay the same: so
generator.py makes a failing network small. The productions are in grammar_image.py and grammar_rest.py.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

HEADER = "import math\nimport torch\nimport torch.nn.functional as F\nfrom torch import nn\n"
SHARED = {
    "ACT": "nn.SiLU()",
    "RELU": "nn.ReLU(inplace=True)",
    "POOL": "nn.MaxPool2d(3, 1, 1)",
    "DROP": "nn.Dropout(0.1)",
}
"""Modules that every class may share, as YOLO's blocks share one activation."""


@dataclass(frozen=True)
class Value:
    """What a variable of the forward pass holds, for one sample."""

    kind: str
    """image (C, H, W), tokens (H, C) or vector (C)."""
    c: int
    h: int = 1
    w: int = 1


@dataclass(frozen=True)
class Step:
    """One production with its choices."""

    op: str
    seed: int
    wrap: bool = False
    """Whether it is a class of its own."""
    bodies: tuple[tuple["Step", ...], ...] = ()


@dataclass(frozen=True)
class Network:
    """The tree of a network. `seed` chooses its stem and head."""

    seed: int
    image: tuple[Step, ...]
    tokens: tuple[Step, ...] | None
    vector: tuple[Step, ...] | None


@dataclass(frozen=True)
class Production:
    """A kind of step."""

    write: Callable[..., Value]
    kind: str
    bodies: int
    weight: float


PRODUCTIONS: dict[str, Production] = {}


def production(
    kind: str, *, bodies: int = 0, weight: float = 1.0
) -> Callable[[Callable[..., Value]], Callable[..., Value]]:
    """Register a function that writes a step: (scope, rng, value, *bodies) -> the value after it."""

    def register(write: Callable[..., Value]) -> Callable[..., Value]:
        PRODUCTIONS[write.__name__] = Production(write, kind, bodies, weight)
        return write

    return register


class Source:
    """The classes of a network."""

    def __init__(self) -> None:
        self.classes: list[str] = []
        self.inputs: list[str] = ["(3, 8, 8)"]

    def add(self, name: str, scope: "Scope", arguments: str = "x") -> None:
        """Add the class that a scope has written."""
        members = scope.members or ["pass"]
        body = [
            f"class {name}(nn.Module):",
            "    def __init__(self):",
            "        super().__init__()",
            *(f"        {line}" for line in members),
            "",
            f"    def forward(self, {arguments}):",
            *(f"        {line}" for line in scope.lines),
        ]
        self.classes.append("\n".join(body))

    def new_name(self, stem: str) -> str:
        """Return an unused class name."""
        return f"{stem.title().replace('_', '')}{len(self.classes)}"


class Scope:
    """The class that is being written: its members and the lines of its forward()."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.members: list[str] = []
        self.lines: list[str] = []
        self.x = "x"
        """The variable that the next step reads and assigns."""
        self._numbers: dict[str, int] = {}

    def name(self, stem: str) -> str:
        """Return an unused name."""
        self._numbers[stem] = self._numbers.get(stem, 0) + 1
        return f"{stem}{self._numbers[stem]}"

    def member(self, stem: str, expression: str) -> str:
        """Add a member; return how forward() reads it."""
        name = self.name(stem)
        self.members.append(f"self.{name} = {expression}")
        return f"self.{name}"

    def line(self, text: str) -> None:
        """Add a line of forward(); {x} is the current variable."""
        self.lines.append(text.replace("{x}", self.x))

    def set(self, expression: str) -> None:
        """Assign the current variable."""
        self.line("{x} = " + expression)

    def run(self, steps: Sequence[Step], value: Value) -> Value:
        """Write steps on the current variable."""
        for step in steps:
            production = PRODUCTIONS[step.op]
            if production.kind not in (value.kind, "any"):
                continue
            value = self._wrapped(step, value) if step.wrap else self._write(step, value)
        return value

    def branch(self, steps: Sequence[Step], value: Value, start: str | None = None) -> tuple[str, Value]:
        """Write steps on a variable of their own; return its name and value."""
        own, saved = self.name("y"), self.x
        self.lines.append(f"{own} = {start or saved}")
        self.x = own
        value = self.run(steps, value)
        self.x = saved
        return own, value

    def _write(self, step: Step, value: Value) -> Value:
        return PRODUCTIONS[step.op].write(self, random.Random(step.seed), value, *step.bodies)

    def _wrapped(self, step: Step, value: Value) -> Value:
        inner = Scope(self.source)
        value = inner._write(replace(step, wrap=False), value)
        inner.lines.append("return x")
        name = self.source.new_name(step.op)
        self.source.add(name, inner)
        self.set(f"{self.member('block', f'{name}()')}({{x}})")
        return value


# --- choosing ------------------------------------------------------------------------------------------------------------


def choose(seed: int) -> Network:
    """Return the network of a seed."""
    rng = random.Random(seed)
    style = rng.random()
    return Network(
        seed=rng.randrange(10**6),
        image=_steps(rng, "image", rng.randint(1, 4) if style < 0.75 else rng.randint(0, 1), depth=0),
        tokens=_steps(rng, "tokens", rng.randint(1, 4), depth=0) if style >= 0.6 else None,
        vector=_steps(rng, "vector", rng.randint(0, 2), depth=0) if rng.random() < 0.8 else None,
    )


def _steps(rng: random.Random, kind: str, count: int, depth: int) -> tuple[Step, ...]:
    return tuple(_step(rng, kind, depth) for _ in range(count))


def _step(rng: random.Random, kind: str, depth: int) -> Step:
    known = {
        name: one for name, one in PRODUCTIONS.items() if one.kind in (kind, "any") and (depth < 2 or not one.bodies)
    }
    (op,) = rng.choices(list(known), [one.weight for one in known.values()])
    bodies = tuple(_steps(rng, kind, rng.randint(1, 3), depth + 1) for _ in range(known[op].bodies))
    return Step(op, rng.randrange(10**6), rng.random() < 0.5, bodies)


# --- shrinking -----------------------------------------------------------------------------------------------------------


def simpler(network: Network) -> Iterator[Network]:
    """Yield networks with one step less, one step replaced by its body, or one class less; and with fewer stages."""
    if network.vector is not None:
        yield replace(network, vector=None)
    if network.tokens is not None:
        yield replace(network, tokens=None)
    for field in ("vector", "tokens", "image"):
        for steps in _simpler_steps(getattr(network, field) or ()):
            yield replace(network, **{field: steps})


def _simpler_steps(steps: tuple[Step, ...]) -> Iterator[tuple[Step, ...]]:
    for number, step in enumerate(steps):
        before, after = steps[:number], steps[number + 1 :]
        yield before + after
        for body in step.bodies:
            yield before + body + after
        for place, body in enumerate(step.bodies):
            for smaller in _simpler_steps(body):
                bodies = (*step.bodies[:place], smaller, *step.bodies[place + 1 :])
                yield (*before, replace(step, bodies=bodies), *after)
        if step.wrap:
            yield (*before, replace(step, wrap=False), *after)
