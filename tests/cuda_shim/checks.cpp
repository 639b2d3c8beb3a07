// What the shim is checked by, for ctypes: its primitives one by one, and kernels that are broken on purpose.
#include "handover.cuh"

using namespace fused_lora::cuda;

namespace {

struct Check {
  const void* in;
  const void* other;
  void* out;
  int flag;
};

// One warp: registers in, sums out.
template <void (*MMA)(float (&)[4], const uint32_t (&)[4], uint32_t, uint32_t)>
void mma_kernel(Check check) {
  const auto* a = static_cast<const uint32_t*>(check.in) + 4 * thread_index();
  const auto* b = static_cast<const uint32_t*>(check.other) + 2 * thread_index();
  auto* out = static_cast<float*>(check.out) + 4 * thread_index();
  float acc[4] = {out[0], out[1], out[2], out[3]};
  const uint32_t of_a[4] = {a[0], a[1], a[2], a[3]};
  MMA(acc, of_a, b[0], b[1]);
  for (int i = 0; i < 4; ++i) out[i] = acc[i];
}

// One warp: 32 rows of eight 16-bit elements in, registers out.
template <bool TRANSPOSED>
void matrices_kernel(Check check) {
  uint32_t registers[4];
  load_matrices<TRANSPOSED>(registers, static_cast<const uint16_t*>(check.in) + 8 * thread_index());
  for (int i = 0; i < 4; ++i) static_cast<uint32_t*>(check.out)[4 * thread_index() + i] = registers[i];
}

// Threads exchange numbers through shared memory; flag: with the barrier that this needs.
void exchange_kernel(Check check) {
  auto* shared = reinterpret_cast<float*>(shared_memory());
  shared[thread_index()] = static_cast<float>(thread_index());
  if (check.flag) sync_block();
  static_cast<float*>(check.out)[thread_index()] = shared[63 - thread_index()];
}

// 10 bytes of each thread's 16 by an asynchronous copy; flag: how far it is awaited.
void copies_kernel(Check check) {
  unsigned char* to = shared_memory() + 16 * thread_index();
  copy_async(to, static_cast<const unsigned char*>(check.in) + 16 * thread_index(), 10);
  commit_copies();
  if (check.flag == 1) await_copies<0>();
  if (check.flag == 2) await_copies<1>();
  if (check.flag == 3) {
    commit_copies();
    await_copies<1>();
  }
  std::memcpy(static_cast<unsigned char*>(check.out) + 16 * thread_index(), to, 16);
}

// flag: half of the threads never come to the barrier.
void barrier_kernel(Check check) {
  if (check.flag == 0 || thread_index() < 32) sync_block();
}

// The first block publishes 64 numbers, the others copy them to out. flag: 1 raises the flag before the barrier, 2 does
// not await it, 3 takes the block's number for its ticket, which may be started last.
void publish_kernel(Check check) {
  auto* counters = const_cast<int*>(static_cast<const int*>(check.other));
  int* place = reinterpret_cast<int*>(shared_memory());
  auto* published = static_cast<float*>(const_cast<void*>(check.in));
  const int ticket = check.flag == 3 ? block_index() : take_ticket(counters, place);
  if (ticket == 0) {
    published[thread_index()] = static_cast<float>(thread_index());
    if (check.flag == 1) {
      if (thread_index() == 0) add_release(counters + HEADER, 1);
    } else {
      raise_flag(counters + HEADER);
    }
  } else {
    if (check.flag != 2) await_flag(counters + HEADER, 1);
    static_cast<float*>(check.out)[64 * ticket + thread_index()] = published[63 - thread_index()];
  }
  leave(counters, 1);
}

}  // namespace

extern "C" {

int run(const char* name, const void* in, const void* other, void* out, int flag, int blocks, uint64_t seed,
        int resident, int delayed) {
  const struct {
    const char* name;
    void (*kernel)(Check);
    int threads;
  } kernels[] = {{"mma_bfloat16", mma_kernel<mma_bfloat16>, 32},
                 {"mma_half", mma_kernel<mma_half>, 32},
                 {"mma_tf32", mma_kernel<mma_tf32>, 32},
                 {"load_matrices", matrices_kernel<false>, 32},
                 {"load_transposed", matrices_kernel<true>, 32},
                 {"exchange", exchange_kernel, 64},
                 {"copies", copies_kernel, 32},
                 {"barrier", barrier_kernel, 64},
                 {"publish", publish_kernel, 64}};
  shim::Machine::here().turns = {seed, resident, delayed};
  for (const auto& known : kernels) {
    if (std::strcmp(known.name, name) == 0) {
      return launch(known.kernel, blocks, known.threads, 1024, nullptr, Check{in, other, out, flag});
    }
  }
  return -1;
}

// each float32 of count: rounded to bfloat16 and to float16 and back, and to tf32
void convert(const float* from, int64_t count, float* to_bfloat16, float* to_half, uint32_t* to_tf32) {
  for (int64_t i = 0; i < count; ++i) {
    BFloat16 bfloat16;
    Half half;
    round_to(from[i], bfloat16);
    round_to(from[i], half);
    to_bfloat16[i] = to_float(bfloat16);
    to_half[i] = to_float(half);
    to_tf32[i] = tf32_bits(from[i]);
  }
}
}
