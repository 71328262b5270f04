// How native_center cuts the positions of a sample.
#pragma once

#include <algorithm>
#include <cstdint>

namespace pyfeedback::cpu {

constexpr int64_t kMinStretch = 64;    // a few cache lines in a row: less wastes the line fetched with each sample
constexpr int64_t kMaxStretch = 2048;  // three float64 rows of this many fit a second-level cache beside the samples
constexpr int64_t kStretchBytes = 512 * 1024;  // one stretch of all samples stays in a second-level cache

// Positions handled at a time, so that the second pass over the samples reads the cache and not memory.
inline int64_t stretch_width(int64_t samples, int64_t element_size) {
  const int64_t width = kStretchBytes / (samples * element_size);
  return std::clamp(width / kMinStretch * kMinStretch, kMinStretch, kMaxStretch);
}

}  // namespace pyfeedback::cpu
