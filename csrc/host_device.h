// One spelling for functions that the CPU and the CUDA kernels share.
#pragma once

#ifdef __CUDACC__
#define PYFEEDBACK_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define PYFEEDBACK_HOST_DEVICE inline
#endif
