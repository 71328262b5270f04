"""Two small transformers, a character GPT and a Vision Transformer, and the text that the GPT learns from.

Both have residual blocks with the layer norm before attention and before the MLP. Their projections are nn.Linear and
nn.MultiheadAttention, so :func:`pyfeedback.convert` changes all of them; it skips the embeddings.
"""

import re
from functools import cache
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CONTEXT = 64  # characters
PATCH = 4  # height and width of a patch in pixels


class Block(nn.Module):
    """A residual block: attention and an MLP of four times the width, each after a layer norm."""

    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.causal = causal
        self.before_attention = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.before_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.before_attention(x)
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], x.device, x.dtype) if self.causal else None
        x = x + self.attention(y, y, y, need_weights=False, attn_mask=mask, is_causal=self.causal)[0]
        return x + self.mlp(self.before_mlp(x))


class GPT(nn.Module):
    """Logits [N, T, vocabulary] of the next character at each position, from characters [N, T]."""

    def __init__(self, vocabulary: int, context: int = CONTEXT, width: int = 64, depth: int = 3, heads: int = 4):
        super().__init__()
        self.characters = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        nn.init.normal_(self.characters.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)
        self.blocks = nn.Sequential(*(Block(width, heads, causal=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, characters: Tensor) -> Tensor:
        x = self.characters(characters) + self.positions.weight[: characters.shape[1]]
        return self.head(self.norm(self.blocks(x)))


class ViT(nn.Module):
    """Logits [N, classes] from square images [N, 1, H, W]: patches, blocks, the mean over the patches, and a head."""

    def __init__(self, classes: int, size: int = 28, width: int = 64, depth: int = 3, heads: int = 4):
        super().__init__()
        self.patches = nn.Linear(PATCH**2, width)
        self.positions = nn.Embedding((size // PATCH) ** 2, width)
        nn.init.normal_(self.positions.weight, std=0.02)
        self.blocks = nn.Sequential(*(Block(width, heads, causal=False) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        patches = F.unfold(images, PATCH, stride=PATCH).transpose(1, 2)
        x = self.patches(patches) + self.positions.weight
        return self.head(self.norm(self.blocks(x)).mean(1))


@cache
def text() -> tuple[Tensor, str]:
    """The text as indices [N] of characters, and the vocabulary.

    The text is the part of Python's language reference that each installation has for ``help()``, in
    ``pydoc_data.topics``, about 370,000 characters. A paragraph that several topics have is taken once, so that no
    paragraph of the test text is in the training text. The documentation of Python is under the PSF License 2.
    """
    paragraphs = re.split(r"\n\s*\n", "\n\n".join(topics.values()))
    once = {" ".join(paragraph.split()): paragraph for paragraph in reversed(paragraphs)}
    joined = "\n\n".join(reversed(once.values()))
    vocabulary = "".join(sorted(set(joined)))
    index = {character: i for i, character in enumerate(vocabulary)}
    return torch.tensor([index[character] for character in joined]), vocabulary


def entropy(targets: Tensor) -> float:
    """The entropy of the frequencies of classes or characters, in nats: the least loss of a model without input."""
    counts = targets.bincount().double()
    return torch.special.entr(counts / counts.sum()).sum().item()
