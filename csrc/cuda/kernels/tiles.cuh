// The main loop that both kernels share: a tile of acc[outer_a, outer_b] += Σ_k a[outer_a, k] b[outer_b, k].
#pragma once

#include <cstddef>
#include <type_traits>

#include "arithmetic.cuh"
#include "dropout.cuh"
#include "launches.h"
#include "primitives.cuh"

namespace fused_lora::cuda {

// WARPS_A × WARPS_B warps, each of FRAGMENTS_A × FRAGMENTS_B fragments of 16 × 8; K_BYTES of k at a time.
template <int WARPS_A, int WARPS_B, int FRAGMENTS_A_, int FRAGMENTS_B_, int K_BYTES_>
struct Tile {
  static constexpr int THREADS = 32 * WARPS_A * WARPS_B;
  static constexpr int FRAGMENTS_A = FRAGMENTS_A_, FRAGMENTS_B = FRAGMENTS_B_, K_BYTES = K_BYTES_;
  static constexpr int OUTER_A = 16 * WARPS_A * FRAGMENTS_A, OUTER_B = 8 * WARPS_B * FRAGMENTS_B;
  static_assert(FRAGMENTS_B % 2 == 0, "a fragment of b is two operands of mma");

  __device__ static int warp_outer_a() { return thread_index() / 32 / WARPS_B * (16 * FRAGMENTS_A); }
  __device__ static int warp_outer_b() { return thread_index() / 32 % WARPS_B * (8 * FRAGMENTS_B); }
};

// Blocks on an SM, for __launch_bounds__. Without it the compiler aims at more blocks, and spills.
constexpr int LEAST_BLOCKS = 1;

// What is left of a matrix, where a tile is no longer than an int.
__device__ inline int at_most(int64_t count, int limit) { return count < limit ? static_cast<int>(count) : limit; }

// One operand in global memory: from element (outer, k) = (first_outer, 0) of it on.
struct Operand {
  const void* data;
  int64_t first_outer, outer_count, stride_outer, stride_k;
  bool is_float32, in_vectors;
};

// along_k: k is the dimension that vectors go along.  outer_is_0: outer is the matrix's first dimension.
template <typename Element>
__device__ Operand operand(const Matrix& matrix, bool outer_is_0, bool along_k, int64_t first_outer, int64_t count) {
  Operand made{matrix.data, first_outer, count, outer_is_0 ? matrix.stride_0 : matrix.stride_1,
               outer_is_0 ? matrix.stride_1 : matrix.stride_0};
  made.is_float32 = sizeof(Element) == 4 || matrix.is_float32;
  const int64_t within = along_k ? made.stride_k : made.stride_outer;
  const int64_t between = along_k ? made.stride_outer : made.stride_k;
  const uint64_t bytes = reinterpret_cast<uint64_t>(matrix.data) | static_cast<uint64_t>(between) * sizeof(Element);
  made.in_vectors = within == 1 && bytes % 16 == 0 && made.is_float32 == (sizeof(Element) == 4);
  return made;
}

// OUTER × K of an operand in shared memory. ALONG_K: neighbours along k are neighbours there, else those of outer are.
// Lines are a little longer than what they hold, so that a fragment's elements lie in different banks.
template <typename Element, int OUTER, int K, bool ALONG_K_, int THREADS>
struct Side {
  static constexpr bool ALONG_K = ALONG_K_;
  static constexpr int VECTOR = 16 / sizeof(Element);
  static constexpr int LINES = ALONG_K ? OUTER : K, LENGTH = ALONG_K ? K : OUTER;
  static constexpr int PITCH = LENGTH + (ALONG_K ? VECTOR : 8);
  static constexpr int BYTES = LINES * PITCH * sizeof(Element);
  static_assert(LINES * LENGTH % (VECTOR * THREADS) == 0, "every thread loads as many vectors");

  __device__ static int offset(int outer, int k) { return ALONG_K ? outer * PITCH + k : k * PITCH + outer; }

  // Elements past the operand's end are zero.
  __device__ static void load(Element* stage, const Operand& from, int64_t first_k, int64_t end_k) {
    if (from.in_vectors) {
      for_each_vector(from, first_k, end_k, [&](int to, int64_t index, int count) {
        copy_async(stage + to, static_cast<const Element*>(from.data) + index,
                   count * static_cast<int>(sizeof(Element)));
      });
    } else {
      const int64_t step = ALONG_K ? from.stride_k : from.stride_outer;
      for_each_vector(from, first_k, end_k, [&](int to, int64_t index, int count) {
#pragma unroll 1
        for (int i = 0; i < VECTOR; ++i) stage[to + i] = i < count ? element(from, index + i * step) : Element{};
      });
    }
  }

  // visit(to, index, count) for this thread's vectors: their first element's place in the stage and in the operand, and
  // how many of their elements are inside it.
  template <typename Visit>
  __device__ static void for_each_vector(const Operand& from, int64_t first_k, int64_t end_k, const Visit& visit) {
    constexpr int PER_LINE = LENGTH / VECTOR;
    // how far the operand goes on from here, where a tile is no longer than an int
    const int outer_left = at_most(from.outer_count - from.first_outer, OUTER), k_left = at_most(end_k - first_k, K);
    const int64_t first = from.first_outer * from.stride_outer + first_k * from.stride_k;
#pragma unroll
    for (int turn = 0; turn < LINES * PER_LINE / THREADS; ++turn) {
      const int vector = turn * THREADS + thread_index();
      const int line = vector / PER_LINE, within = vector % PER_LINE * VECTOR;
      const int outer = ALONG_K ? line : within, k = ALONG_K ? within : line;
      const bool inside = outer < outer_left && k < k_left;
      const int left = ALONG_K ? k_left - k : outer_left - outer;
      visit(line * PITCH + within, inside ? first + outer * from.stride_outer + k * from.stride_k : 0,
            !inside         ? 0
            : left < VECTOR ? left
                            : VECTOR);
    }
  }

  __device__ static Element element(const Operand& from, int64_t index) {
    if (!from.is_float32) return static_cast<const Element*>(from.data)[index];
    Element rounded;
    round_to(static_cast<const float*>(from.data)[index], rounded);
    return rounded;
  }

  // Zero what the mask drops of a matrix whose element (outer, k) is number outer · of_outer + k · of_k.
  __device__ static void drop(Element* stage, const Dropout& dropout, int64_t first_outer, int64_t of_outer,
                              int64_t first_k, int64_t of_k) {
#pragma unroll 1
    for (int index = thread_index(); index < LINES * LENGTH; index += THREADS) {
      const int line = index / LENGTH, within = index % LENGTH;
      const int outer = ALONG_K ? line : within, k = ALONG_K ? within : line;
      if (!dropout.keeps((first_outer + outer) * of_outer + (first_k + k) * of_k)) stage[offset(outer, k)] = Element{};
    }
  }
};

// A main loop over tiles of one shape. Two stages: while one is multiplied, the next is on its way.
template <typename ARITHMETIC, typename TILE, bool A_ALONG_K, bool B_ALONG_K>
struct Product {
  using Arithmetic = ARITHMETIC;
  using Shape = TILE;
  using Element = typename Arithmetic::Element;
  static constexpr int BLOCK_K = TILE::K_BYTES / sizeof(Element);
  using A = Side<Element, TILE::OUTER_A, BLOCK_K, A_ALONG_K, TILE::THREADS>;
  using B = Side<Element, TILE::OUTER_B, BLOCK_K, B_ALONG_K, TILE::THREADS>;
  static constexpr int SHARED_BYTES = 2 * (A::BYTES + B::BYTES);
  using Sums = float[TILE::FRAGMENTS_A][TILE::FRAGMENTS_B][4];

  // The part of the dropout mask that a meets; numbers of elements as in Side::drop.
  struct Dropped {
    Dropout dropout;
    int64_t of_outer, of_k;
  };

  // sums += a b over k from first_k to end_k. weigh(value, outer_a, outer_b): what of a product of Arithmetic::STEP
  // terms is added, instead of itself.  shared: SHARED_BYTES; all threads may use it again when this returns.
  template <typename Weigh = std::nullptr_t>
  __device__ static void add(Sums& sums, const Operand& a, const Operand& b, int64_t first_k, int64_t end_k,
                             const Dropped& dropped, unsigned char* shared, const Weigh& weigh = nullptr) {
    load(shared, 0, a, b, first_k, end_k);
    for (int64_t k = first_k, stage = 0; k < end_k; k += BLOCK_K, stage ^= 1) {
      load(shared, stage ^ 1, a, b, k + BLOCK_K, end_k);
      await_copies<1>();
      sync_block();
      Element* stage_a = reinterpret_cast<Element*>(shared + stage * (A::BYTES + B::BYTES));
      if (dropped.dropout.active) {
        A::drop(stage_a, dropped.dropout, a.first_outer, dropped.of_outer, k, dropped.of_k);
        sync_block();
      }
      const Element* stage_b = reinterpret_cast<const Element*>(shared + stage * (A::BYTES + B::BYTES) + A::BYTES);
      multiply(sums, stage_a, stage_b, end_k - k, weigh);
      // the next load overwrites what is read here
      sync_block();
    }
    await_copies<0>();
  }

  // visit(sum, outer_a, outer_b) for each of this thread's sums, within the tile.
  template <typename Visit>
  __device__ static void for_each(Sums& sums, const Visit& visit) {
#pragma unroll
    for (int in_a = 0; in_a < TILE::FRAGMENTS_A; ++in_a) {
#pragma unroll
      for (int in_b = 0; in_b < TILE::FRAGMENTS_B; ++in_b) {
#pragma unroll
        for (int index = 0; index < 4; ++index)
          visit(sums[in_a][in_b][index], outer_a(in_a, index), outer_b(in_b, index));
      }
    }
  }

 private:
  __device__ static int outer_a(int fragment, int index) {
    return TILE::warp_outer_a() + fragment * 16 + fragment_row() + index / 2 * 8;
  }
  __device__ static int outer_b(int fragment, int index) {
    return TILE::warp_outer_b() + fragment * 8 + fragment_column() + index % 2;
  }

  __device__ static void load(unsigned char* shared, int64_t stage, const Operand& a, const Operand& b, int64_t k,
                              int64_t end_k) {
    if (k < end_k) {
      unsigned char* at = shared + stage * (A::BYTES + B::BYTES);
      A::load(reinterpret_cast<Element*>(at), a, k, end_k);
      B::load(reinterpret_cast<Element*>(at + A::BYTES), b, k, end_k);
    }
    // an empty group too, so that all but the last is always what must have come
    commit_copies();
  }

  template <typename Weigh>
  __device__ static void multiply(Sums& sums, const Element* a, const Element* b, int64_t count, const Weigh& weigh) {
    constexpr bool WEIGHED = !std::is_same_v<Weigh, std::nullptr_t>;
#pragma unroll WEIGHED ? 1 : Arithmetic::UNROLL
    for (int k = 0; k < BLOCK_K; k += Arithmetic::STEP) {
      // ranks are few, and the rest of a stage is zero
      if (WEIGHED && k >= count) break;
      decltype(Arithmetic::template fragment<B, false>(b, 0, 0)) of_b[TILE::FRAGMENTS_B / 2];
#pragma unroll
      for (int in_b = 0; in_b < TILE::FRAGMENTS_B / 2; ++in_b) {
        of_b[in_b] = Arithmetic::template fragment<B, false>(b, TILE::warp_outer_b() + in_b * 16, k);
      }
#pragma unroll
      for (int in_a = 0; in_a < TILE::FRAGMENTS_A; ++in_a) {
        const auto of_a = Arithmetic::template fragment<A, true>(a, TILE::warp_outer_a() + in_a * 16, k);
#pragma unroll
        for (int in_b = 0; in_b < TILE::FRAGMENTS_B; ++in_b) {
          if constexpr (WEIGHED) {
            float part[4] = {};
            Arithmetic::multiply(part, of_a, of_b[in_b / 2], in_b % 2);
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[in_a][in_b][i] += weigh(part[i], outer_a(in_a, i), outer_b(in_b, i));
          } else {
            Arithmetic::multiply(sums[in_a][in_b], of_a, of_b[in_b / 2], in_b % 2);
          }
        }
      }
    }
  }
};

}  // namespace fused_lora::cuda
