// Rows of a map as the depthwise loops see them: a vector of neighbouring groups at every column. In an unnamed
// namespace, see scalar.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

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

// A square of vectors, rows and columns exchanged.
template <typename T>
void transpose(LanesVector<T> (&square)[kLanesOf<T>]) {
  constexpr int kLanes = kLanesOf<T>;
  alignas(32) T turned[kLanes][kLanes];
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < kLanes; ++j) turned[j][i] = square[i][j];
  }
  for (int i = 0; i < kLanes; ++i) square[i] = *reinterpret_cast<const LanesVector<T>*>(turned[i]);
}

template <typename Scalar>
inline void load_lanes(const Scalar* from, LanesVector<Wide<Scalar>>* to) {
  if constexpr (std::is_same_v<Scalar, Wide<Scalar>>) {
    std::memcpy(to, from, sizeof(*to));
  } else {
    widen_row(from, reinterpret_cast<float*>(to), kLanesOf<float>);
  }
}

template <typename Scalar>
inline void store_lanes(const LanesVector<Wide<Scalar>>* from, Scalar* to) {
  if constexpr (std::is_same_v<Scalar, Wide<Scalar>>) {
    std::memcpy(to, from, sizeof(*from));
  } else {
    narrow_row(reinterpret_cast<const float*>(from), to, kLanesOf<float>);
  }
}

// The first `lanes` lanes of `columns` columns; the other lanes of `to` are left as they are.
template <typename Scalar>
void load_row(const Row<const Scalar>& from, LanesVector<Wide<Scalar>>* to, int64_t columns, int64_t lanes) {
  using T = Wide<Scalar>;
  constexpr int kLanes = kLanesOf<T>;
  T* wide = reinterpret_cast<T*>(to);
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
    for (int64_t l = 0; l < lanes; ++l) wide[w * kLanes + l] = widen(from.data[l * from.lane + w * from.column]);
  }
}

template <typename Scalar>
void store_row(const LanesVector<Wide<Scalar>>* from, const Row<Scalar>& to, int64_t columns, int64_t lanes) {
  using T = Wide<Scalar>;
  constexpr int kLanes = kLanesOf<T>;
  const T* wide = reinterpret_cast<const T*>(from);
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
    for (int64_t l = 0; l < lanes; ++l) narrow(wide[w * kLanes + l], to.data[l * to.lane + w * to.column]);
  }
}

// The latest rows of one map, as many as a window can reach and a power of two, each between margins of zeros.
template <typename T>
struct Ring {
  LanesVector<T>* data;
  int64_t height, width, left;

  LanesVector<T>* row(int64_t channel, int64_t row) const {
    return data + ((channel * height + (row & (height - 1))) * width + left);
  }
};

// One weight of a window: what it is multiplied with along a row, and where its own gradient is summed up. The pointers
// are those of the first block of a strip; the others lie `shift` vectors further on.
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
inline void combine_columns(const Taps<T>& taps, int64_t shift, int64_t step, int64_t first, LanesVector<T>* out,
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
void combine(const Taps<T>& taps, int64_t shift, int64_t step, LanesVector<T>* out, int64_t out_step, int64_t length) {
  if (length < 4) {
    for (int64_t t = 0; t < length; ++t) combine_columns<T, 1>(taps, shift, step, t, out, out_step);
    return;
  }
  int64_t t = 0;
  for (; t + 8 <= length; t += 8) combine_columns<T, 8>(taps, shift, step, t, out, out_step);
  // The last columns again with those before them, rather than one by one.
  for (; t < length; t += 4) combine_columns<T, 4>(taps, shift, step, std::min(t, length - 4), out, out_step);
}

template <typename T, int kTaps>
void correlate_taps(const Tap<T>* tap, int64_t shift, int64_t step, const LanesVector<T>* u, int64_t u_step,
                    int64_t length) {
  LanesVector<T> sum[kTaps];
  for (int k = 0; k < kTaps; ++k) sum[k] = tap[k].in[shift] * u[0];
  for (int64_t t = 1; t < length; ++t) {
    const LanesVector<T> value = u[t * u_step];
    for (int k = 0; k < kTaps; ++k) sum[k] += tap[k].in[shift + t * step] * value;
  }
  for (int k = 0; k < kTaps; ++k) tap[k].sum[shift] += sum[k];
}

// Every tap's sum += the sum over t < length, at least one, of in[t * step] * u[t * u_step]; as many taps at a time as
// registers hold.
template <typename T>
void correlate(const Taps<T>& taps, int64_t shift, int64_t step, const LanesVector<T>* u, int64_t u_step,
               int64_t length) {
  constexpr int64_t kMost = 9;
  constexpr decltype(&correlate_taps<T, 1>) kLoops[] = {
      correlate_taps<T, 1>, correlate_taps<T, 2>, correlate_taps<T, 3>, correlate_taps<T, 4>, correlate_taps<T, 5>,
      correlate_taps<T, 6>, correlate_taps<T, 7>, correlate_taps<T, 8>, correlate_taps<T, 9>};
  int64_t done = 0;
  for (int64_t parts = (taps.count + kMost - 1) / kMost; parts > 0; --parts) {
    const int64_t taken = (taps.count - done) / parts;
    kLoops[taken - 1](taps.tap + done, shift, step, u, u_step, length);
    done += taken;
  }
}

}  // namespace
}  // namespace pyfeedback::cpu
