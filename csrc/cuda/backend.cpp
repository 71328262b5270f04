// Allocates the workspaces of the kernels and launches them.
#include "backend.h"

#include <torch/csrc/stable/macros.h>

namespace pyfeedback::cuda {

Backend::Backend(const Device& device) : device_(device), guard_(device.index) {
  void* stream;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device.index, &stream));
  stream_ = static_cast<cudaStream_t>(stream);
}

Tensor Backend::workspace(int32_t dtype, int64_t size) const {
  const int64_t stride = 1;
  return empty(1, &size, &stride, dtype, device_);
}

Tensor Backend::zeros(int64_t size) const {
  const Tensor zeros = workspace(aoti_torch_dtype_int32(), size);
  STD_CUDA_CHECK(cudaMemsetAsync(zeros.mutable_data_ptr(), 0, size * sizeof(int32_t), stream_));
  return zeros;
}

void Backend::feedback_step(const FeedbackPlan& plan, const FeedbackOptions& options) const {
  Tensor flag;
  int* nonfinite = nullptr;
  if (options.skip_nonfinite) {
    flag = zeros(1);
    nonfinite = static_cast<int*>(flag.mutable_data_ptr());
  }
  STD_CUDA_CHECK(launch_step(plan.rows, plan.layouts, options, nonfinite, stream_));
}

void Backend::alignment_products(const AlignmentPlan& plan, const Tensor& products) const {
  const Tensor partial = workspace(aoti_torch_dtype_float64(), alignment_blocks(plan.rows) * kProducts);
  const Tensor arrived = zeros(products.size(0));
  STD_CUDA_CHECK(launch_alignment(plan.rows, plan.layouts, static_cast<double*>(partial.mutable_data_ptr()),
                                  static_cast<unsigned*>(arrived.mutable_data_ptr()),
                                  static_cast<double*>(products.mutable_data_ptr()), stream_));
}

void Backend::center(const CenterOperands& operands) const {
  STD_CUDA_CHECK(launch_center(operands, stream_));
}

void Backend::add_centered(const CenterOperands& operands, double beta, double alpha) const {
  STD_CUDA_CHECK(launch_add_centered(operands, beta, alpha, stream_));
}

void Backend::depthwise_backward(const DepthwiseLayer& layer) const {
  constexpr int64_t kMaxPositions = int64_t{1} << 31;  // the kernel counts the positions of a map in an int
  STD_TORCH_CHECK((layer.H + 2 * layer.padding[0]) * (layer.W + 2 * layer.padding[1]) < kMaxPositions,
                  "input has a map of ", layer.H, " x ", layer.W, "; expected fewer than 2^31 positions, with padding");
  STD_TORCH_CHECK(layer.null == 0 || layer.response.data, "null is ", layer.null, " but response is missing");
  const Tensor partial = workspace(aoti_torch_dtype_float64(), depthwise_partial(layer));
  STD_CUDA_CHECK(launch_depthwise(layer, static_cast<double*>(partial.mutable_data_ptr()), stream_));
}

}  // namespace pyfeedback::cuda
