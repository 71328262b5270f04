"""Random small networks: converted, trained for a step, copied, saved and loaded, and converted back."""

import copy
import io
import random

import torch
from cases import largest_error
from torch import Tensor, nn

import pyfeedback
from pyfeedback.testing import by_reference

RULES = {
    "bp": pyfeedback.rule("bp"),
    "fa": pyfeedback.rule("fa"),
    "wm": pyfeedback.rule("wm", amp=0.01, decay=0.1),
    "ia": pyfeedback.rule("ia", amp=0.01, null=0.01, decay=0.1),
    "ia of half": pyfeedback.rule("ia", amp=0.01, null=0.01, samples=0.5, reduction="mean"),
    "sa": pyfeedback.rule("sa", self_=0.2, decay=0.2),
    "aa": pyfeedback.rule("aa", amp=0.01, sparse=0.01),
    "kp": pyfeedback.rule("kp", decay=0.1),
}
OTHERS = {name: pyfeedback.rule(name) for name in ("pfa", "usf", "frsf", "brsf", "dfa")}  # not in the reference
BATCH = 4


class Residual(nn.Module):
    """x + f(x), added in place if f has a bias: its response is then recomputed rather than saved.

    :func:`pyfeedback.convert` cannot see in-place operations outside of modules.
    """

    def __init__(self, inner: nn.Module, inplace: bool):
        super().__init__()
        self.inner, self.inplace = inner, inplace and inner.bias is not None

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        if self.inplace:
            y += x
            return y
        return x + y


class Attention(nn.Module):
    """Attention of a sequence to itself or to its first half."""

    def __init__(self, layer: nn.MultiheadAttention, half: bool):
        super().__init__()
        self.layer, self.half = layer, half

    def forward(self, x: Tensor) -> Tensor:
        keys = x[:, : (x.shape[1] + 1) // 2] if self.half else x
        return self.layer(x, keys, keys, need_weights=False)[0]


def random_network(draw: random.Random) -> tuple[nn.Sequential, tuple[int, ...]]:
    """A network and the shape of its input."""
    spatial = draw.choice((0, 1, 2, 2, 2, 3))
    channels = draw.choice((2, 4))
    if spatial == 0:
        size: tuple[int, ...] = (BATCH, *[draw.randrange(2, 5)] * draw.choice((0, 1)), channels)
        return nn.Sequential(*_of_sequences(draw, channels, len(size) == 3), nn.Flatten(), nn.LazyLinear(3)), size
    size = (BATCH, channels, *(draw.randrange(4, 8) for _ in range(spatial)))
    return nn.Sequential(*_of_maps(draw, channels, spatial), nn.Flatten(), nn.LazyLinear(3)), size


def _of_maps(draw: random.Random, channels: int, spatial: int):
    """Convolutions and what comes between them."""
    for _ in range(draw.randrange(1, 4)):
        out = draw.choice((2, 4, 6))
        kind = draw.choice(("plain", "plain", "same", "transposed", "depthwise", "residual", "shared"))
        options = {"bias": draw.random() < 0.5}
        conv, transposed = (getattr(nn, f"{name}{spatial}d") for name in ("Conv", "ConvTranspose"))
        if kind == "transposed":
            yield transposed(channels, out, draw.choice((2, 3)), stride=draw.choice((1, 2)), padding=0, **options)
        elif kind == "depthwise":
            out = channels * draw.choice((1, 2))
            yield conv(channels, out, draw.choice((1, 3)), padding=1, groups=channels, **options)
        elif kind in ("residual", "shared"):
            out, mode = channels, draw.choice(("zeros", "circular", "replicate"))
            inner = conv(channels, channels, 3, padding=1, padding_mode=mode, **options)
            if kind == "shared":
                yield from (inner, nn.Tanh(), inner)
            else:
                yield Residual(inner, draw.random() < 0.5)
        else:
            strides = {} if kind == "same" else {"stride": draw.choice((1, 2)), "dilation": draw.choice((1, 1, 2))}
            yield conv(
                channels,
                out,
                draw.choice((1, 2, 3) if strides.get("stride", 1) == 1 else (2, 3)),
                padding="same" if kind == "same" else 2,
                **strides,
                **options,
            )
        channels = out
        if draw.random() < 0.4:
            yield getattr(nn, f"BatchNorm{spatial}d")(channels)
        yield draw.choice((nn.Identity(), nn.ReLU(), nn.ReLU(inplace=True), nn.Tanh(), nn.Hardtanh(inplace=True)))


def _of_sequences(draw: random.Random, channels: int, positions: bool):
    """Linear layers, and attention if there are positions."""
    for _ in range(draw.randrange(1, 4)):
        kind = draw.choice(
            ("linear", "linear", "residual", "attention", "encoder") if positions else ("linear", "residual")
        )
        bias = draw.random() < 0.5
        if kind == "linear":
            out = draw.choice((2, 4, 6))
            yield nn.Linear(channels, out, bias=bias)
            channels = out
        elif kind == "residual":
            yield Residual(nn.Linear(channels, channels, bias=bias), draw.random() < 0.5)
        elif kind == "attention":
            yield Attention(nn.MultiheadAttention(channels, 2, bias=bias, batch_first=True), draw.random() < 0.5)
        else:
            yield nn.TransformerEncoderLayer(channels, 2, 5, dropout=0.0, batch_first=True)
        yield draw.choice((nn.Identity(), nn.ReLU(), nn.ReLU(inplace=True), nn.Tanh(), nn.LayerNorm(channels)))


def check(number: int) -> None:
    """Raise AssertionError if the network with this number fails conversion, training, copying or conversion back."""
    draw = random.Random(number)
    torch.manual_seed(number)
    model, size = random_network(draw)
    model(torch.randn(size))  # initializes the lazy layer
    model.double()
    for module in model.modules():
        if getattr(module, "bias", None) is not None and module.bias.dim() == 1:
            nn.init.normal_(module.bias)  # away from the kinks of activations, where rounding decides
    plain = copy.deepcopy(model)
    x, target = torch.randn(size, dtype=torch.float64), torch.randint(3, (BATCH,))
    name = draw.choice((*RULES, *RULES, *OTHERS))
    rule = RULES.get(name) or OTHERS[name]
    mixed = draw.random() < 0.2 and name in RULES
    rules = {"0*": RULES[draw.choice(tuple(RULES))], "*": rule} if mixed else rule
    what = f"{rules} on {model}"

    pyfeedback.convert(model, rules, init=pyfeedback.Init(seed=number) if draw.random() < 0.5 else None)
    assert largest_error([model(x).detach()], [plain(x).detach()]) < 1e-12, f"another forward: {what}"
    twin = copy.deepcopy(model)
    assert_alike(model.state_dict(), twin.state_dict(), f"a copy differs: {what}")
    if name in RULES:
        check_gradients(model, x, target, what)

    losses = [train(m, x, target, random.Random(number)) for m in (model, twin)]
    assert losses[0] == losses[1] or name == "brsf", f"a copy trains otherwise: {what}"  # brsf draws in every pass
    if name == "brsf":
        twin.load_state_dict(model.state_dict())
    assert_alike(model.state_dict(), twin.state_dict(), f"a copy has trained otherwise: {what}")

    saved = io.BytesIO()
    torch.save(model.state_dict(), saved)
    saved.seek(0)
    fresh = pyfeedback.convert(copy.deepcopy(plain), rules)
    fresh.load_state_dict(torch.load(saved, weights_only=True))
    assert_alike(model.state_dict(), fresh.state_dict(), f"a state does not load: {what}")

    model.eval()
    expected = model(x)
    assert pyfeedback.unconvert(model) is model
    assert largest_error([model(x).detach()], [expected.detach()]) < 1e-12, f"another forward after all: {what}"
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()], f"not all came back: {what}"
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain.eval()(x), model(x)), f"the plain model is another one: {what}"


def check_gradients(model: nn.Module, x: Tensor, target: Tensor, what: str) -> None:
    """Compare the gradient of every parameter with the reference."""
    ours, exact = copy.deepcopy(model), copy.deepcopy(model)
    nn.functional.cross_entropy(ours(x), target).backward()
    for module in exact.modules():
        if getattr(module, "inplace", False):
            module.inplace = False  # the reference reads every response
    with by_reference() as penalties:
        loss = nn.functional.cross_entropy(exact(x), target)
    (loss + sum(penalties)).backward()
    for (n, p), q in zip(ours.named_parameters(), exact.parameters(), strict=True):
        found, expected = (torch.zeros_like(t) if t.grad is None else t.grad for t in (p, q))
        error = (found - expected).abs().max().item()
        assert error <= 1e-9 * max(expected.abs().max().item(), 1e-3), f"{n}.grad is off by {error:.1e}: {what}"


def train(model: nn.Module, x: Tensor, target: Tensor, draw: random.Random) -> list[float]:
    """The losses of two steps. Each must change the forward weights and leave all values finite."""
    parameters = pyfeedback.forward_parameters
    if not any(True for _ in pyfeedback.feedback_layers(model)):
        optimizers = [torch.optim.SGD(model.parameters(), lr=0.05)]
    elif draw.random() < 0.5:
        optimizers = [draw.choice((pyfeedback.optim.SGD, pyfeedback.optim.AdamW))(model, lr=0.05)]
    else:
        optimizers = [pyfeedback.optim.FeedbackSGD(model, lr=0.05), torch.optim.SGD(parameters(model), lr=0.05)]
    losses = []
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        model.zero_grad()
        loss = nn.functional.cross_entropy(model(x), target)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    assert all(p.isfinite().all() for p in model.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    return losses


def assert_alike(found, expected, message: str) -> None:
    assert found.keys() == expected.keys(), message
    assert all(torch.equal(found[n], expected[n]) for n in found), message
