#include "center.h"

#include <torch/csrc/stable/ops.h>

#include "kernels.h"
#include "ops.h"

namespace pyfeedback::cpu {

torch::stable::Tensor center(const torch::stable::Tensor& input, int64_t samples) {
  const SampleBlocks blocks = sample_blocks(input, samples);
  torch::stable::Tensor output = empty_samples(input, blocks);
  if (samples == 0 || blocks.positions == 0) return output;

  const void* from = input.const_data_ptr();
  void* to = output.mutable_data_ptr();
  const Kernels& kernel = kernels();
  const int64_t width = stretch_width(samples, element_size(blocks.dtype));
  const int64_t stretches = (blocks.positions + width - 1) / width;
  const int64_t grain = std::max<int64_t>(1, kGrain / (width * samples));
  torch::stable::parallel_for(0, stretches, grain, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      kernel.center(from, to, blocks, k * width, std::min((k + 1) * width, blocks.positions));
    }
  });
  return output;
}

}  // namespace pyfeedback::cpu
