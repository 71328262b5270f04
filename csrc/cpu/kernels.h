// The CPU kernels, compiled once for the baseline instruction set and once for AVX2.
#pragma once

#include <cstdint>

#include "../arguments.h"

namespace pyfeedback::cpu {

struct Kernels {
  // Elements begin .. end - 1 of one tensor, in storage order, or in row-major order where it has a layout.
  void (*step)(const StepTensor& tensor, const StepLayout* layout, const StepOptions& options, int64_t begin,
               int64_t end);
  // Whether an inf or a nan stands among the same elements of weight and grad.
  bool (*any_nonfinite)(const StepTensor& tensor, const StepLayout* layout, int64_t begin, int64_t end);
  // The same elements of an AdamW step.
  void (*adamw_step)(const AdamWTensor& tensor, const AdamWLayout* layout, const AdamWOptions& options, int64_t begin,
                     int64_t end);
  // Sums of products of elements begin .. end - 1 of one pair, kProducts of them.
  void (*alignment_products)(const AlignmentPair& pair, const PairLayout* layout, int64_t begin, int64_t end,
                             double* sums);
  // output[:, begin:end] = input[:, begin:end] minus its mean over the samples.
  void (*center)(const void* input, void* output, const SampleBlocks& blocks, int64_t begin, int64_t end);
};

extern const Kernels kBaselineKernels;
extern const Kernels kAvx2Kernels;

// The best of them for this processor.
const Kernels& kernels();

}  // namespace pyfeedback::cpu
