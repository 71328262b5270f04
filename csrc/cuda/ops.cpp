// From tensors to launches; everything runs on the current stream and nothing waits for it.
#include "ops.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "launch.h"

namespace pyfeedback::cuda {

namespace {

cudaStream_t current_stream(int32_t device) {
  void* stream;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// Uninitialised.
torch::stable::Tensor empty_on(int32_t device, int32_t dtype, int64_t size) {
  const int64_t stride = 1;
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(1, &size, &stride, dtype, aoti_torch_device_type_cuda(), device, &handle));
  return torch::stable::Tensor(handle);
}

// int32, set to zero in stream order.
torch::stable::Tensor zeros_on(int32_t device, int64_t size, cudaStream_t stream) {
  torch::stable::Tensor zeros = empty_on(device, aoti_torch_dtype_int32(), size);
  STD_CUDA_CHECK(cudaMemsetAsync(zeros.mutable_data_ptr(), 0, size * sizeof(int32_t), stream));
  return zeros;
}

}  // namespace

torch::stable::Tensor alignment_products(StableListHandle feedback, StableListHandle weight) {
  const TensorList feedbacks(feedback), weights(weight);
  const AlignmentPlan plan = plan_alignment(feedbacks, weights);
  const int32_t device = device_of(feedbacks[0]).index;
  const torch::stable::accelerator::DeviceGuard guard(device);
  torch::stable::Tensor products = zero_products(feedbacks);
  if (plan.rows.empty()) return products;
  const cudaStream_t stream = current_stream(device);
  torch::stable::Tensor partial = empty_on(device, aoti_torch_dtype_float64(), alignment_blocks(plan.rows) * kProducts);
  torch::stable::Tensor arrived = zeros_on(device, static_cast<int64_t>(feedbacks.size()), stream);
  STD_CUDA_CHECK(launch_alignment(plan.rows, plan.layouts, static_cast<double*>(partial.mutable_data_ptr()),
                                  static_cast<unsigned*>(arrived.mutable_data_ptr()),
                                  static_cast<double*>(products.mutable_data_ptr()), stream));
  return products;
}

torch::stable::Tensor center(const torch::stable::Tensor& input, int64_t samples) {
  const SampleBlocks blocks = sample_blocks(input, samples);
  const int32_t device = device_of(input.get()).index;
  const torch::stable::accelerator::DeviceGuard guard(device);
  torch::stable::Tensor output = empty_samples(input, blocks);
  if (samples == 0 || blocks.positions == 0) return output;
  const CenterLaunch launch{
      input.const_data_ptr(), output.mutable_data_ptr(), samples, blocks.positions, blocks.stride, blocks.dtype};
  STD_CUDA_CHECK(launch_center(launch, current_stream(device)));
  return output;
}

void add_centered_(const torch::stable::Tensor& self, const torch::stable::Tensor& input, double beta, double alpha) {
  const SampleBlocks blocks = sample_blocks_like(self, input);
  if (blocks.samples == 0 || blocks.positions == 0) return;
  const int32_t device = device_of(input.get()).index;
  const torch::stable::accelerator::DeviceGuard guard(device);
  const CenterLaunch launch{input.const_data_ptr(), self.mutable_data_ptr(), blocks.samples,
                            blocks.positions,       blocks.stride,           blocks.dtype};
  STD_CUDA_CHECK(launch_add_centered(launch, beta, alpha, current_stream(device)));
}

DepthwiseGradients depthwise_backward(const torch::stable::Tensor& grad_output, const torch::stable::Tensor& input,
                                      const torch::stable::Tensor& weight, const torch::stable::Tensor& feedback,
                                      const std::optional<torch::stable::Tensor>& mean,
                                      const std::optional<torch::stable::Tensor>& response,
                                      const std::optional<torch::stable::Tensor>& response_mean,
                                      const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                      const std::vector<int64_t>& dilation, int64_t groups,
                                      const std::vector<double>& coefficients, int64_t samples, bool need_input,
                                      bool need_weight, bool need_feedback, bool need_bias) {
  const DepthwiseCall call = plan_depthwise(grad_output, input, weight, feedback, {mean, response, response_mean},
                                            {stride, padding, dilation, groups}, coefficients, samples,
                                            {need_input, need_weight, need_feedback, need_bias});
  const DepthwiseLayer& layer = call.layer;
  constexpr int64_t kMost = int64_t{1} << 31;  // positions of a map, which the kernel counts in an int
  STD_TORCH_CHECK((layer.H + 2 * layer.padding[0]) * (layer.W + 2 * layer.padding[1]) < kMost, "input has a map of ",
                  layer.H, " x ", layer.W, "; expected fewer than 2^31 positions, with padding");
  STD_TORCH_CHECK(layer.null == 0 || layer.response.data, "null is ", layer.null, " but response is missing");
  const int32_t device = device_of(input.get()).index;
  const torch::stable::accelerator::DeviceGuard guard(device);
  torch::stable::Tensor partial = empty_on(device, aoti_torch_dtype_float64(), depthwise_partial(layer));
  STD_CUDA_CHECK(launch_depthwise(layer, static_cast<double*>(partial.mutable_data_ptr()), current_stream(device)));
  return call.gradients;
}

void feedback_step_(StableListHandle feedback, StableListHandle weight, StableListHandle grad,
                    StableListHandle momentum_buffer, const std::vector<double>& decay, const std::vector<double>& self,
                    const std::vector<double>& tie, double lr, double momentum, bool nesterov, double noise,
                    int64_t seed, bool skip_nonfinite, const std::optional<torch::stable::Tensor>& dynamic) {
  const StepArguments arguments{TensorList(feedback),
                                TensorList(weight),
                                TensorList(grad),
                                TensorList(momentum_buffer),
                                decay,
                                self,
                                tie,
                                dynamic,
                                step_options(lr, momentum, nesterov, noise, seed, dynamic)};
  const StepPlan plan = plan_step(arguments);
  if (plan.rows.empty()) return;
  const int32_t device = device_of(arguments.feedback[0]).index;
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);

  torch::stable::Tensor flag;
  int* nonfinite = nullptr;
  if (skip_nonfinite) {
    flag = zeros_on(device, 1, stream);
    nonfinite = static_cast<int*>(flag.mutable_data_ptr());
  }
  STD_CUDA_CHECK(launch_step(plan.rows, plan.layouts, arguments.options, nonfinite, stream));
}

}  // namespace pyfeedback::cuda
