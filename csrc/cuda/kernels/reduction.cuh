// What the kernels of the adapter gradients share: which tile is a block's, and where its sums go.
#pragma once

#include "dropout.cuh"
#include "parts.cuh"

namespace fused_lora::cuda {

// Tiles of columns and ranks, dA's first; a block reduces one part of M for one of them.
template <typename Shape>
struct GradientTile {
  int tile, part;
  bool of_A;
  int64_t first_column, first_r;

  __device__ GradientTile(const AdapterGradArguments& arguments, int block)
      : tile(block / arguments.split), part(block % arguments.split) {
    // neighbours read the same columns, which the second finds in L2
    const int ranks = ceil_div(arguments.R, Shape::OUTER_B);
    const int tiles_A = ceil_div(arguments.dA.columns, Shape::OUTER_A) * ranks;
    of_A = tile < tiles_A;
    const int of_reduction = of_A ? tile : tile - tiles_A;
    first_column = static_cast<int64_t>(of_reduction / ranks) * Shape::OUTER_A;
    first_r = static_cast<int64_t>(of_reduction % ranks) * Shape::OUTER_B;
  }
};

template <typename Shape>
int64_t gradient_tiles(int64_t K, int64_t N, int64_t R) {
  return static_cast<int64_t>(ceil_div(R, Shape::OUTER_B)) *
         (ceil_div(K, Shape::OUTER_A) + ceil_div(N, Shape::OUTER_A));
}

// Stores the gradient's tile once the sums of all its parts are there: the last block to come does.
// place: PLACE_BYTES in shared memory.
template <typename Element, typename Product>
__device__ void finish_gradient(typename Product::Sums& sums, const AdapterGradArguments& arguments,
                                const GradientTile<typename Product::Shape>& at, const Reduction& reduction,
                                const Dropout& dropout, int* place) {
  using Shape = typename Product::Shape;
  if (arguments.split > 1 &&
      !sum_parts<Product>(sums, arguments.slots + static_cast<int64_t>(at.tile) * arguments.split * SLOT<Shape>,
                          at.part, arguments.split, Shape::OUTER_A, arguments.counters + at.tile, place)) {
    return;
  }
  const float factor = arguments.scale * (dropout.active ? arguments.dropout.keep_scale : 1.0f);
  Product::for_each(sums, [&](float& sum, int in_column, int in_r) {
    const int64_t column = at.first_column + in_column, r = at.first_r + in_r;
    if (column >= reduction.columns || r >= arguments.R) return;
    const int64_t index = r * reduction.stride_r + column * reduction.stride_column;
    if (reduction.out_is_float32) {
      static_cast<float*>(reduction.out)[index] = sum * factor;
    } else {
      round_to(sum * factor, static_cast<Element*>(reduction.out)[index]);
    }
  });
}

}  // namespace fused_lora::cuda
