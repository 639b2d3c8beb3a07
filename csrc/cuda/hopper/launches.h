// What a launch on Hopper (compute capability 9.0) is told, in plain C++ as ../kernels/launches.h, whose arguments it
// takes. The caller knows that the GPU is one.
#pragma once

#include "../kernels/launches.h"

namespace fused_lora::cuda {

// What a launch returns beside a cudaError_t.
constexpr int kTensorMapRefused = -1;  // the driver made no tensor map, though hopper/tensor_maps.h had no objection

// How a product is cut and where its scratch lies. Nothing of it depends on values: same bits every time.
struct HopperPlan {
  int32_t publishes;    // tiles of the first column compute h for all of their rows; 0: every tile for itself
  int32_t columns;      // of a tile of out, which has 128 rows: 256 or 128
  int32_t ranks;        // of h that one tile computes: 16 or 64
  int32_t blocks;       // an even number: they run in clusters of two
  int32_t counters;     // int32 zeros that the launch needs, and leaves zero
  int64_t slot_floats;  // scratch in units of float32, aligned to 16 bytes
  // bytes from its start to the 16-bit copies of u and v; -1: read where they are
  int64_t u_copy, v_copy;
};

// Why the kernel cannot serve these operands, or would serve them worse than kernels that it is built beside; null if
// it does. Scratch (slots, counters, split) is not looked at.
const char* hopper_why_not(Arithmetic arithmetic, const LoraMatmulArguments& arguments);

// For operands that hopper_why_not has nothing against, or only that they have few rows. Scratch is not looked at.
HopperPlan plan_hopper_matmul(Arithmetic arithmetic, const LoraMatmulArguments& arguments, int32_t sms);

// On stream, a cudaStream_t, of the current device; of the arguments' scratch, slots and counters are used. One launch,
// and one before it where u or v needs a copy. Returns a cudaError_t, or a constant from above.
int launch_hopper_matmul(Arithmetic arithmetic, const HopperPlan& plan, const LoraMatmulArguments& arguments,
                         void* stream);

}  // namespace fused_lora::cuda
