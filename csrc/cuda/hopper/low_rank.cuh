// What a consumer multiplies: a by w and, for who computes h, by u; then h by v, which is the LoRA step.
//
// A thread has rows row() and row() + 8 of its consumer's 64, and of every 8 columns two neighbours: in sums and in
// fragments of a alike. So h, rounded where it is, is a first operand of wgmma.
#pragma once

#include "pipeline.cuh"

namespace fused_lora::cuda::hopper {

template <typename Shape>
struct Consumer {
  using Element = typename Shape::Element;
  using OutSums = float[Shape::COLUMNS / 2];
  using HSums = float[Shape::RANKS / 2];
  using OwnH = uint32_t[Shape::RANKS / 4];

  const Arguments& arguments;
  const Schedule& schedule;
  Memory<Shape> memory;
  int consumer, rank;
  Stages<Shape> stages;
  Dropout dropout;
  int with_h = 0;

  __device__ Consumer(const Arguments& arguments, const Schedule& schedule, Memory<Shape> memory, int consumer,
                      int rank)
      : arguments(arguments),
        schedule(schedule),
        memory(memory),
        consumer(consumer),
        rank(rank),
        stages{memory, consumer},
        dropout(arguments.dropout, Shape::DROPS_INPUT || Shape::DROPS_OUTPUT) {}

  __device__ static int thread() { return thread_index() % WARPGROUP; }
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
    const int steps = tiles(arguments.Q, BLOCK_Q);
    for (int step = 0; step < steps; ++step) {
      stages.await_full();
      const uint64_t a = stages.a(), w = stages.w(), u = stages.u();
      wgmma_fence();
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
      wgmma_commit();
      if constexpr (H && Shape::DROPS_INPUT) {
        multiply_dropped(work, step, u, h);
      } else {
        stages.pass();
      }
    }
    // else the LoRA step follows at once
    if constexpr (H) stages.finish();
  }

  // What follows a publisher's main loop: h rounded, to memory and, as what v is multiplied by, to own.
  __device__ void round_h(const Work& work, const HSums& h, OwnH& own) {
    const float keep_scale = Shape::DROPS_INPUT ? arguments.dropout.keep_scale : 1.0f;
    const int m = row(work), first_r = work.block * BLOCK_R + column_of_pair();
    const bool scaled = !Shape::APART && arguments.scaled_h != nullptr;
#pragma unroll
    for (int i = 0; i < Shape::RANKS / 4; ++i) {
      // in the order of an operand in registers: 8 columns of both rows, the next 8
      const int r = first_r + i / 2 * 8, mm = m + i % 2 * 8;
      const float first = h[2 * i] * keep_scale, second = h[2 * i + 1] * keep_scale;
      // rounded here: reference.py rounds at the same point
      const uint32_t pair = round_pair(first, second, Element{});
      const uint32_t scaled_pair =
          Shape::APART ? pair : round_pair(first * arguments.scale, second * arguments.scale, Element{});
      // beyond R, zero by zero would be NaN where a has an infinity
      own[i] = r < arguments.R ? scaled_pair : 0;
      if (work.column > 0 || mm >= arguments.M || r >= arguments.R) continue;
      const int64_t at = (static_cast<int64_t>(mm) * arguments.R + r) * sizeof(Element);
      store_pair(static_cast<unsigned char*>(arguments.h) + at, pair);
      if (scaled) store_pair(static_cast<unsigned char*>(arguments.scaled_h) + at, scaled_pair);
    }
    if (arguments.publishes) Schedule::publish(Schedule::flag(arguments.counters, work), consumer);
  }

  // sums += scale · h v, with h in registers (OWN) or from memory like any a.
  template <bool OWN>
  __device__ void add_low_rank(const Work& work, OutSums& sums, const OwnH& own) {
    using Stages = hopper::Stages<Shape>;
    const int blocks = OWN ? 1 : schedule.blocks;
    for (int block = 0; block < blocks; ++block) {
      stages.await_full();
      const uint64_t a = stages.a(), v = stages.w();
      if constexpr (Shape::APART) {
        // 64 columns at a time: there are no registers for more
#pragma unroll
        for (int chunk = 0; chunk < Shape::COLUMNS / CHUNK; ++chunk) {
          float product[CHUNK / 2];
          multiply_by_v<CHUNK, OWN>(product, a, own, v + chunk * Stages::CHUNK_STEP, false);
          wgmma_wait<0>();
          add_chunk(work, chunk, product, sums);
        }
      } else {
        multiply_by_v<Shape::COLUMNS, OWN>(sums, a, own, v, true);
      }
      stages.pass();
    }
    stages.finish();
  }

 private:
  // h += D(a) u: a's elements pass through registers on their way to the tensor cores, where the mask falls on them.
  __device__ void multiply_dropped(const Work& work, int step, uint64_t u, HSums& h) {
    using Stages = hopper::Stages<Shape>;
    const unsigned char* tile = memory.a(stages.place.stage) + consumer * ROWS * SPAN;
    const int64_t first = static_cast<int64_t>(row(work)) * arguments.Q + step * BLOCK_Q + column_of_pair();
    uint32_t dropped[BLOCK_Q / 16][4];
#pragma unroll
    for (int k = 0; k < BLOCK_Q / 16; ++k) {
      load_matrices<false>(dropped[k], tile + swizzled(first_row_of_warp(), 2 * k));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t element = first + i % 2 * 8 * static_cast<int64_t>(arguments.Q) + k * 16 + i / 2 * 8;
        dropped[k][i] &= dropout.keeps_pair(element);
      }
    }
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < BLOCK_Q / 16; ++k) {
      Stages::template Product<Shape::RANKS>::multiply_registers(h, dropped[k], u + k * Stages::U_STEP,
                                                                 step > 0 || k > 0);
    }
    wgmma_commit();
    // registers that wgmma reads are written again in the next step; and all warps must have read a from the stage
    sync_warpgroup(1 + consumer);
    stages.pass();
    stages.finish();
  }

  // sums (+)= h v of one block of ranks, committed.
  template <int N, bool OWN>
  __device__ void multiply_by_v(float (&sums)[N / 2], uint64_t a, const OwnH& own, uint64_t v, bool accumulate) {
    using Stages = hopper::Stages<Shape>;
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < Shape::RANKS / 16; ++k) {
      const bool adds = accumulate || k > 0;
      if constexpr (OWN) {
        const uint32_t(&h)[4] = *reinterpret_cast<const uint32_t(*)[4]>(own + 4 * k);
        Stages::template Product<N>::multiply_registers(sums, h, v + k * Stages::W_STEP, adds);
      } else {
        Stages::template Product<N>::multiply(sums, a + k * Stages::A_STEP, v + k * Stages::W_STEP, adds);
      }
    }
    wgmma_commit();
  }

  // sums of a chunk's columns += D'(scale · product)
  __device__ void add_chunk(const Work& work, int chunk, const float (&product)[CHUNK / 2], OutSums& sums) const {
    const float factor = arguments.scale * (Shape::DROPS_OUTPUT ? arguments.dropout.keep_scale : 1.0f);
    const int64_t first = static_cast<int64_t>(row(work)) * arguments.P + work.column * Shape::COLUMNS +
                          chunk * CHUNK + column_of_pair();
#pragma unroll
    for (int i = 0; i < CHUNK / 4; ++i) {
      const int64_t element = first + i % 2 * 8 * static_cast<int64_t>(arguments.P) + i / 2 * 8;
      const uint32_t kept = Shape::DROPS_OUTPUT ? dropout.keeps_pair(element) : 0xFFFFFFFF;
      float* pair = sums + chunk * (CHUNK / 2) + 2 * i;
      // a product that is dropped may be infinite: it is left out, not multiplied by zero
      if (kept & 0xFFFF) pair[0] += factor * product[2 * i];
      if (kept >> 16) pair[1] += factor * product[2 * i + 1];
    }
  }
};

}  // namespace fused_lora::cuda::hopper
