// Forward and input gradient, which differ only in operands and strides (reference.py), in one persistent launch: the
// kernel put together, and its launch.
#pragma once

#include "epilogue.cuh"
#include "lora_matmul.h"

namespace fused_lora::cuda::hopper {

template <typename Shape>
__device__ void consume(Consumer<Shape>& consumer) {
  Tickets<Shape> tickets{consumer.memory};
  for (;;) {
    const int ticket = tickets.next_of_consumer(consumer.consumer);
    if (ticket >= consumer.schedule.tickets()) break;
    const Work work = consumer.schedule.work(ticket);
    // declared where they are used: what lived from tile to tile would take registers from all
    typename Consumer<Shape>::OutSums sums;
    if (consumer.schedule.computes_h(work)) {
      typename Consumer<Shape>::HSums h;
      // out's chunks of the tile before may still be on their way from where tiles of u come
      if (consumer.thread() == 0) {
        await_stores_read<0>();
        arrive(&consumer.memory.barriers().stored);
      }
      if (work.is_h_alone()) {
        consumer.template multiply<false, true>(work, sums, h);
      } else {
        consumer.template multiply<true, true>(work, sums, h);
      }
      // out's chunks will lie where the other consumer may still read tiles of u: both go on when both are done
      sync_two_warpgroups(BOTH_CONSUMERS);
      consumer.round_h(work, h);
      if (work.is_h_alone()) continue;
    } else {
      typename Consumer<Shape>::HSums none;
      consumer.template multiply<true, false>(work, sums, none);
    }
    if constexpr (!Shape::APART) consumer.add_low_rank(sums);
    store_out(consumer, work, sums);
  }
  // shared memory must outlive the stores that read it
  if (consumer.thread() == 0) await_stores();
}

template <typename Shape>
__global__ void __launch_bounds__(THREADS, 1) lora_matmul(const __grid_constant__ Arguments arguments) {
  const Memory<Shape> memory;
  const Schedule schedule(arguments.M, arguments.P, arguments.R, Shape::COLUMNS, arguments.publishes != 0);
  const int rank = rank_in_cluster(), warpgroup = thread_index() / WARPGROUP, warp = thread_index() / 32;
  if (thread_index() == 0) init_barriers(memory);
  // no block may arrive at another's barrier before it is there
  sync_cluster();
  // consumers need more registers than all threads can have, and the others fewer
  if (warpgroup == 0) {
    give_registers_back<PRODUCER_REGISTERS>();
    const bool leads = thread_index() % 32 == 0;
    if (warp == 0 && leads) Producer<Shape>{arguments, schedule, memory, rank}.run();
    if (warp == 1 && leads && rank == 0) {
      Tickets<Shape>{memory}.hand_out(arguments.counters, schedule.tickets());
    }
  } else {
    take_registers<CONSUMER_REGISTERS>();
    Consumer<Shape> consumer(arguments, schedule, memory, warpgroup - 1, rank);
    consume(consumer);
  }
  // nor may it leave while another may still arrive at its own
  sync_cluster();
  leave(arguments.counters, schedule.rows * CLUSTER);
}

template <typename Element, bool W_ALONG_Q>
int launch_shape(const HopperPlan& plan, bool drops, const Arguments& arguments, void* stream) {
  const auto launch_with = [&](auto shape) {
    using Shape = decltype(shape);
    return launch_in_pairs(lora_matmul<Shape>, plan.blocks, THREADS, Shape::SHARED_BYTES, stream, arguments);
  };
  if (drops) return launch_with(Shape<Element, W_ALONG_Q, 256, 64, true>{});
  if (plan.columns == 128) {
    return plan.ranks == 16 ? launch_with(Shape<Element, W_ALONG_Q, 128, 16, false>{})
                            : launch_with(Shape<Element, W_ALONG_Q, 128, 64, false>{});
  }
  return plan.ranks == 16 ? launch_with(Shape<Element, W_ALONG_Q, 256, 16, false>{})
                          : launch_with(Shape<Element, W_ALONG_Q, 256, 64, false>{});
}

}  // namespace fused_lora::cuda::hopper
