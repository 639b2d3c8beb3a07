// The kernels on the host, for ctypes.
#include "adapter_grad.cu"
#include "lora_matmul.cu"

using namespace fused_lora::cuda;

extern "C" {

void set_turns(uint64_t seed, int resident, int delayed) { shim::Machine::here().turns = {seed, resident, delayed}; }

int64_t sizes(int which) {
  const int64_t bytes[] = {sizeof(Plan), sizeof(LoraMatmulArguments), sizeof(AdapterGradArguments)};
  return bytes[which];
}

void plan_matmul(int arithmetic, int64_t M, int64_t P, int64_t Q, int64_t R, int sms, Plan* plan) {
  *plan = plan_lora_matmul(static_cast<Arithmetic>(arithmetic), M, P, Q, R, sms);
}
void plan_grad(int arithmetic, int64_t M, int64_t K, int64_t N, int64_t R, int sms, Plan* plan) {
  *plan = plan_adapter_grad(static_cast<Arithmetic>(arithmetic), M, K, N, R, sms);
}
int launch_matmul(int arithmetic, const Plan* plan, const LoraMatmulArguments* arguments) {
  return launch_lora_matmul(static_cast<Arithmetic>(arithmetic), *plan, *arguments, nullptr);
}
int launch_grad(int arithmetic, const AdapterGradArguments* arguments) {
  return launch_adapter_grad(static_cast<Arithmetic>(arithmetic), *arguments, nullptr);
}
}
