// Small kernels, correct and incorrect, that test csrc/cuda_emulator itself: see test_cuda_emulator.py.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace {

// Each thread adds its indices to its element.
__global__ void indices(int* out) {
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  out[block * (blockDim.x * blockDim.y * blockDim.z) + thread] += 1000 * block + thread;
}

template <bool kBarrier>
__global__ void reverse(int* out) {
  __shared__ int values[256];
  values[threadIdx.x] = out[threadIdx.x];
  if (kBarrier) __syncthreads();
  const int other = values[blockDim.x - 1 - threadIdx.x];
  out[threadIdx.x] = other;
}

// Sums of lanes 0..31 to its left and right, of its pairs, and of lane 5.
__global__ void shuffles(int* out) {
  const int own = out[threadIdx.x];
  int sum = own;
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
  int below = own;
  for (unsigned delta = 1; delta < 32; delta *= 2) {
    const int other = __shfl_up_sync(~0u, below, delta);
    if (threadIdx.x % 32 >= delta) below += other;
  }
  const int next = __shfl_down_sync(~0u, own, 1), fifth = __shfl_sync(~0u, own, 5);
  out[4 * threadIdx.x] = sum;
  out[4 * threadIdx.x + 1] = below;
  out[4 * threadIdx.x + 2] = next;
  out[4 * threadIdx.x + 3] = fifth;
}

// The sum of the values of the first lanes of all warps after a shuffle, which is not a barrier of the block.
template <bool kBarrier>
__global__ void sum_of_warps(int* out) {
  __shared__ int of_warp[8];
  const int value = __shfl_sync(~0u, out[threadIdx.x], 0);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  if (kBarrier) {
    __syncthreads();
  } else {
    __syncwarp();
  }
  if (threadIdx.x != 0 && threadIdx.x != 255) return;
  int sum = 0;
  for (int warp = 0; warp < 8; ++warp) sum += of_warp[warp];
  out[256 + threadIdx.x / 255] = sum;
}

// Even and odd lanes shuffle separately, each as often as its lanes require.
__global__ void halves(int* out) {
  const unsigned mask = threadIdx.x % 2 ? 0xaaaaaaaau : 0x55555555u;
  int sum = out[threadIdx.x];
  for (int lanes = 16; lanes > 1; lanes /= 2) {
    sum += __shfl_xor_sync(mask, sum, lanes);
    if (threadIdx.x % 2) __syncwarp(mask);
  }
  out[threadIdx.x] = sum;
}

// Each block sums its threads, and the last block to arrive sums the blocks: out[0] is the sum, out[1] counts blocks.
__global__ void last_block(int* out) {
  __shared__ int sum, ticket;
  if (threadIdx.x == 0) sum = 0;
  __syncthreads();
  atomicAdd(&sum, static_cast<int>(threadIdx.x));
  __syncthreads();
  if (threadIdx.x == 0) {
    out[2 + blockIdx.x] = sum;
    __threadfence();
    ticket = atomicAdd(&out[1], 1);
  }
  __syncthreads();
  if (ticket != static_cast<int>(gridDim.x) - 1) return;
  for (unsigned b = threadIdx.x; b < gridDim.x; b += blockDim.x) atomicAdd(&out[0], __ldcg(&out[2 + b]));
}

__global__ void votes(int* out) {
  const int count = __syncthreads_count(threadIdx.x % 3 == 0), any = __syncthreads_or(threadIdx.x == 99);
  out[threadIdx.x] = 2 * count + any;
}

__global__ void atomics(int* out) {
  atomicMax(&out[0], static_cast<int>(threadIdx.x));
  if (atomicCAS(&out[1], 0, static_cast<int>(threadIdx.x) + 1) == 0) atomicAdd(&out[2], 1);
  out[3 + threadIdx.x] = atomicExch(&out[3 + blockDim.x], static_cast<int>(threadIdx.x));
}

// A barrier does not wait for threads that have returned.
__global__ void early_return(int* out) {
  if (threadIdx.x >= 40) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void divergent_warps(int*) {
  if (threadIdx.x < 8) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

__global__ void absent_lane(int* out) {
  if (threadIdx.x < 16) out[0] = __shfl_xor_sync(0xffffu, 1, 16);
}

__global__ void outside_its_mask(int*) {
  __syncwarp(1u);
}

__global__ void to_bfloat16(int* out) {
  float& value = reinterpret_cast<float*>(out)[threadIdx.x];
  value = __bfloat162float(__float2bfloat16_rn(value));
}

__global__ void to_float16(int* out) {
  float& value = reinterpret_cast<float*>(out)[threadIdx.x];
  value = __half2float(__float2half_rn(value));
}

struct alignas(16) Wide {
  int value[4];
};

__global__ void wide_load(int* out) {
  out[0] = reinterpret_cast<const Wide*>(out + 1)->value[0];
}

constexpr decltype(&indices) kKernels[] = {
    indices,     reverse<true>,    reverse<false>, shuffles,   sum_of_warps<true>, sum_of_warps<false>,
    halves,      last_block,       votes,          atomics,    early_return,       divergent_warps,
    absent_lane, outside_its_mask, to_bfloat16,    to_float16, wide_load,
};

}  // namespace

extern "C" const char* run(int kernel, cuda_emulator::Index grid, cuda_emulator::Index block,
                           cuda_emulator::Order order, int* out) {
  cuda_emulator::order = order;
  cuda_emulator::last_error.clear();
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  cudaLaunchKernelEx(&config, kKernels[kernel], out);
  return cuda_emulator::last_error.c_str();
}
