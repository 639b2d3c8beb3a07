// What of a thread's stores the TMA sees. It reads by a way of its own, so a store is hidden from it until
//   in global memory: its thread has made fence_for_tma and then fence_device; whoever asks for the copy knows of that,
//     by barriers and by a flag released and acquired on the way; and has itself made fence_for_tma since.
//   in shared memory, for wgmma as well: its thread has made fence_shared_for_tma (or fence_for_tma) and then come to a
//     barrier, or asks for the copy itself.
// What is hidden is read as NaN. Stores count that go through store_pair and store_matrices: a plain one the host does
// not notice, and other threads' plain loads it cannot make stale.
#pragma once

#include <unordered_map>

#include "fibers.h"

namespace shim {

class Visibility {
 public:
  static Visibility& here() {
    static Visibility visibility;
    return visibility;
  }

  void begin() {
    stores_ = 0;
    pages_.clear();
    released_.clear();
  }

  // Four bytes, aligned. All stores of a thread between two fences count as one.
  void store(Fiber& fiber, uintptr_t address) {
    if (fiber.state.open < 0) fiber.state.open = stores_++;
    auto& page = pages_[address / PAGE];
    if (page.empty()) page.assign(PAGE / 4, -1);
    page[address % PAGE / 4] = fiber.state.open;
  }

  void fence_for_tma(Fiber& fiber) {
    if (fiber.state.open >= 0) fiber.state.fenced.push_back(fiber.state.open);
    fiber.state.open = -1;
    fiber.state.visible = fiber.state.knows;
  }
  void fence_device(Fiber& fiber) {
    for (const int64_t store : fiber.state.fenced) fiber.state.knows.insert(store);
    fiber.state.fenced.clear();
  }

  void meet(Meeting& meeting) {
    if (stores_ == 0) return;
    Set all;
    for (Fiber* fiber : meeting.here) all |= fiber->state.knows;
    for (Fiber* fiber : meeting.here) fiber->state.knows = all;
  }
  void release(Fiber& fiber, const int* flag) {
    if (stores_ > 0) released_[flag] |= fiber.state.knows;
  }
  void acquire(Fiber& fiber, const int* flag) {
    if (stores_ > 0) fiber.state.knows |= released_[flag];
  }

  bool any_in(uintptr_t first, uintptr_t end) const {
    if (stores_ == 0) return false;
    if ((end - first) / PAGE > pages_.size()) return true;
    for (uintptr_t page = first / PAGE; page <= (end - 1) / PAGE; ++page) {
      if (pages_.count(page)) return true;
    }
    return false;
  }
  bool hidden(const Set& visible, uintptr_t address) const {
    const auto page = pages_.find(address / PAGE);
    if (page == pages_.end()) return false;
    const int64_t store = page->second[address % PAGE / 4];
    return store >= 0 && !visible.has(store);
  }

 private:
  static constexpr uintptr_t PAGE = 4096;
  int64_t stores_ = 0;
  std::unordered_map<uintptr_t, std::vector<int64_t>> pages_;
  std::unordered_map<const int*, Set> released_;
};

// Of a block's shared memory: who has stored each 16 bytes, as thread + 1, until others may rely on them.
struct Unfenced {
  static constexpr uint16_t FENCED = 0x8000;
  std::vector<uint16_t> by;

  void store(Fiber& fiber, size_t chunk) {
    by[chunk] = static_cast<uint16_t>(fiber.thread + 1);
    fiber.state.unfenced.push_back(chunk);
  }
  void fence(Fiber& fiber) {
    for (const size_t chunk : fiber.state.unfenced) {
      if (by[chunk] == fiber.thread + 1) by[chunk] |= FENCED;
    }
  }
  // a barrier: what is fenced is everybody's
  void pass(Fiber& fiber) {
    auto& chunks = fiber.state.unfenced;
    const auto left = std::remove_if(chunks.begin(), chunks.end(), [&](size_t chunk) {
      const bool fenced = by[chunk] == (FENCED | (fiber.thread + 1));
      if (fenced) by[chunk] = 0;
      return fenced || by[chunk] != fiber.thread + 1;
    });
    chunks.erase(left, chunks.end());
  }
  // thread: who asks for a copy; -1: a whole warpgroup reads
  bool hidden(size_t chunk, int thread) const {
    return by[chunk] != 0 && (thread < 0 || by[chunk] != (FENCED | (thread + 1)));
  }
};

}  // namespace shim
