"""The compiled alignment products against plain torch formulas in float64."""

import cuda_emulator
import pytest
import torch
from extension_ops import DTYPES, IMPLEMENTATIONS, PARAMETERS, SIZES, cpu, dtype_id, random_like_model


@pytest.fixture(params=PARAMETERS)
def ops(request):
    return IMPLEMENTATIONS[request.param]


def products_formula(feedback, weight):
    pairs = [(b.flatten().double(), w.flatten().double()) for b, w in zip(feedback, weight, strict=True)]
    return torch.tensor([[(b * b).sum(), (w * w).sum(), (b * w).sum()] for b, w in pairs], dtype=torch.float64).view(
        -1, 3
    )


class TestAlignmentProducts:
    """Sums in float64, whatever the dtype: exact but for one rounding of each addition on the longest way."""

    def check(self, ops, feedback, weight):
        found = ops.extension_alignment_products(feedback, weight)
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
                results.append(torch.ops.pyfeedback.extension_alignment_products(*pair))
        finally:
            torch.set_num_threads(before)
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])

    @pytest.mark.skipif(cuda_emulator.COMPILER is None, reason="no C++ compiler")
    def test_the_order_of_cuda_threads_changes_nothing(self):
        pair = [random_like_model([(40_001,), (3,), (9_000,)], torch.float32, seed) for seed in range(2)]
        results = []
        for order in cuda_emulator.ORDERS:
            with cuda_emulator.order(order):
                results.append(cuda_emulator.extension_alignment_products(*pair))
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
            torch.ops.pyfeedback.extension_alignment_products([torch.zeros(4)], weight)
