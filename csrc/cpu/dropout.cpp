#include "dropout.h"

#include <ATen/Parallel.h>
#include <ATen/ops/full.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <cstring>

#include "../tensors.h"
#include "operators.h"

namespace fused_lora::cpu {
namespace {

constexpr int32_t kLanes = 1 << 16;

// lowbias32, https://nullprogram.com/blog/2018/07/31/
inline uint32_t mix(uint32_t bits) {
  bits = (bits ^ (bits >> 16)) * 0x7FEB352D;
  bits = (bits ^ (bits >> 15)) * 0x846CA68B;
  return bits ^ (bits >> 16);
}

// The vectors' width is chosen when the library is loaded: baseline x86-64 has no vector multiply of 32-bit integers.
#if defined(__x86_64__) && defined(__linux__)
__attribute__((target_clones("avx512f", "avx2", "default")))
#endif
void hash_words(int16_t* lanes, uint64_t first_word, int64_t words, uint32_t key_low, uint32_t key_high) {
  const auto first_low = static_cast<uint32_t>(first_word), first_high = static_cast<uint32_t>(first_word >> 32);
  for (int64_t i = 0; i < words; ++i) {
    const uint32_t low = first_low + static_cast<uint32_t>(i);
    const uint32_t high = first_high + (low < first_low);
    const uint32_t bits = mix(mix(low ^ key_low) ^ key_high ^ high);
    std::memcpy(lanes + 2 * i, &bits, sizeof bits);
  }
}

// Elements as bare bits: to drop one is to clear it, whatever its type. An and, not a choice: it vectorises.
template <typename Bits>
void keep(const void* src, void* dst, int64_t begin, int64_t count, const int16_t* lanes, int16_t least_kept) {
  const Bits* from = static_cast<const Bits*>(src) + begin;
  Bits* to = static_cast<Bits*>(dst) + begin;
  for (int64_t i = 0; i < count; ++i) {
    to[i] = from[i] & -static_cast<Bits>(lanes[i] >= least_kept);
  }
}

}  // namespace

Dropout::Dropout(const at::Tensor& seed, double p) {
  check_shape("seed", seed, {1});
  check_dtype("seed", seed, at::kLong);
  TORCH_CHECK_VALUE(p >= 0 && p < 1, "dropout_p must be in [0, 1), got ", p);
  const auto key = static_cast<uint64_t>(*seed.const_data_ptr<int64_t>());
  key_low_ = static_cast<uint32_t>(key);
  key_high_ = static_cast<uint32_t>(key >> 32);
  threshold_ = std::min(static_cast<int32_t>(std::nearbyint(p * kLanes)), kLanes - 1);
}

double Dropout::keep_scale() const { return static_cast<double>(kLanes) / (kLanes - threshold_); }

void Dropout::apply(const at::Tensor& src, int64_t first_row, const at::Tensor& dst) const {
  const at::Tensor contiguous = src.contiguous();
  const void* from = contiguous.const_data_ptr();
  void* to = dst.mutable_data_ptr();
  const int64_t first = first_row * src.size(1);
  const auto keep_elements = src.element_size() == 2   ? keep<uint16_t>
                             : src.element_size() == 4 ? keep<uint32_t>
                                                       : keep<uint64_t>;
  const auto least_kept = static_cast<int16_t>(threshold_ - kLanes / 2);

  at::parallel_for(0, src.numel(), /*grain_size=*/1 << 15, [&](int64_t begin, int64_t end) {
    constexpr int64_t kChunk = 2048;
    int16_t lanes[kChunk + 2];
    for (int64_t chunk = begin; chunk < end; chunk += kChunk) {
      const int64_t count = std::min(kChunk, end - chunk);
      // a word holds the lanes of two elements, and a chunk may begin or end in the middle of one
      const int64_t element = first + chunk, skipped = element % 2;
      hash_words(lanes, element / 2, (skipped + count + 1) / 2, key_low_, key_high_);
      keep_elements(from, to, chunk, count, lanes + skipped, least_kept);
    }
  });
}

at::Tensor dropout_mask(const at::Tensor& seed, int64_t rows, int64_t cols, double dropout_p, at::ScalarType dtype) {
  check_floating("dtype", dtype);
  TORCH_CHECK_VALUE(rows >= 0 && cols >= 0, "rows and cols must be at least 0, got ", rows, " and ", cols);
  const Dropout dropout(seed, dropout_p);
  const at::Tensor mask = at::full({rows, cols}, dropout.keep_scale(), seed.options().dtype(dtype));
  dropout.apply(mask, 0, mask);
  return mask;
}

}  // namespace fused_lora::cpu
