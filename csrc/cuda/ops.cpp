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

// One int32 on `device`, set to zero in stream order.
torch::stable::Tensor zero_flag(int32_t device, cudaStream_t stream) {
  const int64_t size = 1, stride = 1;
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, &size, &stride, aoti_torch_dtype_int32(),
                                                  aoti_torch_device_type_cuda(), device, &handle));
  torch::stable::Tensor flag(handle);
  STD_CUDA_CHECK(cudaMemsetAsync(flag.mutable_data_ptr(), 0, sizeof(int32_t), stream));
  return flag;
}

}  // namespace

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

void feedback_step_(StableListHandle feedback, StableListHandle weight, StableListHandle grad,
                    StableListHandle momentum_buffer, const std::vector<double>& decay, const std::vector<double>& self,
                    const std::vector<double>& tie, double lr, double momentum, bool nesterov, double noise,
                    int64_t seed, bool skip_nonfinite) {
  const StepArguments arguments{TensorList(feedback),
                                TensorList(weight),
                                TensorList(grad),
                                TensorList(momentum_buffer),
                                decay,
                                self,
                                tie,
                                StepOptions{lr, momentum, noise, static_cast<uint64_t>(seed), nesterov}};
  const StepPlan plan = plan_step(arguments);
  if (plan.rows.empty()) return;
  const int32_t device = device_of(arguments.feedback[0]).index;
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);

  torch::stable::Tensor flag;
  int* nonfinite = nullptr;
  if (skip_nonfinite) {
    flag = zero_flag(device, stream);
    nonfinite = static_cast<int*>(flag.mutable_data_ptr());
  }
  STD_CUDA_CHECK(launch_step(plan.rows, plan.layouts, arguments.options, nonfinite, stream));
}

}  // namespace pyfeedback::cuda
