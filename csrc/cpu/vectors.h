// Vectors of L float32 lanes that the compiler turns into whatever instructions the enclosing function may use, and the
// elements of memory that they are made of.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>
#include <cstring>

// vectors go from one inlined function to another: no calling convention is concerned
#pragma GCC diagnostic ignored "-Wpsabi"

// what takes part in a function for a certain instruction set must be inlined there
#define FUSED_LORA_INLINE __attribute__((always_inline)) inline

namespace fused_lora::cpu {

template <int L>
struct Lanes {
  typedef float Float __attribute__((vector_size(4 * L)));
  typedef uint32_t Bits __attribute__((vector_size(4 * L)));
};

template <typename Vector>
FUSED_LORA_INLINE Vector load(const void* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

template <typename Vector>
FUSED_LORA_INLINE void store(void* to, const Vector& vector) {
  std::memcpy(to, &vector, sizeof vector);
}

template <int L>
FUSED_LORA_INLINE float sum(typename Lanes<L>::Float vector) {
  if constexpr (L == 4) {
    return (vector[0] + vector[1]) + (vector[2] + vector[3]);
  } else {
    using Half = typename Lanes<L / 2>::Float;
    const auto* halves = reinterpret_cast<const char*>(&vector);
    return sum<L / 2>(load<Half>(halves) + load<Half>(halves + sizeof(Half)));
  }
}

// A chunk of elements in memory as `vectors` vectors of L lanes, in an order that costs the least.
template <typename T, int L>
struct Chunk;

template <int L>
struct Chunk<float, L> {
  static constexpr int vectors = 1, elements = L;
  using Float = typename Lanes<L>::Float;

  static FUSED_LORA_INLINE void read(const float* from, Float (&to)[1]) { to[0] = load<Float>(from); }
  static FUSED_LORA_INLINE void write(float* to, const Float (&from)[1]) { store(to, from[0]); }
};

// A bfloat16 is the upper half of a float32: the even elements first, then the odd ones.
template <int L>
struct Chunk<c10::BFloat16, L> {
  static constexpr int vectors = 2, elements = 2 * L;
  using Float = typename Lanes<L>::Float;
  using Bits = typename Lanes<L>::Bits;

  static FUSED_LORA_INLINE void read(const c10::BFloat16* from, Float (&to)[2]) {
    const Bits pairs = load<Bits>(from);
    to[0] = reinterpret_cast<Float>(pairs << 16);
    to[1] = reinterpret_cast<Float>(pairs & 0xFFFF0000);
  }

  static FUSED_LORA_INLINE void write(c10::BFloat16* to, const Float (&from)[2]) {
    store(to, (rounded(from[0]) >> 16) | (rounded(from[1]) & 0xFFFF0000));
  }

  // To the nearest, ties to even; the lower half is left as it comes out.
  static FUSED_LORA_INLINE Bits rounded(Float value) {
    const Bits bits = reinterpret_cast<Bits>(value);
    const Bits is_nan = reinterpret_cast<Bits>(value != value);
    return (is_nan & 0x7FC00000) | (~is_nan & (bits + 0x7FFF + ((bits >> 16) & 1)));
  }
};

}  // namespace fused_lora::cpu
