// extension_probe_gradients, the gradient of a feedback weight from orthogonal probes: its operands.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace pyfeedback {

// The probes X [probes, inputs] are rows of a basis [size, inputs]: the Kronecker product of Paley's matrix and
// Sylvester's, without the columns behind the inputs, and with a sign for each column.
struct ProbeOperands {
  const void *weight, *feedback;  // [outputs, inputs]
  const void* signs;              // [size]
  const void* paley;              // [order, order]
  const int64_t* rows;            // [probes]
  void* gradient;                 // [outputs, inputs]: decay B - self W + scale U X
  void* response;                 // [outputs, probes]: U = (of_feedback B - of_weight W) X'; null if not needed
  int64_t outputs, inputs, size, order, probes;
  Dtype dtype;  // float32 or float64
  double decay, self, of_feedback, of_weight, scale;
};

}  // namespace pyfeedback
