// A warpgroup's wgmma instructions: each read from its descriptors and multiplied some time after all of its threads
// have issued it, in their order, and at the latest when it is awaited. Sums that are not awaited are NaN to their
// threads.
#pragma once

#include "hopper.h"

namespace shim {

constexpr int ROWS_OF_A = 64, DEPTH = 16;

// Sums of one array of each thread, from its first product until they are awaited.
struct Sums {
  float* of[WARPGROUP] = {};
  int columns;
  std::vector<float> values;  // row by row

  explicit Sums(int columns) : columns(columns), values(ROWS_OF_A * columns) {}

  // PTX ISA, fragments of wgmma.m64nNk16: where a thread's sum lies
  float& at(int thread, int index) {
    const int row = thread / 32 * 16 + thread % 32 / 4 + index / 2 % 2 * 8;
    return values[row * columns + index / 4 * 8 + thread % 4 * 2 + index % 2];
  }
  void take(int thread, float* sums) {
    of[thread] = sums;
    for (int i = 0; i < columns / 2; ++i) at(thread, i) = sums[i];
    std::memset(sums, 0xFF, sizeof(float) * columns / 2);
  }
  void give_back(int thread) {
    for (int i = 0; i < columns / 2; ++i) of[thread][i] = at(thread, i);
  }
};

// How a tile lies in shared memory: PTX ISA, matrix descriptor and canonical layouts.
struct Tile {
  size_t start, leading, stride;
  int span;

  explicit Tile(uint64_t descriptor)
      : start((descriptor & 0x3FFF) << 4),
        leading((descriptor >> 16 & 0x3FFF) << 4),
        stride((descriptor >> 32 & 0x3FFF) << 4),
        span(256 >> (descriptor >> 62)) {
    require(descriptor >> 62 != 0, "the shim knows tiles that are swizzled");
    require((descriptor >> 49 & 7) == 0, "the shim knows descriptors without a base offset");
  }
  // of the 8 elements along the contiguous dimension from element `along`, in line `line`
  size_t address(bool transposed, int line, int along) const {
    if (!transposed) return start + line / 8 * stride + line % 8 * span + along * 2;
    return start + along / (span / 2) * leading + along % (span / 2) * 2 + line / 8 * stride + line % 8 * span;
  }
};

using Convert = float (*)(uint16_t);

struct Product {
  uint64_t a, b;  // descriptors; a: 0 where registers are given
  int columns;
  bool a_transposed, b_transposed, accumulate;
  Convert convert;
  std::shared_ptr<Sums> sums;
  int here = 0;
  std::vector<float> of_a;  // DEPTH × ROWS_OF_A

  bool operator==(const Product& other) const {
    return a == other.a && b == other.b && columns == other.columns && accumulate == other.accumulate &&
           a_transposed == other.a_transposed && b_transposed == other.b_transposed && convert == other.convert;
  }
};

// Nothing makes the four warps wait for each other, but that a product needs its operands from all of them.
struct Products : std::enable_shared_from_this<Products> {
  // what a thread has under way
  struct Mine {
    std::shared_ptr<Sums> sums;
    int64_t last;  // product that adds to them
  };

  Block& block;
  std::deque<Product> queue;
  int64_t first = 0;  // number of the queue's first, which not all threads have awaited
  int64_t ready = 0;  // so many are issued by all threads
  int64_t multiplied = 0;
  std::vector<int64_t> groups;  // where each ends
  std::vector<Mine> mine[WARPGROUP];
  std::vector<Fiber*> waiting;

  explicit Products(Block& block) : block(block) {}

  // registers: of a, four, or null.
  void issue(Fiber& fiber, Product given, float* sums, const uint32_t* registers) {
    require(fiber.state.registers_ordered, "wgmma without wgmma_fence");
    const int thread = fiber.thread % WARPGROUP;
    const int64_t number = fiber.state.issued++;
    const auto under_way = std::find_if(mine[thread].begin(), mine[thread].end(),
                                        [&](const Mine& some) { return some.sums->of[thread] == sums; });
    const bool is_first = number == first + static_cast<int64_t>(queue.size());
    if (is_first) {
      const bool is_new = under_way == mine[thread].end();
      given.sums = is_new ? std::make_shared<Sums>(given.columns) : under_way->sums;
      if (registers != nullptr) given.of_a.resize(ROWS_OF_A * DEPTH);
      queue.push_back(std::move(given));
    }
    Product& product = queue[number - first];
    require(is_first || product == given, "threads of a warpgroup issue different wgmmas");
    require(product.sums->columns == product.columns, "sums under way are added to in another shape");
    if (under_way != mine[thread].end()) {
      require(under_way->sums == product.sums, "threads of a warpgroup name different sums");
      under_way->last = number;
    } else {
      require(product.sums->of[thread] == nullptr, "threads of a warpgroup name different sums");
      product.sums->take(thread, sums);
      mine[thread].push_back({product.sums, number});
    }
    if (registers != nullptr) {
      // as mma.m16n8k16 has them
      for (int i = 0; i < 8; ++i) {
        const int row = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8, k = thread % 4 * 2 + i % 2 + i / 4 * 8;
        product.of_a[k * ROWS_OF_A + row] =
            product.convert(static_cast<uint16_t>(registers[i / 2] >> (i % 2 ? 16 : 0)));
      }
    }
    if (++product.here < WARPGROUP) return;
    ready = number + 1;
    Machine::here().later([self = shared_from_this(), number] { self->multiply_until(number + 1); });
    for (Fiber* fiber : waiting) Machine::here().wake(fiber);
    waiting.clear();
  }

  void commit(Fiber& fiber) {
    const size_t group = fiber.state.committed++;
    if (group == groups.size()) groups.push_back(fiber.state.issued);
    require(groups[group] == fiber.state.issued, "threads of a warpgroup commit different groups");
  }

  // This thread: its sums of all but the last `pending` groups.
  void await(Fiber& fiber, int64_t pending) {
    const int thread = fiber.thread % WARPGROUP;
    fiber.state.registers_ordered = false;
    const int64_t last = fiber.state.committed - pending, end = last > 0 ? groups[last - 1] : 0;
    while (ready < end) {
      waiting.push_back(&fiber);
      Machine::here().sleep();
    }
    multiply_until(end);
    for (Mine& some : mine[thread]) {
      if (some.last < end) some.sums->give_back(thread), some.sums = nullptr;
    }
    mine[thread].erase(
        std::remove_if(mine[thread].begin(), mine[thread].end(), [](const Mine& some) { return some.sums == nullptr; }),
        mine[thread].end());
    for (int64_t& number = fiber.state.awaited; number < end; ++number) --queue[number - first].here;
    for (; !queue.empty() && first < ready && queue.front().here == 0; ++first) queue.pop_front();
  }

 private:
  void multiply_until(int64_t end) {
    for (; multiplied < end; ++multiplied) {
      Product& product = queue[multiplied - first];
      if (product.of_a.empty()) product.of_a = read(product.a, product.a_transposed, ROWS_OF_A, product.convert);
      const auto of_b = read(product.b, product.b_transposed, product.columns, product.convert);
      multiply(product, product.of_a.data(), of_b.data());
    }
  }

  // DEPTH × count, from `count` × DEPTH elements that are contiguous along DEPTH, or transposed.
  std::vector<float> read(uint64_t descriptor, bool transposed, int count, Convert convert) const {
    const Tile tile(descriptor);
    const Unfenced& unfenced = Hopper::of(*const_cast<Block*>(&block)).unfenced;
    std::vector<float> values(DEPTH * count);
    const int lines = transposed ? DEPTH : count, length = transposed ? count : DEPTH;
    for (int line = 0; line < lines; ++line) {
      for (int along = 0; along < length; along += 8) {
        const size_t linear = tile.address(transposed, line, along);
        const size_t address = linear ^ (linear >> 7 & (tile.span / 16 - 1)) << 4;
        const unsigned char* at = block.allocated.get() + address;
        require(block.contains(at, 16), "wgmma reads beyond the block's shared memory");
        uint16_t bits[8];
        std::memcpy(bits, at, 16);
        if (unfenced.hidden((at - block.shared) / 16, -1)) std::memset(bits, 0xFF, 16);
        for (int i = 0; i < 8; ++i) {
          values[transposed ? line * count + along + i : (along + i) * count + line] = convert(bits[i]);
        }
      }
    }
    return values;
  }

  static void multiply(Product& product, const float* of_a, const float* of_b) {
    constexpr int LANES = 16;
    using Lanes = float __attribute__((vector_size(4 * LANES)));
    const int columns = product.columns;
    float* sums = product.sums->values.data();
    if (!product.accumulate) std::fill(sums, sums + ROWS_OF_A * columns, 0.0f);
    for (int row = 0; row < ROWS_OF_A; ++row) {
      for (int column = 0; column < columns; column += LANES) {
        Lanes sum, b;
        std::memcpy(&sum, sums + row * columns + column, sizeof sum);
        for (int k = 0; k < DEPTH; ++k) {
          std::memcpy(&b, of_b + k * columns + column, sizeof b);
          sum += of_a[k * ROWS_OF_A + row] * b;
        }
        std::memcpy(sums + row * columns + column, &sum, sizeof sum);
      }
    }
  }
};

}  // namespace shim
