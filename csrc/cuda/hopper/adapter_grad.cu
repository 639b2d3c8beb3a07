#include <type_traits>

#include "adapter_grad.cuh"
#include "adapter_grad.h"

namespace fused_lora::cuda {
namespace {

// f(tile) with the narrowest tile that holds all ranks.
template <typename Element, typename F>
auto with_tile(int64_t R, const F& f) {
  if (R <= 16) return f(hopper::GradTile<Element, 16>{});
  if (R <= 32) return f(hopper::GradTile<Element, 32>{});
  if (R <= 64) return f(hopper::GradTile<Element, 64>{});
  if (R <= 128) return f(hopper::GradTile<Element, 128>{});
  return f(hopper::GradTile<Element, 256>{});
}
constexpr int64_t MOST_RANKS = 256, MOST = int64_t{1} << 30;

template <typename Tile>
TileMap wide_map(const Reduction& reduction, int64_t M) {
  return {reduction.wide.data, reduction.columns, M, reduction.wide.stride_0 * 2, 64, Tile::TOKENS, 128};
}

template <typename Tile>
TileMap low_map(const Reduction& reduction, int64_t M, int64_t R) {
  return {reduction.low.data, R, M, reduction.low.stride_0 * 2, Tile::LOW_WIDTH, Tile::TOKENS, Tile::LOW_ROW};
}

template <typename Tile>
const char* why_not_reduction(const Reduction& reduction, int64_t M, int64_t R) {
  if (reduction.columns == 0) return nullptr;
  if (reduction.wide.is_float32 || reduction.low.is_float32) return "operands must be 16 bits wide";
  if (reduction.wide.stride_1 != 1 || reduction.low.stride_1 != 1) return "rows of operands must be contiguous";
  if (reduction.columns % 8 != 0 || R % 8 != 0) {
    return "in_features, out_features and the rank must be multiples of 8";
  }
  const char* why = why_not(wide_map<Tile>(reduction, M));
  return why != nullptr ? why : why_not(low_map<Tile>(reduction, M, R));
}

template <typename Tile>
int launch_tile(const AdapterGradArguments& gradients, void* stream) {
  constexpr bool BFLOAT16 = std::is_same_v<typename Tile::Element, BFloat16>;
  hopper::GradArguments arguments{};
  arguments.gradients = gradients;
  const int64_t M = gradients.M, R = gradients.R;
  const auto encode = [&](const Reduction& reduction, TensorMap& wide, TensorMap& low) {
    return reduction.columns == 0 || (encode_tensor_map(&wide, wide_map<Tile>(reduction, M), BFLOAT16) == 0 &&
                                      encode_tensor_map(&low, low_map<Tile>(reduction, M, R), BFLOAT16) == 0);
  };
  if (!encode(gradients.dA, arguments.wide_A, arguments.low_A) ||
      !encode(gradients.dB, arguments.wide_B, arguments.low_B)) {
    return kTensorMapRefused;
  }
  const auto tiles = gradient_tiles<typename Tile::Shape>(gradients.dA.columns, gradients.dB.columns, R);
  return launch_singly(hopper::adapter_grad<Tile>, static_cast<int>(tiles * gradients.split), Tile::Shape::THREADS,
                       Tile::SHARED_BYTES, stream, arguments);
}

}  // namespace

const char* hopper_why_not(Arithmetic arithmetic, const AdapterGradArguments& arguments) {
  if (arithmetic != Arithmetic::kBFloat16 && arithmetic != Arithmetic::kHalf) {
    return "Hopper's kernel multiplies bfloat16 and float16 alone";
  }
  if (!driver_makes_tensor_maps()) return "the driver has no cuTensorMapEncodeTiled: it is older than CUDA 12";
  if (arguments.R < 8 || arguments.R > MOST_RANKS) return "the rank must be 8 to 256";
  if (arguments.M < 1) return "there must be a token";
  // coordinates of the TMA are int32, and some room is left beyond the last tile
  if (arguments.M > MOST || arguments.dA.columns > MOST || arguments.dB.columns > MOST) {
    return "there are too many tiles";
  }
  // how wide elements are is all that matters here
  return with_tile<BFloat16>(arguments.R, [&](auto tile) {
    using Tile = decltype(tile);
    const char* why = why_not_reduction<Tile>(arguments.dA, arguments.M, arguments.R);
    return why != nullptr ? why : why_not_reduction<Tile>(arguments.dB, arguments.M, arguments.R);
  });
}

Plan plan_hopper_adapter_grad(const AdapterGradArguments& arguments, int32_t sms) {
  return with_tile<BFloat16>(arguments.R, [&](auto tile) {
    using Tile = decltype(tile);
    const int64_t tiles = gradient_tiles<typename Tile::Shape>(arguments.dA.columns, arguments.dB.columns, arguments.R);
    const bool drops = arguments.dA.columns > 0 && arguments.dropout.seed != nullptr;
    Plan plan{};
    // One block on an SM has enough bytes on their way, and the fewer the parts, the sooner they are summed. Where x is
    // dropped, a block that draws its mask shares an SM with one that waits for dy.
    plan.split = parts_for(tiles, ceil_div(arguments.M, Tile::TOKENS), sms, drops ? Tile::BLOCKS : 1, 4);
    plan.counters = static_cast<int32_t>(plan.split > 1 ? tiles : 0);
    plan.slot_floats = plan.split > 1 ? tiles * plan.split * SLOT<typename Tile::Shape> : 0;
    return plan;
  });
}

int launch_hopper_adapter_grad(Arithmetic arithmetic, const AdapterGradArguments& arguments, void* stream) {
  const auto launch_it = [&](auto tile) { return launch_tile<decltype(tile)>(arguments, stream); };
  return arithmetic == Arithmetic::kBFloat16 ? with_tile<BFloat16>(arguments.R, launch_it)
                                             : with_tile<Half>(arguments.R, launch_it);
}

}  // namespace fused_lora::cuda
