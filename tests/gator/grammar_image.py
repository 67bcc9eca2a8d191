"""Productions on images, (N, C, H, W)."""
# ruff: noqa: UP031 - templates of code, in one piece

from dataclasses import replace
from random import Random

from tests.gator.grammar import Scope, Step, Value, production

WIDTHS = (4, 6, 8, 12)
ACTS = (
    *(
        "nn.ReLU()",
        "nn.ReLU(inplace=True)",
        "nn.GELU()",
        "nn.SiLU()",
        "nn.Hardswish()",
        "nn.LeakyReLU(0.1)",
        "nn.ReLU6()",
    ),
    *(
        "nn.ELU()",
        "nn.Mish()",
        "nn.Sigmoid()",
        "nn.Tanh()",
        "nn.Softplus()",
        "nn.PReLU()",
        "nn.Identity()",
        "nn.Hardsigmoid()",
    ),
    *("nn.CELU()", "nn.SELU()", "nn.Softsign()", "nn.LogSigmoid()", "nn.Hardtanh(-1, 2)", "nn.Threshold(0.1, 0.0)"),
)
ACT_LINES = (
    *(
        "F.relu({x})",
        "{x}.relu()",
        "torch.relu({x})",
        "F.relu({x}, inplace=True)",
        "F.gelu({x})",
        "F.silu({x})",
        "{x}.sigmoid()",
    ),
    *(
        "{x} * {x}.sigmoid()",
        "{x} * torch.tanh(F.softplus({x}))",
        "{x}.clamp(0, 6)",
        "{x}.clamp(min=0)",
        "F.leaky_relu({x}, 0.2)",
    ),
    *(
        "{x} ** 2",
        "{x}.pow(2)",
        "{x}.abs()",
        "{x}.square()",
        "(-{x}).exp()",
        "1 - {x}.sigmoid()",
        "1 - {x}",
        "2 * {x} + 1",
    ),
    *("torch.where({x} > 0, {x}, 0.1 * {x})", "{x}.mul(0.5).add(0.25)", "{x} / 2", "{x}.relu() + 0.1", "{x}.sin()"),
    *("F.hardswish({x})", "F.elu({x})", "{x}.relu_()", "{x}.mul_(0.5)", "{x} - 0.3", "({x}.square() + 1e-3).sqrt()"),
    *(
        "{x}.masked_fill({x} < 0, 0.0)",
        "torch.maximum({x}, 0.1 * {x})",
        "torch.max({x}, -{x})",
        "({x} > 0).to({x}.dtype) * {x}",
    ),
    *(
        "torch.minimum({x}, {x} * 0 + 1)",
        "{x}.sign() * {x}.abs().log1p()",
        "{x}.reciprocal().tanh()",
        "F.hardtanh({x}, 0.5, 2.0)",
    ),
    *(
        "torch.zeros_like({x}) + {x}",
        "torch.full_like({x}, 0.5) * {x}",
        "{x} * torch.ones_like({x}).mul(0.5)",
        "torch.erf({x})",
    ),
    *(
        "{x}.to({x}.dtype)",
        "{x}.type_as({x})",
        "{x}.contiguous()",
        "{x}.clone()",
        "torch.addcmul({x}, {x}, {x}, value=0.1)",
    ),
    *(
        "torch.lerp({x}, {x}.relu(), 0.3)",
        "{x}.exp().log()",
        "{x} @ torch.eye({x}.shape[-1], dtype={x}.dtype)",
        "F.softsign({x})",
    ),
)


def divisors(c: int) -> list[int]:
    """Return the proper divisors of a width that are more than 1."""
    return [g for g in range(2, c) if c % g == 0]


def norm(r: Random, c: int) -> str:
    """Return a normalisation of images."""
    kinds = ["nn.BatchNorm2d({c})"] * 4 + [
        "nn.InstanceNorm2d({c}, affine=True)",
        "nn.Identity()",
        "nn.GroupNorm(1, {c})",
    ]
    kinds += [f"nn.GroupNorm({r.choice(divisors(c))}, {{c}})", "nn.InstanceNorm2d({c})"] if divisors(c) else []
    kinds += ["nn.BatchNorm2d({c}, affine=False)", "nn.InstanceNorm2d({c}, affine=True, track_running_stats=True)"]
    return r.choice(kinds).format(c=c)


def act(r: Random) -> str:
    """Return an activation."""
    return r.choice((*ACTS[:5], *ACTS, *("ACT", "RELU") * 2))


def convolution(r: Random, v: Value, out: int) -> str:
    """Return a convolution of this many outputs that keeps height and width."""
    bias = f", bias={r.random() < 0.6}"
    kinds = [f"nn.Conv2d({v.c}, {out}, 3, padding=1{bias})"] * 3 + [f"nn.Conv2d({v.c}, {out}, 1{bias})"] * 3
    kinds += [
        f"nn.Conv2d({v.c}, {out}, 3, padding='same', dilation=2{bias})",
        f"nn.ConvTranspose2d({v.c}, {out}, 3, padding=1{bias})",
    ]
    if v.h > 1:
        kinds.append(
            f"nn.Conv2d({v.c}, {out}, 3, padding=1, padding_mode='{r.choice(('reflect', 'circular', 'replicate'))}'{bias})"
        )
    for g in {g for g in divisors(v.c) if out % g == 0}:
        kinds.append(f"nn.Conv2d({v.c}, {out}, 3, padding=1, groups={g}{bias})")
        kinds.append(f"nn.ConvTranspose2d({v.c}, {out}, 3, padding=1, groups={g}{bias})")
    if out % v.c == 0:
        kinds.append(f"nn.Conv2d({v.c}, {out}, 3, padding=1, groups={v.c}{bias})")
    return r.choice(kinds)


def fit(e: Scope, r: Random, name: str, v: Value, to: Value) -> None:
    """Bring a variable to the shape of another value."""
    if v.c != to.c:
        layer = f"nn.Conv2d({v.c}, {to.c}, 1)"
        e.lines.append(
            f"{name} = {e.member('fit', r.choice((layer, f'nn.Sequential({layer}, nn.BatchNorm2d({to.c}))')))}({name})"
        )
    if (v.h, v.w) != (to.h, to.w):
        e.lines.append(
            f"{name} = F.interpolate({name}, size=({to.h}, {to.w}), mode='{r.choice(('nearest', 'bilinear'))}')"
        )


# --- layers ---------------------------------------------------------------------------------------------------------------


@production("image", weight=5)
def conv_norm_act(e: Scope, r: Random, v: Value) -> Value:
    """Write the usual three in a row."""
    out = r.choice(WIDTHS)
    parts = [convolution(r, v, out), norm(r, out), act(r)]
    style = r.choice(("sequential", "members", "list", "functional act", "norm first"))
    if style == "norm first":
        parts = [norm(r, v.c), act(r), parts[0]]
    if style in ("sequential", "norm first"):
        e.set(e.member("conv", f"nn.Sequential({', '.join(parts)})") + "({x})")
    elif style == "list":
        e.line("for layer in " + e.member("layers", f"nn.ModuleList([{', '.join(parts)}])") + ":")
        e.line("    {x} = layer({x})")
    else:
        conv, bn = e.member("conv", parts[0]), e.member("bn", parts[1])
        e.set(f"{bn}({conv}({{x}}))")
        e.set(f"{e.member('act', parts[2])}({{x}})" if style == "members" else r.choice(ACT_LINES))
    return replace(v, c=out)


@production("image", weight=3)
def conv(e: Scope, r: Random, v: Value) -> Value:
    """Write a convolution, or what computes its weight."""
    out = r.choice(WIDTHS)
    plain = f"nn.Conv2d({v.c}, {out}, 3, padding=1)"
    style = r.choice(
        ("module",) * 5 + ("functional", "weight_norm", "legacy", "spectral", "standardised", "down", "up", "scaled")
    )
    if style == "down" and v.h > 2:
        e.set(f"{e.member('conv', f'nn.Conv2d({v.c}, {out}, 3, stride=2, padding=1)')}({{x}})")
        return Value("image", out, (v.h + 1) // 2, (v.w + 1) // 2)
    if style == "up" and v.h <= 8:
        e.set(f"{e.member('conv', f'nn.ConvTranspose2d({v.c}, {out}, 2, stride=2)')}({{x}})")
        return Value("image", out, 2 * v.h, 2 * v.w)
    if style in ("functional", "standardised", "scaled"):
        weight = e.member("weight", f"nn.Parameter(0.3 * torch.randn({out}, {v.c}, 3, 3))")
        if style == "standardised":
            e.line(f"w = {weight} - {weight}.mean((1, 2, 3), keepdim=True)")
            e.set("F.conv2d({x}, w / (w.std((1, 2, 3), keepdim=True) + 1e-5), padding=1)")
        else:
            e.set(f"F.conv2d({{x}}, {weight}{' * 0.5' if style == 'scaled' else ''}, padding=1)")
    else:
        wrapper = {"weight_norm": "nn.utils.parametrizations.weight_norm({})", "legacy": "nn.utils.weight_norm({})"}
        wrapper["spectral"] = "nn.utils.parametrizations.spectral_norm({})"
        layer = wrapper[style].format(plain) if style in wrapper else convolution(r, v, out)
        e.set(f"{e.member('conv', layer)}({{x}})")
    return replace(v, c=out)


@production("image", weight=3)
def normalise(e: Scope, r: Random, v: Value) -> Value:
    """Write a normalisation, by a module or by hand."""
    c, style = v.c, r.choice(("module",) * 4 + tuple(_NORMS))
    if style == "module":
        e.set(f"{e.member('norm', norm(r, c))}({{x}})")
        return v
    _NORMS[style](e, r, c)
    return v


def _channels_last(e: Scope, r: Random, c: int) -> None:
    ln = e.member("norm", f"nn.LayerNorm({c})")
    inner = r.choice(
        (
            f"{ln}({{x}})",
            f"F.layer_norm({{x}}, ({c},), {ln}.weight, {ln}.bias)",
            f"F.layer_norm({{x}}, {ln}.normalized_shape)",
        )
    )
    e.set("{x}.permute(0, 2, 3, 1)")
    e.set(inner)
    e.set("{x}.permute(0, 3, 1, 2)")


def _by_hand(e: Scope, r: Random, c: int) -> None:
    w, b = (
        e.member("weight", f"nn.Parameter(torch.rand({c}) + 0.5)"),
        e.member("bias", f"nn.Parameter(torch.rand({c}))"),
    )
    e.line("u = {x}.mean(1, keepdim=True)")
    e.line("s = ({x} - u).pow(2).mean(1, keepdim=True)")
    e.set(f"{w}[:, None, None] * (({{x}} - u) / torch.sqrt(s + 1e-6)) + {b}[:, None, None]")


def _rms(e: Scope, r: Random, c: int) -> None:
    w = e.member("weight", f"nn.Parameter(torch.rand({c}, 1, 1) + 0.5)")
    e.set(f"{{x}} * torch.rsqrt({{x}}.pow(2).mean(1, keepdim=True) + 1e-6) * {w}")


def _grn(e: Scope, r: Random, c: int) -> None:
    gamma, beta = (e.member(stem, f"nn.Parameter(torch.rand(1, {c}, 1, 1))") for stem in ("gamma", "beta"))
    e.line("gx = torch.norm({x}, p=2, dim=(2, 3), keepdim=True)")
    e.line("nx = gx / (gx.mean(dim=1, keepdim=True) + 1e-6)")
    e.set(f"{gamma} * ({{x}} * nx) + {beta} + {{x}}")


def _functional_bn(e: Scope, r: Random, c: int) -> None:
    bn = e.member("bn", f"nn.BatchNorm2d({c})")
    e.set(f"F.batch_norm({{x}}, {bn}.running_mean, {bn}.running_var, {bn}.weight, {bn}.bias, self.training)")


def _frozen(e: Scope, r: Random, c: int) -> None:
    scale, shift = (e.member(name, f"nn.Buffer(torch.rand({c}) + 0.5)") for name in ("scale", "shift"))
    e.set(
        r.choice(("{x} * S.view(1, -1, 1, 1) + T.view(1, -1, 1, 1)", "{x} * S[:, None, None] + T[:, None, None]"))
        .replace("S", scale)
        .replace("T", shift)
    )


def _layer_scale(e: Scope, r: Random, c: int) -> None:
    gamma = e.member("gamma", f"nn.Parameter(torch.rand({r.choice((f'{c}, 1, 1', f'1, {c}, 1, 1'))}))")
    e.set(f"{{x}} * {gamma}")


def _simple(*expressions: str):
    return lambda e, r, c: e.set(r.choice(expressions))


_NORMS = {
    "channels last": _channels_last,
    "by hand": _by_hand,
    "rms": _rms,
    "grn": _grn,
    "functional bn": _functional_bn,
    "frozen": _frozen,
    "layer scale": _layer_scale,
    "l2": _simple(
        "F.normalize({x}, dim=1)", "F.normalize({x}, dim=(2, 3))", "{x} / ({x}.norm(dim=1, keepdim=True) + 1e-3)"
    ),
    "positions": _simple(
        "{x} / {x}.norm(dim=(2, 3), keepdim=True)",
        "{x}.exp() / {x}.exp().sum((2, 3), keepdim=True)",
        "{x}.flatten(2).softmax(-1).view_as({x})",
        "{x}.flatten(2).softmax(-1).reshape({x}.shape)",
        "({x} - {x}.mean((2, 3), keepdim=True)) / ({x}.std((2, 3), keepdim=True) + 1e-3)",
        "({x} - {x}.amin((2, 3), keepdim=True)) / ({x}.amax((2, 3), keepdim=True) - {x}.amin((2, 3), keepdim=True))",
        "F.instance_norm({x})",
    ),
    "all": _simple(
        "F.local_response_norm({x}, 3)",
        "F.group_norm({x}, 1)",
        "{x} / ({x}.abs().amax(1, keepdim=True) + 1e-3)",
        "{x}.softmax(1)",
    ),
}


@production("image", weight=4)
def activate(e: Scope, r: Random, v: Value) -> Value:
    """Write an activation, or arithmetic with one value."""
    if r.random() < 0.4:
        e.set(f"{e.member('act', r.choice((act(r), f'nn.PReLU({v.c})')))}({{x}})")
    else:
        e.set(r.choice(ACT_LINES))
    return v


@production("image", weight=2)
def resize(e: Scope, r: Random, v: Value) -> Value:
    """Write a pooling, an interpolation, or a movement of positions."""
    same = [
        "POOL({x})",
        "F.avg_pool2d({x}, 3, 1, 1)",
        "F.max_pool2d({x}, 3, 1, 1)",
        "{x}.flip(3)",
        "{x}.roll(1, 2)",
        "torch.roll({x}, (1, 1), (2, 3))",
    ]
    same += [
        "{x}.transpose(2, 3)",
        "F.pad({x}, (1, 1, 1, 1))[:, :, 1:-1, 1:-1]",
        "F.pad({x}, (1, 1, 1, 1), value=1.0)[..., 2:, 2:]",
    ]
    same += [
        "{x}.unsqueeze(2).squeeze(2)",
        "{x}.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)",
        "torch.rot90({x}, 1, (2, 3))",
    ]
    same += [
        "F.lp_pool2d({x}.abs() + 0.1, 2, 1)",
        "nn.functional.fold(F.unfold({x}, 3, padding=1), {x}.shape[2:], 3, padding=1)",
    ]
    options = [(text, v) for text in same]
    if v.h % 2 == 0 and v.h == v.w:
        half, pools = (
            replace(v, h=v.h // 2, w=v.w // 2),
            ("nn.MaxPool2d(2)", "nn.AvgPool2d(2)", f"nn.AdaptiveAvgPool2d({v.h // 2})"),
        )
        pools = (
            *pools,
            f"nn.AdaptiveMaxPool2d({v.h // 2})",
            "nn.MaxPool2d(3, 2, 1)",
            "nn.FractionalMaxPool2d(1, output_ratio=0.5)",
        )
        options += [(f"{e.member('pool', pool)}({{x}})", half) for pool in (r.choice(pools[:5]),)] * 4
        options += [
            (text, half) for text in ("F.avg_pool2d({x}, 2)", "F.adaptive_max_pool2d({x}, (%d, %d))" % (half.h, half.w))
        ]
        options += [
            (text, half)
            for text in (
                "{x}[:, :, ::2, ::2]",
                "F.interpolate({x}, scale_factor=0.5)",
                "F.max_pool2d({x}, 2, return_indices=True)[0]",
            )
        ]
        focus = "torch.cat([{x}[..., ::2, ::2], {x}[..., 1::2, ::2], {x}[..., ::2, 1::2], {x}[..., 1::2, 1::2]], 1)"
        options += [(focus, replace(half, c=4 * v.c)), ("F.pixel_unshuffle({x}, 2)", replace(half, c=4 * v.c))]
    if v.h <= 8:
        big = replace(v, h=2 * v.h, w=2 * v.w)
        options += [
            ("F.interpolate({x}, scale_factor=2, mode='bilinear', align_corners=False)", big),
            ("nn.functional.interpolate({x}, scale_factor=2.0)", big),
        ]
        options += [
            ("F.interpolate({x}, size=({x}.shape[2] * 2, {x}.shape[3] * 2))", big),
            (f"{e.member('up', 'nn.Upsample(scale_factor=2)')}({{x}})", big),
        ]
        if v.c % 4 == 0:
            options.append((f"{e.member('shuffle', 'nn.PixelShuffle(2)')}({{x}})", replace(big, c=v.c // 4)))
    text, after = r.choice(options)
    e.set(text)
    return after


@production("image", weight=1)
def drop(e: Scope, r: Random, v: Value) -> Value:
    """Write what runs in training mode only, or drops."""
    lines = [
        f"{e.member('drop', r.choice(('nn.Dropout(0.1)', 'nn.Dropout2d(0.1)', 'DROP', 'nn.AlphaDropout(0.1)')))}({{x}})"
    ]
    lines += [
        "F.dropout({x}, 0.1, self.training)",
        "F.dropout2d({x}, 0.1, self.training)",
        "{x} * 1.5 if self.training else {x}",
    ]
    lines += [
        "{x} if not self.training else {x} + 0.1 * torch.ones_like({x})",
        "{x}.softmax(2) if not self.training else {x}",
    ]
    e.set(r.choice(lines))
    return v


# --- branches ---------------------------------------------------------------------------------------------------------------


@production("image", bodies=1, weight=5)
def residual(e: Scope, r: Random, v: Value, body: tuple[Step, ...]) -> Value:
    """Write a shortcut around a body."""
    y, after = e.branch(body, v)
    fit(e, r, y, after, v)
    e.lines.append(
        f"{y} = {e.member('last', r.choice((f'nn.BatchNorm2d({v.c})', f'nn.Conv2d({v.c}, {v.c}, 1)')))}({y})"
    ) if r.random() < 0.5 else None
    forms = [
        f"{{x}} + {y}",
        f"{y} + {{x}}",
        f"torch.add({{x}}, {y})",
        f"{{x}} + 0.5 * {y}",
        f"{{x}}.add({y})",
        f"F.relu({{x}} + {y})",
        f"{y}.add_({{x}})",
    ]
    forms += [
        f"torch.add({{x}}, {y}, alpha=0.5)",
        f"{{x}} - {y}",
        f"sum([{{x}}, {y}])",
        f"torch.stack([{{x}}, {y}]).sum(0)",
        f"{{x}} * 1 + {y} * 1",
    ]
    if r.random() < 0.3:
        e.lines.append(f"{y} = {y} * {e.member('gamma', f'nn.Parameter(torch.rand({v.c}, 1, 1))')}")
    style = r.random()
    if style < 0.1:
        e.line(f"if {y}.shape == {{x}}.shape:")
        e.line(f"    {{x}} = {{x}} + {y}")
    elif style < 0.2:
        e.line(f"{{x}} += {y}")
    else:
        e.set(r.choice(forms[:3] * 2 + forms))
    return v


@production("image", bodies=2, weight=3)
def concat(e: Scope, r: Random, v: Value, one: tuple[Step, ...], other: tuple[Step, ...]) -> Value:
    """Write a concatenation of two branches, of the input and a branch, or of a value and a copy."""
    y, first = e.branch(one, v)
    if r.random() < 0.3:
        z, second = e.x, v
    else:
        z, second = e.branch(other, v)
    if (first.h, first.w) != (second.h, second.w):
        size = r.choice((f"({first.h}, {first.w})", f"{y}.shape[-2:]", f"{y}.size()[2:]"))
        z = e.name("z") if z == e.x else z
        e.lines.append(f"{z} = F.interpolate({e.x if second is v and z.startswith('z') else z}, size={size})")
    parts = [f"{y}, {z}", f"{z}, {y}"]
    form = r.choice(
        (
            "torch.cat([{}], 1)",
            "torch.cat(({}), dim=1)",
            "torch.cat([{}], dim=-3)",
            "torch.concat([{}], 1)",
            "torch.hstack([{}])",
        )
    )
    e.set(form.format(r.choice(parts)))
    return replace(first, c=first.c + second.c)


@production("image", bodies=1, weight=3)
def split(e: Scope, r: Random, v: Value, body: tuple[Step, ...]) -> Value:
    """Write a split of channels, of which one part goes through a body."""
    k = v.c // 2
    if k == 0:
        return v
    a, b = e.name("a"), e.name("b")
    forms = [
        f"{{x}}.split([{k}, {v.c - k}], 1)",
        f"torch.split({{x}}, ({k}, {v.c - k}), dim=1)",
        f"{{x}}[:, :{k}], {{x}}[:, {k}:]",
        f"{{x}}.narrow(1, 0, {k}), {{x}}.narrow(1, {k}, {v.c - k})",
    ]
    forms += ["{x}[:, : {x}.shape[1] // 2], {x}[:, {x}.shape[1] // 2 :]", "{x}.tensor_split(2, 1)"][
        : 2 if v.c % 2 == 0 else 0
    ]
    forms += ["{x}.chunk(2, 1)", "torch.chunk({x}, 2, dim=1)"] * 2 if v.c % 2 == 0 else []
    e.line(f"{a}, {b} = " + r.choice(forms))
    y, after = e.branch(body, replace(v, c=v.c - k), start=b)
    fit(e, r, y, replace(after, c=v.c - k), replace(v, c=v.c - k))
    e.set(f"torch.cat([{r.choice((f'{a}, {y}', f'{y}, {a}'))}], 1)")
    return replace(v, c=k + after.c)


@production("image", bodies=2, weight=1.5)
def select(e: Scope, r: Random, v: Value, one: tuple[Step, ...], other: tuple[Step, ...]) -> Value:
    """Write branches that are weighted, stacked or multiplied."""
    (y, first), (z, second) = e.branch(one, v), e.branch(other, v)
    fit(e, r, z, second, first)
    c = first.c
    style = r.choice(("stack", "sknet", "product", "weights", "max", "mean", "highway", "where"))
    if style == "stack":
        e.set(f"torch.stack([{y}, {z}], dim=1).{r.choice(('sum(1)', 'mean(dim=1)', 'amax(1)'))}")
    elif style == "sknet":
        fc = e.member("fc", f"nn.Conv2d({c}, {2 * c}, 1)")
        e.line(f"u = torch.stack([{y}, {z}], dim=1)")
        e.line(f"s = {fc}(u.sum(1).mean((2, 3), keepdim=True)).view(-1, 2, {c}, 1, 1).softmax(1)")
        e.set("(u * s).sum(1)")
    elif style == "weights":
        w = e.member("w", "nn.Parameter(torch.rand(2))")
        e.line(f"s = F.relu({w})" if r.random() < 0.5 else f"s = {w}.softmax(0)")
        e.set(f"(s[0] * {y} + s[1] * {z}) / (s.sum() + 1e-4)")
    elif style == "highway":
        g = e.member("gate", f"nn.Conv2d({c}, {c}, 1)")
        e.line(f"g = {g}({y}).sigmoid()")
        e.set(r.choice((f"g * {y} + (1 - g) * {z}", f"torch.lerp({z}, {y}, g)", f"{z} + g * ({y} - {z})")))
    else:
        forms = {
            "product": (f"{y} * {z}", f"{y} * {z}.sigmoid()", f"{y}.mul({z}.tanh())"),
            "max": (f"torch.max({y}, {z})", f"torch.maximum({y}, {z})"),
        }
        forms |= {"mean": (f"({y} + {z}) / 2", f"0.3 * {y} + 0.7 * {z}"), "where": (f"torch.where({y} > 0, {y}, {z})",)}
        e.set(r.choice(forms[style]))
    return first


@production("image", bodies=1, weight=0.8)
def twice(e: Scope, r: Random, v: Value, body: tuple[Step, ...]) -> Value:
    """Write a module that is called twice."""
    inner = Scope(e.source)
    after = inner.run(body, v)
    fit(inner, r, "x", after, v)
    inner.lines.append("return x")
    name = e.source.new_name("Twice")
    e.source.add(name, inner)
    block = e.member("twice", f"{name}()")
    if r.random() < 0.3:
        e.set(f"{block}({block}({{x}}))")
    else:
        e.set(f"{block}({{x}})")
        e.set(r.choice((f"{block}({{x}})", f"{{x}} + {block}({{x}})", f"{block}({{x}}.relu())")))
    return v


# --- movements and gates ------------------------------------------------------------------------------------------------------


@production("image", weight=1.5)
def shuffle(e: Scope, r: Random, v: Value) -> Value:
    """Write a channel shuffle, or another movement of channels."""
    c, groups = v.c, divisors(v.c)
    forms = [
        ("torch.cat([{x}, {x}], 1)", 2 * c),
        ("{x}.repeat(1, 2, 1, 1)", 2 * c),
        ("{x}.repeat_interleave(2, dim=1)", 2 * c),
        ("torch.cat([{x}, -{x}], 1)", 2 * c),
    ]
    forms += [
        ("{x}.flip(1)", c),
        ("{x}.roll(1, 1)", c),
        ("F.pad({x}, (0, 0, 0, 0, 1, 1))", c + 2),
        ("{x}[:, 1:]", c - 1),
        ("{x}[:, ::2]", (c + 1) // 2),
    ]
    forms += [
        (f"{{x}}[:, {list(range(c))[::-1]}]", c),
        ("torch.cat([{x}, torch.zeros_like({x})], 1)", 2 * c),
        ("F.pad({x}, (0, 0, 0, 0, 0, {x}.shape[1]))", 2 * c),
    ]
    forms += [
        (f"{{x}}.index_select(1, torch.arange({c - 1}))", c - 1),
        (f"torch.cat([{{x}}[:, {c // 2}:], {{x}}[:, :{c // 2}]], 1)", c),
        ("torch.cat(torch.unbind({x}, 1)[:1] * 4, 1).unsqueeze(1)", 1),
    ][:2]
    if r.random() < 0.5 and groups:
        g = r.choice(groups)
        e.line("n, c, h, w = {x}.shape" if r.random() < 0.7 else "n, c, h, w = {x}.size()")
        shuffles = [
            f"{{x}}.view(n, {g}, c // {g}, h, w).transpose(1, 2).reshape(n, c, h, w)",
            f"{{x}}.view(n, {g}, -1, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)",
        ]
        shuffles += [
            f"{{x}}.reshape(n, {g}, c // {g}, h, w).permute(0, 2, 1, 3, 4).flatten(1, 2)",
            f"nn.functional.channel_shuffle({{x}}, {g})",
            f"{{x}}.unflatten(1, ({g}, -1)).transpose(1, 2).flatten(1, 2)",
        ]
        shuffles += [
            f"{{x}}.view(n, {g}, c // {g}, h, w).mean(2)",
            f"{{x}}.view(n, {g}, c // {g}, h, w).sum(1)",
            f"{{x}}.view(n, {g}, c // {g}, h, w).amax(1)",
        ]
        text = r.choice(shuffles)
        e.set(text)
        return replace(v, c=g if text.endswith("mean(2)") else c // g if text.endswith(("sum(1)", "amax(1)")) else c)
    text, out = r.choice([form for form in forms if form[1] > 1])
    e.set(text)
    return replace(v, c=out)


def _squeeze(e: Scope, r: Random, c: int, style: str) -> None:
    """Write squeeze-and-excitation by convolutions."""
    mid = r.choice((2, 4))
    layers = f"nn.Conv2d({c}, {mid}, 1), nn.ReLU(), nn.Conv2d({mid}, {c}, 1), {r.choice(('nn.Sigmoid()', 'nn.Hardsigmoid()', 'nn.Tanh()'))}"
    if style == "se":
        e.set(f"{{x}} * {e.member('se', f'nn.Sequential(nn.AdaptiveAvgPool2d(1), {layers})')}({{x}})")
    else:
        pool = e.member(
            "pool", r.choice(("nn.AdaptiveAvgPool2d(1)", "nn.AdaptiveMaxPool2d(1)", "nn.AdaptiveAvgPool2d((1, 1))"))
        )
        e.line(f"s = {e.member('fc', f'nn.Sequential({layers})')}({pool}({{x}}))")
        e.set(
            r.choice(("{x} * s", "s * {x}", "{x} * s.expand_as({x})", "{x}.mul(s)", "{x} + {x} * s", "{x} * (1 + s)"))
        )


def _squeeze_linear(e: Scope, r: Random, c: int) -> None:
    """Write squeeze-and-excitation by linear layers."""
    e.line("n, c, _, _ = {x}.shape")
    fc = e.member("fc", f"nn.Sequential(nn.Linear({c}, 3), nn.ReLU(inplace=True), nn.Linear(3, {c}), nn.Sigmoid())")
    pooled = r.choice(
        (
            "{x}.mean((2, 3))",
            "{x}.mean([-1, -2])",
            "F.adaptive_avg_pool2d({x}, 1).view(n, c)",
            "{x}.flatten(2).mean(2)",
            "{x}.amax((2, 3))",
        )
    )
    e.line(f"s = {fc}({pooled})")
    e.set(
        "{x} * "
        + r.choice(
            (
                "s.view(n, c, 1, 1)",
                "s[:, :, None, None]",
                "s.unsqueeze(-1).unsqueeze(-1)",
                "s.view(n, c, 1, 1).expand_as({x})",
            )
        )
    )


@production("image", weight=2.5)
def gate(e: Scope, r: Random, v: Value) -> Value:
    """Write a gate: over channels, positions, or one number."""
    c, style = (
        v.c,
        r.choice(
            ("se", "se linear", "se module", "spatial", "cbam", "scalar", "eca", "mean", "max", "film", "coordinate")
        ),
    )
    if style in ("se", "se module"):
        _squeeze(e, r, c, style)
    elif style == "se linear":
        _squeeze_linear(e, r, c)
    elif style == "spatial":
        conv = e.member("gate", f"nn.Conv2d({c}, 1, {r.choice((1, 3))}, padding='same')")
        e.line(f"s = {conv}({{x}}).sigmoid()")
        e.set(r.choice(("{x} * s", "{x} * (1 - s)", "{x} + {x} * s", "s.expand_as({x}) * {x}", "{x} + s")))
    elif style == "cbam":
        e.line(
            "s = torch.cat([{x}.mean(1, keepdim=True), {x}.amax(1, keepdim=True)], 1)"
            if r.random() < 0.5
            else "s = torch.cat([{x}.mean(1, keepdim=True), {x}.max(1, keepdim=True)[0]], 1)"
        )
        e.set(f"{{x}} * {e.member('gate', 'nn.Conv2d(2, 1, 3, padding=1)')}(s).sigmoid()")
    elif style == "scalar":
        alpha = e.member(
            "alpha",
            r.choice(
                ("nn.Parameter(torch.rand(1))", "nn.Parameter(torch.rand(()))", "nn.Parameter(torch.rand(1, 1, 1, 1))")
            ),
        )
        e.set(r.choice((f"{alpha} * {{x}}", f"{{x}} * {alpha}.sigmoid()", f"{alpha} + {{x}}")))
    elif style == "eca":
        e.line("s = {x}.mean((2, 3)).unsqueeze(1)")
        e.set(f"{{x}} * {e.member('eca', 'nn.Conv1d(1, 1, 3, padding=1)')}(s).transpose(1, 2).unsqueeze(-1).sigmoid()")
    elif style == "film":
        film = e.member("film", f"nn.Linear({c}, {2 * c})")
        e.line(f"s, t = {film}({{x}}.mean((2, 3))).chunk(2, 1)")
        e.set("{x} * (1 + s[:, :, None, None]) + t[:, :, None, None]")
    elif style == "coordinate":
        e.line("s = torch.cat([{x}.mean(3, keepdim=True), {x}.mean(2, keepdim=True).transpose(2, 3)], 2)")
        e.line(f"s, t = {e.member('coord', f'nn.Conv2d({c}, {c}, 1)')}(s).split([{v.h}, {v.w}], 2)")
        e.set("{x} * s.sigmoid() * t.transpose(2, 3).sigmoid()")
    else:
        e.set(
            {"mean": "{x} - {x}.mean((2, 3), keepdim=True)", "max": "{x} / (1 + {x}.abs().amax((2, 3), keepdim=True))"}[
                style
            ]
        )
    return v


@production("image", weight=1.5)
def glu(e: Scope, r: Random, v: Value) -> Value:
    """Write a gated linear unit."""
    out = r.choice(WIDTHS)
    wide = e.member("glu", f"nn.Conv2d({v.c}, {2 * out}, 1)")
    style = r.choice(("F.glu", "module", "chunk", "slice", "split"))
    if style == "F.glu":
        e.set(f"F.glu({wide}({{x}}), dim=1)")
    elif style == "module":
        e.set(f"{e.member('act', 'nn.GLU(dim=1)')}({wide}({{x}}))")
    else:
        e.line(f"u = {wide}({{x}})")
        e.line(
            {
                "chunk": "a, b = u.chunk(2, dim=1)",
                "slice": f"a, b = u[:, :{out}], u[:, {out}:]",
                "split": f"a, b = torch.split(u, {out}, dim=1)",
            }[style]
        )
        e.set(r.choice(("a * b.sigmoid()", "F.silu(a) * b", "a * b", "a.tanh() * b.sigmoid()")))
    return replace(v, c=out)


def _fused_attention(e: Scope, r: Random, v: Value, width: int) -> None:
    """Write attention of two heads, whose queries, keys and values are one convolution."""
    heads = 2
    qkv, proj = (
        e.member("qkv", f"nn.Conv2d({v.c}, {3 * width}, 1)"),
        e.member("proj", f"nn.Conv2d({width}, {v.c}, 1)"),
    )
    e.line("n, c, h, w = {x}.shape")
    e.line(
        r.choice(
            (
                f"q, k, v = {qkv}({{x}}).reshape(n, 3, {heads}, {width // heads}, h * w).unbind(1)",
                f"q, k, v = {qkv}({{x}}).view(n, {heads}, -1, h * w).chunk(3, dim=2)",
            )
        )
    )
    e.line(
        r.choice(
            (
                f"s = (q.transpose(-2, -1) @ k * {width // heads} ** -0.5).softmax(-1)",
                "s = (q.transpose(-2, -1) @ k / math.sqrt(q.shape[2])).softmax(-1)",
                "s = torch.einsum('bhdi,bhdj->bhij', q, k).softmax(-1)",
            )
        )
    )
    e.line(
        "o = "
        + r.choice(
            (
                "(v @ s.transpose(-2, -1)).reshape(n, -1, h, w)",
                f"(v @ s.transpose(-2, -1)).view(n, {width}, h, w)",
                "torch.einsum('bhij,bhdj->bhdi', s, v).reshape(n, -1, h, w)",
            )
        )
    )
    e.set(r.choice((f"{{x}} + {proj}(o)", f"{proj}(o)", f"{{x}} + {proj}(o) * 0.5")))


@production("image", weight=2)
def attention_2d(e: Scope, r: Random, v: Value) -> Value:
    """Write attention over positions, with convolutions around it."""
    width = r.choice((4, 6, 8))
    style = r.choice(("non-local", "fused", "linear", "channel", "se like"))
    if style == "fused":
        _fused_attention(e, r, v, width)
        return v
    q, k, value = (e.member(name, f"nn.Conv2d({v.c}, {width}, 1)") for name in "qkv")
    proj = e.member("proj", f"nn.Conv2d({width}, {v.c}, 1)")
    e.line(f"q, k, v = {q}({{x}}).flatten(2), {k}({{x}}).flatten(2), {value}({{x}}).flatten(2)")
    if style == "non-local":
        e.line(
            "s = "
            + r.choice(
                (
                    "(q.transpose(1, 2) @ k).softmax(-1)",
                    "(q.transpose(1, 2) @ k * q.shape[1] ** -0.5).softmax(-1)",
                    "torch.bmm(q.permute(0, 2, 1), k).softmax(dim=-1)",
                    "(q.transpose(1, 2) @ k) / q.shape[-1]",
                )
            )
        )
        e.line("o = v @ s.transpose(1, 2)")
    elif style == "linear":
        e.line(
            "o = torch.bmm(k.softmax(-1), v.transpose(1, 2))"
            if r.random() < 0.5
            else "o = k.relu() @ v.transpose(1, 2)"
        )
        e.line(
            "o = (q.softmax(1).transpose(1, 2) @ o).transpose(1, 2)"
            if r.random() < 0.5
            else "o = (q.relu().transpose(1, 2) @ o).transpose(1, 2)"
        )
    elif style == "channel":
        e.line("s = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(1, 2)).softmax(-1)")
        e.line("o = s @ v")
    else:
        e.line("o = v * (q * k).mean(-1, keepdim=True).sigmoid()")
    e.line(
        "o = o."
        + r.choice(
            (
                "unflatten(2, {x}.shape[2:])",
                "view({x}.shape[0], -1, *{x}.shape[2:])",
                f"reshape(-1, {width}, {v.h}, {v.w})",
            )
        )
    )
    e.set(f"{{x}} + {proj}(o)" if r.random() < 0.6 else f"{proj}(o)")
    return v


# --- habits of code ------------------------------------------------------------------------------------------------------------


@production("image", weight=1.5)
def in_place_on_view(e: Scope, r: Random, v: Value) -> Value:
    """Write over a part of a value."""
    k = max(1, v.c // 2)
    short = e.member("short", f"nn.Conv2d({v.c}, {k}, 1)")
    e.line(f"s = {short}({{x}})")
    e.set("{x}.clone()" if r.random() < 0.5 else "{x} * 2")
    forms = [
        f"{{x}}[:, :{k}].add_(s)",
        f"{{x}}[:, :{k}] += s",
        f"{{x}}[:, :{k}] = s",
        f"{{x}}[:, :{k}].relu_()",
        "{x}[:, 0] = 0",
        "{x}.flatten(2).mul_(0.5)",
    ]
    forms += [
        "{x}.chunk(2, 1)[0].sigmoid_()",
        "{x}.transpose(2, 3).add_(0.5)",
        "{x}[:, :, 0] = 0.0",
        "{x}[:, :, :1] += 1",
        "{x}.view(-1).mul_(2)",
    ]
    e.line(r.choice(forms))
    return v


@production("image", weight=1.5)
def flow(e: Scope, r: Random, v: Value) -> Value:
    """Write control flow or numbers that depend on sizes."""
    forms = [
        ["{x} = {x} * {x}.shape[1] ** -0.5"],
        ["if {x}.shape[1] > 5:", "    {x} = {x}.relu()"],
        ["for i in range({x}.shape[1] // 4):", "    {x} = {x} * 1.1"],
    ]
    forms += [
        ["{x} = {x} / math.sqrt({x}.size(1))"],
        ["if {x}.shape[2] == {x}.shape[3]:", "    {x} = {x} + 1"],
        ["{x} = {x}.sum((2, 3), keepdim=True) / ({x}.shape[2] * {x}.shape[3]) + {x}"],
    ]
    forms += [
        ["n, c, h, w = {x}.shape", "{x} = {x}.view(n, c, h * w).view(n, c, h, w)"],
        ["assert {x}.shape[1] == %d" % v.c],
        ["{x} = {x} * ({x}.numel() / len({x})) ** -0.5"],
    ]
    forms += [
        ["{x} = {x}.view({x}.size(0), -1).view({x}.size(0), %d, %d, %d)" % (v.c, v.h, v.w)],
        ["{x} = {x}.reshape(-1, %d, {x}.shape[2], {x}.shape[3])" % v.c],
    ]
    forms += [
        ["for i in range(2):", "    {x} = {x} * 0.9 + i"],
        ["{x} = {x} if {x}.dim() == 4 else {x}.unsqueeze(0)"],
        ["{x} = {x} + torch.ones({x}.shape[1], 1, 1, dtype={x}.dtype)"],
    ]
    forms += [
        ["{x} = {x} + torch.arange({x}.shape[-1]).to({x}.dtype)"],
        ["{x} = {x} * torch.linspace(0, 1, {x}.shape[1], dtype={x}.dtype).view(1, -1, 1, 1)"],
    ]
    for text in r.choice(forms):
        e.line(text)
    return v


@production("image", weight=1)
def habit(e: Scope, r: Random, v: Value) -> Value:
    """Write regions, hooks, tied weights and other habits around one convolution."""
    c, style = (
        v.c,
        r.choice(
            (
                "autocast",
                "checkpoint",
                "hook",
                "tied",
                "transposed tie",
                "no_grad",
                "dict",
                "default",
                "buffer",
                "frames",
                "instance",
            )
        ),
    )
    layer = e.member("conv", f"nn.Conv2d({c}, {c}, 1)")
    if style == "autocast":
        e.line("with torch.autocast('cpu', enabled=False):")
        e.line(f"    {{x}} = {layer}({{x}})")
    elif style == "checkpoint":
        e.set(f"torch.utils.checkpoint.checkpoint({layer}, {{x}}, use_reentrant=False)")
    elif style == "hook":
        e.members.append(f"{layer}.register_forward_hook(lambda module, args, output: output * 2)")
        e.set(f"{layer}({{x}})")
    elif style == "tied":
        other = e.member("conv", f"nn.Conv2d({c}, {c}, 1)")
        e.members.append(f"{other}.weight = {layer}.weight")
        e.set(f"{other}({layer}({{x}}).relu())")
    elif style == "transposed tie":
        e.set(f"F.conv_transpose2d({layer}({{x}}).relu(), {layer}.weight)")
    elif style == "no_grad":
        e.line("with torch.no_grad():")
        e.line(f"    s = {layer}({{x}}).sigmoid()")
        e.set("{x} * s")
    elif style == "dict":
        e.line(f"parts = {{'a': {layer}({{x}}), 'b': {{x}}}}")
        e.set("parts['a'] + parts['b']" if r.random() < 0.5 else "sum(parts.values())")
    elif style == "default":
        inner = Scope(e.source)
        inner.member("conv", f"nn.Conv2d({c}, {c}, 1)")
        inner.lines += ["x = self.conv1(x) * scale", "return (x, skip) if skip is not None else x"]
        name = e.source.new_name("Options")
        e.source.add(name, inner, "x, skip=None, scale=1.0")
        block = e.member("options", f"{name}()")
        e.set(
            r.choice(
                (
                    f"{block}({{x}})",
                    f"{block}({{x}}, scale=0.5)",
                    f"sum({block}({{x}}, skip={{x}}))",
                    f"{block}(x={{x}})",
                )
            )
        )
    elif style == "buffer":
        mean = e.member("mean", f"nn.Buffer(torch.rand(1, {c}, 1, 1))")
        e.set(f"{layer}({{x}} - {mean})")
    elif style == "frames" and v.h % 2 == 0:
        e.line("n, c, h, w = {x}.shape")
        e.set(f"{layer}({{x}}.view(n, c, 2, h // 2, w).transpose(1, 2).reshape(n * 2, c, h // 2, w))")
        e.set("{x}.view(n, 2, c, h // 2, w).transpose(1, 2).reshape(n, c, h, w)")
    else:
        e.set(f"{layer}({{x}})")
    return v
