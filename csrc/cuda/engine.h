// Which kernels serve a launch: Hopper's own where the library has them and the GPU is one, else the portable ones.
#pragma once

#include "hopper/adapter_grad.h"
#include "hopper/launches.h"

namespace fused_lora::cuda {

#ifndef FUSED_LORA_HOPPER
// setup.py compiles hopper/ for compute capability 9.0a alone; without it, these stand for it
template <typename Arguments>
const char* hopper_why_not(Arithmetic, const Arguments&) {
  return "the extension was built without Hopper's kernels: 90a is not among its FUSED_LORA_CUDA_ARCHS";
}
inline HopperPlan plan_hopper_matmul(Arithmetic, const LoraMatmulArguments&, int32_t) { return {}; }
inline Plan plan_hopper_adapter_grad(const AdapterGradArguments&, int32_t) { return {}; }
inline int launch_hopper_matmul(Arithmetic, const HopperPlan&, const LoraMatmulArguments&, void*) {
  return kTensorMapRefused;
}
inline int launch_hopper_adapter_grad(Arithmetic, const AdapterGradArguments&, void*) { return kTensorMapRefused; }
#endif

// Null where Hopper's kernels serve; capability: the GPU's, 90 for 9.0.
template <typename Arguments>
const char* why_not_hopper(int32_t capability, Arithmetic arithmetic, const Arguments& arguments) {
  if (capability != 90) return "the GPU is no Hopper, whose compute capability is 9.0";
  return hopper_why_not(arithmetic, arguments);
}

}  // namespace fused_lora::cuda
