// csrc/cuda/device/primitives.cuh for a host compiler: each by its definition in the PTX ISA, on fibers (fibers.h).
#pragma once

#include <cmath>

#include "visibility.h"

#define __device__
#define __host__
#define __global__
#define __launch_bounds__(...)

namespace fused_lora::cuda {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float to_float(float value) { return value; }
inline float to_float(BFloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }
inline float to_float(Half value) {
  _Float16 half;
  std::memcpy(&half, &value, sizeof half);
  return static_cast<float>(half);
}

inline void round_to(float value, float& rounded) { rounded = value; }
inline void round_to(float value, BFloat16& rounded) {
  const uint32_t bits = bits_of(value);
  // the low half rounds the high one, to even at the middle; a NaN stays one
  rounded.bits = std::isnan(value) ? 0x7FFF : static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
inline void round_to(float value, Half& rounded) {
  const auto half = static_cast<_Float16>(value);
  std::memcpy(&rounded, &half, sizeof half);
}

// to nearest, ties away from zero; 13 bits of fraction go
inline uint32_t tf32_bits(float value) {
  return std::isfinite(value) ? (bits_of(value) + 0x1000) & ~0x1FFFu : bits_of(value);
}

inline int computed_anew(int value) { return value; }

inline shim::Fiber& me() { return *shim::Machine::here().current; }
inline int thread_index() { return me().thread; }
inline int block_index() { return me().block->index; }
inline int block_count() { return shim::Machine::here().blocks; }

inline void sync_block() {
  shim::Block& block = *me().block;
  shim::Machine::here().meet(block.barrier, static_cast<int>(block.fibers.size()),
                             [&] { shim::Machine::here().at_barrier(block.barrier); });
}

inline unsigned char* shared_memory() { return me().block->shared; }

// others may run before an atomic, which is all that makes it one
inline int add_relaxed(int* counter, int count) {
  shim::Machine::here().yield();
  shim::Machine::here().progress();
  const int before = *counter;
  *counter += count;
  return before;
}
inline void add_release(int* counter, int count) {
  add_relaxed(counter, count);
  shim::Visibility::here().release(me(), counter);
}
inline int load_acquire(const int* counter) {
  shim::Visibility::here().acquire(me(), counter);
  return *counter;
}
inline int add_acquire_release(int* counter, int count) {
  const int before = add_relaxed(counter, count);
  shim::Visibility::here().acquire(me(), counter);
  shim::Visibility::here().release(me(), counter);
  return before;
}
inline void pause() { shim::Machine::here().poll(); }

// The bytes come no sooner than they are awaited; until then they are NaN, for the hardware may write at any time.
inline void copy_async(void* shared, const void* global, int bytes) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0) std::abort();
  std::memset(shared, 0xFF, 16);
  me().state.copies.back().push_back({shared, global, bytes});
}
inline void commit_copies() { me().state.copies.emplace_back(); }

template <int PENDING>
inline void await_copies() {
  auto& groups = me().state.copies;
  while (groups.size() > PENDING + 1) {
    for (const auto& copy : groups.front()) {
      std::memcpy(copy.to, copy.from, copy.bytes);
      std::memset(static_cast<unsigned char*>(copy.to) + copy.bytes, 0, 16 - copy.bytes);
    }
    groups.erase(groups.begin());
  }
}

// A warp's operation: work(lane -> given, lane -> wanted) once all lanes are here.
template <typename Work>
inline void with_warp(const void* given, void* wanted, const Work& work) {
  shim::Warp& warp = me().block->warps[thread_index() / shim::WARP];
  warp.given[thread_index() % shim::WARP] = given;
  warp.wanted[thread_index() % shim::WARP] = wanted;
  shim::Machine::here().meet(warp.meeting, shim::WARP, [&] { work(warp.given, warp.wanted); });
}

// PTX ISA, ldmatrix: lane 8·matrix + row gives a row's address; lane l gets elements 2·(l % 4) and the next of row l
// / 4.
template <bool TRANSPOSED>
inline void load_matrices(uint32_t (&fragments)[4], const void* row) {
  with_warp(row, fragments, [](const void* const* rows, void* const* wanted) {
    for (int lane = 0; lane < shim::WARP; ++lane) {
      auto* to = static_cast<uint16_t*>(wanted[lane]);
      for (int matrix = 0; matrix < 4; ++matrix) {
        for (int element = 0; element < 2; ++element) {
          const int i = lane / 4, j = lane % 4 * 2 + element;
          const auto* from = static_cast<const uint16_t*>(rows[matrix * 8 + (TRANSPOSED ? j : i)]);
          to[2 * matrix + element] = from[TRANSPOSED ? i : j];
        }
      }
    }
  });
}

// PTX ISA, mma.m16n8k16 of 16-bit types and m16n8k8 of tf32: which elements of a, b and acc a lane holds.
// A register has PER_REGISTER neighbours along k.
template <int K, int PER_REGISTER, typename Value>
inline void mma(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const Value& value) {
  struct Given {
    uint32_t a[4], b[2];
  } given{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  with_warp(&given, acc, [&](const void* const* lanes, void* const* wanted) {
    float of_a[16][K], of_b[K][8];
    for (int lane = 0; lane < shim::WARP; ++lane) {
      const auto& held = *static_cast<const Given*>(lanes[lane]);
      for (int high = 0; high < 2; ++high) {
        for (int element = 0; element < PER_REGISTER; ++element) {
          const int outer = lane / 4, k = high * K / 2 + lane % 4 * PER_REGISTER + element;
          of_a[outer][k] = value(held.a[2 * high], element);
          of_a[outer + 8][k] = value(held.a[2 * high + 1], element);
          of_b[k][outer] = value(held.b[high], element);
        }
      }
    }
    for (int lane = 0; lane < shim::WARP; ++lane) {
      auto* sums = static_cast<float*>(wanted[lane]);
      for (int index = 0; index < 4; ++index) {
        const int row = lane / 4 + index / 2 * 8, column = lane % 4 * 2 + index % 2;
        for (int k = 0; k < K; ++k) sums[index] += of_a[row][k] * of_b[k][column];
      }
    }
  });
}
inline void mma_bfloat16(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma<16, 2>(acc, a, b0, b1, [](uint32_t bits, int high) {
    return to_float(BFloat16{static_cast<uint16_t>(high ? bits >> 16 : bits)});
  });
}
inline void mma_half(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma<16, 2>(acc, a, b0, b1,
             [](uint32_t bits, int high) { return to_float(Half{static_cast<uint16_t>(high ? bits >> 16 : bits)}); });
}
// the hardware does not look at the bits that tf32 lacks
inline void mma_tf32(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma<8, 1>(acc, a, b0, b1, [](uint32_t bits, int) { return float_of(bits & ~0x1FFFu); });
}

// Returns a shim::Outcome.
template <typename Arguments>
int launch(void (*kernel)(Arguments), int blocks, int threads, int shared_bytes, void*, Arguments arguments) {
  if (shared_bytes > 48 * 1024) return shim::TOO_MUCH_SHARED_MEMORY;
  shim::Visibility::here().begin();
  return shim::Machine::here().run(blocks, 1, threads, shared_bytes, [&] { kernel(arguments); });
}

}  // namespace fused_lora::cuda
