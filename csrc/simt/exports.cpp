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

size_t simt_alignment_blocks(const AlignmentPair* pairs, size_t count) {
  return cuda::alignment_blocks({pairs, pairs + count});
}

cudaError_t simt_alignment(const AlignmentPair* pairs, size_t count, const PairLayout* layouts, size_t layout_count,
                           double* partial, unsigned* arrived, double* products) {
  return cuda::launch_alignment({pairs, pairs + count}, {layouts, layouts + layout_count}, partial, arrived, products,
                                nullptr);
}

cudaError_t simt_center(const cuda::CenterLaunch* launch) {
  return cuda::launch_center(*launch, nullptr);
}

cudaError_t simt_add_centered(const cuda::CenterLaunch* launch, double beta, double alpha) {
  return cuda::launch_add_centered(*launch, beta, alpha, nullptr);
}

int64_t simt_depthwise_partial(const DepthwiseLayer* layer) {
  return cuda::depthwise_partial(*layer);
}

cudaError_t simt_depthwise(const DepthwiseLayer* layer, double* partial) {
  return cuda::launch_depthwise(*layer, partial, nullptr);
}

}  // extern "C"
