// Both adapter gradients on Hopper, in one launch: dA = scale · gᵀ D(x), dB = scale · dyᵀ h, reductions over M.
//
// All the time goes into reading x and dy once. A block has 128 columns of one of them, and all ranks; two warpgroups
// multiply 64 columns each, (64 columns × 64 tokens) (64 tokens × ranks), both operands as they lie in memory: the TMA
// brings tokens × columns and tokens × ranks, and wgmma contracts over the rows of both. So no element passes through
// a register, unless a dropout mask meets it.
//
// A model, not a measurement, of M = 8192, K = N = 4096, R = 16 in bf16 on an H100 (132 SMs, 3 TB/s, 1.7 GHz):
//   memory      134 MB of x and dy, 1 MB of the rest                                               45 µs
//   in flight   6 stages of 16 KB in each of 128 blocks on as many SMs; 3 TB/s for 1.5 µs of latency need 34 KB an SM
//   multiplying 4 wgmmas and two barriers, about 300 cycles a stage, of the 1,200 that memory needs for one
//   L2          g and h are read again for each 128 columns: 17 MB; 67 MB at rank 64, 268 MB at rank 256
//   start       launch, barriers, tensor maps, first bytes                                         about 4 µs
//   end         two parts of 8 KB a tile, an arrival, their sum                                    about 3 µs
// 52 µs with nothing in L2. All parts walk M backwards side by side, so what the input gradient read last of dy is met
// in L2 before anything displaces it: 10 MB are 3 µs less.
// Drawing a mask costs about 2,000 cycles a stage of x, on an SM that then takes as long for a stage of dy.
#pragma once

#include "../kernels/reduction.cuh"
#include "hopper.cuh"
#include "wgmma.cuh"

namespace fused_lora::cuda::hopper {

struct GradArguments {
  AdapterGradArguments gradients;
  TensorMap wide_A, low_A, wide_B, low_B;
};

// A block's tile: 128 columns × RANKS, 64 tokens at a time.
template <typename ELEMENT, int RANKS>
struct GradTile {
  using Element = ELEMENT;
  struct Shape {
    static constexpr int THREADS = 256, OUTER_A = 128, OUTER_B = RANKS;
  };
  static constexpr int TOKENS = 64;

  // In shared memory an operand is in panels of 64 tokens, as wide as the swizzle spans: up to 64 elements.
  static constexpr int WIDE_PANEL = TOKENS * 64 * 2, WIDE_BYTES = Shape::OUTER_A / 64 * WIDE_PANEL;
  static constexpr int LOW_WIDTH = RANKS < 64 ? RANKS : 64, LOW_ROW = LOW_WIDTH * 2, LOW_PANEL = TOKENS * LOW_ROW;
  static constexpr int LOW_BYTES = RANKS / LOW_WIDTH * LOW_PANEL;
  static constexpr Swizzle LOW_SWIZZLE = LOW_ROW == 128 ? Swizzle::k128 : LOW_ROW == 64 ? Swizzle::k64 : Swizzle::k32;
  static constexpr int STAGE_BYTES = WIDE_BYTES + LOW_BYTES;

  // Two blocks share an SM, so that a few more blocks than SMs are no second wave. The sums of 256 ranks are half of
  // an SM's registers: there a block has the SM for itself.
  static constexpr int BLOCKS = RANKS <= 128 ? 2 : 1;
  static constexpr int STAGES = (BLOCKS == 2 ? 112 : 200) * 1024 / STAGE_BYTES;
  static constexpr int SHARED_BYTES = 1024 + STAGES * (STAGE_BYTES + 2 * sizeof(Barrier)) + PLACE_BYTES;
  static_assert(SHARED_BYTES + 1024 <= 228 * 1024 / BLOCKS, "an SM's shared memory, of which a block costs 1 KB more");

  // one wgmma: of a transposed first operand in shared memory
  static constexpr int WIDTH = RANKS < 128 ? RANKS : 128;
  using Product = Wgmma<WIDTH, Element, true, true>;
  using Sums = float[RANKS / WIDTH][WIDTH / 2];

  // visit(sum, column, rank) for each of this thread's sums, within the tile.
  template <typename Visit>
  __device__ static void for_each(Sums& sums, const Visit& visit) {
    const int column = thread_index() / 32 * 16 + thread_index() % 32 / 4, rank = thread_index() % 4 * 2;
#pragma unroll
    for (int index = 0; index < RANKS / 2; ++index) {
      float& sum = sums[index / (WIDTH / 2)][index % (WIDTH / 2)];
      visit(sum, column + index / 2 % 2 * 8, rank + index / 4 * 8 + index % 2);
    }
  }
};

// Zero what the mask drops of a warpgroup's panel, whose first element is number `first` of a matrix with `columns`,
// both even: two neighbours share a hash.
__device__ inline void drop_panel(unsigned char* panel, const Dropout& dropout, int64_t first, int64_t columns) {
  // the swizzle: a row's eight vectors are in an order that the row's number, modulo 8, gives
  const int thread = thread_index() % 128, token = thread / 8;
  int64_t pair = (first + token * columns + (thread % 8 ^ token % 8) * 8) / 2;
#pragma unroll 1
  for (int index = thread; index < 64 * 8; index += 128, pair += 8 * columns) {
    uint32_t pairs[4];
    load_vector(pairs, panel + 16 * index);
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] &= dropout.keeps_pair(pair + i);
    store_vector(panel + 16 * index, pairs);
  }
}

template <typename Tile>
__global__ void __launch_bounds__(Tile::Shape::THREADS, Tile::BLOCKS)
    adapter_grad(const __grid_constant__ GradArguments arguments) {
  if constexpr (FOR_HOPPER) {
    const AdapterGradArguments& gradients = arguments.gradients;
    const GradientTile<typename Tile::Shape> at(gradients, block_index());
    const Reduction& reduction = at.of_A ? gradients.dA : gradients.dB;
    const TensorMap* wide = at.of_A ? &arguments.wide_A : &arguments.wide_B;
    const TensorMap* low = at.of_A ? &arguments.low_A : &arguments.low_B;
    const Dropout dropout(gradients.dropout, reduction.has_dropout);
    const int warp = thread_index() / 32, warpgroup = warp / 4;
    const bool first_of_warp = thread_index() % 32 == 0;

    // a swizzle is a function of the address, so panels begin at multiples of 1024
    unsigned char* stages = shared_memory() + (0u - shared_address(shared_memory())) % 1024;
    auto* full = reinterpret_cast<Barrier*>(stages + Tile::STAGES * Tile::STAGE_BYTES);
    Barrier* empty = full + Tile::STAGES;
    auto* place = reinterpret_cast<int*>(empty + Tile::STAGES);
    if (thread_index() == 0) {
      for (int stage = 0; stage < Tile::STAGES; ++stage) {
        init_barrier(full + stage, 1);
        // each warp says for itself that it has read the stage
        init_barrier(empty + stage, Tile::Shape::THREADS / 32);
      }
      publish_barriers();
    }
    sync_cluster();

    // Backwards, and the parts in turn: part 0 has the last block of tokens, part 1 the one before, and so on.
    const int blocks = ceil_div(gradients.M, Tile::TOKENS), parts = gradients.split;
    const int steps = (blocks - at.part + parts - 1) / parts;
    const auto first_token = [&](int step) { return (blocks - 1 - at.part - step * parts) * Tile::TOKENS; };
    const auto load = [&](int step) {
      if (!first_of_warp) return;
      unsigned char* stage = stages + step % Tile::STAGES * Tile::STAGE_BYTES;
      Barrier* barrier = full + step % Tile::STAGES;
      arrive_expecting(barrier, Tile::STAGE_BYTES);
#pragma unroll
      for (int panel = 0; panel < Tile::Shape::OUTER_A / 64; ++panel) {
        load_tile(stage + panel * Tile::WIDE_PANEL, wide, barrier, static_cast<int>(at.first_column) + panel * 64,
                  first_token(step));
      }
#pragma unroll
      for (int panel = 0; panel < Tile::Shape::OUTER_B / Tile::LOW_WIDTH; ++panel) {
        load_tile(stage + Tile::WIDE_BYTES + panel * Tile::LOW_PANEL, low, barrier, panel * Tile::LOW_WIDTH,
                  first_token(step));
      }
    };

    if (warp == 0) {
      for (int step = 0; step < steps && step < Tile::STAGES; ++step) load(step);
    }
    typename Tile::Sums sums = {};
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      // the stage of the step before takes the next one that has none: its other readers are about done by now
      const int refilled = step - 1, next = refilled + Tile::STAGES;
      if (warp == 0 && refilled >= 0 && next < steps) {
        await_phase(empty + refilled % Tile::STAGES, refilled / Tile::STAGES % 2);
        load(next);
      }
      unsigned char* stage = stages + step % Tile::STAGES * Tile::STAGE_BYTES;
      unsigned char* panel = stage + warpgroup * Tile::WIDE_PANEL;
      await_phase(full + step % Tile::STAGES, step / Tile::STAGES % 2);
      if (dropout.active) {
        drop_panel(panel, dropout, first_token(step) * reduction.columns + at.first_column + warpgroup * 64,
                   reduction.columns);
        // wgmma reads what other threads wrote, and later the TMA writes there again
        fence_shared_for_tma();
        sync_block();
      }
      wgmma_fence();
#pragma unroll
      for (int token = 0; token < Tile::TOKENS; token += 16) {
        const uint64_t of_wide = matrix_descriptor(panel + token * 128, Tile::WIDE_PANEL, 8 * 128, Swizzle::k128);
#pragma unroll
        for (int width = 0; width < Tile::Shape::OUTER_B / Tile::WIDTH; ++width) {
          const unsigned char* ranks = stage + Tile::WIDE_BYTES + width * (Tile::WIDTH * Tile::TOKENS * 2);
          Tile::Product::multiply(
              sums[width], of_wide,
              matrix_descriptor(ranks + token * Tile::LOW_ROW, Tile::LOW_PANEL, 8 * Tile::LOW_ROW, Tile::LOW_SWIZZLE),
              true);
        }
      }
      wgmma_commit();
      wgmma_wait<0>();
      if (first_of_warp) arrive(empty + step % Tile::STAGES);
    }
    finish_gradient<typename Tile::Element, Tile>(sums, gradients, at, reduction, dropout, place);
  }
}

}  // namespace fused_lora::cuda::hopper
