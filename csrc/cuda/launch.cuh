// Launches a kernel without the <<<...>>> syntax, so that a host compiler can read the sources: see csrc/cuda_emulator.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "launch.h"

namespace pyfeedback::cuda {

// kernel<<<blocks, threads, 0, stream>>>(arguments...)
template <typename... Parameters, typename... Arguments>
cudaError_t launch_threads(int threads, void (*kernel)(Parameters...), int64_t blocks, cudaStream_t stream,
                           const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3{static_cast<unsigned>(blocks), 1, 1};
  config.blockDim = dim3{static_cast<unsigned>(threads), 1, 1};
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// The same with kThreads threads in every block.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, cudaStream_t stream, const Arguments&... arguments) {
  return launch_threads(kThreads, kernel, blocks, stream, arguments...);
}

}  // namespace pyfeedback::cuda
