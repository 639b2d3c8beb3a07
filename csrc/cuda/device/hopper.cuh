// Every instruction that Hopper's kernels need beside primitives.cuh's, for compute capability 9.0a: clusters, barriers
// in shared memory, tiles copied by the TMA, registers moved between warps. wgmma's are in wgmma.cuh.
// tests/cuda_shim/hopper.cuh has the same names for a host compiler.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../hopper/tensor_maps.h"
#include "primitives.cuh"

namespace fused_lora::cuda {

// setup.py compiles every source for every GPU. For others than Hopper its kernels are empty; nobody launches them
// there.
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool FOR_HOPPER = false;
#else
constexpr bool FOR_HOPPER = true;
#endif

// What the TMA knows of a matrix: where it lies, its sizes and row stride, the box that one copy moves, the swizzle.
// 128 opaque bytes, made on the host (hopper/tensor_maps.h), passed as a part of a __grid_constant__ argument.
using TensorMap = CUtensorMap;

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- a cluster: blocks that run at the same time and reach each other's shared memory

__device__ inline int rank_in_cluster() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// All threads of all blocks of the cluster. Aligned: a warp comes together, whatever its lanes did before.
__device__ inline void sync_cluster() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" : : : "memory");
}

// The address, in the cluster's shared memory, of what lies at `pointer` in block `block` of it.
__device__ inline uint32_t in_block(const void* pointer, int block) {
  uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(pointer)), "r"(block));
  return address;
}

__device__ inline void store_in_block(int* pointer, int block, int value) {
  asm volatile("st.shared::cluster.u32 [%0], %1;" : : "r"(in_block(pointer, block)), "r"(value) : "memory");
}

// ---- barriers in shared memory: a phase ends when `count` arrivals and all announced bytes have come

using Barrier = uint64_t;

__device__ inline void init_barrier(Barrier* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" : : "r"(shared_address(barrier)), "r"(count) : "memory");
}

// Before any other block or the TMA uses a barrier: one thread, after its init_barrier calls, then sync_cluster.
__device__ inline void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" : : : "memory"); }

__device__ inline void arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" : : "r"(shared_address(barrier)) : "memory");
}

// Arrives, and announces how many bytes copies will bring: those of boxes beyond a matrix's edge count too.
__device__ inline void arrive_expecting(Barrier* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               :
               : "r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// At a block's barrier of the cluster. Orders nothing: for slots that only the TMA writes. With a release the compiler
// puts a fence of the whole GPU before it, which in a main loop costs half the pace.
__device__ inline void arrive_in_block(Barrier* barrier, int block) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" : : "r"(in_block(barrier, block)) : "memory");
}

// The same after a store_in_block, which whoever waits by await_phase_of_cluster then sees.
__device__ inline void arrive_in_block_releasing(Barrier* barrier, int block) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];"
               :
               : "r"(in_block(barrier, block))
               : "memory");
}

// Until the phase of this parity has ended: 0, 1, 0, … in turn. The phase before the first counts as ended, parity 1.
__device__ inline void await_phase(Barrier* barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra DONE;\n"
      "bra AGAIN;\nDONE:\n}"
      :
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
}

__device__ inline void await_phase_of_cluster(Barrier* barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@done bra DONE;\nbra AGAIN;\nDONE:\n}"
      :
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
}

// ---- the TMA: one thread asks, the copy goes on by itself

// A box of the matrix, from element (outer, inner), to shared memory; its bytes arrive at the barrier. What lies beyond
// the matrix's edge comes as zero. shared: aligned to 1024 bytes.
__device__ inline void load_tile(void* shared, const TensorMap* map, Barrier* barrier, int inner, int outer) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
               :
               : "r"(shared_address(shared)), "l"(map), "r"(shared_address(barrier)), "r"(inner), "r"(outer)
               : "memory");
}

// The same to the same place in each block whose bit is in `blocks`, and to each block's own barrier.
__device__ inline void load_tile_multicast(void* shared, const TensorMap* map, Barrier* barrier, int inner, int outer,
                                           uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%3, %4}], [%2], %5;"
      :
      : "r"(shared_address(shared)), "l"(map), "r"(shared_address(barrier)), "r"(inner), "r"(outer), "h"(blocks)
      : "memory");
}

// A box from shared memory; beyond the matrix's edge nothing is written. Each is a group of its own.
__device__ inline void store_tile(const TensorMap* map, const void* shared, int inner, int outer) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];\n"
      "cp.async.bulk.commit_group;"
      :
      : "l"(map), "r"(shared_address(shared)), "r"(inner), "r"(outer)
      : "memory");
}

// Until all but the last `PENDING` of this thread's store_tile have read shared memory, which may be written again.
template <int PENDING>
__device__ inline void await_stores_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" : : "n"(PENDING) : "memory");
}

// Until all of this thread's store_tile are in memory.
__device__ inline void await_stores() { asm volatile("cp.async.bulk.wait_group 0;" : : : "memory"); }

// The TMA reads and writes by a way of its own: what threads stored to memory it sees only past a fence, on the side of
// who stored, and again on the side of who lets it read.
__device__ inline void fence_for_tma() { asm volatile("fence.proxy.async;" : : : "memory"); }
// of shared memory alone: stores there before a store_tile or a wgmma
__device__ inline void fence_shared_for_tma() { asm volatile("fence.proxy.async.shared::cta;" : : : "memory"); }
// this thread's stores, to every block of the GPU
__device__ inline void fence_device() { __threadfence(); }

// Two sums to the nearest 16-bit elements, ties to even, next to each other.
__device__ inline uint32_t round_pair(float first, float second, BFloat16) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}
__device__ inline uint32_t round_pair(float first, float second, Half) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}

// Two 16-bit elements to memory, that another block's TMA reads.
__device__ inline void store_pair(void* global, uint32_t pair) { *static_cast<uint32_t*>(global) = pair; }

// 16 bytes of shared memory, as they lie there.
__device__ inline void load_vector(uint32_t (&words)[4], const void* shared) {
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared_address(shared))
               : "memory");
}
__device__ inline void store_vector(void* shared, const uint32_t (&words)[4]) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};"
               :
               : "r"(shared_address(shared)), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

// ---- warps with different work

// How many registers each thread of this warpgroup has from here on.
template <int REGISTERS>
__device__ inline void give_registers_back() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" : : "n"(REGISTERS));
}
template <int REGISTERS>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" : : "n"(REGISTERS));
}

// The 128 threads of a warpgroup. id: 1 to 15, one for each group that waits at the same time.
__device__ inline void sync_warpgroup(int id) { asm volatile("bar.sync %0, 128;" : : "r"(id) : "memory"); }
// of two warpgroups
__device__ inline void sync_two_warpgroups(int id) { asm volatile("bar.sync %0, 256;" : : "r"(id) : "memory"); }

// Four 8×8 matrices of 16-bit elements from mma's fragments to shared memory: load_matrices the other way.
__device__ inline void store_matrices(void* row, const uint32_t (&fragments)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
               :
               : "r"(shared_address(row)), "r"(fragments[0]), "r"(fragments[1]), "r"(fragments[2]), "r"(fragments[3])
               : "memory");
}

// ---- wgmma: a warpgroup multiplies tiles in shared memory, asynchronously

// How a tile lies in shared memory, for wgmma. Bytes between its parts: leading, along the operand's contiguous
// dimension, and stride, between groups of eight rows (PTX ISA, matrix descriptor). start: its first element.
enum class Swizzle : int { k128 = 1, k64 = 2, k32 = 3 };
__device__ inline uint64_t matrix_descriptor(const void* start, int leading_bytes, int stride_bytes, Swizzle swizzle) {
  return static_cast<uint64_t>((shared_address(start) & 0x3FFFF) >> 4) |
         static_cast<uint64_t>(leading_bytes >> 4) << 16 | static_cast<uint64_t>(stride_bytes >> 4) << 32 |
         static_cast<uint64_t>(swizzle) << 62;
}

// Before the first wgmma of a sequence, and again whenever registers that the next one reads or adds to were touched.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" : : : "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" : : : "memory"); }
// Until all but the last `PENDING` committed groups are done: their sums may be read, their tiles overwritten.
template <int PENDING>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" : : "n"(PENDING) : "memory");
}

// ---- on the host

// The driver's function, asked for by name: the library is then built and imported where no driver is.
inline auto tensor_map_encoder() {
  static const auto encoder = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status;
    const cudaError_t failed =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status);
    return failed == cudaSuccess && status == cudaDriverEntryPointSuccess
               ? reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found)
               : nullptr;
  }();
  return encoder;
}

// Whether there is a driver of CUDA 12 or later.
inline bool driver_makes_tensor_maps() { return tensor_map_encoder() != nullptr; }

// Of elements of bfloat16 or half: zero fills what is beyond the edge, and both are zero alike. Returns 0 or a
// CUresult.
inline int encode_tensor_map(TensorMap* map, const TileMap& tile, bool bfloat16) {
  const auto encoder = tensor_map_encoder();
  if (encoder == nullptr) return CUDA_ERROR_NOT_FOUND;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(tile.inner), static_cast<cuuint64_t>(tile.outer)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(tile.row_bytes)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(tile.box_inner), static_cast<cuuint32_t>(tile.box_outer)};
  const cuuint32_t every[] = {1, 1};
  const auto swizzle = tile.swizzle_bytes == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                       : tile.swizzle_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                  : CU_TENSOR_MAP_SWIZZLE_32B;
  return encoder(map, bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
                 const_cast<void*>(tile.data), sizes, strides, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

// One launch in clusters of so many blocks. Returns a cudaError_t.
template <typename Arguments>
int launch_in_clusters(int cluster_blocks, void (*kernel)(Arguments), int blocks, int threads, int shared_bytes,
                       void* stream, const Arguments& arguments) {
  const auto function = reinterpret_cast<const void*>(kernel);
  const cudaError_t allowed = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (allowed != cudaSuccess) return allowed;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = cluster_blocks, cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  config.attrs = &cluster, config.numAttrs = 1;
  void* values[] = {const_cast<Arguments*>(&arguments)};
  return cudaLaunchKernelExC(&config, function, values);
}
template <typename Arguments>
int launch_in_pairs(void (*kernel)(Arguments), int blocks, int threads, int shared_bytes, void* stream,
                    const Arguments& arguments) {
  return launch_in_clusters(2, kernel, blocks, threads, shared_bytes, stream, arguments);
}
// blocks that stand alone
template <typename Arguments>
int launch_singly(void (*kernel)(Arguments), int blocks, int threads, int shared_bytes, void* stream,
                  const Arguments& arguments) {
  return launch_in_clusters(1, kernel, blocks, threads, shared_bytes, stream, arguments);
}

}  // namespace fused_lora::cuda
