// Both adapter gradients in one launch, reductions over M: dA = scale · gᵀ D(x), dB = scale · dyᵀ h.
#include "launches.h"
#include "reduction.cuh"
#include "tiles.cuh"

namespace fused_lora::cuda {
namespace {

// 64 columns of x or dy × 32 ranks, 8 KB of columns at a time. Reading them takes all the time, so what counts is how
// many loads are on their way: three blocks fit an SM of any GPU, by shared memory (28 KB of at least 100) and by
// registers, and have 24 to 48 KB on their way. 128 columns needed more registers than three blocks have on an H100,
// and twice the shared memory.
using Columns = Tile<4, 1, 1, 4, 128>;
constexpr int BLOCKS_OF_SM = 3;

template <typename Arithmetic>
__global__ void __launch_bounds__(Columns::THREADS, BLOCKS_OF_SM) adapter_grad(const AdapterGradArguments arguments) {
  using Main = Product<Arithmetic, Columns, false, false>;
  using Element = typename Arithmetic::Element;
  const GradientTile<Columns> at(arguments, block_index());
  const Reduction& reduction = at.of_A ? arguments.dA : arguments.dB;
  const int64_t columns = reduction.columns;

  const Dropout dropout(arguments.dropout, reduction.has_dropout);
  const Range range(arguments.M, Main::BLOCK_K, at.part, arguments.split);
  typename Main::Sums sums = {};
  Main::add(sums, operand<Element>(reduction.wide, false, false, at.first_column, columns),
            operand<Element>(reduction.low, false, false, at.first_r, arguments.R), range.first, range.end,
            {dropout, 1, columns}, shared_memory() + PLACE_BYTES);
  finish_gradient<Element, Main>(sums, arguments, at, reduction, dropout, reinterpret_cast<int*>(shared_memory()));
}

template <typename Arithmetic>
int launch_in(const AdapterGradArguments& arguments, void* stream) {
  using Main = Product<Arithmetic, Columns, false, false>;
  const auto tiles = static_cast<int>(gradient_tiles<Columns>(arguments.dA.columns, arguments.dB.columns, arguments.R));
  return launch(adapter_grad<Arithmetic>, tiles * arguments.split, Columns::THREADS, PLACE_BYTES + Main::SHARED_BYTES,
                stream, arguments);
}

}  // namespace

Plan plan_adapter_grad(Arithmetic arithmetic, int64_t M, int64_t K, int64_t N, int64_t R, int32_t sms) {
  Plan plan{};
  const int64_t steps = ceil_div(M, Columns::K_BYTES / element_bytes(arithmetic));
  const int64_t tiles = gradient_tiles<Columns>(K, N, R);
  // as many blocks as run at once: a second wave would wait for the first, and few parts are soon summed
  plan.split = parts_for(tiles, steps, sms, BLOCKS_OF_SM, 2);
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
