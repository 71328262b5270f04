// The parts of the float16 header of the CUDA toolkit that the kernels use: see cuda_runtime.h.
#pragma once

using __half = _Float16;

inline float __half2float(__half value) {
  return value;
}
inline __half __float2half_rn(float value) {
  return static_cast<__half>(value);
}
