// Rows of a feature map in the form that the depthwise kernels use: at every column a vector of adjacent groups. In an
// unnamed namespace, see scalar.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "scalar.h"

namespace pyfeedback::cpu {
namespace {

template <typename T>
constexpr int kLanesOf = 32 / static_cast<int>(sizeof(T));

template <typename T>
struct LanesOf {
  typedef T type __attribute__((vector_size(32)));
};

template <typename T>
using LanesVector = typename LanesOf<T>::type;

// One row in memory: lane l of column w is at data[l * lane + w * column].
template <typename Scalar>
struct Row {
  Scalar* data;
  int64_t lane, column;
};

// Exchanges rows and columns of a square of vectors.
template <typename T>
void transpose(LanesVector<T> (&square)[kLanesOf<T>]) {
  constexpr int kLanes = kLanesOf<T>;
  alignas(32) T transposed[kLanes][kLanes];
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < kLanes; ++j) transposed[j][i] = square[i][j];
  }
  for (int i = 0; i < kLanes; ++i) square[i] = *reinterpret_cast<const LanesVector<T>*>(transposed[i]);
}

template <typename Scalar>
inline void load_lanes(const Scalar* from, LanesVector<AccType<Scalar>>* to) {
  if constexpr (kIsAccType<Scalar>) {
    std::memcpy(to, from, sizeof(*to));
  } else {
    to_acc(from, reinterpret_cast<float*>(to), kLanesOf<float>);
  }
}

template <typename Scalar>
inline void store_lanes(const LanesVector<AccType<Scalar>>* from, Scalar* to) {
  if constexpr (kIsAccType<Scalar>) {
    std::memcpy(to, from, sizeof(*from));
  } else {
    from_acc(reinterpret_cast<const float*>(from), to, kLanesOf<float>);
  }
}

// Loads the first `lanes` lanes of `columns` columns and leaves the other lanes of `to` as they are.
template <typename Scalar>
void load_row(const Row<const Scalar>& from, LanesVector<AccType<Scalar>>* to, int64_t columns, int64_t lanes) {
  using T = AccType<Scalar>;
  constexpr int kLanes = kLanesOf<T>;
  T* values = reinterpret_cast<T*>(to);
  int64_t w = 0;
  if (lanes == kLanes && from.lane == 1) {
    for (; w < columns; ++w) {
      __builtin_prefetch(from.data + (columns + w) * from.column);
      load_lanes(from.data + w * from.column, to + w);
    }
  } else if (lanes == kLanes && from.column == 1) {
    for (; w + kLanes <= columns; w += kLanes) {
      LanesVector<T> square[kLanes];
      for (int l = 0; l < kLanes; ++l) load_lanes(from.data + l * from.lane + w, square + l);
      transpose<T>(square);
      for (int l = 0; l < kLanes; ++l) to[w + l] = square[l];
    }
  }
  for (; w < columns; ++w) {
    for (int64_t l = 0; l < lanes; ++l) values[w * kLanes + l] = to_acc(from.data[l * from.lane + w * from.column]);
  }
}

template <typename Scalar>
void store_row(const LanesVector<AccType<Scalar>>* from, const Row<Scalar>& to, int64_t columns, int64_t lanes) {
  using T = AccType<Scalar>;
  constexpr int kLanes = kLanesOf<T>;
  const T* values = reinterpret_cast<const T*>(from);
  int64_t w = 0;
  if (lanes == kLanes && to.lane == 1) {
    for (; w < columns; ++w) {
      __builtin_prefetch(to.data + (columns + w) * to.column, 1);
      store_lanes(from + w, to.data + w * to.column);
    }
  } else if (lanes == kLanes && to.column == 1) {
    for (; w + kLanes <= columns; w += kLanes) {
      LanesVector<T> square[kLanes];
      for (int l = 0; l < kLanes; ++l) square[l] = from[w + l];
      transpose<T>(square);
      for (int l = 0; l < kLanes; ++l) store_lanes(square + l, to.data + l * to.lane + w);
    }
  }
  for (; w < columns; ++w) {
    for (int64_t l = 0; l < lanes; ++l) from_acc(values[w * kLanes + l], to.data[l * to.lane + w * to.column]);
  }
}

// The latest rows of a feature map, each between margins of zeros. The height is a power of two and at least the number
// of rows that a window covers.
template <typename T>
struct Ring {
  LanesVector<T>* data;
  int64_t height, width, left;

  LanesVector<T>* row(int64_t channel, int64_t row) const {
    return data + ((channel * height + (row & (height - 1))) * width + left);
  }
};

// One weight of a window: the row it is multiplied with and the sum of its gradient. The pointers are those of the
// first block of a strip; those of another block are `shift` vectors further.
template <typename T>
struct Tap {
  const LanesVector<T>* in;
  const LanesVector<T>* weight;
  LanesVector<T>* sum;
};

template <typename T>
struct Taps {
  Tap<T>* tap;
  int64_t count;
};

template <typename T, int kColumns>
inline void convolve_columns(const Taps<T>& taps, int64_t shift, int64_t step, int64_t first, LanesVector<T>* out,
                             int64_t out_step) {
  LanesVector<T> sum[kColumns] = {};
  for (int64_t k = 0; k < taps.count; ++k) {
    const LanesVector<T> weight = taps.tap[k].weight[shift];
    const LanesVector<T>* in = taps.tap[k].in + shift + first * step;
    for (int c = 0; c < kColumns; ++c) sum[c] += weight * in[c * step];
  }
  for (int c = 0; c < kColumns; ++c) out[(first + c) * out_step] = sum[c];
}

// out[t * out_step] = sum over the taps of weight * in[t * step], for t < length.
template <typename T>
void convolve(const Taps<T>& taps, int64_t shift, int64_t step, LanesVector<T>* out, int64_t out_step, int64_t length) {
  if (length < 4) {
    for (int64_t t = 0; t < length; ++t) convolve_columns<T, 1>(taps, shift, step, t, out, out_step);
    return;
  }
  int64_t t = 0;
  for (; t + 8 <= length; t += 8) convolve_columns<T, 8>(taps, shift, step, t, out, out_step);
  // The last columns are computed once more with those before them, which is faster than one by one.
  for (; t < length; t += 4) convolve_columns<T, 4>(taps, shift, step, std::min(t, length - 4), out, out_step);
}

template <typename T, int kTaps>
void wgrad_taps(const Tap<T>* tap, int64_t shift, int64_t step, const LanesVector<T>* u, int64_t u_step,
                int64_t length) {
  LanesVector<T> sum[kTaps];
  for (int k = 0; k < kTaps; ++k) sum[k] = tap[k].in[shift] * u[0];
  for (int64_t t = 1; t < length; ++t) {
    const LanesVector<T> value = u[t * u_step];
    for (int k = 0; k < kTaps; ++k) sum[k] += tap[k].in[shift + t * step] * value;
  }
  for (int k = 0; k < kTaps; ++k) tap[k].sum[shift] += sum[k];
}

// sum += sum over t < length of in[t * step] * u[t * u_step], for every tap. `length` is at least 1. As many taps are
// computed at a time as registers can hold.
template <typename T>
void wgrad(const Taps<T>& taps, int64_t shift, int64_t step, const LanesVector<T>* u, int64_t u_step, int64_t length) {
  constexpr int64_t kMost = 9;
  constexpr decltype(&wgrad_taps<T, 1>) kWgrad[] = {wgrad_taps<T, 1>, wgrad_taps<T, 2>, wgrad_taps<T, 3>,
                                                    wgrad_taps<T, 4>, wgrad_taps<T, 5>, wgrad_taps<T, 6>,
                                                    wgrad_taps<T, 7>, wgrad_taps<T, 8>, wgrad_taps<T, 9>};
  int64_t done = 0;
  for (int64_t parts = (taps.count + kMost - 1) / kMost; parts > 0; --parts) {
    const int64_t taken = (taps.count - done) / parts;
    kWgrad[taken - 1](taps.tap + done, shift, step, u, u_step, length);
    done += taken;
  }
}

}  // namespace
}  // namespace pyfeedback::cpu
