// Who computes which tile, and when. Clusters take tickets; a ticket is a pair of tiles, one below the other.
//
// Nothing waits for a higher ticket, without exception: whoever is waited for holds a lower one, so it is running or
// done, whatever order clusters start in, however few there are, and though a cluster takes a ticket before it has
// finished the last. Where tiles publish h, the order is therefore:
//   1. blocks of h beyond the first 64 ranks, each an item of its own without any part of out;
//   2. tiles of the first column, which compute the first block of h on the way, since a is there anyway;
//   3. all other tiles, which wait for h of their rows when they come to their LoRA step.
// Where tiles are about as many as blocks of the launch, each computes h for itself: then nobody waits.
#pragma once

#include "../kernels/parts.cuh"
#include "shape.cuh"

namespace fused_lora::cuda::hopper {

// row: of pairs.  column: of tiles; -1: a block of h alone.  block: of h, of 64 ranks.
struct Work {
  int row, column, block;

  __device__ bool is_h_alone() const { return column < 0; }
};

struct Schedule {
  // Pairs of tiles below each other that are computed at about the same time, so that they share w's tiles in L2, and
  // a's with those to the right. 4, 8 and 16 made no difference of 1 %.
  static constexpr int GROUP = 8;

  int rows, columns, blocks, alone, publishers;

  __host__ __device__ Schedule(int64_t M, int64_t P, int64_t R, int tile_columns, bool publishes)
      : rows(ceil_div(M, CLUSTER * BLOCK_M)),
        columns(ceil_div(P, tile_columns)),
        blocks(ceil_div(R, BLOCK_R)),
        alone(publishes ? rows * (blocks - 1) : 0),
        publishers(publishes ? rows : 0) {}

  __host__ __device__ int tickets() const { return alone + rows * columns; }

  __device__ Work work(int ticket) const {
    if (ticket < alone) return {ticket / (blocks - 1), -1, 1 + ticket % (blocks - 1)};
    ticket -= alone;
    if (ticket < publishers) return {ticket, 0, 0};
    ticket -= publishers;
    const int first_column = publishers > 0 ? 1 : 0, per_group = GROUP * (columns - first_column);
    const int first = ticket / per_group * GROUP, height = rows - first < GROUP ? rows - first : GROUP;
    return {first + ticket % per_group % height, first_column + ticket % per_group / height, 0};
  }

  __device__ bool computes_h(const Work& work) const { return publishers == 0 || work.column <= 0; }
  // all of it: with several blocks of h, the others are other items' work, and it comes from memory
  __device__ bool has_own_h(const Work& work) const { return computes_h(work) && blocks == 1; }

  // ---- h of a block's 128 rows: each consumer of each of its blocks of ranks raises the flag by one

  __device__ static int* flag(int* counters, const Work& work) {
    return counters + HEADER + work.row * CLUSTER + rank_in_cluster();
  }

  // What all threads of a consumer have stored: to the TMA of every block that waits.
  __device__ static void publish(int* flag, int consumer) {
    // the TMA's side of memory first, then the GPU's other blocks, by every thread that stored
    fence_for_tma();
    fence_device();
    sync_warpgroup(1 + consumer);
    if (thread_index() % WARPGROUP == 0) add_release(flag, 1);
  }

  __device__ void await_h(const int* flag) const {
    while (load_acquire(flag) < CONSUMERS * blocks) pause();
    // what the acquire has seen, the TMA must see too
    fence_for_tma();
  }
};

// Tickets go from one warp of the cluster's first block to every role of both blocks, two ahead, so that a role that is
// done with its part of a tile goes on with the next one at once.
template <typename Shape>
struct Tickets {
  Memory<Shape> memory;
  int turn = 0;

  // The scheduler: takes tickets until there are none. The last one that it passes on is beyond the end.
  __device__ void hand_out(int* counters, int count) {
    auto& barriers = memory.barriers();
    for (int ticket = 0; ticket < count; ++turn) {
      const int slot = turn % 2;
      if (turn >= 2) await_phase_of_cluster(&barriers.heard[slot], (turn / 2 - 1) & 1);
      ticket = add_relaxed(counters, 1);
      for (int block = 0; block < CLUSTER; ++block) {
        store_in_block(&barriers.ticket[slot], block, ticket);
        // with a release here, where it is once a tile: the other block must see the ticket
        arrive_in_block_releasing(&barriers.told[slot], block);
      }
    }
  }

  // The producer's next ticket; a consumer's, whose threads have all read it when one of them says so.
  __device__ int next_of_producer() {
    const int ticket = await();
    heard();
    ++turn;
    return ticket;
  }
  __device__ int next_of_consumer(int consumer) {
    const int ticket = await();
    sync_warpgroup(1 + consumer);
    if (thread_index() % WARPGROUP == 0) heard();
    ++turn;
    return ticket;
  }

 private:
  __device__ int await() const {
    auto& barriers = memory.barriers();
    await_phase_of_cluster(&barriers.told[turn % 2], (turn / 2) & 1);
    return barriers.ticket[turn % 2];
  }
  __device__ void heard() const { arrive_in_block(&memory.barriers().heard[turn % 2], 0); }
};

}  // namespace fused_lora::cuda::hopper
