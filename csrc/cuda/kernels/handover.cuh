// How blocks of one launch hand results to each other, through counters that are zero before it and after it.
// Blocks take tickets, and a block that others wait for holds a lower ticket than they: it is running or done,
// whatever order blocks start in, so waiting ends.
#pragma once

#include "primitives.cuh"

namespace fused_lora::cuda {

// counters: tickets taken, blocks that have left, then a flag for each block of rows, then arrivals at each tile
constexpr int HEADER = 2;
// in shared memory, for what from_first_thread passes on
constexpr int PLACE_BYTES = 16;

// What thread 0 makes, to all threads of the block. place: in shared memory, used for nothing else.
template <typename Make>
__device__ int from_first_thread(int* place, const Make& make) {
  if (thread_index() == 0) *place = make();
  sync_block();
  const int value = *place;
  // nobody overwrites it before everybody has read it
  sync_block();
  return value;
}

__device__ inline int take_ticket(int* counters, int* place) {
  return from_first_thread(place, [&] { return add_relaxed(counters, 1); });
}

__device__ inline void raise_flag(int* flag) {
  // every thread of the block has stored before one of them says so
  sync_block();
  if (thread_index() == 0) add_release(flag, 1);
}

__device__ inline void await_flag(const int* flag, int count) {
  if (thread_index() == 0) {
    while (load_acquire(flag) < count) pause();
  }
  sync_block();
}

// Whether all other parts of a tile have been stored: then the last to come sees them, and the counter is zero again.
__device__ inline bool arrives_last(int* arrivals, int parts, int* place) {
  sync_block();
  return from_first_thread(place, [&] {
    const bool last = add_acquire_release(arrivals, 1) == parts - 1;
    if (last) *arrivals = 0;
    return static_cast<int>(last);
  });
}

// The last block to leave sets tickets and flags back to zero: nobody reads them any more.
__device__ inline void leave(int* counters, int flags) {
  sync_block();
  if (thread_index() == 0 && add_acquire_release(counters + 1, 1) == block_count() - 1) {
    for (int index = 0; index < HEADER + flags; ++index) counters[index] = 0;
  }
}

}  // namespace fused_lora::cuda
