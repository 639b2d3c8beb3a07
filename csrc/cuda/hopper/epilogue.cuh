// From sums to out: what of the low-rank product was summed apart, bias, rounding, and a way through shared memory,
// from which the TMA stores whole lines and leaves out what is beyond M and P. It stores while the consumer goes on.
#pragma once

#include "low_rank.cuh"

namespace fused_lora::cuda::hopper {

template <typename Shape>
__device__ void store_out(Consumer<Shape>& consumer, const Work& work, const typename Consumer<Shape>::OutSums& sums) {
  using Element = typename Shape::Element;
  const Arguments& arguments = consumer.arguments;
  const auto* bias = static_cast<const Element*>(arguments.bias);
  const Dropout dropout(arguments.dropout, Shape::DROPS_OUTPUT);
  const float scale = arguments.scale * (Shape::DROPS_OUTPUT ? arguments.dropout.keep_scale : 1.0f);
  const int64_t P = arguments.P, row_of_pairs = consumer.row(work) * P / 2;
  const int first_m = (work.row * CLUSTER + consumer.rank) * BLOCK_M + consumer.consumer * ROWS;
  const int column_of_pair = consumer.column_of_pair(), first_row = consumer.first_row_of_warp();
  const bool leads = consumer.thread() == 0;
  if constexpr (Shape::APART) consumer.await_low_rank();
#pragma unroll
  for (int chunk = 0; chunk < Shape::COLUMNS / CHUNK; ++chunk) {
    const int first_p = work.column * Shape::COLUMNS + chunk * CHUNK;
    unsigned char* staging = consumer.memory.staging(consumer.consumer, chunk % STAGINGS);
    // the store that reads this staging is the last but one
    if (leads) await_stores_read<STAGINGS - 1>();
    sync_warpgroup(1 + consumer.consumer);
    float product[APART_COLUMNS / 2];
#pragma unroll
    for (int column = 0; column < CHUNK / 8; column += 2) {
      if (Shape::APART && column * 8 % APART_COLUMNS == 0) {
        consumer.multiply_apart(chunk * CHUNK + column * 8, product);
      }
      uint32_t pairs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = column * 4 + 2 * i, p = first_p + (column + i / 2) * 8 + column_of_pair;
        // sums themselves stay untouched: what else than wgmma writes to them makes the compiler wait for every wgmma
        float first = sums[chunk * (CHUNK / 2) + at], second = sums[chunk * (CHUNK / 2) + at + 1];
        if constexpr (Shape::APART) {
          const uint32_t kept =
              Shape::DROPS_OUTPUT ? dropout.keeps_pair(row_of_pairs + i % 2 * 4 * P + p / 2) : 0xFFFFFFFF;
          // left out where dropped, not multiplied by zero: it may be infinite
          if (kept & 0xFFFF) first += scale * product[at % (APART_COLUMNS / 2)];
          if (kept >> 16) second += scale * product[at % (APART_COLUMNS / 2) + 1];
        }
        if (bias != nullptr && p < P) {
          first += to_float(bias[p]);
          second += to_float(bias[p + 1]);
        }
        pairs[i] = round_pair(first, second, Element{});
      }
      // swizzled, as the map of out says; and so without bank conflicts
      store_matrices(staging + swizzled(first_row, column), pairs);
    }
    // the TMA must see what each thread has stored, once all have
    fence_shared_for_tma();
    sync_warpgroup(1 + consumer.consumer);
    if (leads) store_tile(&arguments.out, staging, first_p, first_m);
  }
  if constexpr (Shape::APART) consumer.pass_low_rank();
}

}  // namespace fused_lora::cuda::hopper
