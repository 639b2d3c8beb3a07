// Every instruction that the kernels need and C++ has not, for compute capability 8.0 and later.
// tests/cuda_shim/primitives.cuh has the same names for a host compiler.
#pragma once

#include <cstdint>

namespace fused_lora::cuda {

// Bits alone: what may be done with them is load, store and convert.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(BFloat16 value) { return __uint_as_float(static_cast<uint32_t>(value.bits) << 16); }
__device__ inline float to_float(Half value) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
}

// to nearest, ties to even
__device__ inline void round_to(float value, float& rounded) { rounded = value; }
__device__ inline void round_to(float value, BFloat16& rounded) {
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded.bits) : "f"(value));
}
__device__ inline void round_to(float value, Half& rounded) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(rounded.bits) : "f"(value));
}

// A tensor core cuts the bits that tf32 lacks: round them away first.
__device__ inline uint32_t tf32_bits(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

// value, but what follows from it is not kept in registers through a loop: there would not be enough of them.
__device__ inline int computed_anew(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

__device__ inline int thread_index() { return threadIdx.x; }
__device__ inline int block_index() { return blockIdx.x; }
__device__ inline int block_count() { return gridDim.x; }

// Threads of a block see each other's stores to memory only past a barrier.
__device__ inline void sync_block() { __syncthreads(); }

__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

// Tickets: only that no two are the same matters, so nothing is ordered by it.
__device__ inline int add_relaxed(int* counter, int count) {
  int before;
  asm volatile("atom.relaxed.gpu.global.add.s32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(count) : "memory");
  return before;
}

// Arrivals: what came before mine, in every block that arrived earlier, is seen by whoever finds itself the last.
__device__ inline int add_acquire_release(int* counter, int count) {
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(count) : "memory");
  return before;
}

// Flags: with the barrier before it, whoever acquires the flag sees every store of this block.
__device__ inline void add_release(int* counter, int count) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" : : "l"(counter), "r"(count) : "memory");
}
__device__ inline int load_acquire(const int* counter) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}

// A block that polls a flag leaves the memory to the others.
__device__ inline void pause() { __nanosleep(64); }

// 16 bytes to shared memory: the first `bytes` from global, the rest zero. Both are aligned to 16 bytes.
// It passes by the registers and does not wait, so the next tile is on its way while this one is multiplied.
__device__ inline void copy_async(void* shared, const void* global, int bytes) {
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" : : "r"(to), "l"(global), "r"(bytes) : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" : : : "memory"); }

// Until all of this thread's copies have come, but for those of its last `PENDING` groups.
template <int PENDING>
__device__ inline void await_copies() {
  asm volatile("cp.async.wait_group %0;" : : "n"(PENDING) : "memory");
}

// Four 8×8 matrices of 16-bit elements, each row of 8 at the address that lane 8·matrix + row gives: one instruction
// brings every lane what it must hold for mma. TRANSPOSED: of each matrix's transpose.
template <bool TRANSPOSED>
__device__ inline void load_matrices(uint32_t (&fragments)[4], const void* row) {
  const auto from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (TRANSPOSED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragments[0]), "=r"(fragments[1]), "=r"(fragments[2]), "=r"(fragments[3])
                 : "r"(from)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragments[0]), "=r"(fragments[1]), "=r"(fragments[2]), "=r"(fragments[3])
                 : "r"(from)
                 : "memory");
  }
}

// acc (16×8) += a (16×k) b (k×8) of a warp on its tensor core; k is 16, for tf32 8. Sums are float32.
#define FUSED_LORA_MMA(NAME, SHAPE_AND_TYPES)                                                                  \
  __device__ inline void NAME(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {             \
    asm("mma.sync.aligned." SHAPE_AND_TYPES " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])                                               \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                       \
  }
FUSED_LORA_MMA(mma_bfloat16, "m16n8k16.row.col.f32.bf16.bf16.f32")
FUSED_LORA_MMA(mma_half, "m16n8k16.row.col.f32.f16.f16.f32")
FUSED_LORA_MMA(mma_tf32, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef FUSED_LORA_MMA

// Returns a cudaError_t.
template <typename Arguments>
int launch(void (*kernel)(Arguments), int blocks, int threads, int shared_bytes, void* stream, Arguments arguments) {
  void* values[] = {&arguments};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(blocks), dim3(threads), values, shared_bytes,
                          static_cast<cudaStream_t>(stream));
}

}  // namespace fused_lora::cuda
