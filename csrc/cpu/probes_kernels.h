// The kernel of extension_probe_gradients over some outputs. In an unnamed namespace, see scalar.h.
//
// A product with the probes is a transform by their whole basis, of which only the elements of the probes are kept:
// about n log n additions for each output instead of n M multiply-adds. The transform stops at the lanes of a vector,
// the lowest bits of Sylvester's factor: lanes are summed with their signs for each probe.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../probes.h"
#include "depthwise_rows.h"

namespace pyfeedback::cpu {
namespace {

// The transform by the higher bits of Sylvester's matrix of order `block`, of each block of the values.
template <typename T>
void transform_sylvester(T* values, int64_t size, int64_t block) {
  constexpr int64_t kLanes = kLanesOf<T>;
  int64_t half = kLanes;
  int bits = 0;
  while (half << bits < block) ++bits;
  if (bits % 2) {
    for (int64_t i = 0; i < size; i += 2 * half) {
      LanesVector<T> a, b;
      load_lanes(values + i, &a), load_lanes(values + i + half, &b);
      const LanesVector<T> sum = a + b, difference = a - b;
      store_lanes(&sum, values + i), store_lanes(&difference, values + i + half);
    }
    half *= 2;
  }
  for (; half < block; half *= 4) {
    for (int64_t i = 0; i < size; i += 4 * half) {
      for (T* at = values + i; at < values + i + half; at += kLanes) {
        LanesVector<T> a, b, c, d;  // not an array, which compilers keep in memory
        load_lanes(at, &a), load_lanes(at + half, &b);
        load_lanes(at + 2 * half, &c), load_lanes(at + 3 * half, &d);
        const LanesVector<T> sum = a + b, difference = a - b, upper_sum = c + d, upper_difference = c - d;
        a = sum + upper_sum, b = difference + upper_difference;
        c = sum - upper_sum, d = difference - upper_difference;
        store_lanes(&a, at), store_lanes(&b, at + half);
        store_lanes(&c, at + 2 * half), store_lanes(&d, at + 3 * half);
      }
    }
  }
}

// to[i] = sum of matrix[i, j] from[j] over blocks j.
template <typename T>
void transform_blocks(const T* matrix, int64_t order, const T* from, T* to, int64_t block) {
  constexpr int64_t kRows = 4, kVectors = 2, kLanes = kLanesOf<T>;
  for (int64_t at = 0; at < block; at += kVectors * kLanes) {
    for (int64_t i = 0; i < order; i += kRows) {
      LanesVector<T> sums[kRows][kVectors] = {};
      for (int64_t j = 0; j < order; ++j) {
        LanesVector<T> values[kVectors];
        for (int64_t v = 0; v < kVectors; ++v) load_lanes(from + j * block + at + v * kLanes, values + v);
        for (int64_t k = 0; k < kRows; ++k) {
          const T sign = matrix[(i + k) * order + j];
          for (int64_t v = 0; v < kVectors; ++v) sums[k][v] += sign * values[v];
        }
      }
      for (int64_t k = 0; k < kRows; ++k) {
        for (int64_t v = 0; v < kVectors; ++v) store_lanes(sums[k] + v, to + (i + k) * block + at + v * kLanes);
      }
    }
  }
}

// out = b * feedback - w * weight, exact for b == w when feedback is close to weight. An operand without factor is not
// read.
template <typename T>
void blend(T b, const T* __restrict feedback, T w, const T* __restrict weight, T* __restrict out, int64_t count) {
  if (b == 0) {
    for (int64_t e = 0; e < count; ++e) out[e] = w == 0 ? T(0) : -w * weight[e];
  } else if (w == 0) {
    for (int64_t e = 0; e < count; ++e) out[e] = b * feedback[e];
  } else if (b == w) {
    for (int64_t e = 0; e < count; ++e) out[e] = b * (feedback[e] - weight[e]);
  } else {
    for (int64_t e = 0; e < count; ++e) out[e] = b * feedback[e] - w * weight[e];
  }
}

template <typename T>
void multiply(const T* __restrict signs, T* __restrict values, int64_t count) {
  for (int64_t e = 0; e < count; ++e) values[e] *= signs[e];
}

template <typename T>
void add_product(T scale, const T* __restrict signs, const T* __restrict values, T* __restrict out, int64_t count) {
  for (int64_t e = 0; e < count; ++e) out[e] += scale * signs[e] * values[e];
}

template <typename T>
inline T sum_lanes(const LanesVector<T>& values) {
  typedef T Half __attribute__((vector_size(16)));
  Half halves[2];
  std::memcpy(halves, &values, sizeof(values));
  const Half sum = halves[0] + halves[1];
  if constexpr (sizeof(T) == 8) {
    return sum[0] + sum[1];
  } else {
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
  }
}

// Sylvester's matrix for the lanes of a vector.
template <typename T>
struct LaneSigns {
  static constexpr int64_t kLanes = kLanesOf<T>;
  LanesVector<T> row[kLanes];

  LaneSigns() {
    for (int i = 0; i < kLanes; ++i) {
      for (int j = 0; j < kLanes; ++j) row[i][j] = __builtin_popcount(i & j) % 2 ? T(-1) : T(1);
    }
  }

  // The elements of the probes, from values that are transformed up to the lanes.
  void take(const T* values, const int64_t* rows, int64_t probes, T* response) const {
    for (int64_t i = 0; i < probes; ++i) {
      const int64_t lane = rows[i] & (kLanes - 1);
      LanesVector<T> lanes;
      load_lanes(values + rows[i] - lane, &lanes);
      lanes *= row[lane];
      response[i] = sum_lanes<T>(lanes);
    }
  }

  // The transpose of `take`.
  void add(const T* response, const int64_t* rows, int64_t probes, T* values) const {
    for (int64_t i = 0; i < probes; ++i) {
      const int64_t lane = rows[i] & (kLanes - 1);
      LanesVector<T> lanes;
      load_lanes(values + rows[i] - lane, &lanes);
      lanes += response[i] * row[lane];
      store_lanes(&lanes, values + rows[i] - lane);
    }
  }
};

template <typename T>
void probe_gradients_of(const ProbeOperands& p, int64_t begin, int64_t end, T* memory) {
  const LaneSigns<T> lane_signs;
  const T *signs = static_cast<const T*>(p.signs), *paley = static_cast<const T*>(p.paley);
  const T decay = static_cast<T>(p.decay), self = static_cast<T>(p.self), scale = static_cast<T>(p.scale);
  const T of_feedback = static_cast<T>(p.of_feedback), of_weight = static_cast<T>(p.of_weight);
  const int64_t block = p.size / p.order;
  T *values = memory, *other = memory + p.size;
  T *const transposed = memory + 2 * p.size, *const own = transposed + p.order * p.order;
  for (int64_t i = 0; i < p.order; ++i) {
    for (int64_t j = 0; j < p.order; ++j) transposed[j * p.order + i] = paley[i * p.order + j];
  }
  for (int64_t row = begin; row < end; ++row) {
    const T* weight = static_cast<const T*>(p.weight) + row * p.inputs;
    const T* feedback = static_cast<const T*>(p.feedback) + row * p.inputs;
    T* response = p.response ? static_cast<T*>(p.response) + row * p.probes : own;
    blend(of_feedback, feedback, of_weight, weight, values, p.inputs);
    multiply(signs, values, p.inputs);
    std::fill(values + p.inputs, values + p.size, T(0));
    if (p.order > 1) {
      transform_blocks(paley, p.order, values, other, block);
      std::swap(values, other);
    }
    transform_sylvester(values, p.size, block);
    lane_signs.take(values, p.rows, p.probes, response);
    std::fill(values, values + p.size, T(0));
    lane_signs.add(response, p.rows, p.probes, values);
    transform_sylvester(values, p.size, block);
    if (p.order > 1) {
      transform_blocks(transposed, p.order, values, other, block);
      std::swap(values, other);
    }
    T* gradient = static_cast<T*>(p.gradient) + row * p.inputs;
    blend(decay, feedback, self, weight, gradient, p.inputs);
    add_product(scale, signs, values, gradient, p.inputs);
  }
}

void probe_gradients(const ProbeOperands& operands, int64_t begin, int64_t end, void* memory) {
  if (operands.dtype == Dtype::kFloat64) {
    probe_gradients_of(operands, begin, end, static_cast<double*>(memory));
  } else {
    probe_gradients_of(operands, begin, end, static_cast<float*>(memory));
  }
}

}  // namespace
}  // namespace pyfeedback::cpu
