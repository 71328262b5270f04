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

// visit(launch) for as few launches as hold the whole model.
template <typename Visitor>
void for_each_launch(const StepPlan& plan, const StepOptions& options, const int* skip, const Visitor& visit) {
  constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;
  StepLaunch launch{};
  launch.options = options;
  launch.skip = skip;
  const auto flush = [&] {
    if (launch.count > 0) visit(launch);
    launch.count = 0;
  };
  for (const StepTensor& tensor : plan.rows) {
    if (tensor.layout >= 0) {
      visit(StridedLaunch{options, skip, tensor, plan.layouts[tensor.layout]});
      continue;
    }
    const int64_t blocks = (tensor.numel + kBlockElements - 1) / kBlockElements;
    if (launch.count == kLaunchTensors || launch.first_block[launch.count] + blocks > kMaxBlocks) flush();
    launch.tensor[launch.count] = tensor;
    launch.first_block[launch.count + 1] = launch.first_block[launch.count] + blocks;
    ++launch.count;
  }
  flush();
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
  int* skip = nullptr;
  if (skip_nonfinite) {
    flag = zero_flag(device, stream);
    skip = static_cast<int*>(flag.mutable_data_ptr());
    for_each_launch(plan, arguments.options, nullptr,
                    [&](const auto& launch) { STD_CUDA_CHECK(launch_find_nonfinite(launch, skip, stream)); });
  }
  for_each_launch(plan, arguments.options, skip,
                  [&](const auto& launch) { STD_CUDA_CHECK(launch_step(launch, stream)); });
}

}  // namespace pyfeedback::cuda
