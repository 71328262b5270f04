// The loop of native_center over one stretch of positions. In an unnamed namespace, see scalar.h.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../arguments.h"
#include "center.h"
#include "scalar.h"

namespace pyfeedback::cpu {
namespace {

// Samples added up before the sum is passed on: rounding grows with the group and with the number of groups, no longer
// with the number of samples.
constexpr int64_t kGroup = 16;

template <typename Scalar>
void center_stretch(const Scalar* input, Scalar* output, const SampleBlocks& blocks, int64_t width) {
  using T = Wide<Scalar>;
  T mean[kMaxStretch] = {};
  for (int64_t group = 0; group < blocks.samples; group += kGroup) {
    T sum[kMaxStretch] = {};
    const int64_t last = std::min(group + kGroup, blocks.samples);
    for (int64_t n = group; n < last; ++n) {
      const Scalar* sample = input + n * blocks.stride;
      for (int64_t p = 0; p < width; ++p) sum[p] += widen(sample[p]);
    }
    for (int64_t p = 0; p < width; ++p) mean[p] += sum[p];
  }
  for (int64_t p = 0; p < width; ++p) mean[p] /= static_cast<T>(blocks.samples);
  for (int64_t n = 0; n < blocks.samples; ++n) {
    const Scalar* sample = input + n * blocks.stride;
    Scalar* centered = output + n * blocks.positions;
    for (int64_t p = 0; p < width; ++p) narrow(widen(sample[p]) - mean[p], centered[p]);
  }
}

void center(const void* input, void* output, const SampleBlocks& blocks, int64_t begin, int64_t end) {
  visit_dtype(blocks.dtype, [&](auto scalar) {
    using Scalar = decltype(scalar);
    center_stretch(static_cast<const Scalar*>(input) + begin, static_cast<Scalar*>(output) + begin, blocks,
                   end - begin);
  });
}

}  // namespace
}  // namespace pyfeedback::cpu
