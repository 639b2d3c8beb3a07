// A contraction cut into parts, each summed by a block of its own: how the parts become one sum.
#pragma once

#include "handover.cuh"

namespace fused_lora::cuda {

template <typename Shape>
constexpr int64_t SLOT = Shape::OUTER_A * Shape::OUTER_B;

// Whether this block is the last of its tile; its sums are then those of all parts, added in the order of the parts,
// whoever came first: the same bits every time.
// slots: parts × Shape::OUTER_A × Shape::OUTER_B of the tile.  rows: sums of the tile's rows from there on are not
// kept.
template <typename Product>
__device__ bool sum_parts(typename Product::Sums& sums, float* slots, int part, int parts, int rows, int* arrivals,
                          int* place) {
  constexpr int THREADS = Product::Shape::THREADS;
  // neighbouring threads, neighbouring addresses
  float* mine = slots + part * SLOT<typename Product::Shape> + thread_index();
  Product::for_each(sums, [&](float& sum, int row, int) {
    if (row < rows) *mine = sum;
    mine += THREADS;
  });
  if (!arrives_last(arrivals, parts, place)) return false;
  Product::for_each(sums, [](float& sum, int, int) { sum = 0; });
  const float* theirs = slots + thread_index();
  // a thread's loads, 32 at once: each part read for itself would cost L2's latency again
  [[maybe_unused]] constexpr int LOADS = SLOT<typename Product::Shape> / THREADS, AT_ONCE = LOADS < 32 ? 32 / LOADS : 1;
#pragma unroll AT_ONCE
  for (int other = 0; other < parts; ++other) {
    Product::for_each(sums, [&](float& sum, int row, int) {
      if (row < rows) sum += *theirs;
      theirs += THREADS;
    });
  }
  return true;
}

// Steps of a contraction that one part takes: [first, end), at least one where there are as many steps as parts.
struct Range {
  int64_t first, end;

  __device__ Range(int64_t length, int step, int part, int parts) {
    const int64_t steps = (length + step - 1) / step;
    first = steps * part / parts * step;
    end = steps * (part + 1) / parts * step;
    if (end > length) end = length;
  }
};

__host__ __device__ inline int32_t ceil_div(int64_t count, int64_t by) {
  return static_cast<int32_t>((count + by - 1) / by);
}

// Into how many parts a contraction is cut, so that tiles · parts blocks fill the SMs `waves` times.
inline int32_t parts_for(int64_t tiles, int64_t steps, int32_t sms, int32_t waves, int32_t least_steps) {
  const int64_t filling = tiles == 0 ? 1 : static_cast<int64_t>(sms) * waves / tiles;
  const int64_t most = steps / least_steps;
  const int64_t parts = filling < most ? filling : most;
  return parts < 1 ? 1 : static_cast<int32_t>(parts);
}

}  // namespace fused_lora::cuda
