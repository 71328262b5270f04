// The launch functions under C names, for tests/shared/cuda_emulator.py. Every pointer is to host memory.
#include "../cuda/launch.h"

using namespace pyfeedback;

extern "C" {

const char* emulated_error(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  return error == cudaErrorLaunchFailure ? cuda_emulator::last_error.c_str() : "invalid launch";
}

void emulated_set_order(cuda_emulator::Order order) {
  cuda_emulator::order = order;
}

cudaError_t emulated_step(const FeedbackRow* rows, size_t count, const RowLayout<FeedbackRow>* layouts,
                          size_t layout_count, const FeedbackOptions* options, int* nonfinite) {
  return cuda::launch_step({rows, rows + count}, {layouts, layouts + layout_count}, *options, nonfinite, nullptr);
}

size_t emulated_alignment_blocks(const AlignmentPair* pairs, size_t count) {
  return cuda::alignment_blocks({pairs, pairs + count});
}

cudaError_t emulated_alignment(const AlignmentPair* pairs, size_t count, const RowLayout<AlignmentPair>* layouts,
                               size_t layout_count, double* partial, unsigned* arrived, double* products) {
  return cuda::launch_alignment({pairs, pairs + count}, {layouts, layouts + layout_count}, partial, arrived, products,
                                nullptr);
}

cudaError_t emulated_center(const CenterOperands* operands) {
  return cuda::launch_center(*operands, nullptr);
}

cudaError_t emulated_add_centered(const CenterOperands* operands, double beta, double alpha) {
  return cuda::launch_add_centered(*operands, beta, alpha, nullptr);
}

int64_t emulated_depthwise_partial(const DepthwiseLayer* layer) {
  return cuda::depthwise_partial(*layer);
}

cudaError_t emulated_depthwise(const DepthwiseLayer* layer, double* partial) {
  return cuda::launch_depthwise(*layer, partial, nullptr);
}

}  // extern "C"
