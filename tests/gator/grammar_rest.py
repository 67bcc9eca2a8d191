"""Productions on tokens, (N, L, C), and vectors, (N, C); and the stem and head of a network."""
# ruff: noqa: E501 - templates of code, in one piece

from dataclasses import replace
from random import Random

from tests.gator import grammar_image
from tests.gator.grammar import HEADER, SHARED, Network, Scope, Source, Step, Value, production

ACT_LINES = tuple(line for line in grammar_image.ACT_LINES if "torch.eye" not in line)


def _fit(e: Scope, name: str, v: Value, to: Value) -> None:
    if v.c != to.c:
        e.lines.append(f"{name} = {e.member('fit', f'nn.Linear({v.c}, {to.c})')}({name})")
    if v.h != to.h:
        e.lines.append(f"{name} = {name}.mean(1, keepdim=True).expand(-1, {to.h}, -1)")


def _norm(r: Random, c: int) -> str:
    return r.choice(
        (f"nn.LayerNorm({c})",) * 4
        + (
            f"nn.RMSNorm({c})",
            f"nn.LayerNorm({c}, elementwise_affine=False)",
            f"nn.LayerNorm({c}, bias=False)",
            "nn.Identity()",
        )
    )


# --- tokens ---------------------------------------------------------------------------------------------------------------


@production("tokens", weight=2)
def linear(e: Scope, r: Random, v: Value) -> Value:
    """Write a linear layer."""
    out = r.choice((6, 8, 12))
    if r.random() < 0.2:
        weight = e.member("weight", f"nn.Parameter(0.3 * torch.randn({out}, {v.c}))")
        e.set(
            r.choice(
                (
                    f"F.linear({{x}}, {weight})",
                    f"{{x}} @ {weight}.t()",
                    f"torch.einsum('nlc,oc->nlo', {{x}}, {weight})",
                    f"torch.matmul({{x}}, {weight}.T)",
                )
            )
        )
    else:
        e.set(
            f"{e.member('fc', r.choice((f'nn.Linear({v.c}, {out})',) * 3 + (f'nn.Sequential(nn.Linear({v.c}, {out}), {grammar_image.act(r)})',)))}({{x}})"
        )
    return replace(v, c=out)


@production("tokens", weight=2)
def norm_tokens(e: Scope, r: Random, v: Value) -> Value:
    """Write a normalisation."""
    if r.random() < 0.7:
        e.set(f"{e.member('norm', _norm(r, v.c))}({{x}})")
        return v
    w = e.member("weight", f"nn.Parameter(torch.rand({v.c}) + 0.5)")
    e.set(
        r.choice(
            (
                f"F.rms_norm({{x}}, ({v.c},), {w})",
                f"F.layer_norm({{x}}, {{x}}.shape[-1:], {w})",
                f"{{x}} * torch.rsqrt({{x}}.pow(2).mean(-1, keepdim=True) + 1e-6) * {w}",
                f"F.normalize({{x}}, dim=-1) * {w}",
                f"{e.member('bn', f'nn.BatchNorm1d({v.c})')}({{x}}.transpose(1, 2)).transpose(1, 2) * {w}",
                f"({{x}} - {{x}}.mean(-1, keepdim=True)) / ({{x}}.std(-1, keepdim=True) + 1e-5) * {w}",
            )
        )
    )
    return v


@production("tokens", weight=2)
def activate_tokens(e: Scope, r: Random, v: Value) -> Value:
    """Write an activation."""
    e.set(f"{e.member('act', grammar_image.act(r))}({{x}})" if r.random() < 0.4 else r.choice(ACT_LINES))
    return v


@production("tokens", bodies=1, weight=3)
def residual_tokens(e: Scope, r: Random, v: Value, body: tuple[Step, ...]) -> Value:
    """Write a pre-norm shortcut around a body."""
    start = f"{e.member('norm', _norm(r, v.c))}({e.x})" if r.random() < 0.6 else None
    y, after = e.branch(body, v, start)
    _fit(e, y, after, v)
    scale = e.member("scale", f"nn.Parameter(torch.rand({v.c}))") if r.random() < 0.3 else None
    e.set(f"{{x}} + {scale} * {y}" if scale else r.choice((f"{{x}} + {y}", f"{y} + {{x}}", f"{{x}}.add({y})")))
    return v


@production("tokens", weight=3)
def mlp(e: Scope, r: Random, v: Value) -> Value:
    """Write the two layers of a transformer's block, or their gated forms."""
    c, hidden = v.c, r.choice((6, 10, 16))
    pre, add = r.random() < 0.6, r.random() < 0.7
    e.line(f"y = {e.member('norm', _norm(r, c))}({{x}})" if pre else "y = {x}")
    style = r.choice(("plain", "plain", "swiglu", "w1w2w3", "geglu", "functional", "drop"))
    if style in ("plain", "drop"):
        drop = ", nn.Dropout(0.1)" if style == "drop" else ""
        e.line(
            f"y = {e.member('mlp', f'nn.Sequential(nn.Linear({c}, {hidden}), {grammar_image.act(r)}{drop}, nn.Linear({hidden}, {c}){drop})')}(y)"
        )
    elif style == "w1w2w3":
        w1, w2, w3 = (
            e.member("w", f"nn.Linear({a}, {b}, bias=False)") for a, b in ((c, hidden), (hidden, c), (c, hidden))
        )
        e.line(f"y = {w2}(F.silu({w1}(y)) * {w3}(y))")
    elif style == "functional":
        one, two = e.member("fc", f"nn.Linear({c}, {hidden})"), e.member("fc", f"nn.Linear({hidden}, {c})")
        e.line(f"y = F.linear(F.gelu(F.linear(y, {one}.weight, {one}.bias)), {two}.weight, {two}.bias)")
    else:
        one, two = e.member("fc", f"nn.Linear({c}, {2 * hidden})"), e.member("fc", f"nn.Linear({hidden}, {c})")
        e.line(f"a, b = {one}(y).chunk(2, dim=-1)")
        e.line(f"y = {two}(" + ("F.silu(a) * b)" if style == "swiglu" else "a * F.gelu(b))"))
    e.set("{x} + y" if add else "y")
    return v


def _split_heads(e: Scope, r: Random, style: str, c: int, heads: int, d: int) -> None:
    """Write queries, keys and values of several heads."""
    inner = heads * d
    if style == "fused":
        qkv = e.member("qkv", f"nn.Linear({c}, {3 * inner})")
        e.line(
            r.choice(
                (
                    f"q, k, v = {qkv}(y).reshape(n, l, 3, {heads}, {d}).permute(2, 0, 3, 1, 4).unbind(0)",
                    f"q, k, v = {qkv}(y).reshape(n, l, 3, {heads}, {d}).permute(2, 0, 3, 1, 4)",
                    f"q, k, v = (t.view(n, l, {heads}, {d}).transpose(1, 2) for t in {qkv}(y).chunk(3, dim=-1))",
                    f"q, k, v = {qkv}(y).view(n, l, {heads}, {3 * d}).transpose(1, 2).chunk(3, dim=-1)",
                    f"q, k, v = [t.reshape(n, -1, {heads}, {inner} // {heads}).permute(0, 2, 1, 3) for t in torch.split({qkv}(y), {inner}, dim=2)]",
                )
            )
        )
    elif style == "gqa":
        q, kv = e.member("q", f"nn.Linear({c}, {inner})"), e.member("kv", f"nn.Linear({c}, {2 * d})")
        e.line(f"q = {q}(y).view(n, l, {heads}, {d}).transpose(1, 2)")
        e.line(f"k, v = {kv}(y).view(n, l, 1, {2 * d}).transpose(1, 2).expand(-1, {heads}, -1, -1).chunk(2, -1)")
    else:
        q, k, val = (e.member(name, f"nn.Linear({c}, {inner}, bias={r.random() < 0.7})") for name in "qkv")
        shape = r.choice(
            (
                f"view(n, l, {heads}, {d}).transpose(1, 2)",
                f"reshape(n, l, {heads}, -1).permute(0, 2, 1, 3)",
                f"unflatten(-1, ({heads}, {d})).transpose(1, 2)",
                f"view(n, -1, {heads}, {d}).transpose(1, 2)",
            )
        )
        e.line(f"q, k, v = {q}(y).{shape}, {k}(y).{shape}, {val}(y).{shape}")


def _single_head(e: Scope, r: Random, c: int, inner: int) -> None:
    """Write attention of one head."""
    q, k, val, o = (
        e.member("proj", f"nn.Linear({a}, {b})") for a, b in ((c, inner), (c, inner), (c, inner), (inner, c))
    )
    e.line(f"q, k, v = {q}(y), {k}(y), {val}(y)")
    e.line(
        r.choice(
            (
                f"s = (q @ k.transpose(1, 2) / {inner}**0.5).softmax(-1)",
                "s = torch.softmax(q @ k.mT * q.size(-1) ** -0.5, dim=-1)",
                "s = torch.bmm(q, k.transpose(1, 2)).softmax(2)",
            )
        )
    )
    e.line(f"y = {o}(s @ v)")


@production("tokens", weight=4)
def attention(e: Scope, r: Random, v: Value) -> Value:
    """Write attention, in one of the many ways of doing so."""
    c, heads, d = v.c, r.choice((2, 3)), r.choice((2, 3, 4))
    inner = heads * d
    pre, add = r.random() < 0.6, r.random() < 0.7
    e.line(f"y = {e.member('norm', _norm(r, c))}({{x}})" if pre else "y = {x}")
    style = r.choice(("fused", "fused", "separate", "separate", "mha", "single", "einsum", "gqa", "qk norm", "bias"))
    if style == "mha" and any(c % h == 0 for h in (2, 3)):
        mha = e.member("mha", f"nn.MultiheadAttention({c}, {2 if c % 2 == 0 else 3}, batch_first=True)")
        e.line(f"y = {mha}(y, y, y, need_weights={r.random() < 0.5})[0]")
        e.set("{x} + y" if add else "y")
        return v
    if style == "single":
        _single_head(e, r, c, inner)
        e.set("{x} + y" if add else "y")
        return v
    proj = e.member("proj", f"nn.Linear({inner}, {c})")
    e.line("n, l, _ = y.shape")
    _split_heads(e, r, style, c, heads, d)
    if style == "qk norm":
        qn, kn = e.member("qn", f"nn.LayerNorm({d})"), e.member("kn", f"nn.LayerNorm({d})")
        e.line(
            r.choice(
                (
                    f"q, k = {qn}(q), {kn}(k)",
                    "q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)",
                    f"q, k = F.rms_norm(q, ({d},)), F.rms_norm(k, ({d},))",
                )
            )
        )
    if style == "bias":
        bias = e.member(
            "bias",
            f"nn.Parameter(torch.rand({r.choice((f'1, {heads}, {v.h}, {v.h}', f'{heads}, {v.h}, {v.h}', f'{heads}, 1, 1'))}))",
        )
        e.line(f"y = ((q @ k.transpose(-2, -1)) * {d}**-0.5 + {bias}).softmax(dim=-1) @ v")
    elif style == "einsum":
        e.line("s = torch.einsum('bhid,bhjd->bhij', q, k).softmax(-1)")
        e.line("y = torch.einsum('bhij,bhjd->bhid', s, v)")
    else:
        e.line(
            "y = "
            + r.choice(
                (
                    "F.scaled_dot_product_attention(q, k, v)",
                    f"((q @ k.transpose(-2, -1)) * {d}**-0.5).softmax(dim=-1) @ v",
                    "F.scaled_dot_product_attention(q, k, v, is_causal=True)",
                    "torch.matmul(torch.matmul(q / q.shape[-1] ** 0.5, k.transpose(2, 3)).softmax(-1), v)",
                    "F.relu(q) @ (F.relu(k).transpose(-2, -1) @ v)",
                )
            )
        )
    e.line(
        "y = y."
        + r.choice(
            (
                f"transpose(1, 2).reshape(n, l, {inner})",
                "transpose(1, 2).flatten(2)",
                f"permute(0, 2, 1, 3).contiguous().view(n, l, {inner})",
                "transpose(1, 2).reshape(n, l, -1)",
            )
        )
    )
    e.line(f"y = {proj}(y)")
    e.set("{x} + y" if add else "y")
    return v


@production("tokens", weight=2)
def move_tokens(e: Scope, r: Random, v: Value) -> Value:
    """Write movements of tokens, and layers over them."""
    c, n = v.c, v.h
    forms: list[tuple[str, Value]] = [
        ("{x}.roll(1, 1)", v),
        ("{x}.flip(1)", v),
        ("{x}[:, 1:]", replace(v, h=n - 1)),
        (
            f"torch.cat([{e.member('cls', f'nn.Parameter(torch.rand(1, 1, {c}))')}.expand({{x}}.shape[0], -1, -1), {{x}}], dim=1)",
            replace(v, h=n + 1),
        ),
    ]
    position = e.member("pos", f"nn.Parameter(torch.rand(1, {n}, {c}))")
    forms += [
        (f"{{x}} + {position}", v),
        (f"{{x}} + {position}[:, : {{x}}.shape[1]]", v),
        (f"{{x}} * {position}.sigmoid()", v),
    ]
    forms += [
        (f"{e.member('mix', f'nn.Linear({n}, {n})')}({{x}}.transpose(1, 2)).transpose(1, 2)", v),
        (
            f"{e.member('conv', f'nn.Conv1d({c}, 8, 3, padding=1)')}({{x}}.transpose(1, 2)).transpose(1, 2)",
            replace(v, c=8),
        ),
    ]
    forms += [
        (f"{e.member('dw', f'nn.Conv1d({c}, {c}, 3, padding=1, groups={c})')}({{x}}.mT).mT", v),
        (f"{{x}}[:, {list(range(n))[::-1]}]", v),
        ("{x}.cumsum(1)", v),
    ]
    forms += [
        ("F.glu({x}, dim=-1)" if c % 2 == 0 and c > 4 else "{x}", replace(v, c=c // 2) if c % 2 == 0 and c > 4 else v),
        ("{x}.mean(1, keepdim=True) + {x}", v),
        ("torch.cat([{x}, {x}.mean(1, keepdim=True).expand_as({x})], -1)", replace(v, c=2 * c)),
    ]
    if n % 2 == 0:
        forms += [
            (f"{{x}}.view(-1, {n // 2}, 2, {c}).mean(2)", replace(v, h=n // 2)),
            (f"{{x}}.reshape({{x}}.shape[0], {n // 2}, {2 * c})", Value("tokens", 2 * c, n // 2)),
            ("{x}[:, ::2]", replace(v, h=n // 2)),
            (f"{{x}}.unflatten(1, (2, {n // 2})).flatten(0, 1).softmax(1).unflatten(0, (-1, 2)).flatten(1, 2)", v),
        ]
        forms += [("torch.cat([{x}[:, 0::2], {x}[:, 1::2]], -1)", Value("tokens", 2 * c, n // 2))]
    forms += [
        (f"{e.member('rnn', f'nn.GRU({c}, 8, batch_first=True)')}({{x}})[0]", replace(v, c=8)),
        (f"{e.member('rnn', f'nn.LSTM({c}, 8, batch_first=True)')}({{x}})[0]", replace(v, c=8)),
    ]
    if c % 2 == 0:
        forms += [
            (
                f"{e.member('layer', f'nn.TransformerEncoderLayer({c}, 2, 12, 0.0, batch_first=True, norm_first={r.random() < 0.5})')}({{x}})",
                v,
            )
        ] * 2
    text, after = r.choice([form for form in forms if form[1].h > 0])
    e.members[:] = [
        line for line in e.members if line.split(" = ")[0] in text or line.split(" = ")[0] in "\n".join(e.lines)
    ]
    e.set(text)
    return after


@production("tokens", bodies=2, weight=1)
def two_streams(e: Scope, r: Random, v: Value, one: tuple[Step, ...], other: tuple[Step, ...]) -> Value:
    """Write two branches, joined along channels or tokens."""
    (y, first), (z, second) = e.branch(one, v), e.branch(other, v)
    if r.random() < 0.5:
        _fit(e, z, replace(second, c=first.c), first)
        e.set(f"torch.cat([{y}, {z}], dim={r.choice((2, -1))})")
        return replace(first, c=first.c + second.c)
    _fit(e, z, replace(second, h=first.h), first)
    e.set(f"torch.cat([{y}, {z}], dim=1)")
    return replace(first, h=first.h + second.h)


# --- vectors --------------------------------------------------------------------------------------------------------------


@production("vector", weight=2)
def dense(e: Scope, r: Random, v: Value) -> Value:
    """Write a linear layer with an activation."""
    out = r.choice((6, 8, 10))
    e.set(f"{e.member('fc', f'nn.Linear({v.c}, {out}, bias={r.random() < 0.7})')}({{x}})")
    if r.random() < 0.6:
        e.set(r.choice(ACT_LINES))
    return replace(v, c=out)


@production("vector", weight=2)
def vector_op(e: Scope, r: Random, v: Value) -> Value:
    """Write what classifiers' heads do."""
    c = v.c
    layer = e.member("fc", f"nn.Linear({c}, {c})")
    forms = [
        f"{e.member('bn', f'nn.BatchNorm1d({c})')}({layer}({{x}}))",
        f"{e.member('ln', f'nn.LayerNorm({c})')}({layer}({{x}}))",
        f"{{x}} + {layer}({{x}}).relu()",
    ]
    forms += [
        f"F.dropout({layer}({{x}}), 0.1, self.training)",
        f"F.normalize({layer}({{x}}), dim=1)",
        f"{layer}({{x}}) * {{x}}.sigmoid()",
        f"{layer}({{x}}).softmax(1) * {{x}}",
    ]
    forms += [
        f"{{x}} * {layer}({{x}}).sigmoid() + (1 - {layer}({{x}}).sigmoid()) * {{x}}.tanh()",
        f"torch.cat([{{x}}, {layer}({{x}})], 1)[:, :{c}]",
        f"{layer}({{x}}).view(-1, {c}, 1, 1).flatten(1)",
    ]
    forms += [
        f"{layer}({layer}({{x}}).relu())",
        f"{{x}} - {layer}({{x}}).mean(1, keepdim=True)",
        f"({layer}({{x}}).unsqueeze(2) * {{x}}.unsqueeze(1)).sum(1)",
    ]
    text = r.choice(forms)
    e.members[:] = [
        line for line in e.members if line.split(" = ")[0] in text or line.split(" = ")[0] in "\n".join(e.lines)
    ]
    e.set(text)
    return v


# --- whole networks --------------------------------------------------------------------------------------------------------


def source_of(network: Network) -> str:
    """Return the source of a network: classes, the last one Net, and SHAPES, its inputs for one sample."""
    r, source = Random(network.seed), Source()
    e = Scope(source)
    value = _stem(e, r)
    value = e.run(network.image, value)
    if network.tokens is not None:
        value = _to_tokens(e, r, value)
        value = e.run(network.tokens, value)
    if network.vector is not None:
        value = _to_vector(e, r, value)
        value = e.run(network.vector, value)
    _head(e, r, value)
    source.add("Net", e, ", ".join(["x", *(["z"] if any("z)" in line for line in e.lines) else [])]))
    shapes = "((3, 8, 8), (5,))" if any("z)" in line for line in e.lines) else "((3, 8, 8),)"
    used = "\n".join(source.classes)
    shared = [f"{name} = {text}" for name, text in SHARED.items() if name in used]
    return "\n\n\n".join([HEADER + "\n".join(["", *shared, f"SHAPES = {shapes}"]), *source.classes]) + "\n"


def _stem(e: Scope, r: Random) -> Value:
    c = r.choice((4, 6, 8))
    style = r.choice(("conv",) * 4 + ("bn", "sequential", "stride"))
    if style == "stride":
        e.set(f"{e.member('stem', f'nn.Conv2d(3, {c}, 2, stride=2)')}({{x}})")
        value = Value("image", c, 4, 4)
    else:
        layer = {"conv": f"nn.Conv2d(3, {c}, 3, padding=1)", "stride": ""}.get(
            style,
            f"nn.Sequential(nn.Conv2d(3, {c}, 3, padding=1, bias=False), nn.BatchNorm2d({c}), nn.ReLU(inplace=True))",
        )
        e.set(f"{e.member('stem', layer)}({{x}})" + (".relu()" if style == "conv" and r.random() < 0.5 else ""))
        value = Value("image", c, 8, 8)
    if r.random() < 0.1:
        e.line(f"s, t = {e.member('film', f'nn.Linear(5, {2 * c})')}(z).chunk(2, 1)")
        e.set("{x} * (1 + s[:, :, None, None]) + t[:, :, None, None]")
    return value


def _to_tokens(e: Scope, r: Random, v: Value) -> Value:
    if v.h * v.w > 16:
        e.set(
            f"F.adaptive_avg_pool2d({{x}}, {r.choice((2, 3, 4))})"
            if r.random() < 0.3
            else f"{e.member('patch', f'nn.Conv2d({v.c}, {v.c}, {v.h // 4}, stride={v.h // 4})')}({{x}})"
        )
        side = 4 if "patch" in e.lines[-1] else int(e.lines[-1].rsplit(" ", 1)[1].rstrip(")"))
        v = (
            replace(v, h=side, w=side)
            if "patch" not in e.lines[-1]
            else replace(v, h=v.h // (v.h // 4), w=v.w // (v.h // 4) if v.w >= v.h // 4 else 1)
        )
    e.set(
        r.choice(
            (
                "{x}.flatten(2).transpose(1, 2)",
                "{x}.permute(0, 2, 3, 1).flatten(1, 2)",
                f"{{x}}.reshape({{x}}.shape[0], {v.c}, -1).permute(0, 2, 1)",
                "{x}.flatten(-2).mT",
            )
        )
    )
    return Value("tokens", v.c, v.h * v.w)


def _to_vector(e: Scope, r: Random, v: Value) -> Value:
    if v.kind == "tokens":
        e.set(
            r.choice(("{x}.mean(1)", "{x}[:, 0]", "{x}.amax(1)", "{x}[:, -1]", "{x}.max(dim=1)[0]", "{x}.select(1, 0)"))
        )
        return Value("vector", v.c)
    if r.random() < 0.2 and v.c * v.h * v.w <= 800:
        e.set(
            r.choice(
                (
                    "{x}.flatten(1)",
                    "torch.flatten({x}, 1)",
                    "{x}.view({x}.shape[0], -1)",
                    f"{{x}}.view(-1, {v.c * v.h * v.w})",
                    f"{{x}}.reshape(len({{x}}), {v.c * v.h * v.w})",
                )
            )
        )
        return Value("vector", v.c * v.h * v.w)
    pool = [
        "{x}.mean((2, 3))",
        "{x}.amax((2, 3))",
        "F.adaptive_avg_pool2d({x}, 1).flatten(1)",
        "{x}.flatten(2).mean(-1)",
        "F.adaptive_max_pool2d({x}, 1).squeeze(-1).squeeze(-1)",
    ]
    pool += [
        "F.avg_pool2d({x}, {x}.shape[-2:]).flatten(1)",
        "{x}.clamp(min=1e-6).pow(3).mean((-2, -1)).pow(1 / 3)",
        "{x}.sum((2, 3)) / ({x}.shape[2] * {x}.shape[3])",
        "{x}.mean(3).mean(2)",
    ]
    pool += [
        f"nn.functional.adaptive_avg_pool2d({{x}}, 1).view(-1, {v.c})",
        "torch.cat([F.adaptive_avg_pool2d({x}, 1), F.adaptive_max_pool2d({x}, 1)], 1).flatten(1)",
        f"{e.member('pool', 'nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())')}({{x}})",
    ]
    text = r.choice(pool)
    e.set(text)
    return Value("vector", 2 * v.c if text.startswith("torch.cat") else v.c)


def _head(e: Scope, r: Random, v: Value) -> None:
    def layer() -> str:
        return e.member("head", f"nn.Conv2d({v.c}, 3, 1)" if v.kind == "image" else f"nn.Linear({v.c}, 3)")

    style = r.choice(("one",) * 6 + ("two", "dict", "list", "features", "aux", "activation"))
    if style == "two":
        e.line(f"return {layer()}({{x}}), {layer()}({{x}}.relu())")
    elif style == "dict":
        e.line(f"return {{'out': {layer()}({{x}}), 'aux': {layer()}({{x}})}}")
    elif style == "list":
        e.line(f"heads = [{layer()}, {layer()}]")
        e.line("return [head({x}) for head in heads]")
    elif style == "features":
        e.line(f"return {layer()}({{x}}), {{x}}")
    elif style == "aux":
        aux = layer()
        e.line("if self.training:")
        e.line(f"    return {layer()}({{x}}), {aux}({{x}})")
        e.line("return self.head2({x})")
    elif style == "activation":
        dim = 1 if v.kind == "image" else -1
        e.line(
            f"return {layer()}({{x}})." + r.choice((f"softmax({dim})", "sigmoid()", f"log_softmax({dim})", "tanh()"))
        )
    else:
        e.line(f"return {layer()}({{x}})")
