// What the launch of lora_matmul.cuh asks of its operands, and how it is cut.
#include <utility>

#include "adapters.cuh"
#include "lora_matmul.h"
#include "schedule.cuh"

namespace fused_lora::cuda {
namespace hopper {
namespace {

// fewer rows leave SMs without work: kernels that cut the contraction are ahead there
constexpr int64_t LEAST_ROWS = 129;

bool is_along_q(const LoraMatmulArguments& arguments) { return arguments.w.stride_0 == 1; }

// rows × columns as the TMA reads them, each row contiguous.
TileMap tile_map(const Matrix& matrix, int64_t rows, int64_t columns, int box_rows, int box_columns) {
  // a tensor of one row may have any stride
  const int64_t row_bytes = (rows == 1 ? columns : matrix.stride_0) * 2;
  return {matrix.data, columns, rows, row_bytes, box_columns, box_rows, box_columns < 64 ? box_columns * 2 : SPAN};
}

Matrix contiguous(const void* data, int64_t columns) { return {data, columns, 1, 0}; }
Matrix transposed(const Matrix& matrix) { return {matrix.data, matrix.stride_1, matrix.stride_0, matrix.is_float32}; }

// A matrix with its rows along the dimension that is contiguous in w, and the box of it that one copy moves.
struct Operand {
  Matrix matrix;
  int64_t rows, columns;
  int box_rows, box_columns;

  TileMap map() const { return tile_map(matrix, rows, columns, box_rows, box_columns); }
  const char* why_not() const {
    if (matrix.is_float32) return "the TMA copies, and converts nothing";
    if (matrix.stride_1 != 1 && columns > 1) return "rows must be contiguous";
    return cuda::why_not(map());
  }
  int64_t bytes() const { return (rows * columns * 2 + 15) / 16 * 16; }
  Copy copy_to(void* to) const { return {matrix, to, rows, columns}; }
};

struct Operands {
  Operand a, w, u, v;

  Operands(const LoraMatmulArguments& arguments, int tile_columns, int ranks)
      : a{arguments.a, arguments.M, arguments.Q, BLOCK_M, BLOCK_Q} {
    const int64_t P = arguments.P, Q = arguments.Q, R = arguments.R;
    if (is_along_q(arguments)) {
      w = {transposed(arguments.w), P, Q, tile_columns / CLUSTER, BLOCK_Q};
      u = {transposed(arguments.u), R, Q, ranks, BLOCK_Q};
      v = {transposed(arguments.v), P, R, tile_columns / CLUSTER, BLOCK_R};
    } else {
      w = {arguments.w, Q, P, BLOCK_Q, CHUNK};
      u = {arguments.u, Q, R, BLOCK_Q, ranks};
      v = {arguments.v, R, P, BLOCK_R, CHUNK};
    }
  }
};

// scale · h, where it is another matrix than h and somebody reads it from memory
int64_t scaled_h_bytes(Arithmetic arithmetic, const LoraMatmulArguments& arguments, bool publishes) {
  const bool drops_output = arguments.dropout.seed != nullptr && arguments.dropout_on_output;
  const bool apart = arithmetic == Arithmetic::kHalf || drops_output;
  return publishes && !apart ? arguments.M * arguments.R * 2 : 0;
}

template <typename Element>
int launch(const HopperPlan& plan, const LoraMatmulArguments& given, void* stream) {
  const bool bfloat16 = std::is_same<Element, BFloat16>::value, along_q = is_along_q(given);
  const bool drops = given.dropout.seed != nullptr;
  auto* scratch = reinterpret_cast<unsigned char*>(given.slots);
  const Arithmetic arithmetic = bfloat16 ? Arithmetic::kBFloat16 : Arithmetic::kHalf;
  const bool scales_h = scaled_h_bytes(arithmetic, given, plan.publishes != 0) > 0;

  Operands operands(given, plan.columns, plan.ranks);
  Copies copies{};
  const auto copy = [&](Operand& operand, int64_t at, Copy& copy) {
    if (at < 0) return;
    copy = operand.copy_to(scratch + at);
    operand.matrix = contiguous(scratch + at, operand.columns);
  };
  copy(operands.u, plan.u_copy, copies.u);
  copy(operands.v, plan.v_copy, copies.v);

  Arguments arguments{};
  arguments.h = given.h;
  arguments.scaled_h = scales_h ? scratch : nullptr;
  arguments.bias = given.bias;
  arguments.dropout = given.dropout;
  arguments.counters = given.counters;
  arguments.scale = given.scale;
  arguments.M = static_cast<int32_t>(given.M), arguments.P = static_cast<int32_t>(given.P);
  arguments.Q = static_cast<int32_t>(given.Q), arguments.R = static_cast<int32_t>(given.R);
  arguments.publishes = plan.publishes;
  const Matrix factor = contiguous(scales_h ? scratch : given.h, given.R), out = contiguous(given.out, given.P);
  const std::pair<TensorMap*, TileMap> maps[] = {
      {&arguments.a, operands.a.map()},
      {&arguments.w, operands.w.map()},
      {&arguments.u, operands.u.map()},
      {&arguments.v, operands.v.map()},
      {&arguments.factor, tile_map(factor, given.M, given.R, BLOCK_M, BLOCK_R)},
      {&arguments.out, tile_map(out, given.M, given.P, ROWS, CHUNK)},
  };
  for (const auto& [map, tile] : maps) {
    if (why_not(tile) != nullptr || encode_tensor_map(map, tile, bfloat16) != 0) return kTensorMapRefused;
  }
  if (const int failed = launch_copies<Element>(copies, stream)) return failed;
  return along_q ? launch_shape<Element, true>(plan, drops, arguments, stream)
                 : launch_shape<Element, false>(plan, drops, arguments, stream);
}

}  // namespace
}  // namespace hopper

const char* hopper_why_not(Arithmetic arithmetic, const LoraMatmulArguments& arguments) {
  using namespace hopper;
  if (arithmetic != Arithmetic::kBFloat16 && arithmetic != Arithmetic::kHalf) {
    return "Hopper's kernel multiplies bfloat16 and float16 alone";
  }
  if (!driver_makes_tensor_maps()) return "the driver has no cuTensorMapEncodeTiled: it is older than CUDA 12";
  const int64_t M = arguments.M, P = arguments.P, Q = arguments.Q, R = arguments.R;
  if (R < 8 || R > MOST_RANKS) return "the rank must be 8 to 256";
  if (P % 8 != 0 || Q % 8 != 0 || R % 8 != 0) return "in_features, out_features and the rank must be multiples of 8";
  // coordinates of the TMA and tickets are int32, and some room is left beyond the last tile
  constexpr int64_t MOST = int64_t{1} << 30;
  if (M > MOST || P > MOST || Q > MOST || (M / BLOCK_M + 2) * (P / 128 + 2) > MOST) return "there are too many tiles";
  const bool along_q = is_along_q(arguments);
  if (arguments.dropout.seed != nullptr && along_q == (arguments.dropout_on_output != 0)) {
    return "dropout is on the input where w is contiguous along it, else on the output";
  }
  const Operands operands(arguments, 256, 64);
  if (const char* reason = operands.a.why_not()) return reason;
  if (const char* reason = operands.w.why_not()) return reason;
  if (M < LEAST_ROWS) return "for at most 128 rows kernels that cut the contraction are faster";
  return nullptr;
}

HopperPlan plan_hopper_matmul(Arithmetic arithmetic, const LoraMatmulArguments& arguments, int32_t sms) {
  using namespace hopper;
  const int64_t M = arguments.M, P = arguments.P, R = arguments.R;
  const bool drops = arguments.dropout.seed != nullptr;
  const auto blocks_of = [&](int columns) {
    return CLUSTER * static_cast<int64_t>(Schedule(M, P, R, columns, false).tickets());
  };
  HopperPlan plan{};
  // Half as wide where all tiles still run at once. (There are no narrow instances with dropout.)
  plan.columns = !drops && blocks_of(128) <= sms ? 128 : 256;
  // About one wave: a publisher's rows would wait for it from its first tile to their last. More: h once is cheaper.
  plan.publishes = R > BLOCK_R || blocks_of(plan.columns) > sms;
  plan.ranks = !drops && R <= 16 ? 16 : 64;
  const Schedule schedule(M, P, R, plan.columns, plan.publishes != 0);
  const int64_t wanted = CLUSTER * static_cast<int64_t>(schedule.tickets()), most = sms / CLUSTER * CLUSTER;
  plan.blocks = static_cast<int32_t>(wanted < most ? wanted : most < CLUSTER ? CLUSTER : most);
  plan.counters = HEADER + schedule.rows * CLUSTER;

  const Operands operands(arguments, plan.columns, plan.ranks);
  int64_t bytes = (scaled_h_bytes(arithmetic, arguments, plan.publishes != 0) + 15) / 16 * 16;
  const auto place = [&](const Operand& operand) -> int64_t {
    if (operand.why_not() == nullptr) return -1;
    bytes += operand.bytes();
    return bytes - operand.bytes();
  };
  plan.u_copy = place(operands.u);
  plan.v_copy = place(operands.v);
  plan.slot_floats = bytes / 4;
  return plan;
}

int launch_hopper_matmul(Arithmetic arithmetic, const HopperPlan& plan, const LoraMatmulArguments& arguments,
                         void* stream) {
  return arithmetic == Arithmetic::kBFloat16 ? hopper::launch<BFloat16>(plan, arguments, stream)
                                             : hopper::launch<Half>(plan, arguments, stream);
}

}  // namespace fused_lora::cuda
