// What a consumer multiplies: a by w and, for who computes h, by u; then h by v, which is the LoRA step.
//
// A thread has rows row() and row() + 8 of its consumer's 64, and of every 8 columns two neighbours: in sums, and in
// the fragments of ldmatrix and stmatrix alike.
#pragma once

#include "pipeline.cuh"

namespace fused_lora::cuda::hopper {

template <typename Shape>
struct Consumer {
  using Element = typename Shape::Element;
  using OutSums = float[Shape::COLUMNS / 2];
  using HSums = float[Shape::RANKS / 2];

  const Arguments& arguments;
  const Schedule& schedule;
  Memory<Shape> memory;
  int consumer, rank;
  Stages<Shape> stages;

  __device__ Consumer(const Arguments& arguments, const Schedule& schedule, Memory<Shape> memory, int consumer,
                      int rank)
      : arguments(arguments),
        schedule(schedule),
        memory(memory),
        consumer(consumer),
        rank(rank),
        stages{memory, consumer} {}

  // Anew in each tile: what follows from it, kept from tile to tile, would leave too few registers for sums.
  __device__ static int thread() { return computed_anew(thread_index() % WARPGROUP); }
  __device__ static int first_row_of_warp() { return thread() / 32 * 16; }
  // the thread's first row, of a, h and out
  __device__ int row(const Work& work) const {
    return (work.row * CLUSTER + rank) * BLOCK_M + consumer * ROWS + first_row_of_warp() + thread() % 32 / 4;
  }
  __device__ static int column_of_pair() { return thread() % 4 * 2; }

  // sums = a w and h = a u, or one of them, over all of Q.
  template <bool OUT, bool H>
  __device__ void multiply(const Work& work, OutSums& sums, HSums& h) {
    using Stages = hopper::Stages<Shape>;
    const int steps = ceil_div(arguments.Q, BLOCK_Q);
    // made where it is used, as in the epilogue: its keys would take registers from all else
    const Dropout dropout(arguments.dropout, H && Shape::DROPS_INPUT);
    for (int step = 0; step < steps; ++step) {
      stages.await_full(stages.place);
      const uint64_t a = stages.a(stages.place), w = stages.w(stages.place), u = stages.u(stages.place);
      // not for nothing: the compiler fills a group that has no wgmma
      if constexpr (OUT || !Shape::DROPS_INPUT) wgmma_fence();
      if constexpr (OUT) {
#pragma unroll
        for (int k = 0; k < BLOCK_Q / 16; ++k) {
          Stages::template Product<Shape::COLUMNS>::multiply(sums, a + k * Stages::A_STEP, w + k * Stages::W_STEP,
                                                             step > 0 || k > 0);
        }
      }
      if constexpr (H && !Shape::DROPS_INPUT) {
#pragma unroll
        for (int k = 0; k < BLOCK_Q / 16; ++k) {
          Stages::template Product<Shape::RANKS>::multiply(h, a + k * Stages::A_STEP, u + k * Stages::U_STEP,
                                                           step > 0 || k > 0);
        }
      }
      if constexpr (OUT || !Shape::DROPS_INPUT) wgmma_commit();
      if constexpr (H && Shape::DROPS_INPUT) {
        multiply_dropped(work, dropout, step, u, h);
      } else {
        stages.pass();
      }
    }
    // else the LoRA step follows at once
    if constexpr (H) stages.finish();
  }

  // What follows the main loop of who computes h: h rounded, to memory and, where it is all of h, to this tile's own
  // LoRA step.
  __device__ void round_h(const Work& work, const HSums& h) {
    const float keep_scale = Shape::DROPS_INPUT ? arguments.dropout.keep_scale : 1.0f;
    const int m = row(work), first_r = work.block * BLOCK_R + column_of_pair();
    const bool scaled = !Shape::APART && arguments.scaled_h != nullptr;
    uint32_t factor[Shape::RANKS / 4];
#pragma unroll
    for (int i = 0; i < Shape::RANKS / 4; ++i) {
      // as stmatrix takes them: 8 columns of the upper rows, of the lower, then the next 8
      const int r = first_r + i / 2 * 8, mm = m + i % 2 * 8;
      const float first = h[2 * i] * keep_scale, second = h[2 * i + 1] * keep_scale;
      // rounded here: reference.py rounds at the same point
      const uint32_t pair = round_pair(first, second, Element{});
      const uint32_t scaled_pair =
          Shape::APART ? pair : round_pair(first * arguments.scale, second * arguments.scale, Element{});
      // beyond R, zero by zero would be NaN where a has an infinity
      factor[i] = r < arguments.R ? scaled_pair : 0;
      if (work.column > 0 || mm >= arguments.M || r >= arguments.R) continue;
      const int64_t at = (static_cast<int64_t>(mm) * arguments.R + r) * sizeof(Element);
      store_pair(static_cast<unsigned char*>(arguments.h) + at, pair);
      if (scaled) store_pair(static_cast<unsigned char*>(arguments.scaled_h) + at, scaled_pair);
    }
    if (arguments.publishes) Schedule::publish(Schedule::flag(arguments.counters, work), consumer);
    if (schedule.has_own_h(work)) put_into_stage(factor);
  }

  // sums += scaled_h v: a step of the main loop.
  __device__ void add_low_rank(OutSums& sums) {
#pragma unroll 1
    for (int block = 0; block < schedule.blocks; ++block) {
      stages.await_full(stages.place);
      wgmma_fence();
      multiply_by_v<Shape::COLUMNS>(sums, stages.a(stages.place), stages.w(stages.place), true);
      wgmma_commit();
      stages.pass();
    }
    stages.finish();
  }

  // The other way (Shape::APART): h v of a few of out's columns at a time, for there are no registers for more, over
  // all blocks of ranks. Their stages are there at once, and stay until all columns have been.
  __device__ void await_low_rank() {
    stages.finish();
    Place<Shape> place = stages.place;
    for (int block = 0; block < schedule.blocks; ++block, place.advance()) stages.await_full(place);
  }
  __device__ void multiply_apart(int column, float (&product)[APART_COLUMNS / 2]) {
    using Stages = hopper::Stages<Shape>;
    Place<Shape> place = stages.place;
#pragma unroll 1
    for (int block = 0; block < schedule.blocks; ++block, place.advance()) {
      wgmma_fence();
      const uint64_t v = stages.w(place) + Stages::to_column(column);
      multiply_by_v<APART_COLUMNS>(product, stages.a(place), v, block > 0);
      wgmma_commit();
      // here and not after the loop, where the compiler does not see that all are done, and waits for each wgmma
      wgmma_wait<0>();
    }
  }
  __device__ void pass_low_rank() {
    for (int block = 0; block < schedule.blocks; ++block) stages.pass();
    stages.finish();
  }

 private:
  // h += D(a) u: a's elements pass through registers on their way to the tensor cores, where the mask falls on them.
  __device__ void multiply_dropped(const Work& work, const Dropout& dropout, int step, uint64_t u, HSums& h) {
    using Stages = hopper::Stages<Shape>;
    const unsigned char* tile = memory.a(stages.place.stage) + consumer * ROWS * SPAN;
    const int64_t Q = arguments.Q, first_pair = (row(work) * Q + step * BLOCK_Q + column_of_pair()) / 2;
    uint32_t dropped[BLOCK_Q / 16][4];
#pragma unroll
    for (int k = 0; k < BLOCK_Q / 16; ++k) {
      load_matrices<false>(dropped[k], tile + swizzled(first_row_of_warp(), 2 * k));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        dropped[k][i] &= dropout.keeps_pair(first_pair + i % 2 * 4 * Q + (k * 16 + i / 2 * 8) / 2);
      }
    }
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < BLOCK_Q / 16; ++k) {
      Stages::template Product<Shape::RANKS>::multiply_registers(h, dropped[k], u + k * Stages::U_STEP,
                                                                 step > 0 || k > 0);
    }
    wgmma_commit();
    // at once, for the next step writes to the registers that wgmma reads; and when it is done, which takes the
    // registers of all four warps, all of them have read a from the stage
    stages.pass();
    stages.finish();
  }

  // sums (+)= h v of one block of ranks and N columns.
  template <int N>
  __device__ static void multiply_by_v(float (&sums)[N / 2], uint64_t h, uint64_t v, bool accumulate) {
    using Stages = hopper::Stages<Shape>;
#pragma unroll
    for (int k = 0; k < Shape::RANKS / 16; ++k) {
      Stages::template Product<N>::multiply(sums, h + k * Stages::A_STEP, v + k * Stages::W_STEP, accumulate || k > 0);
    }
  }

  // The producer leaves a of this tile's LoRA step to us: as the TMA would have filled it.
  __device__ void put_into_stage(const uint32_t (&factor)[Shape::RANKS / 4]) {
    // v has come, so nobody reads or writes the stage
    stages.await_full(stages.place);
    unsigned char* tile = memory.a(stages.place.stage) + consumer * ROWS * SPAN;
    const int first_row = first_row_of_warp();
#pragma unroll
    for (int k = 0; k < Shape::RANKS / 16; ++k) {
      const uint32_t fragments[] = {factor[4 * k], factor[4 * k + 1], factor[4 * k + 2], factor[4 * k + 3]};
      store_matrices(tile + swizzled(first_row, 2 * k), fragments);
    }
    // wgmma sees what each thread has stored, once all have
    fence_shared_for_tma();
    sync_warpgroup(1 + consumer);
  }
};

}  // namespace fused_lora::cuda::hopper
