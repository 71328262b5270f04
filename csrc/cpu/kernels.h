// The CPU kernels, compiled once for the baseline instruction set and once for AVX2.
#pragma once

#include <cstdint>

#include "../arguments.h"
#include "../depthwise.h"

namespace pyfeedback::cpu {

// A part of a depthwise backward: blocks of as many groups as a vector has lanes, and samples first .. last - 1.
struct DepthwiseWork {
  int64_t block, blocks;
  int64_t first, last;
};

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
  // self[:, begin:end] = beta * self[:, begin:end] + alpha * (input[:, begin:end] minus its mean over the samples).
  void (*add_centered)(void* self, const void* input, const SampleBlocks& blocks, int64_t begin, int64_t end,
                       double beta, double alpha);
  // Bytes of memory that the backward of so many blocks works in.
  int64_t (*depthwise_bytes)(const DepthwiseLayer& layer, int64_t blocks);
  // Adds to the sums of each block: [weight, data][J, I, R, S, lanes], then [J, lanes] of the bias.
  void (*depthwise)(const DepthwiseLayer& layer, const DepthwiseWork& work, void* memory, double* sums);
  // The gradients of one block's weights, from the sums of its chunks, `step` apart.
  void (*depthwise_finish)(const DepthwiseLayer& layer, int64_t block, const double* sums, int64_t chunks,
                           int64_t step);
};

extern const Kernels kBaselineKernels;
extern const Kernels kAvx2Kernels;

// The best of them for this processor.
const Kernels& kernels();

}  // namespace pyfeedback::cpu
