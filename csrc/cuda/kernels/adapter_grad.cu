// Both adapter gradients in one launch, reductions over M: dA = scale · gᵀ D(x), dB = scale · dyᵀ h.
#include "launches.h"
#include "parts.cuh"
#include "tiles.cuh"

namespace fused_lora::cuda {
namespace {

// columns of x or dy are the long side of a product, the rank is the short one
using Columns = Tile<4, 1, 2, 4, 128>;

// tiles: of columns and ranks, x's first; a block reduces one part of M for one of them
template <typename Arithmetic>
__global__ void __launch_bounds__(Columns::THREADS, LEAST_BLOCKS) adapter_grad(const AdapterGradArguments arguments) {
  using Main = Product<Arithmetic, Columns, false, false>;
  using Element = typename Arithmetic::Element;
  const int64_t M = arguments.M, R = arguments.R;
  const int tile = block_index() / arguments.split, part = block_index() % arguments.split;
  // neighbours read the same columns, which the second finds in L2
  const int ranks = ceil_div(R, Columns::OUTER_B), tiles_A = ceil_div(arguments.dA.columns, Columns::OUTER_A) * ranks;
  const Reduction& reduction = tile < tiles_A ? arguments.dA : arguments.dB;
  const int of_reduction = tile < tiles_A ? tile : tile - tiles_A;
  const int64_t columns = reduction.columns;
  const int64_t first_column = static_cast<int64_t>(of_reduction / ranks) * Columns::OUTER_A;
  const int64_t first_r = static_cast<int64_t>(of_reduction % ranks) * Columns::OUTER_B;

  const Dropout dropout(arguments.dropout, reduction.has_dropout);
  const Range range(M, Main::BLOCK_K, part, arguments.split);
  typename Main::Sums sums = {};
  Main::add(sums, operand<Element>(reduction.wide, false, false, first_column, columns),
            operand<Element>(reduction.low, false, false, first_r, R), range.first, range.end, {dropout, 1, columns},
            shared_memory() + PLACE_BYTES);
  if (arguments.split > 1 &&
      !sum_parts<Main>(sums, arguments.slots + static_cast<int64_t>(tile) * arguments.split * SLOT<Columns>, part,
                       arguments.split, Columns::OUTER_A, arguments.counters + tile,
                       reinterpret_cast<int*>(shared_memory()))) {
    return;
  }
  const float factor = arguments.scale * (dropout.active ? arguments.dropout.keep_scale : 1.0f);
  Main::for_each(sums, [&](float& sum, int in_column, int in_r) {
    const int64_t column = first_column + in_column, r = first_r + in_r;
    if (column >= columns || r >= R) return;
    const int64_t index = r * reduction.stride_r + column * reduction.stride_column;
    if (reduction.out_is_float32) {
      static_cast<float*>(reduction.out)[index] = sum * factor;
    } else {
      round_to(sum * factor, static_cast<Element*>(reduction.out)[index]);
    }
  });
}

template <typename Arithmetic>
int launch_in(const AdapterGradArguments& arguments, void* stream) {
  using Main = Product<Arithmetic, Columns, false, false>;
  const int tiles = ceil_div(arguments.R, Columns::OUTER_B) * (ceil_div(arguments.dA.columns, Columns::OUTER_A) +
                                                               ceil_div(arguments.dB.columns, Columns::OUTER_A));
  return launch(adapter_grad<Arithmetic>, tiles * arguments.split, Columns::THREADS, PLACE_BYTES + Main::SHARED_BYTES,
                stream, arguments);
}

}  // namespace

Plan plan_adapter_grad(Arithmetic arithmetic, int64_t M, int64_t K, int64_t N, int64_t R, int32_t sms) {
  Plan plan{};
  const int64_t steps = ceil_div(M, Columns::K_BYTES / element_bytes(arithmetic));
  const int64_t tiles = ceil_div(R, Columns::OUTER_B) * (ceil_div(K, Columns::OUTER_A) + ceil_div(N, Columns::OUTER_A));
  // reading x and dy takes all the time: four blocks on every SM keep enough loads on their way
  plan.split = parts_for(tiles, steps, sms, 4, 2);
  plan.counters = static_cast<int32_t>(plan.split > 1 ? tiles : 0);
  plan.slot_floats = plan.split > 1 ? tiles * plan.split * SLOT<Columns> : 0;
  return plan;
}

int launch_adapter_grad(Arithmetic arithmetic, const AdapterGradArguments& arguments, void* stream) {
  switch (arithmetic) {
    case Arithmetic::kBFloat16:
      return launch_in<BFloat16Arithmetic>(arguments, stream);
    case Arithmetic::kHalf:
      return launch_in<HalfArithmetic>(arguments, stream);
    case Arithmetic::kTf32:
      return launch_in<Tf32Arithmetic>(arguments, stream);
    default:
      return launch_in<ExactArithmetic>(arguments, stream);
  }
}

}  // namespace fused_lora::cuda
