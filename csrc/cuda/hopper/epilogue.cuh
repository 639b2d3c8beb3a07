// From sums to out: bias, rounding, and a way through shared memory, from which the TMA stores whole lines and leaves out
// what is beyond M and P. It stores while the consumer goes on.
#pragma once

#include "low_rank.cuh"

namespace fused_lora::cuda::hopper {

template <typename Shape>
__device__ void store_out(const Consumer<Shape>& consumer, const Work& work, const typename Consumer<Shape>::OutSums& sums) {
  using Element = typename Shape::Element;
  const Arguments& arguments = consumer.arguments;
  const auto* bias = static_cast<const Element*>(arguments.bias);
  const int first_m = (work.row * CLUSTER + consumer.rank) * BLOCK_M + consumer.consumer * ROWS;
  const bool leads = consumer.thread() == 0;
#pragma unroll
  for (int chunk = 0; chunk < Shape::COLUMNS / CHUNK; ++chunk) {
    const int first_p = work.column * Shape::COLUMNS + chunk * CHUNK;
    unsigned char* staging = consumer.memory.staging(consumer.consumer, chunk % STAGINGS);
    // the store that reads this staging is the last but one
    if (leads) await_stores_read<STAGINGS - 1>();
    sync_warpgroup(1 + consumer.consumer);
#pragma unroll
    for (int column = 0; column < CHUNK / 8; column += 2) {
      uint32_t pairs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* pair = sums + (chunk * (CHUNK / 8) + column) * 4 + 2 * i;
        const int p = first_p + (column + i / 2) * 8 + consumer.column_of_pair();
        // sums themselves stay untouched: what else than wgmma writes to them makes the compiler wait for every wgmma
        const bool adds = bias != nullptr && p < arguments.P;
        const float first = adds ? to_float(bias[p]) : 0, second = adds ? to_float(bias[p + 1]) : 0;
        pairs[i] = round_pair(pair[0] + first, pair[1] + second, Element{});
      }
      // swizzled, as the map of out says; and so without bank conflicts
      store_matrices(staging + swizzled(consumer.first_row_of_warp(), column), pairs);
    }
    // the TMA must see what each thread has stored, once all have
    fence_shared_for_tma();
    sync_warpgroup(1 + consumer.consumer);
    if (leads) store_tile(&arguments.out, staging, first_p, first_m);
  }
}

}  // namespace fused_lora::cuda::hopper
