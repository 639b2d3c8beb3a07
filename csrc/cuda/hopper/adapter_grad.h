// The adapter gradients on Hopper, in plain C++, beside the portable kernel of kernels/launches.h.
#pragma once

#include "launches.h"

namespace fused_lora::cuda {

// Null where the launch can be made, else why the portable kernel must serve.
const char* hopper_why_not(Arithmetic arithmetic, const AdapterGradArguments& arguments);

// For arguments that hopper_why_not has nothing against; scratch and split are not looked at.
Plan plan_hopper_adapter_grad(const AdapterGradArguments& arguments, int32_t sms);

// As launch_adapter_grad. Returns a cudaError_t, or kTensorMapRefused.
int launch_hopper_adapter_grad(Arithmetic arithmetic, const AdapterGradArguments& arguments, void* stream);

}  // namespace fused_lora::cuda
