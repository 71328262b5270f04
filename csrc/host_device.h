// Marks the functions that CPU and CUDA kernels share.
#pragma once

#ifdef __CUDACC__
#define PYFEEDBACK_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define PYFEEDBACK_HOST_DEVICE inline
#endif
