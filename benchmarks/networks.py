"""The networks of the benchmarks, in their simplest form, and their training steps."""

import copy
from collections.abc import Callable

import torch
from costs import sampled
from selection import Selection
from timing import Step
from torch import Tensor, nn
from torch.nn import functional as F

import pyfeedback
from pyfeedback.core.algorithm import algorithms, pass_macs
from pyfeedback.testing import by_reference

UPDATE = {"lr": 1e-6, "momentum": 0.9, "weight_decay": 2e-3}  # small: a thousand steps change nothing


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut: a strided 1x1 convolution if the shape changes."""

    def __init__(self, c: int, k: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(c, k, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(k)
        self.conv2 = nn.Conv2d(k, k, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(k)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential()
        if stride != 1 or c != k:
            self.shortcut = nn.Sequential(nn.Conv2d(c, k, 1, stride, bias=False), nn.BatchNorm2d(k))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with a bottleneck of a quarter of the width, and the shortcut of :class:`Block`."""

    def __init__(self, c: int, k: int, stride: int):
        super().__init__()
        m = k // 4
        self.conv1 = nn.Conv2d(c, m, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(m)
        self.conv2 = nn.Conv2d(m, m, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(m)
        self.conv3 = nn.Conv2d(m, k, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(k)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential()
        if stride != 1 or c != k:
            self.shortcut = nn.Sequential(nn.Conv2d(c, k, 1, stride, bias=False), nn.BatchNorm2d(k))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        return self.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """A stem, stages of blocks, global average pooling and a linear classifier."""

    def __init__(
        self,
        stem: nn.Module,
        c: int,
        widths: tuple[int, ...],
        blocks: tuple[int, ...],
        classes: int,
        kind: type[Block] | type[Bottleneck] = Block,
    ):
        super().__init__()
        layers = [stem]
        for stage, (k, count) in enumerate(zip(widths, blocks, strict=True)):
            for block in range(count):
                layers.append(kind(c, k, 2 if stage and not block else 1))
                c = k
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(c, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.mean(self.features(x), (2, 3)))


def _stem(c: int, kernel: int, stride: int, *more: nn.Module) -> nn.Sequential:
    conv = nn.Conv2d(3, c, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c), nn.ReLU(inplace=True), *more)


def _imagenet_stem() -> nn.Sequential:
    return _stem(64, 7, 2, nn.MaxPool2d(3, 2, 1))


def resnet18() -> ResNet:
    """He et al. 2016, for ImageNet."""
    return ResNet(_imagenet_stem(), 64, (64, 128, 256, 512), (2, 2, 2, 2), 1000)


def resnet18_cifar() -> ResNet:
    """ResNet-18 for 32x32 images: a 3x3 stem without pooling."""
    return ResNet(_stem(64, 3, 1), 64, (64, 128, 256, 512), (2, 2, 2, 2), 10)


def resnet50() -> ResNet:
    """He et al. 2016, for ImageNet, with the stride in the 3x3 convolutions."""
    return ResNet(_imagenet_stem(), 64, (256, 512, 1024, 2048), (3, 4, 6, 3), 1000, Bottleneck)


def resnet20() -> ResNet:
    """He et al. 2016, for CIFAR, with 1x1 shortcuts."""
    return ResNet(_stem(16, 3, 1), 16, (16, 32, 64), (3, 3, 3), 10)


def demo() -> nn.Sequential:
    """The network of examples/two_routes.py: seven layers, 16 channels."""
    widths, strides = (16, 16, 32, 32, 64, 64), (2, 1, 2, 1, 2, 1)
    layers: list[nn.Module] = []
    for c, k, stride in zip((3, *widths), widths, strides, strict=False):
        layers += [nn.Conv2d(c, k, 3, stride, 1, bias=False), nn.BatchNorm2d(k), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def mlp() -> nn.Sequential:
    """Two hidden layers of 1024 units."""
    sizes = (nn.Linear(3072, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))
    return nn.Sequential(nn.Flatten(), *sizes)


class ConvNeXtBlock(nn.Module):
    """A depthwise 7x7 convolution, layer norm and two pointwise layers, with a scaled residual (Liu et al. 2022)."""

    def __init__(self, c: int):
        super().__init__()
        self.depthwise = nn.Conv2d(c, c, 7, padding=3, groups=c)
        self.norm = nn.LayerNorm(c)
        self.mlp = nn.Sequential(nn.Linear(c, 4 * c), nn.GELU(), nn.Linear(4 * c, c))
        self.scale = nn.Parameter(torch.full((c,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(x).permute(0, 2, 3, 1)
        return x + (self.scale * self.mlp(self.norm(y))).permute(0, 3, 1, 2)


def convnext() -> nn.Sequential:
    """The first stage of ConvNeXt-T, three blocks of width 96, between a patch embedding and a classifier."""
    blocks = (ConvNeXtBlock(96) for _ in range(3))
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(96), nn.Linear(96, 1000))
    return nn.Sequential(nn.Conv2d(3, 96, 4, 4), *blocks, *head)


def _blocks(width: int, depth: int, heads: int) -> nn.TransformerEncoder:
    """Blocks with layer norm before attention and before the MLP, and a last layer norm."""
    block = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, F.gelu, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(block, depth, nn.LayerNorm(width), enable_nested_tensor=False)


class VisionTransformer(nn.Module):
    """ViT-Tiny (Touvron et al. 2021), with the mean of the tokens in place of a class token."""

    def __init__(self, width: int = 192, depth: int = 12, heads: int = 3, patch: int = 16, tokens: int = 196):
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.positions = nn.Parameter(torch.zeros(tokens, width))
        self.blocks = _blocks(width, depth, heads)
        self.fc = nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        return self.fc(self.blocks(tokens + self.positions[: tokens.shape[1]]).mean(1))


CHARACTERS = 103  # of the text of docs/transformers.md


class GPT(nn.Module):
    """The character GPT of examples/transformer_models.py: the logits of the next character at each position."""

    def __init__(self, context: int = 64, width: int = 64, depth: int = 3, heads: int = 4):
        super().__init__()
        self.characters = nn.Embedding(CHARACTERS, width)
        self.positions = nn.Parameter(torch.zeros(context, width))
        self.blocks = _blocks(width, depth, heads)
        self.fc = nn.Linear(width, CHARACTERS)

    def forward(self, characters: Tensor) -> Tensor:
        length = characters.shape[1]
        x = self.characters(characters) + self.positions[:length]
        mask = nn.Transformer.generate_square_subsequent_mask(length, x.device, x.dtype)
        return self.fc(self.blocks(x, mask, is_causal=True))


MODELS = {
    "resnet18": resnet18,
    "resnet18-cifar": resnet18_cifar,
    "resnet20": resnet20,
    "resnet50": resnet50,
    "demo": demo,
    "mlp": mlp,
    "convnext": convnext,
    "vit-tiny": VisionTransformer,
    "gpt": GPT,
}

SIZES = {  # network: (batch, height and width of an image or length of a text) for a full run, a quick one, a GPU
    "resnet18": ((16, 224), (16, 64), (128, 224)),
    "resnet18-cifar": ((64, 32), (16, 32), (512, 32)),
    "resnet20": ((64, 32), (32, 32), (512, 32)),
    "resnet50": ((16, 224), (8, 64), (128, 224)),
    "demo": ((64, 32), (32, 32), (512, 32)),
    "mlp": ((256, 32), (64, 32), (2048, 32)),
    "convnext": ((4, 224), (2, 64), (128, 224)),
    "vit-tiny": ((8, 224), (4, 64), (128, 224)),
    "gpt": ((16, 64), (8, 64), (512, 64)),
}


def draw_batch(network: str, batch: int, size: int) -> tuple[Tensor, Tensor]:
    """Random images [N, 3, S, S] and their labels [N]; or random texts [N, S], and the next characters [N, S]."""
    if network == "gpt":
        text = torch.randint(CHARACTERS, (batch, size + 1))
        return text[:, :-1], text[:, 1:]
    return torch.randn(batch, 3, size, size), torch.arange(batch) % 10


def task(
    network: str, selection: Selection, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, Tensor, Tensor, dict[str, object]]:
    """A network, a batch of inputs, their labels, and the description of both in a record."""
    device, layout = selection.device, torch.contiguous_format if selection.contiguous else torch.channels_last
    batch, size = SIZES[network][1 if selection.quick else 2 if device.type == "cuda" else 0]
    batch = batch if selection.timed else 2
    torch.manual_seed(0)
    model = MODELS[network]().to(device, dtype, memory_format=layout)
    inputs, labels = (t.to(device) for t in draw_batch(network, batch, size))
    if inputs.is_floating_point():
        inputs = inputs.to(dtype, memory_format=layout)
    info = {
        "network": network,
        "size": f"{batch} of {f'{size} characters' if network == 'gpt' else f'{size}x{size}'}",
        "layout": "contiguous" if selection.contiguous else "channels_last",
        "dtype": str(dtype).removeprefix("torch."),
    }
    return model, inputs, labels, info


def multiply_adds(model: nn.Module, inputs: Tensor, rule: pyfeedback.Rule) -> float:
    """Those of a step of all layers with a feedback weight, by the cheapest algorithm, relative to backprop.

    Everything else in the network, such as normalization, and the update of B are not counted.
    """
    model = pyfeedback.convert(copy.deepcopy(model), "wm-probes")  # its layers remember the shapes of their last call
    model(inputs)
    ours = plain = 0
    for i, (_, layer) in enumerate(pyfeedback.feedback_layers(model)):
        geometry, input, weight = layer.last_call
        sizes = geometry.sizes(input, weight, 0)
        passes = (3 if i or not inputs.is_floating_point() else 2) * pass_macs(sizes)  # no gradient of the images
        read = sizes._replace(positions=sizes.positions * sampled(rule, len(inputs)))
        ours += passes + min(algorithms(read, rule.coefficients(len(inputs), 1), True).values())
        plain += passes
    return ours / plain


def loss_of(outputs: Tensor, labels: Tensor) -> Tensor:
    """The cross entropy of logits [N, classes] or [N, S, classes]."""
    return F.cross_entropy(outputs.flatten(0, -2), labels.flatten())


def training_step(
    model: nn.Module, inputs: Tensor, labels: Tensor, compiled: bool = False, followed: bool = False
) -> Step:
    """The step of a training loop; one optimizer updates all parameters.

    Args:
        followed: whether the optimizer is that of PyTorch, which the feedback weights follow.
    """
    run_model = torch.compile(model) if compiled else model

    def backward():
        loss_of(run_model(inputs), labels).backward()

    return _step(model, backward, followed=followed)


def reference_step(model: nn.Module, inputs: Tensor, labels: Tensor) -> Step:
    """The same step with the layers of pyfeedback.reference: autograd computes the gradient of the rule."""

    def backward():
        with by_reference() as penalties:
            loss = loss_of(model(inputs), labels)
        (loss + sum(penalties)).backward()

    return _step(model, backward, by_gradient=True)


def _step(model: nn.Module, backward: Callable[[], None], by_gradient: bool = False, followed: bool = False) -> Step:
    optimizer: torch.optim.Optimizer
    if followed:
        optimizer = torch.optim.SGD(pyfeedback.forward_parameters(model), fused=True, **UPDATE)
        pyfeedback.optim.follow(optimizer, model)
    elif list(pyfeedback.feedback_parameters(model)):
        optimizer = pyfeedback.optim.SGD(model, **UPDATE)
    else:
        optimizer = torch.optim.SGD(model.parameters(), fused=True, **UPDATE)
    for feedback in pyfeedback.feedback_parameters(model):
        feedback.requires_grad_(feedback.requires_grad or by_gradient)

    def run():
        backward()
        optimizer.step()
        for parameter in model.parameters():
            parameter.grad = None

    return Step(run)
