// What the shim of Hopper is checked by, for ctypes: its primitives one by one, and kernels that are broken on purpose.
#include "wgmma.cuh"

using namespace fused_lora::cuda;

namespace {

struct Check {
  TensorMap first, second;
  TileMap first_tile, second_tile;
  void* in;
  void* out;
  int flag, inner, outer;
};

constexpr int BOX_BYTES = 32 * 1024, THREADS = 256;

// Two boxes and barriers, aligned as the swizzle needs.
struct Memory {
  unsigned char* boxes;
  Barrier* barriers;
  int* place;

  Memory() {
    const auto at = (reinterpret_cast<uintptr_t>(shared_memory()) + 1023) & ~uintptr_t{1023};
    boxes = reinterpret_cast<unsigned char*>(at);
    barriers = reinterpret_cast<Barrier*>(boxes + 2 * BOX_BYTES);
    place = reinterpret_cast<int*>(barriers + 4);
    if (thread_index() == 0) {
      init_barrier(&barriers[0], 1);
      init_barrier(&barriers[1], 2);
      init_barrier(&barriers[2], 1);
      publish_barriers();
    }
    sync_cluster();
  }
};

int bytes_of(const TileMap& tile) { return 2 * tile.box_inner * tile.box_outer; }

void copy(void* to, const void* from, int bytes) {
  for (int i = thread_index(); i < bytes; i += THREADS) {
    static_cast<unsigned char*>(to)[i] = static_cast<const unsigned char*>(from)[i];
  }
}

// A box to shared memory, and that, as it lies, to out; of the second block to the second half of out.
// flag 0: each block for itself; 1: by the first block to both; 2: not awaited; 3: bytes of half of it are announced;
// 4: twice to one place; 5: announced after it may have come.
void load_kernel(Check check) {
  const Memory memory;
  const int bytes = bytes_of(check.first_tile);
  if (thread_index() == 0) {
    if (check.flag != 5) arrive_expecting(memory.barriers, check.flag == 3 ? bytes / 2 : bytes);
    if (check.flag == 1) {
      if (rank_in_cluster() == 0) {
        load_tile_multicast(memory.boxes, &check.first, memory.barriers, check.inner, check.outer, 3);
      }
    } else {
      load_tile(memory.boxes, &check.first, memory.barriers, check.inner, check.outer);
    }
    if (check.flag == 4) load_tile(memory.boxes, &check.first, memory.barriers, check.inner, check.outer);
    if (check.flag == 5) {
      for (int i = 0; i < 50; ++i) pause();
      arrive_expecting(memory.barriers, bytes);
    }
  }
  if (check.flag != 2) await_phase(memory.barriers, 0);
  copy(static_cast<unsigned char*>(check.out) + rank_in_cluster() * bytes, memory.boxes, bytes);
  await_phase(memory.barriers, 0);
  sync_cluster();
}

// The first block stores a box that lies in shared memory as `in` is.
// flag 1: the thread that stores it has not awaited its reading before memory is overwritten; 2: nor before it leaves.
void store_kernel(Check check) {
  const Memory memory;
  const int bytes = bytes_of(check.first_tile);
  copy(memory.boxes, check.in, bytes);
  fence_shared_for_tma();
  sync_block();
  if (thread_index() == 0 && rank_in_cluster() == 0) {
    store_tile(&check.first, memory.boxes, check.inner, check.outer);
    if (check.flag == 0) await_stores_read<0>();
    if (check.flag != 2) std::memset(memory.boxes, 0, bytes);
    if (check.flag != 2) await_stores();
  }
}

// A warp's registers through stmatrix to shared memory, and from there by a store_tile. flag 1: without the fence, 2:
// without the barrier.
void matrices_kernel(Check check) {
  const Memory memory;
  if (rank_in_cluster() > 0 || thread_index() >= 128) return sync_cluster();
  if (thread_index() < 32) {
    uint32_t registers[4];
    std::memcpy(registers, static_cast<const uint32_t*>(check.in) + 4 * thread_index(), sizeof registers);
    // rows of 32 bytes, of which the first half is matrix 0 over 2, the other 1 over 3, swizzled as 32 bytes are
    const int lane = thread_index(), line = lane / 16 * 8 + lane % 8, half = lane / 8 % 2;
    store_matrices(memory.boxes + line * 32 + (half ^ (line / 4 % 2)) * 16, registers);
    if (check.flag != 1) fence_shared_for_tma();
  }
  if (check.flag != 2) sync_warpgroup(1);
  if (thread_index() == 0) {
    store_tile(&check.first, memory.boxes, 0, 0);
    await_stores();
  }
  sync_cluster();
}

// acc (64 × N) = a b, twice 64 of the contraction, of tiles that the TMA lays out. Threads' sums to out.
// flag 1: a from registers; 2: no fence; 3: sums are not awaited; 4: tiles are overwritten before; 5: half of the
// threads do not take part; 6: not committed; 7: adds to the sums that are there
template <int N, typename Element, bool A_TRANSPOSED, bool B_TRANSPOSED>
void product_kernel(Check check) {
  const Memory memory;
  // boxes are 64 × 64, or as many columns of b as there are, with a swizzle of their width
  constexpr int B_SPAN = B_TRANSPOSED && N < 64 ? 2 * N : 128;
  unsigned char *a = memory.boxes, *b = memory.boxes + BOX_BYTES;
  if (thread_index() == 0) {
    arrive_expecting(memory.barriers, 64 * 128 + 64 * 2 * N);
    load_tile(a, &check.first, memory.barriers, 0, 0);
    if (B_TRANSPOSED) {
      for (int column = 0; column < N; column += 64) {
        load_tile(b + column * 128, &check.second, memory.barriers, column, 0);
      }
    } else {
      load_tile(b, &check.second, memory.barriers, 0, 0);
    }
  }
  await_phase(memory.barriers, 0);
  if (thread_index() >= 128 || (check.flag == 5 && thread_index() >= 64)) return sync_cluster();
  constexpr Swizzle B_SWIZZLE = B_SPAN == 128 ? Swizzle::k128 : B_SPAN == 64 ? Swizzle::k64 : Swizzle::k32;
  const uint64_t of_a = matrix_descriptor(a, 64 * 128, 1024, Swizzle::k128);
  const uint64_t of_b = matrix_descriptor(b, 64 * 128, 8 * B_SPAN, B_SWIZZLE);
  constexpr int A_STEP = (A_TRANSPOSED ? 16 * 128 : 32) >> 4, B_STEP = (B_TRANSPOSED ? 16 * B_SPAN : 32) >> 4;
  float acc[N / 2];
  for (int i = 0; i < N / 2; ++i) acc[i] = static_cast<float>(i);
  if (check.flag != 2) wgmma_fence();
  for (int k = 0; k < 4; ++k) {
    const bool accumulate = k > 0 || check.flag == 7;
    if (check.flag == 1) {
      uint32_t registers[4];
      std::memcpy(registers, static_cast<const uint32_t*>(check.in) + (k * 128 + thread_index()) * 4, 16);
      Wgmma<N, Element, B_TRANSPOSED>::multiply_registers(acc, registers, of_b + k * B_STEP, accumulate);
    } else {
      Wgmma<N, Element, B_TRANSPOSED, A_TRANSPOSED>::multiply(acc, of_a + k * A_STEP, of_b + k * B_STEP, accumulate);
    }
  }
  if (check.flag != 6) wgmma_commit();
  if (check.flag == 4 && thread_index() == 0) {
    arrive_expecting(memory.barriers + 2, 64 * 128);
    load_tile(a, &check.first, memory.barriers + 2, 64, 0);
  }
  if (check.flag != 3) wgmma_wait<0>();
  for (int i = 0; i < N / 2; ++i) static_cast<float*>(check.out)[thread_index() * (N / 2) + i] = acc[i];
  if (check.flag == 3) wgmma_wait<0>();
  if (check.flag == 4) await_phase(memory.barriers + 2, 0);
  sync_cluster();
}

// A number from the first block to the second. flag 1: without a release; 2: without an acquire; 3: at a barrier that
// is not published; 4: more arrivals than it counts; 5: at a barrier that is overwritten
void tell_kernel(Check check) {
  const Memory memory;
  Barrier* barrier = memory.barriers + (check.flag == 3 ? 3 : 1);
  if (thread_index() == 0 && rank_in_cluster() == 0) {
    if (check.flag == 3) init_barrier(barrier, 1);
    if (check.flag == 5) std::memset(barrier, 0, 8);
    if (check.flag == 5) arrive(barrier);
    store_in_block(memory.place, 1, 42);
    check.flag == 1 ? arrive_in_block(barrier, 1) : arrive_in_block_releasing(barrier, 1);
    arrive_in_block(barrier, 1);
    if (check.flag == 4) arrive_expecting(memory.barriers, 16), arrive(memory.barriers);
  }
  if (thread_index() == 0 && rank_in_cluster() == 1) {
    check.flag == 2 ? await_phase(barrier, 0) : await_phase_of_cluster(barrier, 0);
    *static_cast<int*>(check.out) = *memory.place;
  }
  sync_cluster();
}

// Three warpgroups. flag: 0 moves registers from one to the others, 1 more than there are, 2 of half of the threads.
void registers_kernel(Check check) {
  if (check.flag == 2 && thread_index() % 128 >= 64) return;
  if (thread_index() < 128) return give_registers_back<40>();
  check.flag == 1 ? take_registers<240>() : take_registers<232>();
  sync_warpgroup(1 + thread_index() / 128);
}

// The first block publishes 64 × 64 elements that the second's TMA reads. flag 1: no fence of the writer, 2: none for
// other blocks, 3: the flag before the barrier, 4: no release, 5: no acquire, 6: no fence of the reader, 7: the reader
// fences before it has acquired
void publish_kernel(Check check) {
  const Memory memory;
  auto* counter = static_cast<int*>(check.in);
  const int flag = check.flag;
  if (rank_in_cluster() == 0) {
    auto* data = static_cast<uint32_t*>(const_cast<void*>(check.first_tile.data));
    for (int i = thread_index(); i < 64 * 32; i += THREADS) store_pair(data + i, 0x00010001u * (i % 1000));
    if (flag != 1) fence_for_tma();
    if (flag != 2) fence_device();
    if (flag != 3) sync_block();
    if (thread_index() == 0) flag == 4 ? static_cast<void>(add_relaxed(counter, 1)) : add_release(counter, 1);
  } else if (thread_index() == 0) {
    if (flag == 7) fence_for_tma();
    while ((flag == 5 ? *counter : load_acquire(counter)) < 1) pause();
    if (flag < 6) fence_for_tma();
    arrive_expecting(memory.barriers, bytes_of(check.first_tile));
    load_tile(memory.boxes, &check.first, memory.barriers, 0, 0);
    await_phase(memory.barriers, 0);
    std::memcpy(check.out, memory.boxes, bytes_of(check.first_tile));
  }
  sync_cluster();
}

const struct {
  const char* name;
  void (*kernel)(Check);
  int threads = THREADS;
} KERNELS[] = {
    {"load", load_kernel},
    {"store", store_kernel},
    {"matrices", matrices_kernel},
    {"tell", tell_kernel},
    {"registers", registers_kernel, 384},
    {"publish", publish_kernel},
    {"16 bfloat16", product_kernel<16, BFloat16, false, false>},
    {"16 bfloat16 b", product_kernel<16, BFloat16, false, true>},
    {"32 float16 b", product_kernel<32, Half, false, true>},
    {"64 float16 a", product_kernel<64, Half, true, false>},
    {"128 bfloat16 a b", product_kernel<128, BFloat16, true, true>},
    {"256 bfloat16", product_kernel<256, BFloat16, false, false>},
    {"256 float16 b", product_kernel<256, Half, false, true>},
};

}  // namespace

extern "C" {

// Why a tensor map cannot be made, of tensor_maps.h, and whether the shim makes one.
const char* map_why_not(const TileMap* tile) { return why_not(*tile); }
int map_is_made(const TileMap* tile) {
  TensorMap map;
  return encode_tensor_map(&map, *tile, true) == 0;
}

int run(const char* name, const TileMap* first, const TileMap* second, void* in, void* out, int flag, int inner,
        int outer, uint64_t seed) {
  Check check{};
  check.first_tile = *first, check.second_tile = *second;
  check.in = in, check.out = out, check.flag = flag, check.inner = inner, check.outer = outer;
  if (first->data != nullptr && encode_tensor_map(&check.first, *first, true) != 0) return -2;
  if (second->data != nullptr && encode_tensor_map(&check.second, *second, true) != 0) return -3;
  shim::Machine::here().turns = {seed, 4, 0};
  for (const auto& known : KERNELS) {
    if (std::strcmp(known.name, name) == 0) {
      return launch_in_pairs(known.kernel, 2, known.threads, 2 * BOX_BYTES + 2048, nullptr, check);
    }
  }
  return -1;
}
const char* why_broken() { return shim::Machine::here().why.c_str(); }
}
