// The kernels of extension_center and extension_add_centered_: a thread computes the mean of one position.
#include <algorithm>

#include "launch.cuh"
#include "scalar.cuh"

namespace pyfeedback::cuda {

namespace {

// Samples are summed in groups of this size, as on the CPU.
constexpr int64_t kGroup = 16;

// Calls write(value, output) with each value minus the mean of its position. A thread processes one position at a time,
// so that adjacent threads read adjacent elements of every sample.
template <typename Scalar, typename Write>
__device__ __forceinline__ void for_each_centered(const CenterOperands& p, const Write& write) {
  using T = AccType<Scalar>;
  const Scalar* input = static_cast<const Scalar*>(p.input);
  Scalar* output = static_cast<Scalar*>(p.output);
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t position = int64_t{blockIdx.x} * kThreads + threadIdx.x; position < p.positions; position += step) {
    T mean = 0;
    for (int64_t group = 0; group < p.samples; group += kGroup) {
      T sum = 0;
      const int64_t last = group + kGroup < p.samples ? group + kGroup : p.samples;
      for (int64_t n = group; n < last; ++n) sum += to_acc(input[n * p.stride + position]);
      mean += sum;
    }
    mean /= static_cast<T>(p.samples);
    for (int64_t n = 0; n < p.samples; ++n) {
      write(to_acc(input[n * p.stride + position]) - mean, output[n * p.positions + position]);
    }
  }
}

template <typename Scalar>
__global__ void __launch_bounds__(kThreads) center_kernel(CenterOperands p) {
  for_each_centered<Scalar>(p, [](AccType<Scalar> centered, Scalar& output) { from_acc(centered, output); });
}

template <typename Scalar>
__global__ void __launch_bounds__(kThreads) add_centered_kernel(CenterOperands p, double beta, double alpha) {
  using T = AccType<Scalar>;
  const T of_output = static_cast<T>(beta), of_input = static_cast<T>(alpha);
  for_each_centered<Scalar>(
      p, [=](T centered, Scalar& output) { from_acc(of_output * to_acc(output) + of_input * centered, output); });
}

int64_t blocks_of(const CenterOperands& p) {
  constexpr int64_t kMaxBlocks = 65535;
  return std::min((p.positions + kThreads - 1) / kThreads, kMaxBlocks);
}

}  // namespace

cudaError_t launch_center(const CenterOperands& p, cudaStream_t stream) {
  return visit_dtype(p.dtype,
                     [&](auto scalar) { return launch(center_kernel<decltype(scalar)>, blocks_of(p), stream, p); });
}

cudaError_t launch_add_centered(const CenterOperands& p, double beta, double alpha, cudaStream_t stream) {
  return visit_dtype(p.dtype, [&](auto scalar) {
    return launch(add_centered_kernel<decltype(scalar)>, blocks_of(p), stream, p, beta, alpha);
  });
}

}  // namespace pyfeedback::cuda
