// How a launch is cut, and what of it lies where in a block's shared memory.
//
// A block is three warpgroups: two consumers, each with 64 of a tile's 128 rows, and one whose warps fetch: a producer
// that asks the TMA for tiles, and in the cluster's first block a scheduler that takes tickets. Two blocks make a
// cluster and work on tiles one below the other: w's tile is the same for both, so each loads half of it for both.
// Without that the L2 cache is the limit, not the tensor cores.
#pragma once

#include <type_traits>

#include "../kernels/dropout.cuh"
#include "hopper.cuh"
#include "launches.h"
#include "wgmma.cuh"

namespace fused_lora::cuda::hopper {

constexpr int CLUSTER = 2, CONSUMERS = 2, WARPGROUP = 128;
// named barriers: 1 and 2 of a consumer's own threads, and of both
constexpr int BOTH_CONSUMERS = 1 + CONSUMERS;
constexpr int THREADS = (1 + CONSUMERS) * WARPGROUP;
// A consumer has 128 sums of out, 32 of h, and what addresses need. Of 65,536 registers 65,536 - 256 · 232 are left for
// the others, and eight is the unit.
constexpr int CONSUMER_REGISTERS = 232, PRODUCER_REGISTERS = 40;

constexpr int BLOCK_M = 128, ROWS = BLOCK_M / CONSUMERS;
constexpr int BLOCK_Q = 64;       // of one step of the main loop: 128 bytes, the widest swizzle
constexpr int BLOCK_R = BLOCK_Q;  // the LoRA step is one of the same kind
constexpr int MOST_RANKS = 256;
constexpr int CHUNK = 64;  // columns of out that are rounded and stored at once
constexpr int CHUNK_BYTES = 64 * 64 * 2;
constexpr int APART_COLUMNS = 32;  // of h v where it is summed apart
constexpr int STAGINGS = 2;        // chunks of a consumer: one is filled while the other is stored
constexpr int SPAN = 128;          // bytes of a row of a tile, and of the swizzle

constexpr int MOST_SHARED_BYTES = 227 * 1024;

// ELEMENT: BFloat16 or Half.
// W_ALONG_Q: w, u and v are contiguous along the dimension that their products contract, as in the forward pass; else
// along the other one, as in the input gradient.
// COLUMNS: of a tile of out.  RANKS: of h that one tile computes; its rank is at most that, or has several blocks.
// DROPOUT: on a for h alone where W_ALONG_Q, else on h v.
template <typename ELEMENT, bool ALONG_Q, int TILE_COLUMNS, int TILE_RANKS, bool DROPOUT>
struct Shape {
  using Element = ELEMENT;
  static constexpr bool W_ALONG_Q = ALONG_Q;
  static constexpr int COLUMNS = TILE_COLUMNS, RANKS = TILE_RANKS;
  static constexpr bool DROPS_INPUT = DROPOUT && ALONG_Q, DROPS_OUTPUT = DROPOUT && !ALONG_Q;
  // scale · h may overflow in half, or lose its bits, where h does not; and a mask of h v has to come between h v and
  // a w. Both have h v summed apart, and scaled in float32.
  static constexpr bool APART = DROPS_OUTPUT || std::is_same<ELEMENT, Half>::value;

  static constexpr int A_BYTES = BLOCK_M * SPAN, W_BYTES = COLUMNS * SPAN, U_BYTES = RANKS * SPAN;
  static constexpr int STAGING_BYTES = CONSUMERS * STAGINGS * CHUNK_BYTES;
  static constexpr int larger(int a, int b) { return a > b ? a : b; }
  // Tiles of u are there in the main loop of who computes h, out's chunks after it: they share memory, for which a
  // whole stage more fits. Four stages of 256 columns instead of three are 5 %.
  static constexpr int shared_by_u_and_out(int stages) { return larger(stages * U_BYTES, STAGING_BYTES); }
  static constexpr int BARRIER_BYTES = 512, ALIGNMENT = 1024;
  static constexpr int bytes(int stages) {
    return stages * (A_BYTES + W_BYTES) + shared_by_u_and_out(stages) + BARRIER_BYTES + ALIGNMENT;
  }
  static constexpr int most_stages(int stages) {
    return bytes(stages) <= MOST_SHARED_BYTES ? stages : most_stages(stages - 1);
  }
  static constexpr int STAGES = most_stages(8), SHARED_BYTES = bytes(STAGES);
  static_assert(STAGES * BLOCK_R >= MOST_RANKS, "all blocks of h v must be there at once");
  static constexpr int BARRIERS_AT = SHARED_BYTES - BARRIER_BYTES - ALIGNMENT;
};

struct Arguments {
  TensorMap a, w, u, v, out;
  TensorMap factor;  // what v is multiplied by: scale · h, or h where scale comes after (Shape::APART)
  void *h, *scaled_h;
  const void* bias;
  DropoutArguments dropout;
  int* counters;
  float scale;
  int32_t M, P, Q, R, publishes;
};

template <typename Shape>
struct Memory {
  struct Barriers {
    Barrier full[Shape::STAGES], empty[Shape::STAGES];  // of each stage: its tiles have come; nobody reads them
    Barrier told[2], heard[2];                          // of each slot: a ticket is there; everybody has read it
    Barrier stored;                                     // out's chunks have left, tiles of u may come
    int ticket[2];
  };
  static_assert(sizeof(Barriers) <= Shape::BARRIER_BYTES, "barriers outgrow their place");

  unsigned char* base;

  // the swizzle is of addresses, and repeats every 1024 bytes
  __device__ Memory()
      : base(reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(shared_memory()) + Shape::ALIGNMENT - 1) &
                                              ~static_cast<uintptr_t>(Shape::ALIGNMENT - 1))) {}

  __device__ unsigned char* a(int stage) const { return base + stage * Shape::A_BYTES; }
  __device__ unsigned char* w(int stage) const {
    return base + Shape::STAGES * Shape::A_BYTES + stage * Shape::W_BYTES;
  }
  __device__ unsigned char* u(int stage) const { return w(Shape::STAGES) + stage * Shape::U_BYTES; }
  __device__ unsigned char* staging(int consumer, int index) const {
    return w(Shape::STAGES) + (consumer * STAGINGS + index) * CHUNK_BYTES;
  }
  __device__ Barriers& barriers() const { return *reinterpret_cast<Barriers*>(base + Shape::BARRIERS_AT); }
};

// The address that this lane gives ldmatrix and stmatrix for 16 × 16 elements of a tile: lane 8 · i + row has a row of
// 8×8 matrix i, and the matrices go down first, then right. In bytes from the start of the tile, whose rows are SPAN
// bytes, with the swizzle of 128 bytes.  column: of 8 elements.
__device__ inline int swizzled(int first_row, int column) {
  const int lane = computed_anew(thread_index() % 32), row = first_row + lane / 8 % 2 * 8 + lane % 8;
  return row * SPAN + ((column + lane / 16) ^ (row % 8)) * 16;
}

}  // namespace fused_lora::cuda::hopper
