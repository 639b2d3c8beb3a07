// Blocks of a kernel on the host: every thread is a fiber, several blocks are in flight, and whose turn it is is drawn.
//
// A thread runs until it meets others: at a barrier, in an operation of its warp, at an atomic or a poll. So what one
// thread reads before another has written is seen as stale, and memory starts full of NaN. What this cannot show is a
// missing acquire or release: the host has one memory, and it is never behind.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

namespace shim {

constexpr int WARP = 32;
constexpr size_t STACK_BYTES = 1 << 17;
// polls in a row without any thread going on: nobody ever will
constexpr int64_t MOST_POLLS = 1 << 19;

// In what order blocks take their turns.
struct Turns {
  uint64_t seed = 0;
  int resident = 4;  // blocks in flight
  int delayed = 0;   // of the blocks that start first, how many get one turn in 64
};

struct Block;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<unsigned char[]> stack{new unsigned char[STACK_BYTES]};
  Block* block = nullptr;
  int thread = 0;
  // copies to shared memory that are not awaited yet, in groups
  struct Copy {
    void* to;
    const void* from;
    int bytes;
  };
  std::vector<std::vector<Copy>> copies{1};
};

// Threads that wait for each other: the last to come does the work of all.
struct Meeting {
  std::vector<Fiber*> here;
};

struct Warp {
  Meeting meeting;
  const void* given[WARP];
  void* wanted[WARP];
};

struct Block {
  int index = 0, left = 0;
  bool delayed = false;
  std::vector<unsigned char> shared;
  Meeting barrier;
  std::vector<Warp> warps;
  std::vector<Fiber> fibers;
};

class Machine {
 public:
  static Machine& here() {
    static Machine machine;
    return machine;
  }

  Turns turns;
  int blocks = 0;
  Fiber* current = nullptr;

  // Returns 0, or 1 if the threads wait for what never comes.
  int run(int block_count, int threads, int shared_bytes, const std::function<void()>& kernel) {
    draw_.seed(turns.seed);
    blocks = block_count;
    kernel_ = &kernel;
    ready_.clear();
    polls_ = 0;
    std::vector<int> order(block_count);
    for (int i = 0; i < block_count; ++i) order[i] = i;
    if (turns.seed != 0) std::shuffle(order.begin(), order.end(), draw_);
    std::vector<Block> in_flight(std::min(turns.resident, block_count));
    int started = 0, unfinished = block_count;
    for (Block& block : in_flight) start(block, order[started], started, threads, shared_bytes), ++started;
    while (unfinished > 0) {
      if (ready_.empty() || polls_ > MOST_POLLS) return 1;
      current = take();
      swapcontext(&scheduler_, &current->context);
      if (finished_ == nullptr) continue;
      finished_ = nullptr;
      Block& block = *current->block;
      if (--block.left > 0) continue;
      --unfinished;
      if (started < block_count) start(block, order[started], started, threads, shared_bytes), ++started;
    }
    return 0;
  }

  // The current thread's turn ends; it goes on some time.
  void yield() {
    ready_.push_back(current);
    sleep();
  }

  void poll() {
    ++polls_;
    yield();
  }

  // All `count` threads go on when the last has come, and it has done `work`.
  template <typename Work>
  void meet(Meeting& meeting, int count, const Work& work) {
    meeting.here.push_back(current);
    if (static_cast<int>(meeting.here.size()) < count) {
      sleep();
      return;
    }
    polls_ = 0;
    work();
    for (Fiber* fiber : meeting.here) {
      if (fiber != current) ready_.push_back(fiber);
    }
    meeting.here.clear();
  }

  void progress() { polls_ = 0; }

 private:
  ucontext_t scheduler_;
  std::vector<Fiber*> ready_;
  std::mt19937_64 draw_;
  const std::function<void()>* kernel_ = nullptr;
  Fiber* finished_ = nullptr;
  int64_t polls_ = 0;

  void sleep() {
    Fiber* mine = current;
    swapcontext(&mine->context, &scheduler_);
  }

  Fiber* take() {
    size_t at = turns.seed == 0 ? ready_.size() - 1 : draw_() % ready_.size();
    for (int again = 0; again < 8 && ready_[at]->block->delayed && draw_() % 64 != 0; ++again) {
      at = draw_() % ready_.size();
    }
    Fiber* taken = ready_[at];
    ready_[at] = ready_.back();
    ready_.pop_back();
    return taken;
  }

  static void body() {
    Machine& machine = here();
    (*machine.kernel_)();
    machine.finished_ = machine.current;
  }

  void start(Block& block, int index, int place, int threads, int shared_bytes) {
    block.index = index;
    block.left = threads;
    block.delayed = place < turns.delayed;
    // NaN, in every type
    block.shared.assign(shared_bytes + 15, 0xFF);
    block.barrier = {};
    block.warps = std::vector<Warp>(threads / WARP);
    block.fibers.resize(threads);
    for (int thread = 0; thread < threads; ++thread) {
      Fiber& fiber = block.fibers[thread];
      fiber.block = &block;
      fiber.thread = thread;
      fiber.copies.assign(1, {});
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = STACK_BYTES;
      fiber.context.uc_link = &scheduler_;
      makecontext(&fiber.context, reinterpret_cast<void (*)()>(&Machine::body), 0);
      ready_.push_back(&fiber);
    }
  }
};

}  // namespace shim
