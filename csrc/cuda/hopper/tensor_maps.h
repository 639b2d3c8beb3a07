// What the TMA must know of a matrix to copy boxes of it, and whether it can. Plain C++: the rules are the documented
// limits of cuTensorMapEncodeTiled (CUDA Driver API, Tensor Map Object Management), checked before the driver is asked,
// so that a matrix that no map can describe goes to another kernel and never into a failed launch.
#pragma once

#include <cstdint>

namespace fused_lora::cuda {

// A matrix of 16-bit elements, and the box of it that one copy moves.
struct TileMap {
  const void* data;
  int64_t inner, outer;  // elements of a row, which lie next to each other, and rows
  int64_t row_bytes;     // from one row to the next
  int32_t box_inner, box_outer;
  // The box's rows lie one after the other in shared memory, and their 16-byte chunks change places within spans of so
  // many bytes, that eight rows of one column are in eight different banks: 32, 64 or 128.
  int32_t swizzle_bytes;
};

// Why no tensor map can describe it, or null.
inline const char* why_not(const TileMap& tile) {
  constexpr int64_t ELEMENT_BYTES = 2, MOST_ELEMENTS = int64_t{1} << 32, MOST_STRIDE = int64_t{1} << 40;
  if (tile.data == nullptr || reinterpret_cast<uintptr_t>(tile.data) % 16 != 0) {
    return "a matrix must begin at a multiple of 16 bytes";
  }
  if (tile.row_bytes % 16 != 0) return "the stride between rows must be a multiple of 16 bytes";
  if (tile.inner < 1 || tile.outer < 1 || tile.inner > MOST_ELEMENTS || tile.outer > MOST_ELEMENTS) {
    return "a matrix must have 1 to 2^32 rows and columns";
  }
  // rows that overlap, as an expanded tensor's, are no matrix to the TMA
  if (tile.row_bytes < tile.inner * ELEMENT_BYTES || tile.row_bytes >= MOST_STRIDE) {
    return "rows must lie apart, and less than 2^40 bytes";
  }
  if (tile.box_inner < 1 || tile.box_outer < 1 || tile.box_inner > 256 || tile.box_outer > 256) {
    return "a box must have 1 to 256 rows and columns";
  }
  if (tile.swizzle_bytes != 32 && tile.swizzle_bytes != 64 && tile.swizzle_bytes != 128) {
    return "a swizzle must span 32, 64 or 128 bytes";
  }
  const int64_t box_bytes = tile.box_inner * ELEMENT_BYTES;
  if (box_bytes % 16 != 0 || box_bytes > tile.swizzle_bytes) {
    return "a row of a box must be a multiple of 16 bytes within the swizzle's span";
  }
  return nullptr;
}

}  // namespace fused_lora::cuda
