// The bits of LoRA dropout: those of dropout.dropout_mask.
#pragma once

#include "launches.h"
#include "primitives.cuh"

namespace fused_lora::cuda {

// lowbias32, https://nullprogram.com/blog/2018/07/31/
__device__ inline uint32_t mix(uint32_t bits) {
  bits = (bits ^ (bits >> 16)) * 0x7FEB352D;
  bits = (bits ^ (bits >> 15)) * 0x846CA68B;
  return bits ^ (bits >> 16);
}

// The mask of one matrix, whose elements are numbered row after row.
struct Dropout {
  bool active;
  uint32_t key_low, key_high;
  int32_t threshold;

  __device__ Dropout(const DropoutArguments& arguments, bool wanted) : active(wanted && arguments.seed != nullptr) {
    const uint64_t seed = active ? static_cast<uint64_t>(*arguments.seed) : 0;
    key_low = static_cast<uint32_t>(seed);
    key_high = static_cast<uint32_t>(seed >> 32);
    threshold = arguments.threshold;
  }

  __device__ bool keeps(int64_t element) const {
    const uint32_t bits = hash(element >> 1);
    return keeps_lane(element & 1 ? bits : bits << 16);
  }

  // Of elements 2 · pair and 2 · pair + 1, as 16 bits each: ones where an element is kept. They share a hash.
  __device__ uint32_t keeps_pair(int64_t pair) const {
    const uint32_t bits = hash(pair);
    return (keeps_lane(bits << 16) ? 0x0000FFFF : 0) | (keeps_lane(bits) ? 0xFFFF0000 : 0);
  }

 private:
  __device__ uint32_t hash(int64_t pair) const {
    const uint32_t bits = mix(static_cast<uint32_t>(pair) ^ key_low) ^ key_high;
    return mix(bits ^ static_cast<uint32_t>(static_cast<uint64_t>(pair) >> 32));
  }

  // of the upper 16 bits, as a signed number: what is below them cannot change the comparison
  __device__ bool keeps_lane(uint32_t bits) const {
    return static_cast<int32_t>(bits) >= static_cast<int32_t>(static_cast<uint32_t>(threshold - 32768) << 16);
  }
};

}  // namespace fused_lora::cuda
