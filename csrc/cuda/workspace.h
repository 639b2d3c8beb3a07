// Memory that the launches of a stream use in turn, beside their results. No header of PyTorch or CUDA: the tests run
// it on a machine without a GPU.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

namespace fused_lora::cuda {

// Buffer: copied as a reference is.
template <typename Buffer>
class Workspace {
 public:
  // At least count elements of the stream's own, the same until it asks for more.
  // make(n): n elements, or nothing where none may be made now. It is called where the stream has fewer than count.
  template <typename Make>
  std::optional<Buffer> at_least(int64_t count, int device, void* stream, const Make& make) {
    const std::lock_guard<std::mutex> lock(mutex_);
    Kept& kept = known_[{device, stream}];
    if (kept.buffer && kept.size >= count) return kept.buffer;
    // doubled, so that growing sizes leave no more behind than they end with
    int64_t size = kLeast;
    while (size < count) size *= 2;
    std::optional<Buffer> made = make(size);
    if (!made) return std::nullopt;
    // a captured graph may hold its address
    if (kept.buffer) outgrown_.push_back(*kept.buffer);
    kept = {made, size};
    return made;
  }

 private:
  static constexpr int64_t kLeast = 1 << 14;

  struct Kept {
    std::optional<Buffer> buffer;
    int64_t size = 0;
  };

  std::mutex mutex_;
  std::map<std::pair<int, void*>, Kept> known_;
  std::vector<Buffer> outgrown_;
};

}  // namespace fused_lora::cuda
