#include "center.h"

#include <torch/csrc/stable/ops.h>

#include "kernels.h"
#include "ops.h"

namespace pyfeedback::cpu {

namespace {

// Runs visit(begin, end) over the positions of a sample.
template <typename Visitor>
void for_each_position(const SampleBlocks& blocks, const Visitor& visit) {
  if (blocks.samples == 0 || blocks.positions == 0) return;
  const int64_t width = stretch_width(blocks.samples, element_size(blocks.dtype));
  const int64_t stretches = (blocks.positions + width - 1) / width;
  const int64_t grain = std::max<int64_t>(1, kGrain / (width * blocks.samples));
  torch::stable::parallel_for(0, stretches, grain, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) visit(k * width, std::min((k + 1) * width, blocks.positions));
  });
}

}  // namespace

torch::stable::Tensor center(const torch::stable::Tensor& input, int64_t samples) {
  const SampleBlocks blocks = sample_blocks(input, samples);
  torch::stable::Tensor output = empty_samples(input, blocks);
  const void* from = input.const_data_ptr();
  void* to = output.mutable_data_ptr();
  for_each_position(blocks, [&](int64_t begin, int64_t end) { kernels().center(from, to, blocks, begin, end); });
  return output;
}

void add_centered_(const torch::stable::Tensor& self, const torch::stable::Tensor& input, double beta, double alpha) {
  const SampleBlocks blocks = sample_blocks_like(self, input);
  const void* from = input.const_data_ptr();
  void* to = self.mutable_data_ptr();
  for_each_position(
      blocks, [&](int64_t begin, int64_t end) { kernels().add_centered(to, from, blocks, begin, end, beta, alpha); });
}

}  // namespace pyfeedback::cpu
