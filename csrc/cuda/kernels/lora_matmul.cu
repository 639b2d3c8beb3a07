// Forward and input gradient, which differ only in operands and strides (reference.py), in one launch.
//
// The columns of [u | w] are tiles. Those of u give h = a u, and have the lowest tickets; those of w give a w, wait
// in their epilogue for the h of their rows, and add scale · h v. So no tile recomputes h, whatever the rank:
// it costs one more column of tiles. For small M the tiles are flat and Q is cut into parts, so that all of
// the GPU streams a share of w.
#include "launches.h"
#include "parts.cuh"
#include "tiles.cuh"

namespace fused_lora::cuda {
namespace {

using SmallM = Tile<1, 4, 1, 2, 256>;
using LargeM = Tile<2, 4, 4, 4, 64>;
constexpr int64_t MOST_SMALL_M = SmallM::OUTER_A;

// Tile `index` of rows × columns, 8 rows at a time: neighbours in time share operands in L2.
__device__ void place_of(int index, int rows, int columns, int& row, int& column) {
  const int per_group = 8 * columns, first = index / per_group * 8;
  const int group = rows - first < 8 ? rows - first : 8;
  row = first + index % per_group % group;
  column = index % per_group / group;
}

template <typename Arithmetic, typename Shape, bool W_ALONG_Q>
__global__ void __launch_bounds__(Shape::THREADS, LEAST_BLOCKS) lora_matmul(const LoraMatmulArguments arguments) {
  using Main = Product<Arithmetic, Shape, true, W_ALONG_Q>;
  using Element = typename Arithmetic::Element;
  const int64_t M = arguments.M, P = arguments.P, Q = arguments.Q, R = arguments.R;
  const bool drops_output = arguments.dropout_on_output != 0;
  const float scale = arguments.scale, keep_scale = arguments.dropout.keep_scale;
  const auto* bias = static_cast<const Element*>(arguments.bias);
  auto* out = static_cast<Element*>(arguments.out);
  auto* h = static_cast<Element*>(arguments.h);
  int* counters = arguments.counters;
  int* place = reinterpret_cast<int*>(shared_memory());
  unsigned char* stages = shared_memory() + PLACE_BYTES;

  const int rows = ceil_div(M, Shape::OUTER_A);
  const int h_columns = ceil_div(R, Shape::OUTER_B), columns = ceil_div(P, Shape::OUTER_B);
  const int ticket = take_ticket(counters, place);
  const int tile = ticket / arguments.split, part = ticket % arguments.split;
  const bool makes_h = tile < rows * h_columns;
  int row, column;
  place_of(makes_h ? tile : tile - rows * h_columns, rows, makes_h ? h_columns : columns, row, column);
  const int64_t first_m = static_cast<int64_t>(row) * Shape::OUTER_A;
  const int64_t first_column = static_cast<int64_t>(column) * Shape::OUTER_B;

  const Operand of_a = operand<Element>(arguments.a, true, true, first_m, M);
  const Operand of_b = makes_h ? operand<Element>(arguments.u, false, W_ALONG_Q, first_column, R)
                               : operand<Element>(arguments.w, false, W_ALONG_Q, first_column, P);
  const Range range(Q, Main::BLOCK_K, part, arguments.split);
  const Dropout input_dropout(arguments.dropout, makes_h && !drops_output);
  typename Main::Sums sums = {};
  Main::add(sums, of_a, of_b, range.first, range.end, {input_dropout, Q, 1}, stages);

  const int ms = at_most(M - first_m, Shape::OUTER_A);
  int* flags = counters + HEADER;
  float* slots = arguments.slots + static_cast<int64_t>(tile) * arguments.split * SLOT<Shape>;
  const bool finishes =
      arguments.split == 1 || sum_parts<Main>(sums, slots, part, arguments.split, ms, flags + rows + tile, place);
  if (finishes && makes_h) {
    const float factor = input_dropout.active ? keep_scale : 1.0f;
    const int rs = at_most(R - first_column, Shape::OUTER_B);
    Element* to = h + first_m * R + first_column;
    Main::for_each(sums, [&](float& sum, int m, int r) {
      // rounded here: reference.py rounds at the same point
      if (m < ms && r < rs) round_to(sum * factor, to[m * R + r]);
    });
    raise_flag(flags + row);
  } else if (finishes) {
    await_flag(flags + row, h_columns);
    const Matrix stored{h, R, 1, 0};
    const Operand of_h = operand<Element>(stored, true, true, first_m, M);
    const Operand of_v = operand<Element>(arguments.v, false, W_ALONG_Q, first_column, P);
    const int64_t first = first_m * P + first_column;
    const Dropout output_dropout(arguments.dropout, drops_output);
    Main::add(sums, of_h, of_v, 0, R, {Dropout(arguments.dropout, false), 0, 0}, stages,
              [&](float value, int m, int p) {
                value *= scale;
                if (!output_dropout.active) return value;
                return output_dropout.keeps(first + computed_anew(m) * P + p) ? value * keep_scale : 0.0f;
              });
    const int ps = at_most(P - first_column, Shape::OUTER_B);
    Element* to = out + first;
    Main::for_each(sums, [&](float& sum, int m, int p) {
      if (m >= ms || p >= ps) return;
      const float offset = bias == nullptr ? 0.0f : to_float(bias[first_column + p]);
      round_to(sum + offset, to[m * P + p]);
    });
  }
  leave(counters, rows);
}

template <typename Arithmetic, typename Shape, bool W_ALONG_Q>
int launch_with(const LoraMatmulArguments& arguments, void* stream) {
  using Main = Product<Arithmetic, Shape, true, W_ALONG_Q>;
  const int tiles = ceil_div(arguments.M, Shape::OUTER_A) *
                    (ceil_div(arguments.R, Shape::OUTER_B) + ceil_div(arguments.P, Shape::OUTER_B));
  return launch(lora_matmul<Arithmetic, Shape, W_ALONG_Q>, tiles * arguments.split, Shape::THREADS,
                PLACE_BYTES + Main::SHARED_BYTES, stream, arguments);
}

template <typename Arithmetic>
int launch_in(const Plan& plan, const LoraMatmulArguments& arguments, void* stream) {
  // vectors go along the contiguous dimension of w, which is u's and v's too: Wᵀ, Aᵀ and Bᵀ, or W, B and A
  if (arguments.w.stride_0 == 1) {
    return plan.small_m ? launch_with<Arithmetic, SmallM, true>(arguments, stream)
                        : launch_with<Arithmetic, LargeM, true>(arguments, stream);
  }
  return plan.small_m ? launch_with<Arithmetic, SmallM, false>(arguments, stream)
                      : launch_with<Arithmetic, LargeM, false>(arguments, stream);
}

}  // namespace

Plan plan_lora_matmul(Arithmetic arithmetic, int64_t M, int64_t P, int64_t Q, int64_t R, int32_t sms) {
  Plan plan{};
  plan.small_m = M <= MOST_SMALL_M;
  const int64_t outer_a = plan.small_m ? SmallM::OUTER_A : LargeM::OUTER_A;
  const int64_t outer_b = plan.small_m ? SmallM::OUTER_B : LargeM::OUTER_B;
  const int64_t block_k = (plan.small_m ? SmallM::K_BYTES : LargeM::K_BYTES) / element_bytes(arithmetic);
  const int64_t rows = ceil_div(M, outer_a), tiles = rows * (ceil_div(R, outer_b) + ceil_div(P, outer_b));
  // small M: three blocks on every SM keep enough loads on their way; large M: every block has enough to do
  plan.split = plan.small_m ? parts_for(tiles, ceil_div(Q, block_k), sms, 3, 1)
                            : parts_for(tiles, ceil_div(Q, block_k), sms, 1, 4);
  plan.counters = static_cast<int32_t>(HEADER + rows + (plan.split > 1 ? tiles : 0));
  plan.slot_floats = plan.split > 1 ? tiles * plan.split * outer_a * outer_b : 0;
  return plan;
}

int launch_lora_matmul(Arithmetic arithmetic, const Plan& plan, const LoraMatmulArguments& arguments, void* stream) {
  switch (arithmetic) {
    case Arithmetic::kBFloat16:
      return launch_in<BFloat16Arithmetic>(plan, arguments, stream);
    case Arithmetic::kHalf:
      return launch_in<HalfArithmetic>(plan, arguments, stream);
    case Arithmetic::kTf32:
      return launch_in<Tf32Arithmetic>(plan, arguments, stream);
    default:
      return launch_in<ExactArithmetic>(plan, arguments, stream);
  }
}

}  // namespace fused_lora::cuda
