// Runs a CUDA grid on one CPU thread: blocks one after another, the warps of a block one after another as far as they
// get without the others, every thread a fiber that runs until it waits. What a GPU would leave undefined and a fiber
// can see, such as a barrier that some threads never reach, ends the launch with an error.
#pragma once

#include <functional>
#include <string>

namespace simt {

struct Index {
  unsigned x = 1, y = 1, z = 1;
};

constexpr unsigned kWarp = 32;

// The order in which blocks, warps and the threads of a warp take their turn. A kernel without races gives the same
// bits under all of them.
enum class Order { kForward, kBackward, kShuffled };

// Runs `thread` once for every thread of the grid; returns what went wrong, "" if nothing did.
std::string run_grid(Index grid, Index block, Order order, const std::function<void()>& thread);

// Of the thread that is running.
unsigned lane();

// Until every thread of the block that has not returned waits too; the number of them for which `predicate` holds.
int wait_for_block(bool predicate);

// Until the lanes of `mask`, the caller among them, call it with the same mask; then the `size` bytes of `value`, at
// most 16, are those that lane `source` came with.
void exchange(unsigned mask, unsigned source, void* value, unsigned size);

}  // namespace simt
