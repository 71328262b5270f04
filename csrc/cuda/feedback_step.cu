#include <algorithm>

#include "../philox.h"
#include "launch.h"
#include "scalar.cuh"

namespace pyfeedback::cuda {

namespace {

// The four elements that one thread takes at a time, loaded and stored at once where every operand is aligned.
template <typename Scalar>
struct alignas(kVector * sizeof(Scalar)) Pack {
  Scalar value[kVector];
};

template <typename Scalar>
__device__ __forceinline__ bool is_aligned(const StepTensor& tensor) {
  const auto addresses = reinterpret_cast<uintptr_t>(tensor.feedback) | reinterpret_cast<uintptr_t>(tensor.weight) |
                         reinterpret_cast<uintptr_t>(tensor.grad) | reinterpret_cast<uintptr_t>(tensor.momentum);
  return addresses % sizeof(Pack<Scalar>) == 0;
}

// Elements first .. first + count - 1 of one operand; zeros where there is no such operand.
template <typename Scalar>
__device__ __forceinline__ Pack<Scalar> load(const void* operand, int64_t first, int count, bool whole) {
  Pack<Scalar> pack{};
  if (operand == nullptr) return pack;
  const Scalar* from = static_cast<const Scalar*>(operand) + first;
  if (whole) return *reinterpret_cast<const Pack<Scalar>*>(from);
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    if (j < count) pack.value[j] = from[j];
  }
  return pack;
}

template <typename Scalar>
__device__ __forceinline__ void store(const Pack<Scalar>& pack, void* operand, int64_t first, int count, bool whole) {
  Scalar* to = static_cast<Scalar*>(operand) + first;
  if (whole) {
    *reinterpret_cast<Pack<Scalar>*>(to) = pack;
    return;
  }
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    if (j < count) to[j] = pack.value[j];
  }
}

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

// The tensor that a block works on: the last whose first block is not behind it.
__device__ __forceinline__ int find_tensor(const StepLaunch& p) {
  int low = 0, high = p.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (p.first_block[middle] <= int64_t{blockIdx.x}) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// visit(first, count) for every group of four of this thread within this block's part of the tensor.
template <typename Visitor>
__device__ __forceinline__ void for_each_group(const StepTensor& tensor, int64_t block, const Visitor& visit) {
  const int64_t begin = block * kBlockElements;
  const int64_t end = begin + kBlockElements < tensor.numel ? begin + kBlockElements : tensor.numel;
  for (int64_t first = begin + int64_t{threadIdx.x} * kVector; first < end; first += int64_t{kThreads} * kVector) {
    visit(first, static_cast<int>(end - first < kVector ? end - first : kVector));
  }
}

template <typename Scalar>
__device__ void step_block(const StepTensor& tensor, const StepOptions& options, int64_t block) {
  const auto step = make_step<Wide<Scalar>>(tensor, options);
  const bool aligned = is_aligned<Scalar>(tensor);
  for_each_group(tensor, block, [&](int64_t first, int count) {
    const bool whole = aligned && count == kVector;
    Pack<Scalar> feedback = load<Scalar>(tensor.feedback, first, count, whole);
    const Pack<Scalar> weight = load<Scalar>(tensor.weight, first, count, whole);
    const Pack<Scalar> grad = load<Scalar>(tensor.grad, first, count, whole);
    Pack<Scalar> momentum = load<Scalar>(tensor.momentum, first, count, whole);
    const Normals noise =
        options.noise != 0 ? normals(options.seed, tensor.index, static_cast<uint64_t>(first) / kVector) : Normals{};
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      step_element(step, feedback.value[j], weight.value[j], grad.value[j], momentum.value[j],
                   tensor.momentum != nullptr, noise.value[j]);
    }
    store(feedback, tensor.feedback, first, count, whole);
    if (tensor.momentum) store(momentum, tensor.momentum, first, count, whole);
  });
}

__global__ void __launch_bounds__(kThreads) step_kernel(const __grid_constant__ StepLaunch p) {
  if (p.skip != nullptr && *p.skip != 0) return;
  const int index = find_tensor(p);
  const StepTensor& tensor = p.tensor[index];
  visit_dtype(tensor.dtype, [&](auto scalar) {
    step_block<decltype(scalar)>(tensor, p.options, int64_t{blockIdx.x} - p.first_block[index]);
  });
}

template <typename Scalar>
__device__ __forceinline__ bool is_nonfinite(Scalar value) {
  return !isfinite(widen(value));
}

__global__ void __launch_bounds__(kThreads) find_nonfinite_kernel(const __grid_constant__ StepLaunch p, int* found) {
  const int index = find_tensor(p);
  const StepTensor& tensor = p.tensor[index];
  bool any = false;
  visit_dtype(tensor.dtype, [&](auto scalar) {
    using Scalar = decltype(scalar);
    const bool aligned = is_aligned<Scalar>(tensor);
    for_each_group(tensor, int64_t{blockIdx.x} - p.first_block[index], [&](int64_t first, int count) {
      const bool whole = aligned && count == kVector;
      const Pack<Scalar> weight = load<Scalar>(tensor.weight, first, count, whole);
      const Pack<Scalar> grad = load<Scalar>(tensor.grad, first, count, whole);
#pragma unroll
      for (int j = 0; j < kVector; ++j) any |= is_nonfinite(weight.value[j]) || is_nonfinite(grad.value[j]);
    });
  });
  // Every writer writes the same value, so no atomic is needed.
  if (any) *found = 1;
}

// Where each operand has the row-major element `element`.
__device__ __forceinline__ void find_offsets(const StepLayout& layout, int64_t element, int64_t (&at)[kStepOperands]) {
#pragma unroll
  for (int k = 0; k < kStepOperands; ++k) at[k] = 0;
  for (int64_t d = layout.dims - 1; d >= 0; --d) {
    const int64_t position = element % layout.size[d];
    element /= layout.size[d];
#pragma unroll
    for (int k = 0; k < kStepOperands; ++k) at[k] += position * layout.stride[k][d];
  }
}

template <typename Scalar>
__device__ __forceinline__ Scalar read(const void* operand, int64_t at) {
  return operand ? static_cast<const Scalar*>(operand)[at] : Scalar{};
}

template <typename Visitor>
__device__ __forceinline__ void for_each_element(int64_t numel, const Visitor& visit) {
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < numel; i += step) visit(i);
}

__global__ void __launch_bounds__(kThreads) step_strided_kernel(const __grid_constant__ StridedLaunch p) {
  if (p.skip != nullptr && *p.skip != 0) return;
  visit_dtype(p.tensor.dtype, [&](auto scalar) {
    using Scalar = decltype(scalar);
    const auto step = make_step<Wide<Scalar>>(p.tensor, p.options);
    for_each_element(p.tensor.numel, [&](int64_t i) {
      int64_t at[kStepOperands];
      find_offsets(p.layout, i, at);
      float normal = 0;
      if (p.options.noise != 0) {
        const Normals draws = normals(p.options.seed, p.tensor.index, static_cast<uint64_t>(i) / kVector);
#pragma unroll
        for (int j = 0; j < kVector; ++j) normal = i % kVector == j ? draws.value[j] : normal;
      }
      Scalar momentum = read<Scalar>(p.tensor.momentum, at[3]);
      step_element(step, static_cast<Scalar*>(p.tensor.feedback)[at[0]], read<Scalar>(p.tensor.weight, at[1]),
                   read<Scalar>(p.tensor.grad, at[2]), momentum, p.tensor.momentum != nullptr, normal);
      if (p.tensor.momentum) static_cast<Scalar*>(p.tensor.momentum)[at[3]] = momentum;
    });
  });
}

__global__ void __launch_bounds__(kThreads)
    find_nonfinite_strided_kernel(const __grid_constant__ StridedLaunch p, int* found) {
  bool any = false;
  visit_dtype(p.tensor.dtype, [&](auto scalar) {
    using Scalar = decltype(scalar);
    for_each_element(p.tensor.numel, [&](int64_t i) {
      int64_t at[kStepOperands];
      find_offsets(p.layout, i, at);
      any |= is_nonfinite(read<Scalar>(p.tensor.weight, at[1])) || is_nonfinite(read<Scalar>(p.tensor.grad, at[2]));
    });
  });
  if (any) *found = 1;
}

unsigned blocks_of(const StepLaunch& launch) {
  return static_cast<unsigned>(launch.first_block[launch.count]);
}

unsigned blocks_of(const StridedLaunch& launch) {
  constexpr int64_t kMaxBlocks = 65535;
  return static_cast<unsigned>(std::min((launch.tensor.numel + kThreads - 1) / kThreads, kMaxBlocks));
}

}  // namespace

cudaError_t launch_step(const StepLaunch& launch, cudaStream_t stream) {
  step_kernel<<<blocks_of(launch), kThreads, 0, stream>>>(launch);
  return cudaGetLastError();
}

cudaError_t launch_step(const StridedLaunch& launch, cudaStream_t stream) {
  step_strided_kernel<<<blocks_of(launch), kThreads, 0, stream>>>(launch);
  return cudaGetLastError();
}

cudaError_t launch_find_nonfinite(const StepLaunch& launch, int* found, cudaStream_t stream) {
  find_nonfinite_kernel<<<blocks_of(launch), kThreads, 0, stream>>>(launch, found);
  return cudaGetLastError();
}

cudaError_t launch_find_nonfinite(const StridedLaunch& launch, int* found, cudaStream_t stream) {
  find_nonfinite_strided_kernel<<<blocks_of(launch), kThreads, 0, stream>>>(launch, found);
  return cudaGetLastError();
}

}  // namespace pyfeedback::cuda
