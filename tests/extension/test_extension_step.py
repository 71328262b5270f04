"""The compiled SGD step and its noise against plain torch formulas in float64."""

import cuda_emulator
import pytest
import torch
from extension_ops import (
    DTYPES,
    EVERYTHING,
    IMPLEMENTATIONS,
    PARAMETERS,
    SIZES,
    check_step,
    cpu,
    dtype_id,
    extension_step,
    random_like_model,
    step_formula,
)

import pyfeedback
from pyfeedback import functional


@pytest.fixture(params=PARAMETERS)
def ops(request):
    return IMPLEMENTATIONS[request.param]


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
        ops.extension_feedback_step_([feedback], [], [], [], decay=[1.0], self_=[0.0], tie=[0.0], lr=0.5)
        torch.testing.assert_close(storage, expected, equal_nan=True, rtol=0, atol=0)

    @cpu
    def test_an_expanded_feedback_is_refused(self):
        feedback = torch.ones(1, 3).expand(4, 3)
        with pytest.raises(RuntimeError):
            torch.ops.pyfeedback.extension_feedback_step_(
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
            ops.extension_feedback_step_(*model, **(EVERYTHING | coefficients), noise=0.1)
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
            stepped, _ = extension_step(ops, feedback, weight, grad, [], **coefficients, skip_nonfinite=skip)
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
        stepped, buffers = extension_step(ops, *model.values(), skip_nonfinite=True, **EVERYTHING)
        for before, after in zip(model["feedback"] + model["buffers"], stepped + buffers, strict=True):
            assert torch.equal(before, after)
        stepped, _ = extension_step(ops, *model.values(), **EVERYTHING)
        assert not torch.isfinite(stepped[13][49, 40])

    def test_skip_nonfinite_steps_when_all_is_finite(self, ops):
        model = [random_like_model([(100,)], torch.float32, seed) for seed in range(3)]
        keywords = {"decay": 0.1, "self_": 0.2, "tie": 0.3, "lr": 0.5}
        plain, _ = extension_step(ops, *model, [], **keywords)
        skipping, _ = extension_step(ops, *model, [], skip_nonfinite=True, **keywords)
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
            torch.ops.pyfeedback.extension_feedback_step_(feedback, **(arguments | change))
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
        ops.extension_feedback_step_(
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
        found = extension_step(ops, *model, **coefficients, lr=0.5, noise=0.1, seed=3, dynamic=dynamic)
        scaled = {"decay": [0.2, 0.4], "self_": [0.05, 0.075], "tie": [1.2, 1.6], "momentum": 0.9}
        expected = extension_step(ops, *model, **scaled, lr=0.25, noise=0.1, seed=10)
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
            with pyfeedback.backend("composite"):
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
            extension_step(torch.ops.pyfeedback, feedback, [], [], [], decay=0.1, lr=0.5, dynamic=dynamic)
        with pytest.raises(ValueError, match="dynamic is"):
            functional.feedback_step_(feedback, [], [], decay=[0.1], self_=[0.0], tie=[0.0], lr=0.5, dynamic=dynamic)
        assert torch.equal(feedback[0], torch.ones(4))


class TestNoise:
    def draw(self, ops, shapes, seed=1, dtype=torch.float32, layout=None):
        """The normal draws themselves: from zero, with lr = -1 and no other term."""
        tensors = [torch.zeros(shape, dtype=dtype) for shape in shapes]
        if layout is not None:
            tensors = [tensor.contiguous(memory_format=layout) for tensor in tensors]
        return extension_step(ops, tensors, [], [], [], lr=-1.0, noise=1.0, seed=seed)[0]

    def test_moments_of_the_normal_distribution(self, ops):
        (draws,) = self.draw(ops, [(400_000,)], dtype=torch.float64)
        standard_error = 400_000**-0.5
        assert abs(draws.mean()) < 4 * standard_error
        assert abs(draws.var() - 1) < 4 * 2**0.5 * standard_error
        assert abs((draws**3).mean()) < 4 * 15**0.5 * standard_error
        assert abs((draws**4).mean() - 3) < 4 * 96**0.5 * standard_error
        assert draws.abs().max() < 7

    def test_neighbors_are_uncorrelated(self, ops):
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
                results.append(extension_step(IMPLEMENTATIONS["cpu"], *model, **EVERYTHING, noise=noise, seed=7))
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            for ours, theirs in zip(results[0], other, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))

    @pytest.mark.skipif(cuda_emulator.COMPILER is None, reason="no C++ compiler")
    @pytest.mark.parametrize("noise", [0.0, 0.5])
    def test_the_order_of_cuda_threads_changes_nothing(self, noise):
        model = [random_like_model([(9_001,), (3,), (5_000,)], torch.float32, seed) for seed in range(4)]
        results = []
        for order in cuda_emulator.ORDERS:
            with cuda_emulator.order(order):
                results.append(
                    extension_step(cuda_emulator, *model, **EVERYTHING, noise=noise, seed=7, skip_nonfinite=True)
                )
        for other in results[1:]:
            for ours, theirs in zip(results[0], other, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))

    @pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
    def test_noise_adds_to_the_gradient(self, ops, dtype):
        feedback, weight, grad, buffers = (random_like_model([(41,)], dtype, seed) for seed in range(4))
        (noise,) = self.draw(ops, [(41,)], seed=5, dtype=torch.float64)
        stepped, _ = extension_step(ops, feedback, weight, grad, buffers, **EVERYTHING, noise=0.25, seed=5)
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
