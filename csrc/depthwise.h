// extension_depthwise_backward, the backward of a depthwise or grouped convolution: its operands and the arithmetic
// that CPU and CUDA share.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "host_device.h"

namespace pyfeedback {

// A tensor [N, channels, rows, columns] by its strides in elements. `data` is null if the layer has no such operand.
struct FeatureMap {
  void* data;
  int64_t sample, channel, row, column;
};

// Group g reads the input channels from g * I and writes the output channels from g * J. A depthwise layer has I == 1.
struct DepthwiseLayer {
  int64_t N, G, I, J;        // samples, groups, input and output channels of a group
  int64_t H, W, P, Q, R, S;  // input map, output map, kernel
  int64_t stride[2], padding[2], dilation[2];
  int64_t samples;  // that the rule reads, at least 1
  Dtype dtype;
  FeatureMap input, grad_output, grad_input;
  FeatureMap mean;                     // of the input over the samples, in the acc type; null if not centered
  FeatureMap response, response_mean;  // conv(x, W) and its mean; read only by CUDA, and only for null
  const void *weight, *feedback;       // [K, I, R, S]
  void *grad_weight, *grad_feedback, *grad_bias;  // [K, I, R, S] and [K], null if not needed
  double decay, amp, null, sparse, self, tie;
};

// The arithmetic of the rule. T is the acc type, or double for the last sums.
template <typename T>
struct DepthwiseRule {
  T decay, amp, null, sparse, self, tie;

  // b * feedback - w * weight, exact for b == w when feedback is close to weight.
  PYFEEDBACK_HOST_DEVICE static T blend(T b, T feedback, T w, T weight) {
    return b == w ? b * (feedback - weight) : b * feedback - w * weight;
  }

  // Whether wgrad(x, conv(x, sparse B - amp W)) is computed. If not, amp is part of the null term, which is then
  // wgrad(null convT(y, B) - amp x, y).
  PYFEEDBACK_HOST_DEVICE bool has_combined() const { return sparse != 0 || (amp != 0 && null == 0); }

  PYFEEDBACK_HOST_DEVICE T combined(T feedback, T weight) const { return blend(sparse, feedback, amp, weight); }

  PYFEEDBACK_HOST_DEVICE T amp_of_null() const { return has_combined() ? T(0) : amp; }
  PYFEEDBACK_HOST_DEVICE bool reads_data() const { return has_combined() || null != 0; }

  // The gradient of one feedback weight; `data` is the sum over the samples.
  PYFEEDBACK_HOST_DEVICE T gradient(T data, T samples, T feedback, T weight, T grad_weight) const {
    T total = reads_data() ? data / samples : T(0);
    if (decay != 0 || self != 0) total += blend(decay, feedback, self, weight);
    return tie != 0 ? total + tie * grad_weight : total;
  }
};

template <typename T>
PYFEEDBACK_HOST_DEVICE DepthwiseRule<T> make_rule(const DepthwiseLayer& layer) {
  return {static_cast<T>(layer.decay),  static_cast<T>(layer.amp),  static_cast<T>(layer.null),
          static_cast<T>(layer.sparse), static_cast<T>(layer.self), static_cast<T>(layer.tie)};
}

}  // namespace pyfeedback
