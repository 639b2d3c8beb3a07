// Blocks of a kernel on the host: every thread is a fiber, several blocks are in flight, and whose turn it is is drawn.
//
// A thread runs until it meets others: at a barrier, in an operation of its warp, at an atomic or a poll. So what one
// thread reads before another has written is seen as stale, and memory starts full of NaN. What copies and tensor cores
// do by themselves are jobs, which are done at any time between when they are asked for and when they are awaited.
#pragma once

// what checks jumps would take a change of stacks for an error
#undef _FORTIFY_SOURCE
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <vector>

namespace shim {

constexpr int WARP = 32, WARPGROUP = 128;
constexpr size_t STACK_BYTES = 1 << 17;
// polls in a row without any thread going on: nobody ever will
constexpr int64_t MOST_POLLS = 1 << 19;
constexpr size_t MOST_ALIGNMENT = 1024;
enum Outcome { RIGHT = 0, HANGS = 1, TOO_MUCH_SHARED_MEMORY = 2, BROKEN = 3 };

// In what order blocks take their turns.
struct Turns {
  uint64_t seed = 0;
  int resident = 4;  // blocks in flight
  // Of the blocks that start first, how many get one turn in 64. Where turns are drawn, so does a warp or a warpgroup
  // in two of three blocks, since they drift far apart.
  int delayed = 0;
};

// What the hardware leaves undefined or traps.
struct Broken {
  std::string why;
};
[[noreturn]] inline void broken(const std::string& why) { throw Broken{why}; }
inline void require(bool holds, const char* rule) {
  if (!holds) broken(rule);
}

// Numbers, as bits.
struct Set {
  std::vector<uint64_t> words;

  void insert(size_t number) {
    if (words.size() <= number / 64) words.resize(number / 64 + 1);
    words[number / 64] |= uint64_t{1} << number % 64;
  }
  bool has(size_t number) const { return number / 64 < words.size() && words[number / 64] >> number % 64 & 1; }
  void operator|=(const Set& other) {
    if (words.size() < other.words.size()) words.resize(other.words.size());
    for (size_t i = 0; i < other.words.size(); ++i) words[i] |= other.words[i];
  }
};

// Done once, some time.
struct Job {
  std::function<void()> work;
  bool done = false;
};
using Jobs = std::vector<std::shared_ptr<Job>>;

struct Block;

struct Fiber {
  ucontext_t context;
  jmp_buf place;
  bool begun = false;
  std::unique_ptr<unsigned char[]> stack{new unsigned char[STACK_BYTES]};
  Block* block = nullptr;
  int thread = 0;
  bool delayed = false;

  // what it does in the background, and what of others' stores it may rely on: all of it starts anew with the thread
  struct State {
    // copies to shared memory that are not awaited yet, in groups
    struct Copy {
      void* to;
      const void* from;
      int bytes;
    };
    std::vector<std::vector<Copy>> copies{1};
    // of each store_tile: its reading of shared memory, its writing
    Jobs reads, writes;
    // see visibility.h
    int64_t open = -1;
    std::vector<int64_t> fenced;
    Set knows, visible;
    std::vector<size_t> unfenced;
    // stores to other blocks' shared memory that it has not released
    std::vector<std::pair<int*, int>> remote;
    // products.h: how many of its warpgroup's products it has issued and awaited, and groups of them committed
    int64_t issued = 0, awaited = 0, committed = 0;
    bool registers_ordered = false;
  } state;
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

struct FreeAligned {
  void operator()(unsigned char* memory) const { ::operator delete[](memory, std::align_val_t(MOST_ALIGNMENT)); }
};

struct Cluster;

struct Block {
  int index = 0, rank = 0, left = 0;
  Cluster* cluster = nullptr;
  std::unique_ptr<unsigned char[], FreeAligned> allocated;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  Meeting barrier;
  std::vector<Warp> warps;
  std::vector<Fiber> fibers;
  std::shared_ptr<void> hopper;  // what Hopper adds, of hopper.h

  bool contains(const void* pointer, size_t bytes) const {
    const auto* first = static_cast<const unsigned char*>(pointer);
    return first >= shared && first + bytes <= shared + shared_bytes;
  }
};

// Blocks that run at the same time.
struct Cluster {
  Meeting meeting;
  int left = 0;
  std::vector<Block> blocks;
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
  std::string why;                       // of the last run: what is broken
  std::function<void(Block&)> on_start;  // of each block, before its threads
  std::function<void(Fiber&)> on_thread_end;
  std::function<void(Meeting&)> on_meeting;  // of all threads of a block

  int run(int block_count, int cluster_size, int threads, size_t shared_bytes, const std::function<void()>& kernel) {
    draw_.seed(turns.seed);
    blocks = block_count;
    kernel_ = &kernel;
    ready_.clear();
    jobs_.clear();
    polls_ = 0;
    why.clear();
    threads_ = threads;
    shared_bytes_ = shared_bytes;
    // a block's memory is aligned to 16 bytes, and no better by itself
    shift_ = turns.seed == 0 ? 0 : 16 * (draw_() % (MOST_ALIGNMENT / 16));
    patience_ = int64_t{1} << 4 * (draw_() % 3);
    const int cluster_count = block_count / cluster_size;
    std::vector<int> order(cluster_count);
    for (int i = 0; i < cluster_count; ++i) order[i] = i;
    if (turns.seed != 0) std::shuffle(order.begin(), order.end(), draw_);
    in_flight_.resize(std::min(std::max(turns.resident / cluster_size, 1), cluster_count));
    try {
      int started = 0, unfinished = cluster_count;
      for (Cluster& cluster : in_flight_) start(cluster, cluster_size, order[started], started), ++started;
      while (unfinished > 0) {
        if (polls_ > MOST_POLLS) return HANGS;
        if (!jobs_.empty() && jobs_turn()) {
          const size_t at = draw_() % jobs_.size();
          const auto job = jobs_[at];
          jobs_[at] = jobs_.back();
          jobs_.pop_back();
          finish(*job);
          continue;
        }
        if (ready_.empty()) return HANGS;
        current = take();
        go_on(*current);
        if (!why.empty()) return BROKEN;
        if (finished_ == nullptr) continue;
        finished_ = nullptr;
        --current->block->left;
        Cluster& cluster = *current->block->cluster;
        if (--cluster.left > 0) continue;
        --unfinished;
        if (started < cluster_count) start(cluster, cluster_size, order[started], started), ++started;
      }
      // what is written at the end of a launch at the latest
      while (!jobs_.empty()) {
        const auto job = jobs_.back();
        jobs_.pop_back();
        finish(*job);
      }
    } catch (const Broken& error) {
      why = error.why;
      return BROKEN;
    }
    return RIGHT;
  }

  // The current thread's turn ends; it goes on some time.
  void yield() {
    ready_.push_back(current);
    sleep();
  }

  void poll() {
    ++polls_;
    // in order of their numbers too, whoever polls lets the others go on
    if (turns.seed == 0) {
      ready_.insert(ready_.begin(), current);
      sleep();
    } else {
      yield();
    }
  }

  // Until another thread or a job lets it go on.
  void sleep() {
    Fiber& mine = *current;
#ifdef __SANITIZE_ADDRESS__
    swapcontext(&mine.context, &scheduler_);
#else
    if (_setjmp(mine.place) == 0) _longjmp(scheduler_place_, 1);
#endif
  }

  void wake(Fiber* fiber) {
    polls_ = 0;
    ready_.push_back(fiber);
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

  void at_barrier(Meeting& meeting) {
    if (on_meeting) on_meeting(meeting);
  }

  void progress() { polls_ = 0; }

  std::shared_ptr<Job> later(std::function<void()> work) {
    jobs_.push_back(std::make_shared<Job>(Job{std::move(work)}));
    return jobs_.back();
  }

  void finish(Job& job) {
    if (job.done) return;
    job.done = true;
    polls_ = 0;
    job.work();
    job.work = nullptr;
  }

 private:
  ucontext_t scheduler_;
  jmp_buf scheduler_place_;
  std::vector<Cluster> in_flight_;
  std::vector<Fiber*> ready_;
  Jobs jobs_;
  std::mt19937_64 draw_;
  const std::function<void()>* kernel_ = nullptr;
  Fiber* finished_ = nullptr;
  int threads_ = 0;
  size_t shared_bytes_ = 0, shift_ = 0;
  int64_t polls_ = 0, patience_ = 1;

  // In order of their numbers, jobs are done as late as may be.
  bool jobs_turn() {
    if (ready_.empty()) return true;
    return turns.seed == 0 ? polls_ > 0 : draw_() % patience_ == 0;
  }

  void go_on(Fiber& fiber) {
#ifdef __SANITIZE_ADDRESS__
    swapcontext(&scheduler_, &fiber.context);
#else
    if (_setjmp(scheduler_place_) != 0) return;
    if (fiber.begun) _longjmp(fiber.place, 1);
    fiber.begun = true;
    setcontext(&fiber.context);
#endif
  }

  Fiber* take() {
    size_t at = turns.seed == 0 ? ready_.size() - 1 : draw_() % ready_.size();
    for (int again = 0; again < 8 && ready_[at]->delayed && draw_() % 64 != 0; ++again) {
      at = draw_() % ready_.size();
    }
    Fiber* taken = ready_[at];
    if (turns.seed == 0) {
      ready_.pop_back();
    } else {
      ready_[at] = ready_.back();
      ready_.pop_back();
    }
    return taken;
  }

  static void body() {
    Machine& machine = here();
    try {
      (*machine.kernel_)();
      if (machine.on_thread_end) machine.on_thread_end(*machine.current);
    } catch (const Broken& error) {
      machine.why = error.why;
    }
    machine.finished_ = machine.current;
    machine.sleep();
  }

  void start(Cluster& cluster, int size, int index, int place) {
    cluster.meeting = {};
    cluster.left = size * threads_;
    cluster.blocks.resize(size);
    for (int rank = 0; rank < size; ++rank) {
      Block& block = cluster.blocks[rank];
      block.cluster = &cluster;
      block.rank = rank;
      block.index = index * size + rank;
      start(block, place * size < turns.delayed);
    }
  }

  void start(Block& block, bool delayed) {
    const int drifting[] = {0, WARP, WARPGROUP};
    const int together = turns.seed == 0 ? 0 : drifting[draw_() % 3];
    const int behind = together == 0 || threads_ <= together ? -1 : static_cast<int>(draw_() % (threads_ / together));
    block.left = threads_;
    block.allocated.reset(new (std::align_val_t(MOST_ALIGNMENT)) unsigned char[shift_ + shared_bytes_]);
    block.shared = block.allocated.get() + shift_;
    block.shared_bytes = shared_bytes_;
    // NaN, in every type
    std::memset(block.shared, 0xFF, shared_bytes_);
    block.barrier = {};
    block.warps = std::vector<Warp>((threads_ + WARP - 1) / WARP);
    block.hopper = nullptr;
    if (on_start) on_start(block);
    block.fibers.resize(threads_);
    for (int thread = 0; thread < threads_; ++thread) {
      Fiber& fiber = block.fibers[thread];
      fiber.block = &block;
      fiber.thread = thread;
      fiber.delayed = delayed || (behind >= 0 && thread / together == behind);
      fiber.state = {};
      fiber.begun = false;
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
