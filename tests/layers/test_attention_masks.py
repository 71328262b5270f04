"""Attention accepts the masks of torch.nn.MultiheadAttention, with the same values, and refuses all others."""

import copy
import itertools

import pytest
import torch
from torch import nn

import pyfeedback

# torch accepts two masks of different dtypes with a warning.
pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched:UserWarning")

N, HEADS, L, S = 3, 2, 4, 5


def pairs(*shape, dtype=torch.bool):
    """A mask that hides a third of the keys, but never the first."""
    hidden = torch.rand(shape) < 0.3
    if shape and shape[-1]:
        hidden[..., 0] = False
    if dtype is torch.bool:
        return hidden
    return hidden.to(dtype) if not dtype.is_floating_point else torch.randn(shape).masked_fill_(hidden, -9.0).to(dtype)


DTYPES = (torch.bool, torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8)
ATTENTION_SHAPES = [
    (L, S), (N * HEADS, L, S), (HEADS, L, S), (1, L, S), (N, L, S), (S, L), (L, S + 1), (1, S), (L, 1), (1, 1), (1, 3),
    (3, 1), (S,), (N, 1, 1, S), (N, HEADS, L, S), (), (0, S), (N * HEADS, 1, S),
]  # fmt: skip
PADDING_SHAPES = [
    (N, S), (S,), (S, N), (N, S + 1), (N, 1), (1, S), (N * S,), (N, 1, S), (N, 1, 1, S), (), (1, 1), (0, S), (N, L),
]  # fmt: skip


def outcome(layer, inputs, masks, autocast=False):
    """The output and the weights, or the error."""
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return layer(*inputs, **masks)
    except (RuntimeError, AssertionError, ValueError, TypeError, IndexError) as error:
        return error


def both(dtype=torch.float32, **options):
    """torch.nn's attention, and its converted copy."""
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(8, HEADS, dtype=dtype, **options)
    return plain, pyfeedback.convert(copy.deepcopy(plain), "fa")


def agree(layers, inputs, masks, autocast=False):
    """Whether both accept the masks. Compares their values, and checks that our error is one line about a mask."""
    theirs, ours = (outcome(layer, inputs, masks, autocast) for layer in layers)
    refused = isinstance(theirs, Exception)
    assert isinstance(ours, Exception) == refused, (masks, theirs, ours)
    if refused:
        assert isinstance(ours, (ValueError, TypeError)), ours
        assert "\n" not in str(ours)
        assert str(ours).split()[0] in ("attn_mask", "key_padding_mask"), ours
        assert "expected" in str(ours)
        return False
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if theirs[0].dtype in (torch.bfloat16, torch.float16) else {}
    torch.testing.assert_close(ours[0], theirs[0], **tolerance)
    assert (ours[1] is None) == (theirs[1] is None)
    if ours[1] is not None:
        torch.testing.assert_close(ours[1], theirs[1], **tolerance)
    return True


def inputs(batched=True, dtype=torch.float32):
    query, key, value = (torch.randn(length, N, 8, dtype=dtype) for length in (L, S, S))
    return (query, key, value) if batched else (query[:, 0], key[:, 0], value[:, 0])


@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no_weights"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes_and_dtypes(dtype, need_weights, batched):
    layers, given = both(), inputs(batched)
    taken = 0
    for shape in ATTENTION_SHAPES:
        taken += agree(layers, given, {"attn_mask": pairs(*shape, dtype=dtype), "need_weights": need_weights})
    for shape in PADDING_SHAPES:
        taken += agree(layers, given, {"key_padding_mask": pairs(*shape, dtype=dtype), "need_weights": need_weights})
    assert taken == (3 if dtype in (torch.bool, torch.float32) else 0)


def pairs_of_masks(need_weights):
    """The arguments of a call with each pair of dtypes of both masks; either may be missing."""
    for attention, padding in itertools.product((None, *DTYPES), (None, *DTYPES)):
        masks = {"need_weights": need_weights}
        if attention is not None:
            masks["attn_mask"] = pairs(L, S, dtype=attention)
        if padding is not None:
            masks["key_padding_mask"] = pairs(N, S, dtype=padding)
        yield masks


@pytest.mark.parametrize("query_dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no_weights"])
def test_two_masks_of_any_dtypes(need_weights, query_dtype):
    layers, given = both(query_dtype), inputs(dtype=query_dtype)
    assert sum(agree(layers, given, masks) for masks in pairs_of_masks(need_weights)) > 8


@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no_weights"])
def test_under_autocast(need_weights):
    layers, given = both(), inputs()
    assert sum(agree(layers, given, masks, autocast=True) for masks in pairs_of_masks(need_weights)) > 8


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
def test_appended_keys(dtype, options):
    layers, given = both(**options), inputs()
    for attention, padding in itertools.product((L, L + 1, 1), (S, S + 1)):
        masks = {"attn_mask": pairs(attention, S, dtype=dtype), "key_padding_mask": pairs(N, padding, dtype=dtype)}
        assert agree(layers, given, masks) == (attention == L and padding == S)


@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True}], ids=str)
def test_the_causal_hint(options, batched):
    """Without weights and padding, torch uses the hint and ignores the mask."""
    layers, given = both(**options), inputs(batched)
    causal = torch.ones(L, S, dtype=torch.bool).triu(1)
    for mask in (causal, ~causal.flip(1), pairs(L, S, dtype=torch.float32), *(pairs(*s) for s in ATTENTION_SHAPES)):
        for need_weights, padded in itertools.product((True, False), repeat=2):
            masks = {"attn_mask": mask, "is_causal": True, "need_weights": need_weights}
            if padded:
                masks["key_padding_mask"] = pairs(*((N, S) if batched else (S,)))
            agree(layers, given, masks)
    assert isinstance(outcome(layers[1], given, {"is_causal": True}), ValueError)


def test_batch_first_and_a_transposed_view():
    layers = both(batch_first=True)
    given = [t.transpose(0, 1) for t in inputs()]
    assert agree(layers, given, {"key_padding_mask": pairs(S, N).t(), "attn_mask": pairs(S, L).t()})
    assert not agree(layers, given, {"key_padding_mask": pairs(S, N)})


def test_a_mask_that_requires_grad():
    layers, given = both(), inputs()
    with torch.no_grad():  # otherwise another error comes first
        layers[1].out_proj.feedback.copy_(layers[1].out_proj.weight)
    grads = []
    for layer in layers:
        mask = torch.zeros(L, S).requires_grad_()
        layer(*given, attn_mask=mask)[0].square().sum().backward()
        grads.append(mask.grad)
    torch.testing.assert_close(*grads)


MESSAGES = {
    "integer": ({"attn_mask": pairs(L, S, dtype=torch.int64)}, "attn_mask has dtype torch.int64, expected torch.bool"),
    "half": ({"attn_mask": pairs(L, S).half()}, "attn_mask has dtype torch.float16, expected torch.bool or that of"),
    "list": ({"attn_mask": [[True]]}, "attn_mask is a list, expected a tensor"),
    "meta": ({"attn_mask": pairs(L, S).to("meta")}, "attn_mask is on meta, expected the device of query, cpu"),
    "transposed": ({"key_padding_mask": pairs(S, N)}, "key_padding_mask has shape (5, 3), expected (3, 5), [N, S]"),
    "pairs": ({"attn_mask": pairs(1, S)}, "attn_mask has shape (1, 5), expected (4, 5), [L, S]"),
    "heads": ({"attn_mask": pairs(N, L, S)}, "attn_mask has shape (3, 4, 5), expected (6, 4, 5), [N * heads, L, S]"),
    "rank": ({"attn_mask": pairs(N, 1, L, S)}, "attn_mask has rank 4, shape (3, 1, 4, 5), expected [L, S] or"),
}


@pytest.mark.parametrize("case", MESSAGES)
def test_the_error_is_one_line(case):
    masks, message = MESSAGES[case]
    _, layer = both()
    with pytest.raises((ValueError, TypeError)) as refused:
        layer(*inputs(), **masks)
    assert str(refused.value).startswith(message)


INPUTS = {
    "query rank": ((torch.randn(8),) * 3, "query has rank 1, shape (8,), expected [L, N, E] or [L, E]"),
    "query rank 4": ((torch.randn(2, 2, 3, 8),) * 3, "query has rank 4, shape (2, 2, 3, 8), expected [L, N, E] or"),
    "key rank": ((torch.randn(3, 2, 8), *[torch.randn(3, 8)] * 2), "key has rank 2, shape (3, 8), expected rank 3"),
    "value shape": (
        (torch.randn(3, 2, 8), torch.randn(4, 2, 8), torch.randn(5, 2, 8)),
        "value has shape (5, 2, 8), expected that of key, (4, 2, 8)",
    ),
    "batch": ((torch.randn(3, 2, 8), *[torch.randn(3, 1, 8)] * 2), "key has a batch of 1, expected that of query, 2"),
    "embedding": ((torch.randn(3, 2, 6),) * 3, "query has 6 features, shape (3, 2, 6), expected embed_dim, 8"),
    "none": ((torch.randn(3, 2, 8), None, None), "key is None, expected a tensor"),
}  # fmt: skip


@pytest.mark.parametrize("case", INPUTS)
def test_inputs_that_torch_refuses(case):
    tensors, message = INPUTS[case]
    plain, layer = both()
    with pytest.raises((AssertionError, RuntimeError, AttributeError, TypeError)):
        plain(*tensors)
    with pytest.raises((ValueError, TypeError)) as refused:
        layer(*tensors)
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize("need_weights", [False, True])
def test_evaluation_drops_nothing(need_weights):
    plain = torch.nn.MultiheadAttention(8, 2, dropout=0.6, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    expected, _ = plain(x, x, x, need_weights=need_weights)
    found, _ = pyfeedback.convert(plain, "fa")(x, x, x, need_weights=need_weights)
    torch.testing.assert_close(found, expected)
