// The stages through which tiles pass from memory to the tensor cores, and the producer that fills them.
//
// A stage holds a tile of a (128 × 64), one of w (64 × COLUMNS) and, for who computes h, one of u (64 × RANKS): 64 of
// the contraction. The LoRA step is a stage like any other: its a is h (or scale · h), its w is v.
#pragma once

#include "schedule.cuh"

namespace fused_lora::cuda::hopper {

// A place in the ring of stages, and how often the ring has been passed.
template <typename Shape>
struct Place {
  int stage = 0, phase = 0;

  __device__ void advance() {
    if (++stage == Shape::STAGES) stage = 0, phase ^= 1;
  }
};

template <typename Shape>
__device__ void init_barriers(const Memory<Shape>& memory) {
  auto& barriers = memory.barriers();
  for (int stage = 0; stage < Shape::STAGES; ++stage) {
    // the producer arrives, and announces bytes
    init_barrier(&barriers.full[stage], 1);
    // half of w's tile goes to the other block, so its consumers must be done with the stage too
    init_barrier(&barriers.empty[stage], CLUSTER * CONSUMERS);
  }
  for (int slot = 0; slot < 2; ++slot) {
    init_barrier(&barriers.told[slot], 1);
    init_barrier(&barriers.heard[slot], CLUSTER * (1 + CONSUMERS));
  }
  init_barrier(&barriers.stored, CONSUMERS);
  publish_barriers();
}

// One thread, all tiles of the block.
template <typename Shape>
struct Producer {
  const Arguments& arguments;
  const Schedule& schedule;
  Memory<Shape> memory;
  int rank;
  Place<Shape> place{};

  __device__ void run() {
    auto& barriers = memory.barriers();
    Tickets<Shape> tickets{memory};
    const int steps = ceil_div(arguments.Q, BLOCK_Q);
    for (int with_h = 0;;) {
      const int ticket = tickets.next_of_producer();
      if (ticket >= schedule.tickets()) return;
      const Work work = schedule.work(ticket);
      const int m = (work.row * CLUSTER + rank) * BLOCK_M, p = work.column * Shape::COLUMNS;
      const bool computes_h = schedule.computes_h(work);
      // out's chunks of the tile before lie where u's tiles come
      if (computes_h) await_phase(&barriers.stored, with_h++ & 1);
      for (int step = 0; step < steps; ++step) {
        const int q = step * BLOCK_Q;
        const int w_bytes = work.is_h_alone() ? 0 : Shape::W_BYTES, u_bytes = computes_h ? Shape::U_BYTES : 0;
        await_empty(Shape::A_BYTES + w_bytes + u_bytes);
        load_tile(memory.a(place.stage), &arguments.a, full(), q, m);
        if (!work.is_h_alone()) load_half_for_both(&arguments.w, q, p);
        if (computes_h) load_u(q, work.block * BLOCK_R);
        place.advance();
      }
      if (work.is_h_alone()) continue;
      const bool own_h = schedule.has_own_h(work);
      for (int block = 0; block < schedule.blocks; ++block) {
        await_empty(Shape::W_BYTES + (own_h ? 0 : Shape::A_BYTES));
        // not before: until here nothing of this tile needed h
        if (block == 0 && !own_h) schedule.await_h(Schedule::flag(arguments.counters, work));
        if (!own_h) load_tile(memory.a(place.stage), &arguments.factor, full(), block * BLOCK_R, m);
        load_half_for_both(&arguments.v, block * BLOCK_R, p);
        place.advance();
      }
    }
  }

 private:
  __device__ Barrier* full() const { return &memory.barriers().full[place.stage]; }

  // Until the stage may be written; bytes: of the tiles that will come.  A tile is whole even where the matrix ends
  // within it: the TMA fills it with zeros, which count, and so the kernel knows no tails of M, P, Q or R.
  __device__ void await_empty(uint32_t bytes) const {
    await_phase(&memory.barriers().empty[place.stage], place.phase ^ 1);
    arrive_expecting(full(), bytes);
  }

  // This block's half of a tile of w or v, from row k of the contraction and column p of out, to both blocks.
  __device__ void load_half_for_both(const TensorMap* map, int k, int p) const {
    constexpr uint16_t BOTH = (1 << CLUSTER) - 1;
    constexpr int HALF = Shape::COLUMNS / CLUSTER;
    unsigned char* to = memory.w(place.stage) + rank * (Shape::W_BYTES / CLUSTER);
    p += rank * HALF;
    if (Shape::W_ALONG_Q) {
      load_tile_multicast(to, map, full(), k, p, BOTH);
    } else {
      // a swizzled row is at most 128 bytes: 64 columns at a time
      for (int column = 0; column < HALF; column += CHUNK) {
        load_tile_multicast(to + column * SPAN, map, full(), p + column, k, BOTH);
      }
    }
  }

  __device__ void load_u(int q, int r) const {
    load_tile(memory.u(place.stage), &arguments.u, full(), Shape::W_ALONG_Q ? q : r, Shape::W_ALONG_Q ? r : q);
  }
};

// One step of a consumer: what it multiplies, and when it lets go of a stage.
template <typename Shape>
struct Stages {
  Memory<Shape> memory;
  int consumer;
  Place<Shape> place{};
  int unreleased = -1;  // the stage that the wgmma in flight reads

  // How tiles lie, for wgmma. Along the contraction: rows of 64, groups of eight rows 1024 bytes apart, 16 of the
  // contraction are 32 bytes on. Along the other dimension: 64 rows of the contraction for every 64 columns, eight rows
  // are 1024 bytes, 16 of the contraction 2048. A tile of u with 16 columns has rows of 32 bytes instead of 128.
  static constexpr bool ALONG = Shape::W_ALONG_Q;
  static constexpr int U_SPAN = ALONG || Shape::RANKS >= 64 ? SPAN : Shape::RANKS * 2;
  static constexpr int LEADING = ALONG ? 16 : 64 * SPAN;
  static constexpr int W_STEP = (ALONG ? 32 : 16 * SPAN) >> 4, U_STEP = (ALONG ? 32 : 16 * U_SPAN) >> 4;
  static constexpr int A_STEP = 32 >> 4;
  static constexpr Swizzle U_SWIZZLE = U_SPAN == 128 ? Swizzle::k128 : U_SPAN == 64 ? Swizzle::k64 : Swizzle::k32;

  // from the first column of w's tile to a multiple of 32: contiguous along it, they lie in chunks of 64
  __device__ static constexpr int to_column(int column) {
    return (ALONG ? column * SPAN : column / CHUNK * CHUNK_BYTES + column % CHUNK * 2) >> 4;
  }

  template <int N>
  using Product = Wgmma<N, typename Shape::Element, !ALONG>;

  __device__ uint64_t a(Place<Shape> at) const {
    return matrix_descriptor(memory.a(at.stage) + consumer * ROWS * SPAN, 16, 8 * SPAN, Swizzle::k128);
  }
  __device__ uint64_t w(Place<Shape> at) const {
    return matrix_descriptor(memory.w(at.stage), LEADING, 8 * SPAN, Swizzle::k128);
  }
  __device__ uint64_t u(Place<Shape> at) const {
    return matrix_descriptor(memory.u(at.stage), LEADING, 8 * U_SPAN, U_SWIZZLE);
  }

  __device__ void await_full(Place<Shape> at) const { await_phase(&memory.barriers().full[at.stage], at.phase); }

  // The wgmma of this stage is committed. The one before it is done when only one is left in flight, and then its stage
  // may be filled: the tensor cores never run dry.
  __device__ void pass() {
    wgmma_wait<1>();
    release();
    unreleased = place.stage;
    place.advance();
  }

  // All that was multiplied is done, its sums may be read.
  __device__ void finish() {
    wgmma_wait<0>();
    release();
    unreleased = -1;
  }

 private:
  // To the producers of both blocks. What they are told is that reads are over, which need no release: only the TMA
  // writes there.
  __device__ void release() const {
    const int thread = thread_index() % WARPGROUP;
    if (unreleased >= 0 && thread < CLUSTER) arrive_in_block(&memory.barriers().empty[unreleased], thread);
  }
};

}  // namespace fused_lora::cuda::hopper
