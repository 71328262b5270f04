// The backward of a strip of blocks, each of as many groups as a vector has lanes. A sample is processed row by row:
// the rows that a window covers stay in rings in the cache, and every row of the input and of grad_output is read once.
// In an unnamed namespace, see scalar.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../depthwise.h"
#include "depthwise_rows.h"
#include "kernels.h"
#include "scalar.h"

namespace pyfeedback::cpu {
namespace {

// Allocates from one block of memory. Without a block it only counts the bytes.
class Arena {
 public:
  explicit Arena(void* memory) : memory_(static_cast<char*>(memory)) {}

  template <typename Item>
  Item* allocate(int64_t count) {
    const int64_t offset = used_;
    used_ += (count * static_cast<int64_t>(sizeof(Item)) + 63) / 64 * 64;
    return memory_ ? reinterpret_cast<Item*>(memory_ + offset) : nullptr;
  }

  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

template <typename Scalar>
class DepthwiseStrip {
  using T = AccType<Scalar>;
  using Vector = LanesVector<T>;
  static constexpr int kLanes = kLanesOf<T>;

  // Kernel column s connects output column c to input column first + stride * (c - column), with first < stride.
  struct KernelColumn {
    int64_t first, s, column;
  };

 public:
  DepthwiseStrip(const DepthwiseLayer& layer, int64_t block, int64_t blocks, void* memory)
      : layer_(layer),
        rule_(make_rule<T>(layer)),
        block_(block),
        blocks_(blocks),
        weights_(layer.J * layer.I * layer.R * layer.S) {
    const int64_t reach = layer_.dilation[0] * (layer_.R - 1), width = layer_.dilation[1] * (layer_.S - 1);
    // The columns that taps read to the left of the first one, and from the first one to the right: of the input, then
    // of the output.
    const int64_t in_left = layer_.padding[1],
                  in_right = layer_.stride[1] * (layer_.Q - 1) + width - layer_.padding[1] + 1;
    const int64_t out_left =
        std::max<int64_t>(0, (width - layer_.padding[1] + layer_.stride[1] - 1) / layer_.stride[1]);
    const int64_t out_right = (layer_.W - 1 + layer_.padding[1]) / layer_.stride[1] + 1;
    const int64_t out_rows = reach / layer_.stride[0] + 1;
    Arena arena(memory);
    taps_ = arena.allocate<Tap<T>>(std::max(layer_.I, layer_.J) * layer_.R * layer_.S);
    columns_ = arena.allocate<KernelColumn>(layer_.S);
    unread_ = arena.allocate<int64_t>(layer_.W);
    shared_ = arena.used();
    const auto ring = [&](bool needed, int64_t channels, int64_t rows, int64_t left, int64_t right) {
      const int64_t columns = needed ? left + right : 0;
      int64_t height = 1;
      while (height < rows) height *= 2;
      return Ring<T>{arena.allocate<Vector>(channels * height * columns), height, columns, left};
    };
    x_ = ring(true, layer_.I, reach + 1, in_left, std::max(layer_.W, in_right));
    centered_ = x_;
    if (layer_.mean.data)
      centered_ = ring(rule_.reads_data(), layer_.I, reach + 1, in_left, std::max(layer_.W, in_right));
    dy_ = ring(true, layer_.J, out_rows, out_left, std::max(layer_.Q, out_right));
    y_ = ring(rule_.null != 0, layer_.J, out_rows, out_left, std::max(layer_.Q, out_right));
    weight_ = arena.allocate<Vector>(weights_);
    feedback_ = arena.allocate<Vector>(weights_);
    combined_ = arena.allocate<Vector>(weights_);
    sums_ = arena.allocate<Vector>(2 * weights_ + layer_.J);
    row_ = arena.allocate<Vector>(std::max(layer_.W, layer_.Q));
    step_ = (arena.used() - shared_) / static_cast<int64_t>(sizeof(Vector));
  }

  int64_t bytes() const { return shared_ + blocks_ * step_ * static_cast<int64_t>(sizeof(Vector)); }

  // Adds to the sums of each block: [weight, data][J, I, R, S, lanes], then [J, lanes] of the bias.
  void run(int64_t first, int64_t last, double* sums) {
    load_weights();
    find_unread_columns();
    for (int64_t n = first; n < last; ++n) {
      run_sample(n, n < layer_.samples && rule_.reads_data());
      const int64_t size = (2 * weights_ + layer_.J) * kLanes;
      for (int64_t b = 0; b < blocks_; ++b) {
        T* sum = reinterpret_cast<T*>(sums_ + b * step_);
        for (int64_t i = 0; i < size; ++i) sums[b * size + i] += sum[i];
        std::fill_n(sum, size, T(0));
      }
    }
  }

 private:
  void load_weights() {
    std::memset(static_cast<void*>(x_.data), 0, blocks_ * step_ * sizeof(Vector));
    for (int64_t b = 0; b < blocks_; ++b) {
      for (int64_t l = 0; l < lanes(b); ++l) {
        const int64_t first = (group(b) + l) * weights_;
        for (int64_t k = 0; k < weights_; ++k) {
          const T weight = to_acc(static_cast<const Scalar*>(layer_.weight)[first + k]);
          const T feedback = to_acc(static_cast<const Scalar*>(layer_.feedback)[first + k]);
          lane(weight_ + b * step_ + k, l) = weight;
          lane(feedback_ + b * step_ + k, l) = feedback;
          lane(combined_ + b * step_ + k, l) = rule_.combined(feedback, weight);
        }
      }
    }
    KernelColumn* next = columns_;
    for (int64_t first = 0; first < layer_.stride[1]; ++first) {
      for (int64_t s = 0; s < layer_.S; ++s) {
        const int64_t column = first + layer_.padding[1] - layer_.dilation[1] * s;
        if (column % layer_.stride[1] == 0) *next++ = {first, s, column / layer_.stride[1]};
      }
    }
  }

  // Columns of the input that no window reads. Their values must not meet the zeros around the response, which would
  // turn an infinity into a nan.
  void find_unread_columns() {
    for (int64_t w = 0; w < layer_.W; ++w) {
      bool is_read = false;
      for (int64_t s = 0; s < layer_.S && !is_read; ++s) {
        const int64_t column = w + layer_.padding[1] - layer_.dilation[1] * s;
        is_read = column >= 0 && column % layer_.stride[1] == 0 && column / layer_.stride[1] < layer_.Q;
      }
      if (!is_read) unread_[unread_count_++] = w;
    }
  }

  // An input row is complete as soon as the last output row that reads it is loaded.
  void run_sample(int64_t n, bool learns) {
    int64_t loaded = 0, complete = 0;
    for (int64_t p = 0; p < layer_.P; ++p) {
      const int64_t top = layer_.stride[0] * p - layer_.padding[0], bottom = top + layer_.dilation[0] * (layer_.R - 1);
      for (loaded = std::max(loaded, top); loaded < layer_.H && loaded <= bottom; ++loaded)
        load_input(n, loaded, learns);
      load_output(n, p);
      output_row(p, learns);
      for (; complete < layer_.H && (complete < top + layer_.stride[0] || p + 1 == layer_.P); ++complete) {
        input_row(n, complete, learns);
      }
    }
  }

  void load_input(int64_t n, int64_t h, bool learns) {
    for (int64_t i = 0; i < layer_.I; ++i) {
      for (int64_t b = 0; b < blocks_; ++b) {
        Vector* x = x_.row(i, h) + b * step_;
        load_row<Scalar>(row<const Scalar>(layer_.input, n, b, i, layer_.I, h), x, layer_.W, lanes(b));
        if (!learns) continue;
        Vector* centered = centered_.row(i, h) + b * step_;
        if (layer_.mean.data) {
          load_row<T>(row<const T>(layer_.mean, 0, b, i, layer_.I, h), centered, layer_.W, lanes(b));
          for (int64_t w = 0; w < layer_.W; ++w) centered[w] = x[w] - centered[w];
        }
        for (int64_t k = 0; k < unread_count_; ++k) centered[unread_[k]] = Vector{};
      }
    }
  }

  void load_output(int64_t n, int64_t p) {
    for (int64_t j = 0; j < layer_.J; ++j) {
      for (int64_t b = 0; b < blocks_; ++b) {
        Vector* dy = dy_.row(j, p) + b * step_;
        load_row<Scalar>(row<const Scalar>(layer_.grad_output, n, b, j, layer_.J, p), dy, layer_.Q, lanes(b));
        if (!layer_.grad_bias) continue;
        Vector sum = dy[0];
        for (int64_t q = 1; q < layer_.Q; ++q) sum += dy[q];
        sums_[b * step_ + 2 * weights_ + j] += sum;
      }
    }
  }

  // The terms that read the input under the window: grad_weight, the response and the combined term.
  void output_row(int64_t p, bool learns) {
    const int64_t step = layer_.stride[1], length = layer_.Q;
    for (int64_t j = 0; j < layer_.J; ++j) {
      if (layer_.grad_weight || rule_.tie != 0) {
        const Taps<T> taps = window_taps(x_, p, j, weight_, sums_);
        const Vector* dy = dy_.row(j, p);
        for_each_block([&](int64_t at) { wgrad(taps, at, step, dy + at, 1, length); });
      }
      if (learns && rule_.null != 0) {
        const Taps<T> taps = window_taps(centered_, p, j, weight_, sums_);
        Vector* y = y_.row(j, p);
        for_each_block([&](int64_t at) { convolve(taps, at, step, y + at, 1, length); });
      }
      if (learns && rule_.has_combined()) {
        const Taps<T> taps = window_taps(centered_, p, j, combined_, sums_ + weights_);
        for_each_block([&](int64_t at) {
          convolve(taps, at, step, row_, 1, length);
          wgrad(taps, at, step, row_, 1, length);
        });
      }
    }
  }

  // The terms that map the output back to the input: grad_input and z = convT(y, B).
  void input_row(int64_t n, int64_t h, bool learns) {
    const bool has_null = learns && rule_.null != 0;
    const T null = rule_.null, amp = rule_.amp_of_null();
    for (int64_t i = 0; i < layer_.I; ++i) {
      if (layer_.grad_input.data) {
        for_each_phase([&](int64_t first, int64_t step, int64_t length, int64_t begin, int64_t end) {
          const Taps<T> taps = adjoint_taps(dy_, h, i, begin, end);
          for_each_block([&](int64_t at) { convolve(taps, at, 1, row_ + at + first, step, length); });
        });
        for (int64_t b = 0; b < blocks_; ++b) {
          store_row<Scalar>(row_ + b * step_, row<Scalar>(layer_.grad_input, n, b, i, layer_.I, h), layer_.W, lanes(b));
        }
      }
      if (!has_null) continue;
      const Vector* x = centered_.row(i, h);
      for_each_phase([&](int64_t first, int64_t step, int64_t length, int64_t begin, int64_t end) {
        const Taps<T> taps = adjoint_taps(y_, h, i, begin, end);
        if (taps.count == 0) return;
        for_each_block([&](int64_t at) {
          convolve(taps, at, 1, row_ + first, step, length);
          for (int64_t w = first; w < layer_.W; w += step) row_[w] = null * row_[w] - amp * x[at + w];
          wgrad(taps, at, 1, row_ + first, step, length);
        });
      });
    }
  }

  // visit(shift) for every block, with the number of vectors between the first block and this one.
  template <typename Visitor>
  void for_each_block(const Visitor& visit) const {
    for (int64_t b = 0; b < blocks_; ++b) visit(b * step_);
  }

  // visit(first, step, length, begin, end) for the input columns first, first + step, ..., to which
  // columns_[begin .. end - 1] apply.
  template <typename Visitor>
  void for_each_phase(const Visitor& visit) const {
    const int64_t step = layer_.stride[1];
    int64_t begin = 0;
    for (int64_t first = 0; first < std::min(step, layer_.W); ++first) {
      int64_t end = begin;
      while (end < layer_.S && columns_[end].first == first) ++end;
      visit(first, step, (layer_.W - first + step - 1) / step, begin, end);
      begin = end;
    }
  }

  // The taps of output channel j at output row p, over the input.
  Taps<T> window_taps(const Ring<T>& ring, int64_t p, int64_t j, const Vector* weight, Vector* sum) const {
    const int64_t R = layer_.R, S = layer_.S, H = layer_.H, down = layer_.dilation[0], right = layer_.dilation[1];
    const int64_t top = layer_.stride[0] * p - layer_.padding[0];
    Tap<T>* tap = taps_;
    int64_t k = j * layer_.I * R * S;
    for (int64_t i = 0; i < layer_.I; ++i) {
      for (int64_t r = 0; r < R; ++r, k += S) {
        const int64_t h = top + down * r;
        if (h < 0 || h >= H) continue;
        const Vector* in = ring.row(i, h) - layer_.padding[1];
        for (int64_t s = 0; s < S; ++s) *tap++ = {in + right * s, weight + k + s, sum + k + s};
      }
    }
    return {taps_, tap - taps_};
  }

  // The taps that map the output to row h of input channel i, for columns_[begin .. end - 1].
  Taps<T> adjoint_taps(const Ring<T>& ring, int64_t h, int64_t i, int64_t begin, int64_t end) const {
    const int64_t step = layer_.stride[0];
    Tap<T>* tap = taps_;
    for (int64_t r = 0; r < layer_.R; ++r) {
      const int64_t above = h + layer_.padding[0] - layer_.dilation[0] * r, p = step == 1 ? above : above / step;
      if (above < 0 || p >= layer_.P || p * step != above) continue;
      for (int64_t j = 0; j < layer_.J; ++j) {
        const int64_t k = ((j * layer_.I + i) * layer_.R + r) * layer_.S;
        const Vector* in = ring.row(j, p);
        for (const KernelColumn* column = columns_ + begin; column < columns_ + end; ++column) {
          *tap++ = {in + column->column, feedback_ + k + column->s, sums_ + weights_ + k + column->s};
        }
      }
    }
    return {taps_, tap - taps_};
  }

  int64_t group(int64_t b) const { return (block_ + b) * kLanes; }
  int64_t lanes(int64_t b) const { return std::min<int64_t>(kLanes, layer_.G - group(b)); }

  // Row `row` of channel `member` of each group. A group has `members` channels.
  template <typename Item>
  Row<Item> row(const FeatureMap& map, int64_t n, int64_t b, int64_t member, int64_t members, int64_t row) const {
    const int64_t channel = group(b) * members + member;
    Item* data = static_cast<Item*>(map.data) + n * map.sample + channel * map.channel + row * map.row;
    return {data, members * map.channel, map.column};
  }

  static T& lane(Vector* vector, int64_t l) { return reinterpret_cast<T*>(vector)[l]; }

  const DepthwiseLayer& layer_;
  const DepthwiseRule<T> rule_;
  const int64_t block_, blocks_, weights_;
  // Of the first block. Those of each further block are step_ vectors further.
  Ring<T> x_, centered_, dy_, y_;
  Vector *weight_, *feedback_, *combined_, *sums_, *row_;
  int64_t step_;
  // Shared by all blocks.
  Tap<T>* taps_;
  KernelColumn* columns_;  // sorted by `first`
  int64_t* unread_;        // the columns of the input that no window reads
  int64_t unread_count_ = 0;
  int64_t shared_;  // bytes of both
};

int64_t depthwise_bytes(const DepthwiseLayer& layer, int64_t blocks) {
  return visit_dtype(layer.dtype,
                     [&](auto scalar) { return DepthwiseStrip<decltype(scalar)>(layer, 0, blocks, nullptr).bytes(); });
}

void depthwise(const DepthwiseLayer& layer, const DepthwiseWork& work, void* memory, double* sums) {
  visit_dtype(layer.dtype, [&](auto scalar) {
    DepthwiseStrip<decltype(scalar)>(layer, work.block, work.blocks, memory).run(work.first, work.last, sums);
  });
}

// The gradients of the weights of one block, from the sums of its chunks, which are `step` apart.
template <typename Scalar>
void finish(const DepthwiseLayer& layer, int64_t block, const double* sums, int64_t chunks, int64_t step) {
  constexpr int64_t kLanes = kLanesOf<AccType<Scalar>>;
  const auto rule = make_rule<double>(layer);
  const int64_t weights = layer.J * layer.I * layer.R * layer.S, group = block * kLanes;
  const auto sum = [&](int64_t index) {
    double total = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) total += sums[chunk * step + index];
    return total;
  };
  const auto set = [](void* to, int64_t index, double value) {
    if (to) from_acc(static_cast<AccType<Scalar>>(value), static_cast<Scalar*>(to)[index]);
  };
  for (int64_t l = 0; l < std::min(kLanes, layer.G - group); ++l) {
    for (int64_t k = 0; k < weights; ++k) {
      const int64_t index = (group + l) * weights + k;
      const double grad_weight = sum(k * kLanes + l), data = sum((weights + k) * kLanes + l);
      const double weight = to_acc(static_cast<const Scalar*>(layer.weight)[index]);
      const double feedback = to_acc(static_cast<const Scalar*>(layer.feedback)[index]);
      const double samples = static_cast<double>(layer.samples);
      set(layer.grad_weight, index, grad_weight);
      set(layer.grad_feedback, index, rule.gradient(data, samples, feedback, weight, grad_weight));
    }
    for (int64_t j = 0; j < layer.J; ++j) {
      set(layer.grad_bias, (group + l) * layer.J + j, sum((2 * weights + j) * kLanes + l));
    }
  }
}

void depthwise_finish(const DepthwiseLayer& layer, int64_t block, const double* sums, int64_t chunks, int64_t step) {
  visit_dtype(layer.dtype, [&](auto scalar) { finish<decltype(scalar)>(layer, block, sums, chunks, step); });
}

}  // namespace
}  // namespace pyfeedback::cpu
