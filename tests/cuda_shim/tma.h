// The TMA by the CUDA driver's and PTX's definitions: boxes of a matrix to and from shared memory, some time.
#pragma once

#include "hopper.h"
#include "tensor_maps.h"

namespace shim {

using fused_lora::cuda::TileMap;

// What cuTensorMapEncodeTiled documents of two dimensions of 16-bit elements, no interleave, this swizzle.
inline bool can_be_encoded(const TileMap& tile) {
  const auto within = [](int64_t value, int64_t least, int64_t most) { return value >= least && value <= most; };
  const bool swizzles = tile.swizzle_bytes == 32 || tile.swizzle_bytes == 64 || tile.swizzle_bytes == 128;
  return tile.data != nullptr && reinterpret_cast<uintptr_t>(tile.data) % 16 == 0 && swizzles &&
         within(tile.inner, 1, int64_t{1} << 32) && within(tile.outer, 1, int64_t{1} << 32) &&
         within(tile.row_bytes, 2 * tile.inner, (int64_t{1} << 40) - 1) && tile.row_bytes % 16 == 0 &&
         within(tile.box_inner, 1, 256) && within(tile.box_outer, 1, 256) && 2 * tile.box_inner % 16 == 0 &&
         2 * tile.box_inner <= tile.swizzle_bytes;
}

struct alignas(64) TensorMap {
  static constexpr uint64_t MADE = 0x7E4504A9;
  TileMap tile;
  uint64_t made;
  unsigned char rest[128 - sizeof(TileMap) - sizeof(uint64_t)];
};

// The 16-byte chunks of a line change places, by bits of the address itself: those that count lines, so that eight
// lines below each other have one chunk at eight places.
inline unsigned char* swizzled(unsigned char* address, int span) {
  const auto bits = reinterpret_cast<uintptr_t>(address);
  return reinterpret_cast<unsigned char*>(bits ^ (bits >> 7 & (span / 16 - 1)) << 4);
}

inline void fill_with_nan(void* memory, size_t bytes) { std::memset(memory, 0xFF, bytes); }

// A box: each 16 bytes of it, in shared memory and where they are in the matrix.
template <typename Visit>
void for_each_chunk(const TileMap& tile, unsigned char* shared, int64_t inner, int64_t outer, const Visit& visit) {
  const int row_bytes = 2 * tile.box_inner;
  require(row_bytes == tile.swizzle_bytes, "the shim knows boxes as wide as their swizzle");
  auto* data = static_cast<unsigned char*>(const_cast<void*>(tile.data));
  for (int row = 0; row < tile.box_outer; ++row) {
    for (int at = 0; at < row_bytes; at += 16) {
      const int64_t column = inner + at / 2, of = outer + row;
      // elements of the chunk that are within the matrix
      const int64_t first = std::max<int64_t>(0, -column), end = std::min<int64_t>(8, tile.inner - column);
      const bool inside = of >= 0 && of < tile.outer && first < end;
      visit(swizzled(shared + row * row_bytes + at, tile.swizzle_bytes), data + of * tile.row_bytes + column * 2,
            inside ? static_cast<int>(first) : 0, inside ? static_cast<int>(end) : 0);
    }
  }
}

inline int box_bytes(const TileMap& tile) { return 2 * tile.box_inner * tile.box_outer; }

inline const TileMap& checked(const TensorMap* map, const void* shared, const Block& block) {
  require(map->made == TensorMap::MADE, "a tensor map that nobody made");
  require(reinterpret_cast<uintptr_t>(shared) % 128 == 0, "a box is not aligned to 128 bytes");
  require(block.contains(shared, box_bytes(map->tile)), "a box outside of the block's shared memory");
  return map->tile;
}

// To each of the cluster's blocks in `mask`: the same place, its own barrier.
inline void load_box(unsigned char* shared, const TensorMap* map, uint64_t* word, int inner, int outer, int mask) {
  Machine& machine = Machine::here();
  Block& mine = *machine.current->block;
  const TileMap tile = checked(map, shared, mine);
  const auto first = reinterpret_cast<uintptr_t>(tile.data);
  const bool hides = Visibility::here().any_in(first, first + tile.row_bytes * tile.outer);
  const auto visible = std::make_shared<Set>(hides ? machine.current->state.visible : Set{});
  for (Block& block : mine.cluster->blocks) {
    if (!(mask >> block.rank & 1)) continue;
    Hopper& hopper = Hopper::of(block);
    unsigned char* to = block.shared + (shared - mine.shared);
    Barrier& barrier = hopper.barrier(
        reinterpret_cast<uint64_t*>(block.shared + (reinterpret_cast<unsigned char*>(word) - mine.shared)));
    const std::pair<const unsigned char*, const unsigned char*> range{to, to + box_bytes(tile)};
    for (const auto& other : hopper.arriving) {
      require(range.second <= other.first || other.second <= range.first, "two copies to one place at the same time");
    }
    hopper.arriving.push_back(range);
    // from here on nobody may rely on what was there
    fill_with_nan(to, box_bytes(tile));
    machine.later([=, &hopper, &barrier] {
      for_each_chunk(tile, to, inner, outer, [&](unsigned char* at, const unsigned char* from, int begin, int end) {
        std::memset(at, 0, 16);
        std::memcpy(at + 2 * begin, from + 2 * begin, 2 * (end - begin));
        hopper.unfenced.by[hopper.chunk(at)] = 0;
        for (int i = begin; hides && i < end; ++i) {
          const auto address = reinterpret_cast<uintptr_t>(from + 2 * i) / 4 * 4;
          if (Visibility::here().hidden(*visible, address)) fill_with_nan(at + 2 * i, 2);
        }
      });
      hopper.arriving.erase(std::find(hopper.arriving.begin(), hopper.arriving.end(), range));
      barrier.come(box_bytes(tile));
    });
  }
}

// It reads shared memory some time, and writes the matrix some time after.
inline void store_box(const TensorMap* map, unsigned char* shared, int inner, int outer) {
  Machine& machine = Machine::here();
  Fiber& fiber = *machine.current;
  Hopper& hopper = Hopper::of(*fiber.block);
  const TileMap tile = checked(map, shared, *fiber.block);
  const auto box = std::make_shared<std::vector<unsigned char>>();
  const int thread = fiber.thread;
  const auto read = machine.later([=, &hopper] {
    for_each_chunk(tile, shared, inner, outer, [&](unsigned char* at, unsigned char*, int, int) {
      box->insert(box->end(), at, at + 16);
      if (hopper.unfenced.hidden(hopper.chunk(at), thread)) fill_with_nan(&*box->end() - 16, 16);
    });
  });
  const auto write = machine.later([=] {
    Machine::here().finish(*read);
    const unsigned char* from = box->data();
    for_each_chunk(tile, shared, inner, outer, [&](unsigned char*, unsigned char* to, int begin, int end) {
      std::memcpy(to + 2 * begin, from + 2 * begin, 2 * (end - begin));
      from += 16;
    });
  });
  fiber.state.reads.push_back(read);
  fiber.state.writes.push_back(write);
}

// All but the last `pending` of the thread.
inline void await_all(Jobs& jobs, size_t pending) {
  while (jobs.size() > pending) {
    Machine::here().finish(*jobs.front());
    jobs.erase(jobs.begin());
  }
}

}  // namespace shim
