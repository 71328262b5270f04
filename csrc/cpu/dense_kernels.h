// The whole backward of a small layer without groups, on one thread: every product is one of matrices in the cache. In
// an unnamed namespace, see scalar.h.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../depthwise.h"
#include "depthwise_kernels.h"
#include "scalar.h"

namespace pyfeedback::cpu {
namespace {

// out[rows, columns] += a[rows, inner] b[inner, columns]. The rounding error of a sum grows with the size and the
// number of the blocks that it is divided into, not with the number of its terms.
template <typename T>
void multiply(const T* a, int64_t rows, int64_t inner, const T* b, int64_t columns, T* out, T* scratch) {
  constexpr int64_t kBlock = 64;
  for (int64_t m = 0; m < rows; ++m, a += inner, out += columns) {
    for (int64_t begin = 0; begin < inner; begin += kBlock) {
      const int64_t end = std::min(begin + kBlock, inner);
      T* __restrict sum = scratch;
      std::fill_n(sum, columns, T(0));
      int64_t k = begin;
      for (; k + 4 <= end; k += 4) {
        const T *b0 = b + k * columns, *b1 = b0 + columns, *b2 = b1 + columns, *b3 = b2 + columns;
        const T a0 = a[k], a1 = a[k + 1], a2 = a[k + 2], a3 = a[k + 3];
        for (int64_t c = 0; c < columns; ++c) sum[c] += (a0 * b0[c] + a1 * b1[c]) + (a2 * b2[c] + a3 * b3[c]);
      }
      for (; k < end; ++k) {
        const T a0 = a[k], *b0 = b + k * columns;
        for (int64_t c = 0; c < columns; ++c) sum[c] += a0 * b0[c];
      }
      for (int64_t c = 0; c < columns; ++c) out[c] += sum[c];
    }
  }
}

template <typename T>
void transpose(const T* from, int64_t rows, int64_t columns, T* to) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) to[c * rows + r] = from[r * columns + c];
  }
}

// Activations are matrices [positions, channels]. The window of an output position is a row [R, S, I], in the order of
// the columns of a kernel [J, R, S, I] here.
template <typename Scalar>
class DenseBackward {
  using T = AccType<Scalar>;

 public:
  DenseBackward(const DepthwiseLayer& layer, void* memory)
      : layer_(layer),
        rule_(make_rule<T>(layer)),
        rows_(layer.N * layer.P * layer.Q),
        columns_(layer.I * layer.R * layer.S),
        weights_(layer.J * columns_) {
    Arena arena(memory);
    const int64_t pixels = layer.N * layer.H * layer.W * layer.I;
    image_ = arena.allocate<T>(pixels);
    folded_ = arena.allocate<T>(pixels);
    windows_ = arena.allocate<T>(rows_ * columns_);
    products_ = arena.allocate<T>(rows_ * columns_);
    output_ = arena.allocate<T>(rows_ * layer.J);
    transposed_ = arena.allocate<T>(rows_ * layer.J);
    weight_ = arena.allocate<T>(weights_);
    feedback_ = arena.allocate<T>(weights_);
    kernel_ = arena.allocate<T>(weights_);
    grad_weight_ = arena.allocate<T>(weights_);
    data_ = arena.allocate<T>(weights_);
    columns_first_ = arena.allocate<T>(weights_);
    scratch_ = arena.allocate<T>(std::max(columns_, layer.J));
    bytes_ = arena.used();
  }

  int64_t bytes() const { return bytes_; }

  void run(bool center) {
    for_each_weight([&](int64_t here, int64_t there) {
      weight_[here] = to_acc(static_cast<const Scalar*>(layer_.weight)[there]);
      feedback_[here] = to_acc(static_cast<const Scalar*>(layer_.feedback)[there]);
    });
    std::fill_n(grad_weight_, weights_, T(0));
    std::fill_n(data_, weights_, T(0));
    for_each_pixel(layer_.input, [&](int64_t here, int64_t there) {
      image_[here] = to_acc(static_cast<const Scalar*>(layer_.input.data)[there]);
    });
    unfold(layer_.N);
    task_gradients();
    if (rule_.reads_data()) data_terms(center);
    store_weights();
  }

 private:
  void task_gradients() {
    const FeatureMap& dy = layer_.grad_output;
    for (int64_t n = 0, row = 0; n < layer_.N; ++n) {
      for (int64_t p = 0; p < layer_.P; ++p) {
        for (int64_t q = 0; q < layer_.Q; ++q, ++row) {
          const Scalar* from = static_cast<const Scalar*>(dy.data) + n * dy.sample + p * dy.row + q * dy.column;
          for (int64_t j = 0; j < layer_.J; ++j) output_[row * layer_.J + j] = to_acc(from[j * dy.channel]);
        }
      }
    }
    if (layer_.grad_bias) {
      for (int64_t j = 0; j < layer_.J; ++j) {
        double sum = 0;
        for (int64_t row = 0; row < rows_; ++row) sum += output_[row * layer_.J + j];
        from_acc(static_cast<T>(sum), static_cast<Scalar*>(layer_.grad_bias)[j]);
      }
    }
    if (layer_.grad_weight || rule_.tie != 0) add_wgrad(layer_.N, grad_weight_);
    if (layer_.grad_input.data) {
      dgrad(layer_.N);
      for_each_pixel(layer_.grad_input, [&](int64_t here, int64_t there) {
        from_acc(folded_[here], static_cast<Scalar*>(layer_.grad_input.data)[there]);
      });
    }
  }

  // The response to centered inputs is the centered response.
  void data_terms(bool center) {
    const int64_t n = layer_.samples, pixels = layer_.H * layer_.W * layer_.I;
    if (center) {
      subtract_mean(n, pixels);
      unfold(n);
    }
    if (rule_.has_combined()) {
      for (int64_t k = 0; k < weights_; ++k) kernel_[k] = rule_.combined(feedback_[k], weight_[k]);
      fprop(n, kernel_);
      add_wgrad(n, data_);
    }
    if (rule_.null != 0) {
      fprop(n, weight_);
      dgrad(n);
      const T null = rule_.null, amp = rule_.amp_of_null();
      for (int64_t k = 0; k < n * pixels; ++k) image_[k] = null * folded_[k] - amp * image_[k];
      unfold(n);
      add_wgrad(n, data_);
    }
  }

  void subtract_mean(int64_t samples, int64_t pixels) {
    for (int64_t k = 0; k < pixels; ++k) {
      double sum = 0;
      for (int64_t n = 0; n < samples; ++n) sum += image_[n * pixels + k];
      const T mean = static_cast<T>(sum / static_cast<double>(samples));
      for (int64_t n = 0; n < samples; ++n) image_[n * pixels + k] -= mean;
    }
  }

  // output = windows kernel'
  void fprop(int64_t samples, const T* kernel) {
    const int64_t rows = samples * layer_.P * layer_.Q;
    transpose(kernel, layer_.J, columns_, columns_first_);
    std::fill_n(output_, rows * layer_.J, T(0));
    multiply(windows_, rows, columns_, columns_first_, layer_.J, output_, scratch_);
  }

  // folded = conv_transpose(output, B)
  void dgrad(int64_t samples) {
    const int64_t rows = samples * layer_.P * layer_.Q;
    std::fill_n(products_, rows * columns_, T(0));
    multiply(output_, rows, layer_.J, feedback_, columns_, products_, scratch_);
    std::fill_n(folded_, samples * layer_.H * layer_.W * layer_.I, T(0));
    for_each_run(samples, [&](int64_t window, int64_t pixel, int64_t count) {
      for (int64_t k = 0; k < count; ++k) folded_[pixel + k] += products_[window + k];
    });
  }

  // sum += output' windows
  void add_wgrad(int64_t samples, T* sum) {
    const int64_t rows = samples * layer_.P * layer_.Q;
    transpose(output_, rows, layer_.J, transposed_);
    multiply(transposed_, layer_.J, rows, windows_, columns_, sum, scratch_);
  }

  void unfold(int64_t samples) {
    std::fill_n(windows_, samples * layer_.P * layer_.Q * columns_, T(0));
    for_each_run(samples, [&](int64_t window, int64_t pixel, int64_t count) {
      for (int64_t k = 0; k < count; ++k) windows_[window + k] = image_[pixel + k];
    });
  }

  void store_weights() {
    const auto rule = make_rule<double>(layer_);
    const double samples = static_cast<double>(layer_.samples);
    for_each_weight([&](int64_t here, int64_t there) {
      const double grad = grad_weight_[here];
      const double of_feedback = rule.gradient(data_[here], samples, feedback_[here], weight_[here], grad);
      if (layer_.grad_weight) from_acc(static_cast<T>(grad), static_cast<Scalar*>(layer_.grad_weight)[there]);
      if (layer_.grad_feedback) {
        from_acc(static_cast<T>(of_feedback), static_cast<Scalar*>(layer_.grad_feedback)[there]);
      }
    });
  }

  // visit(window, pixel, count) for every run of elements that are adjacent in a window and in the input.
  template <typename Visitor>
  void for_each_run(int64_t samples, const Visitor& visit) const {
    const int64_t I = layer_.I, S = layer_.S, W = layer_.W, right = layer_.dilation[1];
    for (int64_t n = 0, window = 0; n < samples; ++n) {
      for (int64_t p = 0; p < layer_.P; ++p) {
        for (int64_t q = 0; q < layer_.Q; ++q, window += columns_) {
          const int64_t left = layer_.stride[1] * q - layer_.padding[1];
          for (int64_t r = 0; r < layer_.R; ++r) {
            const int64_t h = layer_.stride[0] * p - layer_.padding[0] + layer_.dilation[0] * r;
            if (h < 0 || h >= layer_.H) continue;
            const int64_t to = window + r * S * I, from = (n * layer_.H + h) * W * I;
            if (right == 1) {
              const int64_t first = std::max<int64_t>(0, -left), last = std::min(S, W - left);
              if (first < last) visit(to + first * I, from + (left + first) * I, (last - first) * I);
              continue;
            }
            for (int64_t s = 0; s < S; ++s) {
              const int64_t w = left + right * s;
              if (w >= 0 && w < W) visit(to + s * I, from + w * I, I);
            }
          }
        }
      }
    }
  }

  // visit(here, there): the index in a kernel [J, R, S, I], and in [J, I, R, S].
  template <typename Visitor>
  void for_each_weight(const Visitor& visit) const {
    const int64_t taps = layer_.R * layer_.S;
    for (int64_t j = 0, here = 0; j < layer_.J; ++j) {
      for (int64_t tap = 0; tap < taps; ++tap) {
        for (int64_t i = 0; i < layer_.I; ++i, ++here) visit(here, (j * layer_.I + i) * taps + tap);
      }
    }
  }

  // visit(here, there): the index in an image [N, H, W, I], and the offset in a map.
  template <typename Visitor>
  void for_each_pixel(const FeatureMap& map, const Visitor& visit) const {
    for (int64_t n = 0, here = 0; n < layer_.N; ++n) {
      for (int64_t h = 0; h < layer_.H; ++h) {
        for (int64_t w = 0; w < layer_.W; ++w) {
          const int64_t there = n * map.sample + h * map.row + w * map.column;
          for (int64_t i = 0; i < layer_.I; ++i, ++here) visit(here, there + i * map.channel);
        }
      }
    }
  }

  const DepthwiseLayer& layer_;
  const DepthwiseRule<T> rule_;
  const int64_t rows_, columns_, weights_;
  T *image_, *folded_;                                      // [N, H, W, I]
  T *windows_, *products_;                                  // [N * P * Q, R * S * I]
  T *output_, *transposed_;                                 // [N * P * Q, J], and the transpose
  T *weight_, *feedback_, *kernel_, *grad_weight_, *data_;  // [J, R, S, I]
  T* columns_first_;                                        // the transpose of a kernel
  T* scratch_;                                              // a row of a product
  int64_t bytes_;
};

int64_t dense_bytes(const DepthwiseLayer& layer) {
  return visit_dtype(layer.dtype, [&](auto scalar) { return DenseBackward<decltype(scalar)>(layer, nullptr).bytes(); });
}

void dense(const DepthwiseLayer& layer, bool center, void* memory) {
  visit_dtype(layer.dtype, [&](auto scalar) { DenseBackward<decltype(scalar)>(layer, memory).run(center); });
}

}  // namespace
}  // namespace pyfeedback::cpu
