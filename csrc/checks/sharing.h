// Which tensors of a step share memory. pyfeedback/core/overlap.py decides the same for the steps composed of PyTorch's
// kernels, with errors for the user.
#pragma once

#include <cstdint>
#include <vector>

#include "tensors.h"

namespace pyfeedback {

// The memory of one operand.
struct Span {
  uintptr_t begin, end;
  AtenTensorHandle tensor;
  uint32_t row;           // of the plan, or kNoRow
  bool written, stepped;  // stepped: the operand kStepped of its row
};

constexpr uint32_t kNoRow = UINT32_MAX;

// Raises if an operand that is written shares memory with another one. There is one exception: a stepped operand may be
// the same tensor as one that its own row reads, or a row before it in the same chain, because one thread updates
// element i of all rows of a chain in their order. `chain` holds the first row of the chain of each row.
void check_sharing(const std::vector<Span>& spans, const std::vector<uint32_t>& chain);

// Whether two elements of a tensor are at the same address.
bool overlaps_itself(const Shape& shape);

}  // namespace pyfeedback
