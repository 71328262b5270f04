// The backward of a depthwise or grouped convolution: its operands and the arithmetic that CPU and CUDA share.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "host_device.h"

namespace pyfeedback {

// A tensor [N, channels, rows, columns] by its strides in elements; data is null where it takes no part.
struct Map {
  void* data;
  int64_t sample, channel, row, column;
};

// One layer. Group g reads input channels g * I .. and writes output channels g * J ..; a depthwise layer has I == 1.
struct DepthwiseLayer {
  int64_t N, G, I, J;        // samples, groups, input and output channels of a group
  int64_t H, W, P, Q, R, S;  // input map, output map, kernel
  int64_t stride[2], padding[2], dilation[2];
  int64_t samples;  // that the rule sees, at least 1 where it reads data
  Dtype dtype;
  Map input, mean, grad_output, grad_input;  // mean: of input over the samples, in the wide type, null without centring
  Map response, response_mean;               // conv(x, W) and its mean, read by CUDA alone, and where null is not zero
  const void *weight, *feedback;             // [K, I, R, S]
  void *grad_weight, *grad_feedback, *grad_bias;  // [K, I, R, S] and [K], null where they are not asked for
  double decay, amp, null, sparse, self, tie;
};

// The rule's arithmetic in the wide type.
template <typename Wide>
struct DepthwiseRule {
  Wide decay, amp, null, sparse, self, tie;

  // b * feedback - w * weight, exact where b == w and feedback nears weight.
  PYFEEDBACK_HOST_DEVICE static Wide blend(Wide b, Wide feedback, Wide w, Wide weight) {
    return b == w ? b * (feedback - weight) : b * feedback - w * weight;
  }

  // Whether corr(x, conv(x, sparse B - amp W)) is computed; otherwise amp rides on
  // null, as corr(null convT(y, B) - amp x, y).
  PYFEEDBACK_HOST_DEVICE bool has_combined() const { return sparse != 0 || (amp != 0 && null == 0); }

  PYFEEDBACK_HOST_DEVICE Wide combined(Wide feedback, Wide weight) const {
    return blend(sparse, feedback, amp, weight);
  }

  PYFEEDBACK_HOST_DEVICE Wide carried_amp() const { return has_combined() ? Wide(0) : amp; }
  PYFEEDBACK_HOST_DEVICE bool reads_data() const { return has_combined() || null != 0; }

  // The gradient of one feedback weight; data is the sum over the samples.
  PYFEEDBACK_HOST_DEVICE Wide gradient(Wide data, Wide samples, Wide feedback, Wide weight, Wide grad_weight) const {
    Wide total = reads_data() ? data / samples : Wide(0);
    if (decay != 0 || self != 0) total += blend(decay, feedback, self, weight);
    return tie != 0 ? total + tie * grad_weight : total;
  }
};

template <typename Wide>
PYFEEDBACK_HOST_DEVICE DepthwiseRule<Wide> make_rule(const DepthwiseLayer& layer) {
  return {static_cast<Wide>(layer.decay),  static_cast<Wide>(layer.amp),  static_cast<Wide>(layer.null),
          static_cast<Wide>(layer.sparse), static_cast<Wide>(layer.self), static_cast<Wide>(layer.tie)};
}

}  // namespace pyfeedback
