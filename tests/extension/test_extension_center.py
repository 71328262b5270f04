"""The compiled centering against plain torch formulas in float64."""

import pytest
import torch
from extension_ops import DTYPES, IMPLEMENTATIONS, PARAMETERS, assert_as_accurate, cpu, dtype_id


@pytest.fixture(params=PARAMETERS)
def ops(request):
    return IMPLEMENTATIONS[request.param]


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
            actual = ops.extension_center(tensor, samples)
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
        actual = ops.extension_center(tensor, 4)
        assert actual.stride()[1:] == tensor.stride()[1:]
        assert actual.stride(0) == tensor[0].numel()
        assert_as_accurate(actual, center_formula(plain, 4), center_formula(plain.double(), 4), scale=plain)

    @pytest.mark.parametrize("shape", [(0, 3), (4, 0, 2), (0,)], ids=str)
    def test_nothing_to_center(self, ops, shape):
        assert ops.extension_center(torch.zeros(shape), shape[0]).shape == shape

    def test_a_nonfinite_value_stays_at_its_position(self, ops):
        tensor = torch.randn(5, 200)
        tensor[2, 77] = float("inf")
        finite = torch.isfinite(ops.extension_center(tensor, 5)).all(0)
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
                results.append(torch.ops.pyfeedback.extension_center(tensor, 33))
        finally:
            torch.set_num_threads(before)
        assert torch.equal(*results)

    @cpu
    @pytest.mark.parametrize(
        "tensor", [torch.zeros(4, 6)[:, ::2], torch.zeros(1, 6).expand(4, 6)], ids=["gaps", "expanded"]
    )
    def test_a_sample_that_is_no_block_raises(self, tensor):
        with pytest.raises(RuntimeError):
            torch.ops.pyfeedback.extension_center(tensor, 4)

    @cpu
    @pytest.mark.parametrize("samples", [-1, 5])
    def test_samples_out_of_range_raises(self, samples):
        with pytest.raises(RuntimeError):
            torch.ops.pyfeedback.extension_center(torch.zeros(4, 6), samples)


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
        ops.extension_add_centered_(total, tensor, beta, alpha)
        assert_as_accurate(total, plain, exact, scale=tensor)

    @pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
    def test_layouts(self, ops, dtype):
        plain, start = (torch.randn(6, 5, 7, 3, dtype=torch.float64).to(dtype) for _ in range(2))
        spread = torch.full((12, *plain.shape[1:]), float("nan"), dtype=dtype).contiguous(
            memory_format=torch.channels_last
        )
        spread[::2] = plain
        total = start.clone(memory_format=torch.channels_last)
        ops.extension_add_centered_(total, spread[::2], 0.5, 2.0)
        exact = 0.5 * start.double() + 2.0 * center_formula(plain.double(), 6)
        assert_as_accurate(total, exact.to(dtype), exact, scale=exact)

    @pytest.mark.parametrize("shape", [(0, 3), (4, 0, 2)], ids=str)
    def test_nothing_to_center(self, ops, shape):
        total = torch.zeros(shape)
        ops.extension_add_centered_(total, torch.zeros(shape), 1.0, 1.0)
        assert total.shape == shape

    @cpu
    @pytest.mark.parametrize(
        "total",
        [torch.zeros(4, 5), torch.zeros(4, 6).double(), torch.zeros(6, 4).t(), torch.zeros(8, 6)[::2], torch.zeros(24)],
        ids=["shape", "dtype", "strides", "apart", "rank"],
    )
    def test_what_does_not_fit_raises(self, total):
        before = total.clone()
        with pytest.raises(RuntimeError):
            torch.ops.pyfeedback.extension_add_centered_(total, torch.ones(4, 6), 1.0, 1.0)
        assert torch.equal(total, before)
