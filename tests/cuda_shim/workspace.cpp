// A stream's memory in csrc/cuda, for ctypes: buffers are numbers, and nothing is allocated.
#include "../workspace.h"

#include <atomic>
#include <memory>

namespace {

std::atomic<int64_t> made{0}, alive{0};

}  // namespace

extern "C" {

// The number of the stream's buffer, from 1 on; 0 where there is none.  size: of a buffer that is made now.
int64_t buffer_of(int64_t count, int32_t device, int64_t stream, int32_t may_make, int64_t* size) {
  using Buffer = std::shared_ptr<int64_t>;
  static auto& workspace = *new fused_lora::cuda::Workspace<Buffer>;
  const auto make = [&](int64_t elements) -> std::optional<Buffer> {
    if (may_make == 0) return std::nullopt;
    *size = elements;
    ++alive;
    return Buffer(new int64_t(++made), [](int64_t* number) {
      --alive;
      delete number;
    });
  };
  const auto found = workspace.at_least(count, device, reinterpret_cast<void*>(stream), make);
  return found ? **found : 0;
}

int64_t buffers_alive() { return alive; }
}
