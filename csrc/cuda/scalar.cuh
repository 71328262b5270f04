// Storage types on the device and their conversion to the acc type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../dtype.h"

namespace pyfeedback::cuda {

__device__ __forceinline__ double to_acc(double value) {
  return value;
}
__device__ __forceinline__ float to_acc(float value) {
  return value;
}
__device__ __forceinline__ float to_acc(__nv_bfloat16 value) {
  return __bfloat162float(value);
}
__device__ __forceinline__ float to_acc(__half value) {
  return __half2float(value);
}

__device__ __forceinline__ void from_acc(double value, double& result) {
  result = value;
}
__device__ __forceinline__ void from_acc(float value, float& result) {
  result = value;
}
__device__ __forceinline__ void from_acc(float value, __nv_bfloat16& result) {
  result = __float2bfloat16_rn(value);
}
__device__ __forceinline__ void from_acc(float value, __half& result) {
  result = __float2half_rn(value);
}

// visit(Scalar{}) for the storage type of `dtype`.
template <typename Visitor>
__host__ __device__ __forceinline__ auto visit_dtype(Dtype dtype, const Visitor& visit) {
  switch (dtype) {
    case Dtype::kFloat64:
      return visit(double{});
    case Dtype::kFloat32:
      return visit(float{});
    case Dtype::kBFloat16:
      return visit(__nv_bfloat16{});
    default:
      return visit(__half{});
  }
}

// The same for the storage types whose acc type is float.
template <typename Visitor>
__device__ __forceinline__ void visit_float_dtype(Dtype dtype, const Visitor& visit) {
  if (dtype == Dtype::kFloat32) return visit(float{});
  if (dtype == Dtype::kBFloat16) return visit(__nv_bfloat16{});
  return visit(__half{});
}

}  // namespace pyfeedback::cuda
