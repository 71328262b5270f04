// The table of the CPU kernels, which all_kernels.h fills. They are compiled once for the baseline instruction set and
// once for AVX2.
#pragma once

#include <cstdint>

#include "../alignment.h"
#include "../center.h"
#include "../depthwise.h"
#include "../probes.h"
#include "../step.h"

namespace pyfeedback::cpu {

// The largest chunk of positions of `center` and `add_centered`: three float64 rows of it fit a second-level
// cache beside the samples.
constexpr int64_t kMaxCenterChunk = 2048;

// A part of a depthwise backward: samples first .. last - 1 of some blocks. A block has as many groups as a vector has
// lanes.
struct DepthwiseWork {
  int64_t block, blocks;
  int64_t first, last;
};

// Elements begin .. end - 1 of one row: in storage order, or in row-major order if there is a layout.
template <typename Row, typename Options>
using StepKernel = void (*)(const Row& row, const RowLayout<Row>* layout, const Options& options, int64_t begin,
                            int64_t end);

struct Kernels {
  StepKernel<FeedbackRow, FeedbackOptions> feedback_step;
  StepKernel<AdamWRow, AdamWOptions> adamw_step;
  // Whether one of the same elements of weight or grad is inf or nan.
  bool (*any_nonfinite)(const FeedbackRow& row, const RowLayout<FeedbackRow>* layout, int64_t begin, int64_t end);
  // The kProducts sums of elements begin .. end - 1 of one pair.
  void (*alignment_products)(const AlignmentPair& pair, const RowLayout<AlignmentPair>* layout, int64_t begin,
                             int64_t end, double* sums);
  // For positions begin .. end - 1: output = input minus its mean over the samples.
  void (*center)(const CenterOperands& operands, int64_t begin, int64_t end);
  // For the same positions: output = beta * output + alpha * (input minus its mean over the samples).
  void (*add_centered)(const CenterOperands& operands, double beta, double alpha, int64_t begin, int64_t end);
  // The bytes of scratch memory that `depthwise` needs for this number of blocks.
  int64_t (*depthwise_bytes)(const DepthwiseLayer& layer, int64_t blocks);
  // Adds to the sums of each block: [weight, data][J, I, R, S, lanes], then [J, lanes] of the bias.
  void (*depthwise)(const DepthwiseLayer& layer, const DepthwiseWork& work, void* memory, double* sums);
  // The gradients of the weights of one block, from the sums of its chunks, which are `step` apart.
  void (*depthwise_finish)(const DepthwiseLayer& layer, int64_t block, const double* sums, int64_t chunks,
                           int64_t step);
  // The bytes of scratch memory that `dense` needs.
  int64_t (*dense_bytes)(const DepthwiseLayer& layer);
  // All gradients of a layer without groups.
  void (*dense)(const DepthwiseLayer& layer, bool center, void* memory);
  // The gradients of outputs begin .. end - 1. The memory has 2 size + order^2 + probes elements.
  void (*probe_gradients)(const ProbeOperands& operands, int64_t begin, int64_t end, void* memory);
};

// The fastest kernels that this processor can run.
const Kernels& kernels();

}  // namespace pyfeedback::cpu
