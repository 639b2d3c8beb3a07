// LoRA dropout as fused_lora/dropout.py defines it, without a mask in memory.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstdint>

namespace fused_lora::cpu {

// The mask of dropout.dropout_mask, bit for bit.
class Dropout {
 public:
  // seed: (1,) of int64.  p: in [0, 1).
  Dropout(const at::Tensor& seed, double p);

  // 1 / (1 - p) for the p that the mask really has.
  double keep_scale() const;

  // dst = src where the mask keeps, 0 elsewhere.
  // src: the rows of a (M, C) tensor from first_row on.  dst: contiguous, of src's size and dtype; may be src.
  void apply(const at::Tensor& src, int64_t first_row, const at::Tensor& dst) const;

 private:
  uint32_t key_low_, key_high_;
  int32_t threshold_;  // p in units of 1/65536
};

// Calls body(first, count, buffer) for one block of rows of wide (M, C) after the other.
// buffer: (count, C) of wide's dtype, the same memory every time; a block and its buffer are small enough for a cache.
template <typename Body>
void for_row_blocks(const at::Tensor& wide, const Body& body) {
  constexpr int64_t kBlockElements = 1 << 17;
  const int64_t M = wide.size(0), C = wide.size(1);
  const int64_t step = std::min(M, std::max<int64_t>(1, kBlockElements / std::max<int64_t>(1, C)));
  const at::Tensor buffer = at::empty({step, C}, wide.options());
  for (int64_t first = 0; first < M; first += step) {
    const int64_t count = std::min(step, M - first);
    body(first, count, buffer.narrow(0, 0, count));
  }
}

}  // namespace fused_lora::cpu
