"""Small modules that use a weight in their own forward, each like a layer of a well-known library."""

import copy

import layer_cases
import torch
from torch import nn
from torch.nn import functional as F

import pyfeedback

N, C, K, E = 5, 4, 6, 3  # samples, inputs, outputs, experts


class Swin(nn.Module):
    """torchvision's and timm's attention: the weight of a linear layer is read."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(C, K)

    def forward(self, x):
        return F.linear(x, self.qkv.weight, self.qkv.bias)


class Beit(Swin):
    """With a bias that is put together in the forward."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(C, K, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.randn(2)), nn.Parameter(torch.randn(2))

    def forward(self, x):
        return F.linear(x, weight=self.qkv.weight, bias=torch.cat([self.q_bias, torch.zeros(2).to(x), self.v_bias]))


class Helper(Swin):
    """A function of the module file reads the weight."""

    def forward(self, x):
        return _apply(x, self.qkv)


def _apply(x, layer):
    return x @ layer.weight.t() + layer.bias


class Reads2d(nn.Module):
    """The weight of a convolution is read."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(C, K, 3, padding=1, stride=2)

    def forward(self, x):
        return F.conv2d(x, self.conv.weight, self.conv.bias, stride=2, padding="valid")


class Own(nn.Module):
    """A weight of its own, [K, C]."""

    shape: tuple[int, ...] = (K, C)

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(self.shape))
        self.bias = nn.Parameter(torch.randn(K))


class OwnLinear(Own):
    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class Conv1D(Own):
    """The linear class of GPT-2 in transformers."""

    shape = (C, K)

    def forward(self, x):
        size = (*x.size()[:-1], self.weight.shape[1])
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size)


class Matmul(Own):
    def forward(self, x):
        return x @ self.weight.T + self.bias


class LeftMatmul(Own):
    """W x, with the samples in columns."""

    def forward(self, x):
        return torch.matmul(self.weight, x.mT).mT


class Addmm(Own):
    """With factors, and the weight on the left."""

    def forward(self, x):
        return torch.addmm(self.bias.unsqueeze(1), self.weight, x.t(), beta=2.0, alpha=0.5).t()


class Einsum(Own):
    shape = (C, 2, 3)  # as the projections of transformers' and JAX's attention: heads and their width

    def forward(self, x):
        return torch.einsum("nc,chd->nhd", x, self.weight)


class EinsumEllipsis(Own):
    def forward(self, x):
        return torch.einsum("oc,...c->...o", self.weight, x)


class Slices(Own):
    """Slices of one weight, as of in_proj_weight."""

    def forward(self, x):
        first, second = self.weight.chunk(2)
        rows = [F.linear(x, first), x.matmul(second.transpose(0, 1)), x.mv(self.weight[0]).unsqueeze(1)]
        return torch.cat(rows, -1)


class Joined(nn.Module):
    """Queries, keys and values in one product."""

    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(C, K, bias=False), nn.Linear(C, 2, bias=False)

    def forward(self, x):
        return F.linear(x, torch.cat([self.q.weight, self.k.weight]))


class Rows(Own):
    """Rows of the weight, by iteration and by an index."""

    def forward(self, x):
        return torch.stack([F.linear(x, row.unsqueeze(0)).squeeze(-1) for row in self.weight], 1)


class Padded(nn.Conv2d):
    """A convolution with a forward of its own, as timm's Conv2dSame."""

    def __init__(self):
        super().__init__(C, K, 3, stride=2)

    def forward(self, x):
        return super().forward(F.pad(x, (0, 1, 1, 0)))


class Transposed(Own):
    shape = (C, K, 3)

    def forward(self, x):
        return F.conv_transpose1d(x, self.weight, self.bias, stride=2, padding=1, output_padding=1)


class Same(Own):
    """An even kernel, whose "same" padding is not equal on both sides."""

    shape = (K, C // 2, 4)

    def forward(self, x):
        return F.conv1d(x, self.weight, self.bias, padding="same", groups=2)


class Experts(nn.Module):
    """Weights [E, C, K] of experts, applied to x [N, E, C]."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(E, C, K))


class Bmm(Experts):
    def forward(self, x):
        return torch.bmm(x.transpose(0, 1), self.weight).transpose(0, 1)


class BatchedEinsum(Experts):
    def forward(self, x):
        return torch.einsum("nec,eck->nek", x, self.weight)


class BroadcastMatmul(Experts):
    def forward(self, x):
        return (x.unsqueeze(2) @ self.weight).squeeze(2)


class Indexed(Experts):
    """As the experts of transformers: a loop with weight[e]."""

    def forward(self, x):
        return torch.stack([x[:, e] @ self.weight[e] for e in range(E)], 1)


# One product each, whose input is the input of the module with the samples in dimension 0.
PRODUCTS = {
    "swin": (Swin, (N, C)),
    "swin 3d": (Swin, (N, 2, C)),
    "beit": (Beit, (N, C)),
    "helper": (Helper, (N, C)),
    "conv": (Reads2d, (N, C, 7, 6)),
    "own": (OwnLinear, (N, 2, C)),
    "own unbatched": (OwnLinear, (C,)),
    "conv1d": (Conv1D, (N, C)),
    "matmul": (Matmul, (N, C)),
    "matmul 3d": (Matmul, (N, 2, C)),
    "left": (LeftMatmul, (N, C)),
    "left 3d": (LeftMatmul, (N, 2, C)),
    "addmm": (Addmm, (N, C)),
    "einsum": (Einsum, (N, C)),
    "einsum ellipsis": (EinsumEllipsis, (N, 2, C)),
    "padded": (Padded, (N, C, 7, 6)),
    "transposed": (Transposed, (N, C, 5)),
    "same": (Same, (N, C, 5)),
    "bmm": (Bmm, (N, E, C)),
    "batched einsum": (BatchedEinsum, (N, E, C)),
    "broadcast": (BroadcastMatmul, (N, E, C)),
}
# Several products with parts of one weight.
PARTS = {
    "joined": (Joined, (N, C)),
    "slices": (Slices, (N, C)),
    "rows": (Rows, (N, C)),
    "indexed": (Indexed, (N, E, C)),
}
ALL = PRODUCTS | PARTS


def build(name, dtype=torch.float64):
    """The module with random weights, and an input for it."""
    make, shape = ALL[name]
    torch.manual_seed(0)
    module = make().to(dtype)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module, torch.randn(shape, dtype=dtype)


# Cases of every kind, for tests that are about something else.
SAMPLED = ("swin", "beit", "conv1d", "joined", "padded", "bmm", "slices", "indexed")


def converted(name, rule="ia", dtype=torch.float64):
    """The converted module of a case, the module before, and an input."""
    plain, x = build(name, dtype)
    return pyfeedback.convert(copy.deepcopy(plain), layer_cases.RULES.get(rule, rule)), plain, x


class Standardized(nn.Conv1d):
    """A weight-standardized convolution."""

    def forward(self, x):
        var, mean = torch.var_mean(self.weight, dim=(1, 2), keepdim=True)
        return self._conv_forward(x, (self.weight - mean) * (var + 1e-5).rsqrt(), self.bias)
