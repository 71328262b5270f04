// Divides extension_probe_gradients among threads; the kernel is in probes_kernels.h.
#include <algorithm>
#include <memory>

#include <torch/csrc/stable/ops.h>

#include "backend.h"
#include "kernels.h"

namespace pyfeedback::cpu {

void Backend::probe_gradients(const ProbeOperands& operands) const {
  const int64_t elements = 2 * operands.size + operands.order * operands.order + operands.probes;
  const int64_t bytes = elements * element_size(operands.dtype);
  const int64_t grain = std::max<int64_t>(1, kGrain / operands.size);
  torch::stable::parallel_for(0, operands.outputs, grain, [&](int64_t begin, int64_t end) {
    constexpr size_t kAlignment = 64;
    size_t space = bytes + kAlignment;
    const std::unique_ptr<char[]> memory(new char[space]);
    void* aligned = memory.get();
    std::align(kAlignment, bytes, aligned, space);
    kernels().probe_gradients(operands, begin, end, aligned);
  });
}

}  // namespace pyfeedback::cpu
