// The products of a warp: acc (16×8) += a (16×STEP) b (STEP×8), in four arithmetics.
// UNROLL: how many of them in a row the registers have room for.
#pragma once

#include "primitives.cuh"

namespace fused_lora::cuda {

// Where the four elements of a lane's part of acc are: rows ROW and ROW + 8, columns COLUMN and COLUMN + 1.
__device__ inline int lane() { return thread_index() % 32; }
__device__ inline int fragment_row() { return lane() / 4; }
__device__ inline int fragment_column() { return lane() % 4 * 2; }

// A fragment is 16 outer × STEP of an operand, as a lane holds it: in quarters, of outer's and k's lower and upper
// half. All of a's is one operand of mma, with outer's halves next to each other; b's is two, each with k's halves next
// to each other, for mma reads neighbouring registers.  Side says where elements are in shared memory (tiles.cuh).
struct Registers {
  uint32_t of[4];
};

template <typename ELEMENT, void (*MMA)(float (&)[4], const uint32_t (&)[4], uint32_t, uint32_t)>
struct SixteenBits {
  using Element = ELEMENT;
  static constexpr int STEP = 16, UNROLL = 4;

  template <typename Side, bool OF_A>
  __device__ static Registers fragment(const Element* stage, int outer, int k) {
    const int neighbour = lane() / 8 % 2 * 8, other = lane() / 16 * 8;
    outer += (OF_A ? neighbour : other) + (Side::ALONG_K ? lane() % 8 : 0);
    k += (OF_A ? other : neighbour) + (Side::ALONG_K ? 0 : lane() % 8);
    Registers registers;
    load_matrices<!Side::ALONG_K>(registers.of, stage + Side::offset(outer, k));
    return registers;
  }

  __device__ static void multiply(float (&acc)[4], const Registers& a, const Registers& b, int half) {
    MMA(acc, a.of, b.of[2 * half], b.of[2 * half + 1]);
  }
};

using BFloat16Arithmetic = SixteenBits<BFloat16, mma_bfloat16>;
using HalfArithmetic = SixteenBits<Half, mma_half>;

struct Tf32Arithmetic {
  using Element = float;
  static constexpr int STEP = 8, UNROLL = 2;

  template <typename Side, bool OF_A>
  __device__ static Registers fragment(const Element* stage, int outer, int k) {
    Registers registers;
    for (int index = 0; index < 4; ++index) {
      const int at_outer = outer + lane() / 4 + (OF_A ? index % 2 : index / 2) * 8;
      const int at_k = k + lane() % 4 + (OF_A ? index / 2 : index % 2) * 4;
      registers.of[index] = tf32_bits(stage[Side::offset(at_outer, at_k)]);
    }
    return registers;
  }

  __device__ static void multiply(float (&acc)[4], const Registers& a, const Registers& b, int half) {
    mma_tf32(acc, a.of, b.of[2 * half], b.of[2 * half + 1]);
  }
};

// Without tensor cores a lane reads what its own four sums need; the compiler keeps what the next fragment reads too.
struct ExactArithmetic {
  using Element = float;
  static constexpr int STEP = 8, UNROLL = 1;

  template <typename Side>
  struct Fragment {
    const float* stage;
    int outer, k;

    __device__ float at(int in_outer, int in_k) const { return stage[Side::offset(outer + in_outer, k + in_k)]; }
  };

  template <typename Side, bool OF_A>
  __device__ static Fragment<Side> fragment(const Element* stage, int outer, int k) {
    return {stage, outer, k};
  }

  template <typename A, typename B>
  __device__ static void multiply(float (&acc)[4], const A& a, const B& b, int half) {
    const int row = fragment_row(), column = fragment_column() + half * 8;
    // of their own first: a long sum of short ones errs less than one long sum, as a library's does
    float sums[4] = {};
#pragma unroll
    for (int k = 0; k < STEP; ++k) {
#pragma unroll
      for (int index = 0; index < 4; ++index) {
        sums[index] += a.at(row + index / 2 * 8, k) * b.at(column + index % 2, k);
      }
    }
#pragma unroll
    for (int index = 0; index < 4; ++index) acc[index] += sums[index];
  }
};

}  // namespace fused_lora::cuda
