// Counter-based normal draws (Philox4x32-10 and Box-Muller), the same on CPU and CUDA up to the last bit of logf,
// sinf and cosf. A draw depends only on (seed, tensor, element), not on threads, chunks or memory layout.
// Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace pyfeedback {

struct Philox {
  uint32_t word[4];
};

PYFEEDBACK_HOST_DEVICE Philox philox4x32_10(Philox counter, uint64_t key) {
  uint32_t key0 = static_cast<uint32_t>(key);
  uint32_t key1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * counter.word[0];
    const uint64_t product1 = uint64_t{0xCD9E8D57u} * counter.word[2];
    counter = {{static_cast<uint32_t>(product1 >> 32) ^ counter.word[1] ^ key0, static_cast<uint32_t>(product1),
                static_cast<uint32_t>(product0 >> 32) ^ counter.word[3] ^ key1, static_cast<uint32_t>(product0)}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

struct Normals {
  float value[4];
};

// The draws of elements 4 * group .. 4 * group + 3 of one tensor, elements counted in row-major order.
PYFEEDBACK_HOST_DEVICE Normals normals(uint64_t seed, uint32_t tensor, uint64_t group) {
  const Philox bits =
      philox4x32_10({{static_cast<uint32_t>(group), static_cast<uint32_t>(group >> 32), tensor, 0}}, seed);
  constexpr float kUnit = 2.3283064e-10f;  // 2^-32
  constexpr float kAngle = 1.4629181e-9f;  // 2 pi 2^-32
  Normals result;
  for (int pair = 0; pair < 4; pair += 2) {
    // At least half a step above zero, because log(0) is not finite.
    const float uniform = static_cast<float>(bits.word[pair]) * kUnit + 0.5f * kUnit;
    const float radius = sqrtf(-2.0f * logf(uniform));
    const float angle = static_cast<float>(bits.word[pair + 1]) * kAngle;
    result.value[pair] = radius * cosf(angle);
    result.value[pair + 1] = radius * sinf(angle);
  }
  return result;
}

}  // namespace pyfeedback
