"""The compiled ops against plain torch formulas in float64, every implementation of them (native_ops).

The rule everywhere: error at most twice that of the same formula in plain torch in the tensor's own dtype, plus one
unit in the last place of the largest value; four in float64, where the formula that judges rounds as much itself.
"""

from __future__ import annotations

import pytest
import simt
import torch
from native_ops import IMPLEMENTATIONS, PARAMETERS

import pyfeedback
from pyfeedback import functional
from pyfeedback.backends import dispatch
from pyfeedback.backends.extension import loading

cpu = pytest.mark.skipif(not loading.has_cpu(), reason="the CPU library is not built")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
EVERYTHING = {"decay": 0.1, "self_": 0.2, "tie": 0.3, "lr": 0.5, "momentum": 0.9}
SIZES = [(0,), (), (1,), (7,), (3, 5), (33, 1, 7), (4, 6, 3, 3), (8, 3, 5, 7), (40000,)]


@pytest.fixture(params=PARAMETERS)
def ops(request):
    return IMPLEMENTATIONS[request.param]


def dtype_id(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def assert_as_accurate(actual, composed, oracle, scale=None):
    """`actual` against the float64 `oracle`; `composed` is plain torch in the dtype of `actual`, `scale` the largest
    value that took part, by default the largest of the oracle."""
    assert actual.shape == oracle.shape
    if oracle.numel() == 0:
        return
    own = (composed.double() - oracle).abs().max()
    ulps = 4 if actual.dtype == torch.float64 else 1
    floor = ulps * torch.finfo(actual.dtype).eps * (oracle if scale is None else scale).abs().max()
    error = (actual.double() - oracle).abs().max()
    assert error <= 2 * own + floor, f"error {error:.3g}, plain torch {own:.3g}, floor {floor:.3g}"


def step_formula(
    feedback, weight, grad, buffer, *, decay, self_, tie, lr, momentum=0.0, nesterov=False, noise=0.0, seed=0
):
    """(feedback, momentum buffer) after one step of one tensor, out of place and in the dtype given."""
    gradient = decay * feedback
    if self_:
        gradient = gradient - self_ * weight
    if tie:
        gradient = gradient + tie * grad
    if buffer is None:
        return feedback - lr * gradient, None
    buffer = momentum * buffer + gradient
    direction = gradient + momentum * buffer if nesterov else buffer
    return feedback - lr * direction, buffer


def random_like_model(shapes, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def native_step(ops, feedback, weight, grad, buffers, **keywords):
    """The op on copies; per-tensor coefficients may be given as one number. Returns (feedback, buffers)."""
    feedback = [tensor.clone() for tensor in feedback]
    buffers = [tensor.clone() for tensor in buffers]
    for name in ("decay", "self_", "tie"):
        value = keywords.get(name, 0.0)
        keywords[name] = list(value) if isinstance(value, (list, tuple)) else [value] * len(feedback)
    ops.native_feedback_step_(feedback, weight, grad, buffers, **keywords)
    return feedback, buffers


def check_step(ops, feedback, weight, grad, buffers, **keywords):
    """One native step of a model against the formula, tensor by tensor."""
    stepped, stepped_buffers = native_step(ops, feedback, weight, grad, buffers, **keywords)
    for i, start in enumerate(feedback):
        operands = [start, *(list_[i] if list_ else None for list_ in (weight, grad, buffers))]
        own = {name: value[i] if isinstance(value, list) else value for name, value in keywords.items()}
        own = {"decay": 0.0, "self_": 0.0, "tie": 0.0, **own}
        composed, composed_buffer = step_formula(*operands, **own)
        oracle, oracle_buffer = step_formula(*(t if t is None else t.double() for t in operands), **own)
        assert_as_accurate(stepped[i], composed, oracle)
        assert stepped[i].stride() == start.stride()
        if buffers:
            assert_as_accurate(stepped_buffers[i], composed_buffer, oracle_buffer)


class TestFeedbackStep:
    @pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
    @pytest.mark.parametrize(
        "coefficients", [(0.1, 0.0, 0.0), (0.0, 0.3, 0.0), (0.0, 0.0, 1.0), (0.1, 0.3, 0.7)], ids=str
    )
    @pytest.mark.parametrize("follow", ["plain", "momentum", "nesterov"])
    def test_matches_the_formula(self, ops, dtype, coefficients, follow):
        decay, self_, tie = coefficients
        feedback, weight, grad, buffers = (random_like_model(SIZES, dtype, seed) for seed in range(4))
        keywords = {} if follow == "plain" else {"momentum": 0.9, "nesterov": follow == "nesterov"}
        weight, grad = weight if self_ else [], grad if tie else []
        buffers = [] if follow == "plain" else buffers
        check_step(ops, feedback, weight, grad, buffers, decay=decay, self_=self_, tie=tie, lr=0.05, **keywords)

    def test_three_hundred_tensors_of_mixed_dtypes_and_coefficients(self, ops):
        shapes = [(1 + 37 * i % 211, 1 + i % 5) for i in range(300)]
        dtypes = [DTYPES[i % 4] for i in range(300)]
        model = [
            [
                tensor.to(dtype)
                for tensor, dtype in zip(random_like_model(shapes, torch.float64, seed), dtypes, strict=True)
            ]
            for seed in range(4)
        ]
        check_step(
            ops,
            *model,
            decay=[i / 300 for i in range(300)],
            self_=[i % 3 / 3 for i in range(300)],
            tie=[i % 2 / 2 for i in range(300)],
            lr=0.1,
            momentum=0.5,
        )

    @pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
    @pytest.mark.parametrize("formats", ["clll", "lccc", "lclc", "llll", "ctts"])
    def test_layouts(self, ops, dtype, formats):
        """c contiguous, l channels_last, t transposed, s a strided slice; one letter per operand."""

        def arrange(tensor, letter):
            if letter == "c":
                return tensor
            if letter == "l":
                return tensor.contiguous(memory_format=torch.channels_last)
            if letter == "t":
                return tensor.transpose(0, 1).contiguous().transpose(0, 1)
            spread = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), float("nan"), dtype=tensor.dtype)
            spread[..., ::2] = tensor
            return spread[..., ::2]

        tensors = [arrange(random_like_model([(6, 4, 3, 5)], dtype, i)[0], letter) for i, letter in enumerate(formats)]
        feedback, weight, grad, buffer = tensors
        check_step(ops, [feedback], [weight], [grad], [buffer], **EVERYTHING)

    def test_a_strided_feedback_leaves_its_gaps_alone(self, ops):
        storage = torch.full((10, 8), float("nan"))
        feedback = storage[:, 1::3]
        feedback.copy_(torch.arange(30.0).view(10, 3))
        expected = storage.clone()
        expected[:, 1::3] *= 0.5
        ops.native_feedback_step_([feedback], [], [], [], decay=[1.0], self_=[0.0], tie=[0.0], lr=0.5)
        torch.testing.assert_close(storage, expected, equal_nan=True, rtol=0, atol=0)

    @cpu
    def test_an_expanded_feedback_is_refused(self):
        feedback = torch.ones(1, 3).expand(4, 3)
        with pytest.raises(RuntimeError):
            torch.ops.pyfeedback.native_feedback_step_(
                [feedback], [], [], [], decay=[0.1], self_=[0.0], tie=[0.0], lr=0.5
            )
        assert torch.equal(feedback, torch.ones(4, 3))

    @pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
    @pytest.mark.parametrize("offset", [1, 3])
    def test_unaligned_starts(self, ops, dtype, offset):
        model = [[tensor[offset:] for tensor in random_like_model([(103,)], dtype, seed)] for seed in range(4)]
        check_step(ops, *model, **EVERYTHING, nesterov=True)

    @pytest.mark.parametrize("size", [1, 3, 4, 8, 1023, 1024, 1025, 2047, 2048, 2049, 4095, 4096, 4097, 8193])
    @pytest.mark.parametrize("offset", [0, 1, 8])
    def test_sizes_around_every_boundary_between_guards(self, ops, size, offset):
        """Each tensor lies inside a storage of nan that stays as it is."""
        for dtype in DTYPES:
            storages = [torch.full((size + 24,), float("nan"), dtype=dtype) for _ in range(4)]
            model = [[storage[offset : offset + size]] for storage in storages]
            for seed, (tensor,) in enumerate(model):
                tensor.copy_(random_like_model([(size,)], dtype, seed)[0])
            check_step(ops, *model, **EVERYTHING)
            coefficients = {name: [EVERYTHING[name]] for name in ("decay", "self_", "tie")}
            ops.native_feedback_step_(*model, **(EVERYTHING | coefficients), noise=0.1)
            for storage in storages:
                assert torch.isfinite(storage[offset : offset + size]).all()
                assert storage[:offset].isnan().all()
                assert storage[offset + size :].isnan().all()

    @pytest.mark.parametrize("count", [45, 46, 48, 390, 1000])
    @pytest.mark.parametrize("layout", ["dense", "strided", "mixed"])
    def test_models_of_any_number_of_tensors(self, ops, count, layout):
        """More than one launch of the CUDA kernels takes, with empty tensors among them."""
        model = [random_like_model([(i % 7, 3) for i in range(count)], torch.float32, seed) for seed in range(4)]
        for i in range(count):
            if layout == "strided" or (layout == "mixed" and i % 3 == 0):
                model[1][i] = model[1][i].t().contiguous().t()
        check_step(ops, *model, **EVERYTHING)

    @pytest.mark.parametrize("layout", ["dense", "strided"])
    def test_unread_tensors_may_hold_anything(self, ops, layout):
        feedback = random_like_model([(4, 6), (5, 5)], torch.float32)
        weight, grad = ([torch.full_like(tensor, float("nan")) for tensor in feedback] for _ in range(2))
        weight[1], grad[0] = random_like_model([(5, 5), (4, 6)], torch.float32, 1)
        if layout == "strided":
            weight[1] = weight[1].t().contiguous().t()
            grad[0] = grad[0].t().contiguous().t()
        for skip in (False, True):
            coefficients = {"decay": 0.1, "self_": [0.0, 1.0], "tie": [1.0, 0.0], "lr": 0.1}
            stepped, _ = native_step(ops, feedback, weight, grad, [], **coefficients, skip_nonfinite=skip)
            assert all(torch.isfinite(tensor).all() for tensor in stepped)
            assert all((after != before).any() for after, before in zip(stepped, feedback, strict=True))

    @pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
    @pytest.mark.parametrize("operand", ["weight", "grad"])
    @pytest.mark.parametrize("layout", ["dense", "strided"])
    def test_skip_nonfinite_writes_nothing_anywhere(self, ops, dtype, value, operand, layout):
        shapes = [(50, 41)] * 20
        names = ("feedback", "weight", "grad", "buffers")
        model = {name: random_like_model(shapes, dtype, seed) for seed, name in enumerate(names)}
        if layout == "strided":
            model[operand][13] = model[operand][13].t().contiguous().t()
        model[operand][13][49, 40] = value
        stepped, buffers = native_step(ops, *model.values(), skip_nonfinite=True, **EVERYTHING)
        for before, after in zip(model["feedback"] + model["buffers"], stepped + buffers, strict=True):
            assert torch.equal(before, after)
        stepped, _ = native_step(ops, *model.values(), **EVERYTHING)
        assert not torch.isfinite(stepped[13][49, 40])

    def test_skip_nonfinite_steps_when_all_is_finite(self, ops):
        model = [random_like_model([(100,)], torch.float32, seed) for seed in range(3)]
        keywords = {"decay": 0.1, "self_": 0.2, "tie": 0.3, "lr": 0.5}
        plain, _ = native_step(ops, *model, [], **keywords)
        skipping, _ = native_step(ops, *model, [], skip_nonfinite=True, **keywords)
        assert torch.equal(plain[0], skipping[0])

    @cpu
    @pytest.mark.parametrize(
        "change",
        [
            {"weight": [torch.zeros(3)]},
            {"grad": [torch.zeros(4, dtype=torch.float64)]},
            {"grad": []},
            {"decay": [0.1, 0.2]},
            {"momentum": 0.5},
        ],
        ids=["shape", "dtype", "no-grad", "coefficients", "no-buffer"],
    )
    def test_contradictory_arguments_raise_and_write_nothing(self, change):
        feedback = [torch.ones(4)]
        arguments = {"weight": [torch.zeros(4)], "grad": [torch.zeros(4)], "momentum_buffer": []}
        arguments |= {"decay": [0.1], "self_": [0.2], "tie": [0.3], "lr": 0.5}
        # Torch before 2.13 loses the text of an error from a library; Python has told the user before.
        with pytest.raises(RuntimeError):
            torch.ops.pyfeedback.native_feedback_step_(feedback, **(arguments | change))
        assert torch.equal(feedback[0], torch.ones(4))

    @pytest.mark.parametrize("layout", ["dense", "strided", "mixed"])
    @pytest.mark.parametrize("count", [1, 15, 16, 130])
    def test_what_shares_memory_with_the_row_before_is_stepped_after_it(self, ops, count, layout):
        """Two feedbacks read a weight, which steps behind them; a model larger than one launch is cut between such."""
        shapes = [(1 + 37 * i % 211, 1 + i % 5) if i else (70, 90) for i in range(count)]
        weight, grad, *others = (random_like_model(shapes, torch.float64, seed) for seed in range(7))
        if layout == "strided" or (layout == "mixed" and count > 1):
            others[3][-1] = others[3][-1].t().contiguous().t()
        if layout == "strided":
            weight = [tensor.t().contiguous().t() for tensor in weight]
        rows = [
            (stepped, w, g, buffer, *terms)
            for i, (w, g) in enumerate(zip(weight, grad, strict=True))
            for stepped, buffer, *terms in [
                (others[0][i], others[1][i], 0.1, 0.2, 0.3),
                (others[2][i], others[3][i], 0.2, 0.4, 0.0),
                (w, others[4][i], 0.3, 0.0, 1.0),
            ]
        ]
        expected = []
        now = {id(w): w for w in weight}
        for stepped, w, g, buffer, decay, self_, tie in rows:
            terms = {"decay": decay, "self_": self_, "tie": tie, "lr": 0.5, "momentum": 0.9}
            expected.append(step_formula(now.get(id(stepped), stepped), now[id(w)], g, buffer, **terms))
            if id(stepped) in now:
                now[id(stepped)] = expected[-1][0]
        stepped, weights, grads, buffers, decay, self_, tie = map(list, zip(*rows, strict=True))
        ops.native_feedback_step_(
            stepped, weights, grads, buffers, decay=decay, self_=self_, tie=tie, lr=0.5, momentum=0.9
        )
        for found, found_buffer, (one, buffer) in zip(stepped, buffers, expected, strict=True):
            torch.testing.assert_close(found, one, rtol=1e-14, atol=1e-14)
            torch.testing.assert_close(found_buffer, buffer, rtol=1e-14, atol=1e-14)

    @pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
    @pytest.mark.parametrize("layout", ["dense", "strided"])
    def test_dynamic_factors_multiply_the_coefficients(self, ops, dtype, layout):
        model = [random_like_model([(50, 41), (3,)], dtype, seed) for seed in range(4)]
        if layout == "strided":
            model[1][0] = model[1][0].t().contiguous().t()
        coefficients = {"decay": [0.1, 0.2], "self_": [0.2, 0.3], "tie": [0.3, 0.4], "momentum": 0.9}
        dynamic = torch.tensor([0.5, 2.0, 0.25, 4.0, 7.0], dtype=torch.float64)
        found = native_step(ops, *model, **coefficients, lr=0.5, noise=0.1, seed=3, dynamic=dynamic)
        scaled = {"decay": [0.2, 0.4], "self_": [0.05, 0.075], "tie": [1.2, 1.6], "momentum": 0.9}
        expected = native_step(ops, *model, **scaled, lr=0.25, noise=0.1, seed=10)
        for ours, theirs in zip(found, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))

    def test_dynamic_factors_mean_the_same_composed(self):
        model = [random_like_model([(50, 41), (3,)], torch.float64, seed) for seed in range(4)]
        dynamic = torch.tensor([0.5, 2.0, 0.25, 4.0, 7.0], dtype=torch.float64)
        changing = {
            "decay": [0.1, 0.2],
            "self_": [0.2, 0.3],
            "tie": [0.3, 0.4],
            "lr": 0.5,
            "seed": 3,
            "dynamic": dynamic,
        }
        fixed = {"decay": [0.2, 0.4], "self_": [0.05, 0.075], "tie": [1.2, 1.6], "lr": 0.25, "seed": 10}
        results = []
        for options in (changing, fixed):
            copies = [[tensor.clone() for tensor in tensors] for tensors in model]
            with pyfeedback.backend("aten"):
                functional.feedback_step_(*copies, **options, momentum=0.9, nesterov=True, noise=0.1)
            results.append(copies[0] + copies[3])
        torch.testing.assert_close(results[0], results[1], rtol=1e-14, atol=1e-14)

    @cpu
    @pytest.mark.parametrize(
        "dynamic",
        [torch.ones(4, dtype=torch.float64), torch.ones(5), torch.ones(10, dtype=torch.float64)[::2]],
        ids=["short", "float32", "strided"],
    )
    def test_a_dynamic_that_cannot_be_read_raises_and_writes_nothing(self, dynamic):
        feedback = [torch.ones(4)]
        with pytest.raises(RuntimeError):
            native_step(torch.ops.pyfeedback, feedback, [], [], [], decay=0.1, lr=0.5, dynamic=dynamic)
        with pytest.raises(ValueError, match="dynamic is"):
            functional.feedback_step_(feedback, [], [], decay=[0.1], self_=[0.0], tie=[0.0], lr=0.5, dynamic=dynamic)
        assert torch.equal(feedback[0], torch.ones(4))


class TestNoise:
    def draw(self, ops, shapes, seed=1, dtype=torch.float32, layout=None):
        """The normal draws themselves: from zero, with lr = -1 and no other term."""
        tensors = [torch.zeros(shape, dtype=dtype) for shape in shapes]
        if layout is not None:
            tensors = [tensor.contiguous(memory_format=layout) for tensor in tensors]
        return native_step(ops, tensors, [], [], [], lr=-1.0, noise=1.0, seed=seed)[0]

    def test_moments_of_the_normal_distribution(self, ops):
        (draws,) = self.draw(ops, [(400_000,)], dtype=torch.float64)
        standard_error = 400_000**-0.5
        assert abs(draws.mean()) < 4 * standard_error
        assert abs(draws.var() - 1) < 4 * 2**0.5 * standard_error
        assert abs((draws**3).mean()) < 4 * 15**0.5 * standard_error
        assert abs((draws**4).mean() - 3) < 4 * 96**0.5 * standard_error
        assert draws.abs().max() < 7

    def test_neighbours_are_uncorrelated(self, ops):
        (draws,) = self.draw(ops, [(400_000,)], dtype=torch.float64)
        for lag in (1, 2, 3, 4):
            assert abs((draws[lag:] * draws[:-lag]).mean()) < 4 * 400_000**-0.5

    def test_depends_on_seed_and_tensor_alone(self, ops):
        first, second = self.draw(ops, [(50,), (50,)], seed=1)
        assert not torch.equal(first, second)
        assert not torch.equal(first, self.draw(ops, [(50,)], seed=2)[0])
        assert torch.equal(first, self.draw(ops, [(9, 9)], seed=1)[0].flatten()[:50])

    @pytest.mark.parametrize("seed", [-1, 0, 2**63 - 1, 1 << 32])
    def test_every_seed_draws_its_own(self, ops, seed):
        (draws,) = self.draw(ops, [(1000,)], seed=seed)
        assert torch.isfinite(draws).all()
        assert not torch.equal(draws, self.draw(ops, [(1000,)], seed=12345)[0])

    def test_the_layout_does_not_change_the_draws(self, ops):
        shape = [(3, 4, 5, 6)]
        assert torch.equal(self.draw(ops, shape)[0], self.draw(ops, shape, layout=torch.channels_last)[0])

    @cpu
    @pytest.mark.parametrize("noise", [0.0, 0.5])
    def test_the_number_of_threads_changes_nothing(self, noise):
        model = [random_like_model([(70_001,), (3,), (50_000,)], torch.float32, seed) for seed in range(4)]
        before = torch.get_num_threads()
        results = []
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(native_step(IMPLEMENTATIONS["cpu"], *model, **EVERYTHING, noise=noise, seed=7))
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            for ours, theirs in zip(results[0], other, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))

    @pytest.mark.skipif(simt.COMPILER is None, reason="no C++ compiler")
    @pytest.mark.parametrize("noise", [0.0, 0.5])
    def test_the_order_of_cuda_threads_changes_nothing(self, noise):
        model = [random_like_model([(9_001,), (3,), (5_000,)], torch.float32, seed) for seed in range(4)]
        results = []
        for order in simt.ORDERS:
            with simt.order(order):
                results.append(native_step(simt, *model, **EVERYTHING, noise=noise, seed=7, skip_nonfinite=True))
        for other in results[1:]:
            for ours, theirs in zip(results[0], other, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))

    @pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
    def test_noise_adds_to_the_gradient(self, ops, dtype):
        feedback, weight, grad, buffers = (random_like_model([(41,)], dtype, seed) for seed in range(4))
        (noise,) = self.draw(ops, [(41,)], seed=5, dtype=torch.float64)
        stepped, _ = native_step(ops, feedback, weight, grad, buffers, **EVERYTHING, noise=0.25, seed=5)
        oracle, _ = step_formula(
            feedback[0].double(),
            weight[0].double(),
            grad[0].double() + noise * 0.25 / 0.3,
            buffers[0].double(),
            **EVERYTHING,
        )
        # The draw itself is a float32 number in every dtype.
        eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
        torch.testing.assert_close(stepped[0].double(), oracle, rtol=4 * eps, atol=eps)


def products_formula(feedback, weight):
    pairs = [(b.flatten().double(), w.flatten().double()) for b, w in zip(feedback, weight, strict=True)]
    return torch.tensor([[(b * b).sum(), (w * w).sum(), (b * w).sum()] for b, w in pairs], dtype=torch.float64).view(
        -1, 3
    )


class TestAlignmentProducts:
    """Sums in float64, whatever the dtype: exact but for one rounding of each addition on the longest way."""

    def check(self, ops, feedback, weight):
        found = ops.native_alignment_products(feedback, weight)
        expected = products_formula(feedback, weight)
        assert found.dtype == torch.float64
        assert found.shape == (len(feedback), 3)
        additions = torch.tensor([16384 / 8 + b.numel() / 16384 + 8 for b in feedback], dtype=torch.float64)
        largest = torch.cat([expected[:, :2], (expected[:, :1] * expected[:, 1:2]).sqrt()], dim=1)  # |<B, W>| <= |B||W|
        assert ((found - expected).abs() <= additions[:, None] * torch.finfo(torch.float64).eps * largest).all()

    @pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
    def test_matches_the_formula(self, ops, dtype):
        self.check(ops, *(random_like_model(SIZES, dtype, seed) for seed in range(2)))

    def test_three_hundred_pairs_of_mixed_dtypes(self, ops):
        shapes = [(1 + 37 * i % 211, 1 + i % 5) for i in range(300)]
        pair = [
            [t.to(DTYPES[i % 4]) for i, t in enumerate(random_like_model(shapes, torch.float64, seed))]
            for seed in range(2)
        ]
        self.check(ops, *pair)

    @pytest.mark.parametrize("size", [1, 7, 8, 511, 512, 513, 4095, 4096, 4097, 16383, 16384, 16385, 40000])
    @pytest.mark.parametrize("offset", [0, 1, 3])
    def test_sizes_around_every_boundary_and_unaligned_starts(self, ops, size, offset):
        for dtype in (torch.float32, torch.float16):
            self.check(ops, *([random_like_model([(size + offset,)], dtype, seed)[0][offset:]] for seed in range(2)))

    @pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
    def test_layouts(self, ops, dtype):
        feedback, weight = (random_like_model([(6, 4, 3, 5)] * 4, dtype, seed) for seed in range(2))
        feedback[1] = feedback[1].contiguous(memory_format=torch.channels_last)
        feedback[2] = weight[2].expand(6, 4, 3, 5).transpose(0, 1).contiguous().transpose(0, 1)
        weight[2] = torch.randn(4, 1, 5).to(dtype).expand(6, 4, 3, 5)
        weight[3] = weight[3].contiguous(memory_format=torch.channels_last)
        feedback[3] = feedback[3].contiguous(memory_format=torch.channels_last)
        self.check(ops, feedback, weight)

    def test_empty_pairs(self, ops):
        self.check(ops, [torch.zeros(0, 3), torch.ones(2)], [torch.zeros(0, 3), torch.ones(2)])

    def test_float32_is_not_summed_in_float32(self, ops):
        tensor = torch.full((3_000_000,), 0.1)
        self.check(ops, [tensor], [tensor])

    @cpu
    def test_the_number_of_threads_changes_nothing(self):
        pair = [random_like_model([(70_001,), (3,), (50_000,)], torch.float32, seed) for seed in range(2)]
        before = torch.get_num_threads()
        results = []
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(torch.ops.pyfeedback.native_alignment_products(*pair))
        finally:
            torch.set_num_threads(before)
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])

    @pytest.mark.skipif(simt.COMPILER is None, reason="no C++ compiler")
    def test_the_order_of_cuda_threads_changes_nothing(self):
        pair = [random_like_model([(40_001,), (3,), (9_000,)], torch.float32, seed) for seed in range(2)]
        results = []
        for order in simt.ORDERS:
            with simt.order(order):
                results.append(simt.native_alignment_products(*pair))
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])

    @pytest.mark.parametrize("layout", ["dense", "strided", "mixed"])
    def test_models_of_any_number_of_pairs(self, ops, layout):
        for count in (1, 90, 91, 800):
            pair = [random_like_model([(i % 7, 3) for i in range(count)], torch.float32, seed) for seed in range(2)]
            for i in range(count):
                if layout == "strided" or (layout == "mixed" and i % 3 == 0):
                    pair[1][i] = pair[1][i].t().contiguous().t()
            self.check(ops, *pair)

    @cpu
    @pytest.mark.parametrize(
        "weight",
        [[torch.zeros(3)], [torch.zeros(4, dtype=torch.float64)], [], [torch.zeros(4, dtype=torch.int64)]],
        ids=["shape", "dtype", "none", "integer"],
    )
    def test_contradictory_pairs_raise(self, weight):
        with pytest.raises(RuntimeError):
            torch.ops.pyfeedback.native_alignment_products([torch.zeros(4)], weight)


def center_formula(tensor, samples):
    tensor = tensor[:samples]
    return tensor - tensor.mean(0, keepdim=True)


class TestCenter:
    @pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
    @pytest.mark.parametrize(
        "shape", [(1, 3), (5,), (7, 1, 3, 3), (8, 16, 9, 11), (300, 5), (4, 70001), (65, 3, 2)], ids=str
    )
    @pytest.mark.parametrize("mean", [0.0, 30.0])
    def test_matches_the_formula(self, ops, dtype, shape, mean):
        generator = torch.Generator().manual_seed(0)
        tensor = (torch.randn(shape, generator=generator, dtype=torch.float64) + mean).to(dtype)
        for samples in {1, (shape[0] + 1) // 2, shape[0]}:
            actual = ops.native_center(tensor, samples)
            assert actual.dtype == dtype
            assert actual.is_contiguous()
            assert_as_accurate(
                actual, center_formula(tensor, samples), center_formula(tensor.double(), samples), scale=tensor
            )

    @pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
    @pytest.mark.parametrize("arrangement", ["channels_last", "permuted", "apart", "offset"])
    def test_layouts(self, ops, dtype, arrangement):
        tensor = torch.randn(6, 5, 7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
        plain = tensor
        if arrangement == "channels_last":
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        elif arrangement == "permuted":
            tensor = tensor.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
        elif arrangement == "apart":
            spread = torch.full((12, *tensor.shape[1:]), float("nan"), dtype=dtype)
            spread[::2] = tensor
            tensor = spread[::2]
        else:
            storage = torch.full((tensor.numel() + 3,), float("nan"), dtype=dtype)
            storage[3:] = tensor.flatten()
            tensor = storage[3:].view_as(tensor)
        actual = ops.native_center(tensor, 4)
        assert actual.stride()[1:] == tensor.stride()[1:]
        assert actual.stride(0) == tensor[0].numel()
        assert_as_accurate(actual, center_formula(plain, 4), center_formula(plain.double(), 4), scale=plain)

    @pytest.mark.parametrize("shape", [(0, 3), (4, 0, 2), (0,)], ids=str)
    def test_nothing_to_center(self, ops, shape):
        assert ops.native_center(torch.zeros(shape), shape[0]).shape == shape

    def test_a_nonfinite_value_stays_at_its_position(self, ops):
        tensor = torch.randn(5, 200)
        tensor[2, 77] = float("inf")
        finite = torch.isfinite(ops.native_center(tensor, 5)).all(0)
        assert finite.sum() == 199
        assert not finite[77]

    @cpu
    def test_the_number_of_threads_changes_nothing(self):
        tensor = torch.randn(33, 12345)
        before = torch.get_num_threads()
        try:
            results = []
            for threads in (1, 3):
                torch.set_num_threads(threads)
                results.append(torch.ops.pyfeedback.native_center(tensor, 33))
        finally:
            torch.set_num_threads(before)
        assert torch.equal(*results)

    @cpu
    @pytest.mark.parametrize(
        "tensor", [torch.zeros(4, 6)[:, ::2], torch.zeros(1, 6).expand(4, 6)], ids=["gaps", "expanded"]
    )
    def test_a_sample_that_is_no_block_raises(self, tensor):
        with pytest.raises(RuntimeError):
            torch.ops.pyfeedback.native_center(tensor, 4)

    @cpu
    @pytest.mark.parametrize("samples", [-1, 5])
    def test_samples_out_of_range_raises(self, samples):
        with pytest.raises(RuntimeError):
            torch.ops.pyfeedback.native_center(torch.zeros(4, 6), samples)


class TestAddCentered:
    @pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
    @pytest.mark.parametrize("shape", [(1, 3), (7, 1, 3, 3), (8, 16, 9, 11), (300, 5), (4, 70001)], ids=str)
    @pytest.mark.parametrize(("beta", "alpha"), [(1.0, -0.7), (-0.3, 1.0)])
    def test_matches_the_formula(self, ops, dtype, shape, beta, alpha):
        generator = torch.Generator().manual_seed(0)
        total, tensor = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
        tensor = tensor + 30
        plain, exact = (
            beta * total.to(wide) + alpha * center_formula(tensor.to(wide), shape[0]) for wide in (dtype, torch.float64)
        )
        ops.native_add_centered_(total, tensor, beta, alpha)
        assert_as_accurate(total, plain, exact, scale=tensor)

    @pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
    def test_layouts(self, ops, dtype):
        plain, start = (torch.randn(6, 5, 7, 3, dtype=torch.float64).to(dtype) for _ in range(2))
        spread = torch.full((12, *plain.shape[1:]), float("nan"), dtype=dtype).contiguous(
            memory_format=torch.channels_last
        )
        spread[::2] = plain
        total = start.clone(memory_format=torch.channels_last)
        ops.native_add_centered_(total, spread[::2], 0.5, 2.0)
        exact = 0.5 * start.double() + 2.0 * center_formula(plain.double(), 6)
        assert_as_accurate(total, exact.to(dtype), exact, scale=exact)

    @pytest.mark.parametrize("shape", [(0, 3), (4, 0, 2)], ids=str)
    def test_nothing_to_center(self, ops, shape):
        ops.native_add_centered_(torch.zeros(shape), torch.zeros(shape), 1.0, 1.0)

    @cpu
    @pytest.mark.parametrize(
        "total",
        [torch.zeros(4, 5), torch.zeros(4, 6).double(), torch.zeros(6, 4).t(), torch.zeros(8, 6)[::2], torch.zeros(24)],
        ids=["shape", "dtype", "strides", "apart", "rank"],
    )
    def test_what_does_not_fit_raises(self, total):
        before = total.clone()
        with pytest.raises(RuntimeError):
            torch.ops.pyfeedback.native_add_centered_(total, torch.ones(4, 6), 1.0, 1.0)
        assert torch.equal(total, before)


@cpu
def test_a_forced_backend_takes_the_kernels_that_there_are_and_composes_the_rest():
    on_cuda = "native" if loading.has_cuda() else "aten"
    for op in ("feedback_step_", "alignment_products", "center", "add_centered_"):
        chosen = [dispatch._choose(op, device, "native") for device in ("cpu", "cuda", "meta")]
        assert chosen == ["native", on_cuda, "aten"]
    assert [dispatch._choose("adamw_step_", device, "native") for device in ("cpu", "cuda")] == ["native", "aten"]


@cpu
def test_the_ops_pass_opcheck_on_their_schema():
    torch.library.opcheck(
        torch.ops.pyfeedback.native_feedback_step_.default,
        ([torch.ones(4)], [torch.ones(4)], [], [torch.zeros(4)]),
        {"decay": [0.1], "self_": [0.2], "tie": [0.0], "lr": 0.5, "momentum": 0.9},
        test_utils="test_schema",
    )
    torch.library.opcheck(
        torch.ops.pyfeedback.native_alignment_products.default,
        ([torch.ones(4), torch.ones(2, 3)], [torch.ones(4), torch.ones(2, 3)]),
        test_utils=("test_schema", "test_faketensor"),
    )
    torch.library.opcheck(torch.ops.pyfeedback.native_center.default, (torch.ones(4, 3), 2), test_utils="test_schema")
