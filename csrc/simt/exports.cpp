// The launch functions under C names, for tests/simt.py; every pointer is to host memory.
#include "../cuda/launch.h"

using namespace pyfeedback;

extern "C" {

const char* simt_error(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  return error == cudaErrorLaunchFailure ? simt::last_error.c_str() : "invalid launch";
}

void simt_set_order(simt::Order order) {
  simt::order = order;
}

cudaError_t simt_step(const StepTensor* tensors, size_t count, const StepLayout* layouts, size_t layout_count,
                      const StepOptions* options, int* nonfinite) {
  return cuda::launch_step({tensors, tensors + count}, {layouts, layouts + layout_count}, *options, nonfinite, nullptr);
}

cudaError_t simt_center(const cuda::CenterLaunch* launch) {
  return cuda::launch_center(*launch, nullptr);
}

}  // extern "C"
