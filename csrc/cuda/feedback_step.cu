#include "../philox.h"
#include "pack.cuh"
#include "table.cuh"

namespace pyfeedback::cuda {

namespace {

using StridedTensor = Strided<StepTensor, kStepOperands>;

// One element: feedback and, where has_momentum, the buffer are read and written.
template <typename Scalar>
__device__ __forceinline__ void step_element(const FeedbackStep<Wide<Scalar>>& step, Scalar& feedback, Scalar weight,
                                             Scalar grad, Scalar& momentum, bool has_momentum, float normal) {
  using T = Wide<Scalar>;
  const T old = widen(feedback);
  const T gradient = step.gradient(old, widen(weight), widen(grad)) + step.noise * static_cast<T>(normal);
  T direction = gradient;
  if (has_momentum) {
    T buffer = widen(momentum);
    direction = step.direction(gradient, buffer);
    narrow(buffer, momentum);
  }
  narrow(old - step.lr * direction, feedback);
}

template <typename Scalar>
__device__ __forceinline__ void step_block(const StepTensor& tensor, const StepOptions& options, int64_t block) {
  constexpr int kWidth = kPack<Scalar>;
  const auto step = make_step<Wide<Scalar>>(tensor, options);
  const bool aligned = is_aligned(tensor.feedback, tensor.weight, tensor.grad, tensor.momentum);
  for_each_pack<kWidth>(tensor.numel, block, [&](int64_t first, int count) {
    // Drawn before anything is loaded: what lives across the logarithm, sine and cosine is spilled.
    float noise[kWidth] = {};
#pragma unroll
    for (int draw = 0; options.noise != 0 && draw < kWidth; draw += 4) {
      const Normals drawn = normals(options.current_seed(), tensor.index, static_cast<uint64_t>(first + draw) / 4);
#pragma unroll
      for (int j = 0; j < 4; ++j) noise[draw + j] = drawn.value[j];
    }
    const bool whole = aligned && count == kWidth;
    Pack<Scalar> feedback = load<Scalar>(tensor.feedback, true, first, count, whole);
    const Pack<Scalar> weight = load<Scalar>(tensor.weight, tensor.has_weight, first, count, whole);
    const Pack<Scalar> grad = load<Scalar>(tensor.grad, tensor.has_grad, first, count, whole);
    Pack<Scalar> momentum = load<Scalar>(tensor.momentum, tensor.has_momentum, first, count, whole);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      step_element(step, feedback.value[j], weight.value[j], grad.value[j], momentum.value[j], tensor.has_momentum,
                   noise[j]);
    }
    store(feedback, tensor.feedback, first, count, whole);
    if (tensor.has_momentum) store(momentum, tensor.momentum, first, count, whole);
  });
}

template <typename Scalar>
__device__ __forceinline__ void step_block(const StridedTensor& tensor, const StepOptions& options, int64_t block) {
  for_each_element(tensor.numel, block, [&](int64_t i) {
    float normal = 0;
    if (options.noise != 0) {
      const Normals draws = normals(options.current_seed(), tensor.index, static_cast<uint64_t>(i) / 4);
#pragma unroll
      for (int j = 0; j < 4; ++j) normal = i % 4 == j ? draws.value[j] : normal;
    }
    int64_t at[kStepOperands];
    find_offsets(tensor.place, i, at);
    const auto step = make_step<Wide<Scalar>>(tensor, options);
    Scalar momentum = read<Scalar>(tensor.momentum, tensor.has_momentum, at[3]);
    step_element(step, static_cast<Scalar*>(tensor.feedback)[at[0]],
                 read<Scalar>(tensor.weight, tensor.has_weight, at[1]),
                 read<Scalar>(tensor.grad, tensor.has_grad, at[2]), momentum, tensor.has_momentum, normal);
    if (tensor.has_momentum) static_cast<Scalar*>(tensor.momentum)[at[3]] = momentum;
  });
}

// visit(tensor, Scalar{}, block) for the tensors of this block: one, or several that share memory and whose elements
// the same threads step one after the other, in the order of the model.
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
    step_kernel(const __grid_constant__ Table table, const StepOptions options, const int* nonfinite) {
  if (nonfinite != nullptr && *nonfinite != 0) return;
  for_each_row(table, [&](const auto& tensor, auto scalar, int64_t block) {
    step_block<decltype(scalar)>(tensor, options, block);
  });
}

template <typename Scalar>
__device__ __forceinline__ bool is_nonfinite(Scalar value) {
  return !isfinite(widen(value));
}

template <typename Scalar>
__device__ __forceinline__ bool any_nonfinite(const StepTensor& tensor, int64_t block) {
  constexpr int kWidth = kPack<Scalar>;
  const bool aligned = is_aligned(tensor.weight, tensor.grad);
  bool any = false;
  for_each_pack<kWidth>(tensor.numel, block, [&](int64_t first, int count) {
    const Pack<Scalar> weight =
        load<Scalar>(tensor.weight, tensor.has_weight, first, count, aligned && count == kWidth);
    const Pack<Scalar> grad = load<Scalar>(tensor.grad, tensor.has_grad, first, count, aligned && count == kWidth);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) any |= is_nonfinite(weight.value[j]) || is_nonfinite(grad.value[j]);
  });
  return any;
}

template <typename Scalar>
__device__ __forceinline__ bool any_nonfinite(const StridedTensor& tensor, int64_t block) {
  bool any = false;
  for_each_element(tensor.numel, block, [&](int64_t i) {
    int64_t at[kStepOperands];
    find_offsets(tensor.place, i, at);
    any |= is_nonfinite(read<Scalar>(tensor.weight, tensor.has_weight, at[1])) ||
           is_nonfinite(read<Scalar>(tensor.grad, tensor.has_grad, at[2]));
  });
  return any;
}

template <typename Table>
__global__ void __launch_bounds__(kThreads) find_nonfinite_kernel(const __grid_constant__ Table table, int* nonfinite) {
  for_each_row(table, [&](const auto& tensor, auto scalar, int64_t block) {
    // Every writer writes the same value, so no atomic is needed.
    if (any_nonfinite<decltype(scalar)>(tensor, block)) *nonfinite = 1;
  });
}

}  // namespace

cudaError_t launch_step(const std::vector<StepTensor>& tensors, const std::vector<StepLayout>& layouts,
                        const StepOptions& options, int* nonfinite, cudaStream_t stream) {
  if (nonfinite != nullptr) {
    const cudaError_t error = for_each_table(tensors, layouts, [&](const auto& table) {
      return launch(find_nonfinite_kernel<std::decay_t<decltype(table)>>, table.blocks(), stream, table, nonfinite);
    });
    if (error) return error;
  }
  return for_each_table(tensors, layouts, [&](const auto& table) {
    return launch(step_kernel<std::decay_t<decltype(table)>>, table.blocks(), stream, table, options, nonfinite);
  });
}

}  // namespace pyfeedback::cuda
