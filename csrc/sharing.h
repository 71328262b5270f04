// Which tensors of a multi-tensor step share memory. pyfeedback/sharing.py decides the same for the composed steps, and
// says it in the words that a user reads.
#pragma once

#include <cstdint>
#include <vector>

#include "tensors.h"

namespace pyfeedback {

// The memory of one operand. `row` is its place among the rows of the plan, or kNoRow for what belongs to none.
struct Span {
  uintptr_t begin, end;
  AtenTensorHandle tensor;
  uint32_t row;
  bool written, stepped;  // stepped: the first operand of its row
};

constexpr uint32_t kNoRow = UINT32_MAX;

// Raises where an operand that is written shares memory with another one. A stepped operand may be what its own row
// reads, or a row before it in its chain: one thread takes element i of all rows of a chain, in their order.
void check_sharing(const std::vector<Span>& spans, const std::vector<uint32_t>& chain);

// Whether two elements of a tensor lie at one place.
bool has_shared_places(const Shape& shape);

}  // namespace pyfeedback
