// extension_center and extension_add_centered_: their operands.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace pyfeedback {

// A sample is a dense block of `positions` elements, in the same order in both tensors.
struct CenterOperands {
  const void* input;  // samples are `stride` elements apart
  void* output;       // samples are `positions` elements apart
  int64_t samples, positions, stride;
  Dtype dtype;

  bool is_empty() const { return samples == 0 || positions == 0; }
};

}  // namespace pyfeedback
