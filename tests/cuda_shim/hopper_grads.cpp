// The adapter gradients of Hopper on the host, for ctypes.
#include "../../csrc/cuda/hopper/adapter_grad.cu"

using namespace fused_lora::cuda;

extern "C" {

void set_turns(uint64_t seed, int resident, int delayed) { shim::Machine::here().turns = {seed, resident, delayed}; }
const char* why_broken() { return shim::Machine::here().why.c_str(); }

const char* grad_why_not(int arithmetic, const AdapterGradArguments* arguments) {
  return hopper_why_not(static_cast<Arithmetic>(arithmetic), *arguments);
}
void plan_grad(const AdapterGradArguments* arguments, int sms, Plan* plan) {
  *plan = plan_hopper_adapter_grad(*arguments, sms);
}
int launch_grad(int arithmetic, const AdapterGradArguments* arguments) {
  return launch_hopper_adapter_grad(static_cast<Arithmetic>(arithmetic), *arguments, nullptr);
}
}
