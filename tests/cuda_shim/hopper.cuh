// csrc/cuda/device/hopper.cuh for a host compiler: each by its definition in the PTX ISA, on fibers (fibers.h).
#pragma once

#include "primitives.cuh"
#include "products.h"
#include "tma.h"

#define __grid_constant__

namespace fused_lora::cuda {

constexpr bool FOR_HOPPER = true;

using TensorMap = shim::TensorMap;

inline shim::Hopper& on_hopper() { return shim::Hopper::of(*me().block); }

// of the block's shared memory, whose bits are the address's on the host as far as a swizzle looks
inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - me().block->allocated.get());
}

// ---- a cluster

inline int rank_in_cluster() { return me().block->rank; }

template <typename T>
T* in_block(T* pointer, int block) {
  shim::Block& mine = *me().block;
  const auto at = reinterpret_cast<const unsigned char*>(pointer) - mine.shared;
  return reinterpret_cast<T*>(mine.cluster->blocks.at(block).shared + at);
}

inline void sync_cluster() {
  shim::Cluster& cluster = *me().block->cluster;
  int threads = 0;
  for (const shim::Block& block : cluster.blocks) threads += static_cast<int>(block.fibers.size());
  shim::Machine::here().meet(cluster.meeting, threads, [&] {
    shim::Hopper::meet(cluster.meeting);
    for (shim::Block& block : cluster.blocks) {
      for (shim::Barrier& barrier : shim::Hopper::of(block).barriers) barrier.published = barrier.fenced;
    }
    for (shim::Fiber* fiber : cluster.meeting.here) {
      for (const auto& [to, value] : fiber->state.remote) *to = value;
      fiber->state.remote.clear();
    }
  });
}

// seen past an arrive_in_block_releasing or a sync_cluster of this thread
inline void store_in_block(int* pointer, int block, int value) {
  me().state.remote.push_back({in_block(pointer, block), value});
}

// ---- barriers in shared memory

using Barrier = uint64_t;

inline void init_barrier(Barrier* barrier, int count) { on_hopper().init(barrier, thread_index(), count); }

inline void publish_barriers() {
  for (shim::Barrier& barrier : on_hopper().barriers) barrier.fenced |= barrier.by == thread_index();
}

// An arrival makes known what its thread knows, but that in another block which orders nothing.
inline void arrive_expecting(Barrier* barrier, uint32_t bytes) {
  shim::Barrier& state = on_hopper().barrier(barrier);
  state.knows |= me().state.knows;
  on_hopper().unfenced.pass(me());
  state.arrive(bytes);
}
inline void arrive(Barrier* barrier) { arrive_expecting(barrier, 0); }

inline shim::Barrier& barrier_in_block(Barrier* barrier, int block) {
  return shim::Hopper::of(me().block->cluster->blocks.at(block)).barrier(in_block(barrier, block));
}
inline void arrive_in_block(Barrier* barrier, int block) { barrier_in_block(barrier, block).arrive(); }
inline void arrive_in_block_releasing(Barrier* barrier, int block) {
  shim::Barrier& state = barrier_in_block(barrier, block);
  const shim::Block& there = me().block->cluster->blocks[block];
  auto& remote = me().state.remote;
  const auto others = std::partition(remote.begin(), remote.end(),
                                     [&](const auto& store) { return !there.contains(store.first, sizeof(int)); });
  for (auto store = others; store != remote.end(); ++store) {
    state.stores.push_back({store->first, store->second, state.phase});
  }
  remote.erase(others, remote.end());
  state.knows |= me().state.knows;
  state.arrive();
}

inline void await_phase(Barrier* barrier, int parity) { on_hopper().barrier(barrier).await(parity, false); }
inline void await_phase_of_cluster(Barrier* barrier, int parity) { on_hopper().barrier(barrier).await(parity, true); }

// ---- the TMA

inline void load_tile(void* shared, const TensorMap* map, Barrier* barrier, int inner, int outer) {
  shim::load_box(static_cast<unsigned char*>(shared), map, barrier, inner, outer, 1 << rank_in_cluster());
}
inline void load_tile_multicast(void* shared, const TensorMap* map, Barrier* barrier, int inner, int outer,
                                uint16_t blocks) {
  shim::load_box(static_cast<unsigned char*>(shared), map, barrier, inner, outer, blocks);
}
inline void store_tile(const TensorMap* map, const void* shared, int inner, int outer) {
  shim::store_box(map, static_cast<unsigned char*>(const_cast<void*>(shared)), inner, outer);
}
template <int PENDING>
inline void await_stores_read() {
  shim::await_all(me().state.reads, PENDING);
}
inline void await_stores() {
  shim::await_all(me().state.reads, 0);
  shim::await_all(me().state.writes, 0);
}

inline void fence_shared_for_tma() { on_hopper().unfenced.fence(me()); }
inline void fence_for_tma() {
  fence_shared_for_tma();
  shim::Visibility::here().fence_for_tma(me());
}
inline void fence_device() { shim::Visibility::here().fence_device(me()); }

template <typename Element>
uint32_t round_pair(float first, float second, Element) {
  Element low, high;
  round_to(first, low);
  round_to(second, high);
  return static_cast<uint32_t>(high.bits) << 16 | low.bits;
}

inline void store_pair(void* global, uint32_t pair) {
  shim::Visibility::here().store(me(), reinterpret_cast<uintptr_t>(global));
  std::memcpy(global, &pair, sizeof pair);
}

inline size_t vector_at(const void* shared) {
  const bool aligned = reinterpret_cast<uintptr_t>(shared) % 16 == 0;
  shim::require(aligned && me().block->contains(shared, 16), "no place for 16 bytes");
  return on_hopper().chunk(shared);
}
inline void load_vector(uint32_t (&words)[4], const void* shared) {
  vector_at(shared);
  std::memcpy(words, shared, 16);
}
inline void store_vector(void* shared, const uint32_t (&words)[4]) {
  on_hopper().unfenced.store(me(), vector_at(shared));
  std::memcpy(shared, words, 16);
}

// ---- warps with different work

inline int warpgroup_index() { return thread_index() / shim::WARPGROUP; }

// All threads of a warpgroup, which do one thing.
template <typename Work>
inline void with_warpgroup(const Work& work) {
  shim::Machine::here().meet(on_hopper().warpgroups.at(warpgroup_index()), shim::WARPGROUP, work);
}

template <int REGISTERS>
inline void give_registers_back() {
  static_assert(REGISTERS >= 24 && REGISTERS <= 256 && REGISTERS % 8 == 0, "PTX ISA, setmaxnreg");
  with_warpgroup([] {
    int& mine = on_hopper().registers[warpgroup_index()];
    shim::require(mine >= REGISTERS, "setmaxnreg.dec to more registers than there are");
    on_hopper().free_registers += (mine - REGISTERS) * shim::WARPGROUP;
    mine = REGISTERS;
  });
}
// waits until others have given enough back
template <int REGISTERS>
inline void take_registers() {
  static_assert(REGISTERS >= 24 && REGISTERS <= 256 && REGISTERS % 8 == 0, "PTX ISA, setmaxnreg");
  const int more = (REGISTERS - on_hopper().registers[warpgroup_index()]) * shim::WARPGROUP;
  shim::require(more >= 0, "setmaxnreg.inc to fewer registers than there are");
  with_warpgroup([&] {
    while (on_hopper().free_registers < more) pause();
    on_hopper().free_registers -= more;
    on_hopper().registers[warpgroup_index()] = REGISTERS;
  });
}

inline void sync_named(int id, int warpgroups) {
  shim::require(id > 0 && id < 16, "a named barrier is 1 to 15");
  shim::Meeting& meeting = on_hopper().named[id];
  for (const shim::Fiber* fiber : meeting.here) {
    const bool mine = fiber->thread / shim::WARPGROUP == warpgroup_index();
    shim::require(mine || warpgroups > 1, "two warpgroups at one named barrier");
  }
  shim::Machine::here().meet(meeting, warpgroups * shim::WARPGROUP, [&] { shim::Hopper::meet(meeting); });
}
inline void sync_warpgroup(int id) { sync_named(id, 1); }
inline void sync_two_warpgroups(int id) { sync_named(id, 2); }

// PTX ISA, stmatrix: lane 8·matrix + row gives a row's address; lane l has elements 2·(l % 4) and the next of row l
// / 4.
inline void store_matrices(void* row, const uint32_t (&fragments)[4]) {
  shim::require(reinterpret_cast<uintptr_t>(row) % 16 == 0 && me().block->contains(row, 16), "stmatrix to nowhere");
  on_hopper().unfenced.store(me(), on_hopper().chunk(row));
  uint32_t given[4] = {fragments[0], fragments[1], fragments[2], fragments[3]};
  with_warp(given, row, [](const void* const* lanes, void* const* rows) {
    for (int lane = 0; lane < shim::WARP; ++lane) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        auto* to = static_cast<uint32_t*>(rows[8 * matrix + lane / 4]) + lane % 4;
        *to = static_cast<const uint32_t*>(lanes[lane])[matrix];
      }
    }
  });
}

// ---- wgmma; its products are in wgmma.cuh

enum class Swizzle : int { k128 = 1, k64 = 2, k32 = 3 };
inline uint64_t matrix_descriptor(const void* start, int leading_bytes, int stride_bytes, Swizzle swizzle) {
  shim::require(reinterpret_cast<uintptr_t>(start) % 16 == 0, "a tile of wgmma starts within 16 bytes");
  return static_cast<uint64_t>((shared_address(start) & 0x3FFFF) >> 4) |
         static_cast<uint64_t>(leading_bytes >> 4) << 16 | static_cast<uint64_t>(stride_bytes >> 4) << 32 |
         static_cast<uint64_t>(swizzle) << 62;
}

inline shim::Products& products() {
  auto& mine = on_hopper().products.at(warpgroup_index());
  if (mine == nullptr) mine = std::make_shared<shim::Products>(*me().block);
  return *mine;
}

inline void wgmma_fence() { me().state.registers_ordered = true; }
inline void wgmma_commit() { products().commit(me()); }
template <int PENDING>
inline void wgmma_wait() {
  products().await(me(), PENDING);
}

// ---- on the host

inline bool driver_makes_tensor_maps() { return true; }

inline int encode_tensor_map(TensorMap* map, const TileMap& tile, bool) {
  constexpr int INVALID_VALUE = 1;
  if (!shim::can_be_encoded(tile)) return INVALID_VALUE;
  map->tile = tile;
  map->made = TensorMap::MADE;
  return 0;
}

// In clusters of so many blocks. Returns a shim::Outcome.
template <typename Arguments>
int launch_in_clusters(int cluster_blocks, void (*kernel)(Arguments), int blocks, int threads, int shared_bytes,
                       const Arguments& arguments) {
  if (shared_bytes > 227 * 1024) return shim::TOO_MUCH_SHARED_MEMORY;
  shim::Machine& machine = shim::Machine::here();
  shim::Visibility::here().begin();
  machine.on_start = [&](shim::Block& block) { block.hopper = std::make_shared<shim::Hopper>(block, threads); };
  machine.on_meeting = shim::Hopper::meet;
  machine.on_thread_end = [](shim::Fiber& fiber) { shim::Hopper::of(*fiber.block).end(fiber); };
  const int outcome = machine.run(blocks, cluster_blocks, threads, shared_bytes, [&] { kernel(arguments); });
  machine.on_start = nullptr;
  machine.on_thread_end = nullptr;
  machine.on_meeting = nullptr;
  return outcome;
}
template <typename Arguments>
int launch_in_pairs(void (*kernel)(Arguments), int blocks, int threads, int shared_bytes, void*,
                    const Arguments& arguments) {
  return launch_in_clusters(2, kernel, blocks, threads, shared_bytes, arguments);
}
template <typename Arguments>
int launch_singly(void (*kernel)(Arguments), int blocks, int threads, int shared_bytes, void*,
                  const Arguments& arguments) {
  return launch_in_clusters(1, kernel, blocks, threads, shared_bytes, arguments);
}

}  // namespace fused_lora::cuda
