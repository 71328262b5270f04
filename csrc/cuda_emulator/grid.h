// Runs a CUDA grid on one CPU thread. Blocks run one after another. Each warp of a block runs until all its threads
// wait for other warps. Every thread is a fiber that runs until it waits. If the emulator detects behavior that CUDA
// leaves undefined, such as a barrier that some threads never reach, the launch ends with an error.
#pragma once

#include <functional>
#include <string>

namespace cuda_emulator {

struct Index {
  unsigned x = 1, y = 1, z = 1;
};

constexpr unsigned kWarp = 32;

// The order in which blocks, warps and the threads of a warp run. A kernel without races gives the same bits in every
// order.
enum class Order { kForward, kBackward, kShuffled };

// Runs `thread` once for every thread of the grid. Returns an error message, or "" on success.
std::string run_grid(Index grid, Index block, Order order, const std::function<void()>& thread);

// The lane of the running thread.
unsigned lane();

// Waits until all threads of the block that have not returned wait as well. Returns the number of them for which
// `predicate` is true.
int wait_for_block(bool predicate);

// Waits until all lanes of `mask`, which includes the caller, have called it with the same mask. Then replaces the
// `size` bytes of `value`, at most 16, by those of lane `source`.
void exchange(unsigned mask, unsigned source, void* value, unsigned size);

}  // namespace cuda_emulator
