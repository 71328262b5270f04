// The kernels of extension_feedback_step_: a block updates a part of one row.
#include "../philox.h"
#include "pack.cuh"
#include "table.cuh"

namespace pyfeedback::cuda {

namespace {

using StridedRow = Strided<FeedbackRow>;

template <typename Scalar>
__device__ __forceinline__ void step_element(const FeedbackStep<AccType<Scalar>>& step, Scalar& feedback, Scalar weight,
                                             Scalar grad, Scalar& momentum, bool has_momentum, AccType<Scalar> noise) {
  using T = AccType<Scalar>;
  const T old = to_acc(feedback);
  const T gradient = step.gradient(old, to_acc(weight), to_acc(grad)) + noise;
  T buffer = to_acc(momentum);
  from_acc(step.next(old, gradient, has_momentum ? &buffer : nullptr), feedback);
  if (has_momentum) from_acc(buffer, momentum);
}

template <typename Scalar>
__device__ __forceinline__ void step_block(const FeedbackRow& row, const FeedbackOptions& options, int64_t block) {
  using T = AccType<Scalar>;
  constexpr int kWidth = kPack<Scalar>;
  const auto step = make_step<T>(row, options);
  const bool aligned = is_aligned(row.operand[kStepped], row.operand[kWeight], row.operand[kGrad], row.operand[kState]);
  for_each_pack<kWidth>(row.numel, block, [&](int64_t first, int count) {
    // Drawn before anything is loaded: values that live across the logarithm, sine and cosine are spilled.
    float noise[kWidth] = {};
#pragma unroll
    for (int draw = 0; options.noise != 0 && draw < kWidth; draw += 4) {
      const Normals drawn = normals(options.current_seed(), row.index, static_cast<uint64_t>(first + draw) / 4);
#pragma unroll
      for (int j = 0; j < 4; ++j) noise[draw + j] = drawn.value[j];
    }
    const bool whole = aligned && count == kWidth;
    Pack<Scalar> feedback = load<Scalar>(row.operand[kStepped], first, count, whole);
    const Pack<Scalar> weight = load<Scalar>(row.operand[kWeight], first, count, whole);
    const Pack<Scalar> grad = load<Scalar>(row.operand[kGrad], first, count, whole);
    Pack<Scalar> momentum = load<Scalar>(row.operand[kState], first, count, whole);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      step_element(step, feedback.value[j], weight.value[j], grad.value[j], momentum.value[j], row.has(kState),
                   static_cast<T>(options.noise) * noise[j]);
    }
    store(feedback, row.operand[kStepped], first, count, whole);
    if (row.has(kState)) store(momentum, row.operand[kState], first, count, whole);
  });
}

template <typename Scalar>
__device__ __forceinline__ void step_block(const StridedRow& row, const FeedbackOptions& options, int64_t block) {
  using T = AccType<Scalar>;
  for_each_element(row.numel, block, [&](int64_t i) {
    float normal = 0;
    if (options.noise != 0) {
      const Normals draws = normals(options.current_seed(), row.index, static_cast<uint64_t>(i) / 4);
#pragma unroll
      for (int j = 0; j < 4; ++j) normal = i % 4 == j ? draws.value[j] : normal;
    }
    int64_t offset[FeedbackRow::kOperands];
    find_offsets(row.strides, i, offset);
    Scalar momentum = read<Scalar>(row.operand[kState], offset[kState]);
    step_element(make_step<T>(row, options), static_cast<Scalar*>(row.operand[kStepped])[offset[kStepped]],
                 read<Scalar>(row.operand[kWeight], offset[kWeight]), read<Scalar>(row.operand[kGrad], offset[kGrad]),
                 momentum, row.has(kState), static_cast<T>(options.noise) * normal);
    if (row.has(kState)) static_cast<Scalar*>(row.operand[kState])[offset[kState]] = momentum;
  });
}

// visit(row, Scalar{}, block) for the rows of this block: one, or several that share memory. The same threads update
// the elements of the latter row after row.
template <typename Table, typename Visitor>
__device__ __forceinline__ void for_each_row(const Table& table, const Visitor& visit) {
  int index = table.find(blockIdx.x);
  const int64_t block = int64_t{blockIdx.x} - table.first_block[index];
  visit_dtype(table.row[index].dtype, [&](auto scalar) {
    do {
      visit(table.row[index], scalar, block);
    } while (++index < table.count && table.row[index].with_previous);
  });
}

template <typename Table>
__global__ void __launch_bounds__(kThreads)
    step_kernel(const __grid_constant__ Table table, const FeedbackOptions options, const int* nonfinite) {
  if (nonfinite != nullptr && *nonfinite != 0) return;
  for_each_row(table,
               [&](const auto& row, auto scalar, int64_t block) { step_block<decltype(scalar)>(row, options, block); });
}

template <typename Scalar>
__device__ __forceinline__ bool is_nonfinite(Scalar value) {
  return !isfinite(to_acc(value));
}

template <typename Scalar>
__device__ __forceinline__ bool any_nonfinite(const FeedbackRow& row, int64_t block) {
  constexpr int kWidth = kPack<Scalar>;
  const bool aligned = is_aligned(row.operand[kWeight], row.operand[kGrad]);
  bool any = false;
  for_each_pack<kWidth>(row.numel, block, [&](int64_t first, int count) {
    const bool whole = aligned && count == kWidth;
    const Pack<Scalar> weight = load<Scalar>(row.operand[kWeight], first, count, whole);
    const Pack<Scalar> grad = load<Scalar>(row.operand[kGrad], first, count, whole);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) any |= is_nonfinite(weight.value[j]) || is_nonfinite(grad.value[j]);
  });
  return any;
}

template <typename Scalar>
__device__ __forceinline__ bool any_nonfinite(const StridedRow& row, int64_t block) {
  bool any = false;
  for_each_element(row.numel, block, [&](int64_t i) {
    int64_t offset[FeedbackRow::kOperands];
    find_offsets(row.strides, i, offset);
    any |= is_nonfinite(read<Scalar>(row.operand[kWeight], offset[kWeight])) ||
           is_nonfinite(read<Scalar>(row.operand[kGrad], offset[kGrad]));
  });
  return any;
}

template <typename Table>
__global__ void __launch_bounds__(kThreads) find_nonfinite_kernel(const __grid_constant__ Table table, int* nonfinite) {
  for_each_row(table, [&](const auto& row, auto scalar, int64_t block) {
    // Every thread writes the same value, so no atomic is needed.
    if (any_nonfinite<decltype(scalar)>(row, block)) *nonfinite = 1;
  });
}

}  // namespace

cudaError_t launch_step(const std::vector<FeedbackRow>& rows, const std::vector<RowLayout<FeedbackRow>>& layouts,
                        const FeedbackOptions& options, int* nonfinite, cudaStream_t stream) {
  if (nonfinite != nullptr) {
    const cudaError_t error = for_each_table(rows, layouts, [&](const auto& table) {
      return launch(find_nonfinite_kernel<std::decay_t<decltype(table)>>, table.blocks(), stream, table, nonfinite);
    });
    if (error) return error;
  }
  return for_each_table(rows, layouts, [&](const auto& table) {
    return launch(step_kernel<std::decay_t<decltype(table)>>, table.blocks(), stream, table, options, nonfinite);
  });
}

}  // namespace pyfeedback::cuda
