// The scheduler of the emulator: fibers, barriers and exchanges between lanes.
#include "grid.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <random>
#include <setjmp.h>
#include <ucontext.h>
#include <vector>

#include "cuda_runtime.h"

thread_local cuda_emulator::Index threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_emulator {

namespace {

constexpr size_t kStackBytes = 64 * 1024;
constexpr unsigned kMaxBytes = 16;  // of a value that lanes exchange

enum class State { kReady, kWaitsForBlock, kWaitsForLanes, kReturned };

// A fiber that runs one thread of each block. It is entered through its context once. After that, it is left and
// entered by jumps, which make no system call, unlike swapcontext.
struct Thread {
  std::vector<char> stack = std::vector<char>(kStackBytes);
  bool entered = false;
  ucontext_t context;
  jmp_buf jump;
  Index index;
  State state;
  bool predicate;         // passed to a barrier of the block
  unsigned mask, source;  // the lanes it waits for, and the one whose value it receives
  char value[kMaxBytes];  // passed to an exchange
  char received[kMaxBytes];
};

struct Block {
  std::vector<Thread> threads;
  const std::function<void()>* body;
  jmp_buf scheduler;
  Thread* running;
  int votes;  // of the last barrier
  std::string error;
};

Block* current = nullptr;

void yield() {
  if (_setjmp(current->running->jump) == 0) _longjmp(current->scheduler, 1);
}

// Ends the launch. The fiber is not resumed.
void fail(const std::string& error) {
  if (current->error.empty()) current->error = error;
  yield();
}

void run_fiber() {
  for (;;) {
    (*current->body)();
    current->running->state = State::kReturned;
    yield();
  }
}

void resume(Thread& thread) {
  current->running = &thread;
  threadIdx = thread.index;
  if (_setjmp(current->scheduler) != 0) return;
  if (thread.entered) _longjmp(thread.jump, 1);
  thread.entered = true;
  getcontext(&thread.context);
  thread.context.uc_stack.ss_sp = thread.stack.data();
  thread.context.uc_stack.ss_size = thread.stack.size();
  thread.context.uc_link = nullptr;
  makecontext(&thread.context, run_fiber, 0);
  setcontext(&thread.context);
}

// Wakes the threads of a complete barrier of the block. Returns false if it is not complete.
bool release_block() {
  auto& threads = current->threads;
  int votes = 0;
  for (const Thread& thread : threads) {
    if (thread.state == State::kWaitsForLanes) return false;
    votes += thread.state == State::kWaitsForBlock && thread.predicate;
  }
  current->votes = votes;
  for (Thread& thread : threads) {
    if (thread.state == State::kWaitsForBlock) thread.state = State::kReady;
  }
  return true;
}

// Wakes the lanes of every complete exchange of a warp. Returns false if none is complete.
bool release_lanes(Thread* warp, size_t count) {
  bool any = false;
  for (size_t i = 0; i < count; ++i) {
    if (warp[i].state != State::kWaitsForLanes) continue;
    const unsigned mask = warp[i].mask;
    unsigned waiting = 0;
    for (size_t j = 0; j < count; ++j) {
      waiting |= unsigned{warp[j].state == State::kWaitsForLanes && warp[j].mask == mask} << j;
    }
    if ((waiting & mask) != mask) continue;
    any = true;
    for (size_t j = 0; j < count; ++j) {
      if (!(mask >> j & 1)) continue;
      std::memcpy(warp[j].received, warp[warp[j].source].value, kMaxBytes);
      warp[j].state = State::kReady;
    }
  }
  return any;
}

std::vector<size_t> order_of(size_t count, Order order, unsigned seed) {
  std::vector<size_t> result(count);
  std::iota(result.begin(), result.end(), size_t{0});
  if (order == Order::kBackward) std::reverse(result.begin(), result.end());
  if (order == Order::kShuffled) std::shuffle(result.begin(), result.end(), std::mt19937(seed));
  return result;
}

// Runs the warp until every thread has returned or waits for other warps.
void run_warp(Thread* warp, size_t count, Order order, unsigned seed) {
  const std::vector<size_t> lanes = order_of(count, order, seed);
  do {
    for (size_t i : lanes) {
      if (warp[i].state == State::kReady) resume(warp[i]);
      if (!current->error.empty()) return;
    }
  } while (release_lanes(warp, count));
}

void run_block(Order order, unsigned seed) {
  auto& threads = current->threads;
  for (size_t i = 0; i < threads.size(); ++i) {
    const unsigned n = static_cast<unsigned>(i);
    threads[i].index = {n % blockDim.x, n / blockDim.x % blockDim.y, n / blockDim.x / blockDim.y};
    threads[i].state = State::kReady;
  }
  const std::vector<size_t> warps = order_of((threads.size() + kWarp - 1) / kWarp, order, seed);
  const auto returned = [](const Thread& thread) { return thread.state == State::kReturned; };
  while (!std::all_of(threads.begin(), threads.end(), returned)) {
    for (size_t warp : warps) {
      const size_t first = warp * kWarp;
      run_warp(&threads[first], std::min<size_t>(kWarp, threads.size() - first), order, seed);
      if (!current->error.empty()) return;
    }
    if (!release_block()) {
      current->error = "threads wait at a barrier or a shuffle that the others never reach";
      return;
    }
  }
}

}  // namespace

std::string run_grid(Index grid, Index block, Order order, const std::function<void()>& thread) {
  const size_t blocks = size_t{grid.x} * grid.y * grid.z, threads = size_t{block.x} * block.y * block.z;
  if (blocks == 0 || threads == 0 || threads > 1024) {
    return "a grid without blocks, or a block of 0 or above 1024 threads";
  }
  static thread_local Block state;
  if (!state.error.empty()) state.threads.clear();  // its fibers were suspended in the middle of a kernel
  state.error.clear();
  state.threads.resize(threads);
  state.body = &thread;
  current = &state;
  gridDim = grid;
  blockDim = block;
  for (size_t b : order_of(blocks, order, 0)) {
    const unsigned n = static_cast<unsigned>(b);
    blockIdx = {n % grid.x, n / grid.x % grid.y, n / grid.x / grid.y};
    run_block(order, n);
    if (!state.error.empty()) break;
  }
  return state.error;
}

unsigned lane() {
  return static_cast<unsigned>(current->running - current->threads.data()) % kWarp;
}

int wait_for_block(bool predicate) {
  current->running->predicate = predicate;
  current->running->state = State::kWaitsForBlock;
  yield();
  return current->votes;
}

void exchange(unsigned mask, unsigned source, void* value, unsigned size) {
  Thread& own = *current->running;
  if (!(mask >> lane() & 1)) fail("a lane calls a warp function whose mask leaves it out");
  if (!(mask >> source & 1)) fail("a shuffle reads a lane that its mask leaves out");
  std::memcpy(own.value, value, size);
  own.mask = mask;
  own.source = source;
  own.state = State::kWaitsForLanes;
  yield();
  std::memcpy(value, own.received, size);
}

}  // namespace cuda_emulator
