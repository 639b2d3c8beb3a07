// What a block has on Hopper beside its threads and memory: barriers that count bytes, named barriers, registers that
// move between warpgroups, products under way.
#pragma once

#include <deque>

#include "visibility.h"

namespace shim {

// An mbarrier. Its 64 bits in shared memory say which one it is, and are checked: memory that others wrote to is none.
struct Barrier {
  static constexpr uint64_t MARK = 0xBA771E5000000000;
  static constexpr int64_t MOST_BYTES = (1 << 20) - 1;

  uint64_t* word;
  int by, count, pending;
  bool fenced = false, published = false;
  int64_t bytes = 0, phase = 0;
  Set knows;
  std::vector<Fiber*> waiting;
  // that came with an arrival which releases: seen past a wait which acquires for the cluster
  struct Store {
    int* to;
    int value;
    int64_t phase;
  };
  std::vector<Store> stores;

  void arrive(int64_t announced = 0) {
    require(pending > 0, "more arrivals than the barrier counts");
    --pending;
    come(-announced);
  }
  // So many of the announced bytes; they may come first.
  void come(int64_t some) {
    bytes -= some;
    require(bytes <= MOST_BYTES && bytes >= -MOST_BYTES, "more bytes than a barrier can count");
    if (pending > 0 || bytes != 0) return;
    ++phase;
    pending = count;
    for (Fiber* fiber : waiting) Machine::here().wake(fiber);
    waiting.clear();
  }
  void await(int parity, bool of_cluster) {
    Machine& machine = Machine::here();
    Fiber& me = *machine.current;
    while ((phase & 1) == parity) {
      waiting.push_back(&me);
      machine.sleep();
    }
    me.state.knows |= knows;
    if (!of_cluster) return;
    auto left = stores.begin();
    for (const Store& store : stores) {
      if (store.phase < phase) {
        *store.to = store.value;
      } else {
        *left++ = store;
      }
    }
    stores.erase(left, stores.end());
  }
};

// Products of a warpgroup: products.h.
struct Products;

struct Hopper {
  static constexpr int REGISTERS = 1 << 16, MOST_BY_THREAD = 256;

  Block& block;
  std::deque<Barrier> barriers;
  Meeting named[16];
  Unfenced unfenced;
  // of the multiprocessor, not given to anybody; of a thread of each warpgroup
  int free_registers;
  std::vector<int> registers;
  std::vector<Meeting> warpgroups;
  std::vector<std::shared_ptr<Products>> products;
  // where copies are on their way to
  std::vector<std::pair<const unsigned char*, const unsigned char*>> arriving;

  explicit Hopper(Block& block, int threads)
      : block(block), warpgroups(threads / WARPGROUP), products(threads / WARPGROUP) {
    unfenced.by.assign(block.shared_bytes / 16 + 1, 0);
    const int by_thread = std::min(REGISTERS / threads / 8 * 8, MOST_BY_THREAD);
    registers.assign(threads / WARPGROUP, by_thread);
    free_registers = REGISTERS - threads * by_thread;
  }

  static Hopper& of(Block& block) { return *static_cast<Hopper*>(block.hopper.get()); }

  void init(uint64_t* word, int by, int count) {
    require(block.contains(word, 8) && reinterpret_cast<uintptr_t>(word) % 8 == 0, "no place for a barrier");
    require(count > 0, "a barrier that counts nothing");
    for (const Barrier& barrier : barriers) require(barrier.word != word, "a barrier is made twice");
    *word = Barrier::MARK + barriers.size();
    barriers.push_back({word, by, count, count});
  }

  Barrier& barrier(uint64_t* word) {
    require(block.contains(word, 8), "a barrier outside of the block's memory");
    const uint64_t index = *word - Barrier::MARK;
    require(index < barriers.size() && barriers[index].word == word, "a barrier that nobody made, or is overwritten");
    require(barriers[index].published, "a barrier is used before publish_barriers and sync_cluster");
    require(block.left > 0, "a barrier of a block that has left");
    return barriers[index];
  }

  // A thread leaves.
  void end(const Fiber& fiber) const {
    for (const auto& read : fiber.state.reads) {
      require(read->done, "a thread leaves before its stores have read shared memory");
    }
    require(fiber.state.issued == fiber.state.awaited, "a thread leaves before its wgmmas are done");
    require(block.left > 1 || arriving.empty(), "a block leaves before its loads have come");
  }

  // Threads meet at a barrier, or one of them arrives at one: what they know and have fenced is everybody's there.
  static void meet(Meeting& meeting) {
    Visibility::here().meet(meeting);
    for (Fiber* fiber : meeting.here) of(*fiber->block).unfenced.pass(*fiber);
  }

  size_t chunk(const void* pointer) const { return (static_cast<const unsigned char*>(pointer) - block.shared) / 16; }
};

}  // namespace shim
