// Hopper's kernels on the host, for ctypes.
#include "../../csrc/cuda/hopper/lora_matmul.cu"
#include "../../csrc/cuda/hopper/lora_matmul_forward_bfloat16.cu"
#include "../../csrc/cuda/hopper/lora_matmul_forward_half.cu"
#include "../../csrc/cuda/hopper/lora_matmul_input_grad_bfloat16.cu"
#include "../../csrc/cuda/hopper/lora_matmul_input_grad_half.cu"

using namespace fused_lora::cuda;

extern "C" {

void set_turns(uint64_t seed, int resident, int delayed) { shim::Machine::here().turns = {seed, resident, delayed}; }
// of the last launch that was broken
const char* why_broken() { return shim::Machine::here().why.c_str(); }

int64_t sizes(int which) {
  const int64_t bytes[] = {sizeof(HopperPlan), sizeof(LoraMatmulArguments)};
  return bytes[which];
}

const char* matmul_why_not(int arithmetic, const LoraMatmulArguments* arguments) {
  return hopper_why_not(static_cast<Arithmetic>(arithmetic), *arguments);
}
void plan_matmul(int arithmetic, const LoraMatmulArguments* arguments, int sms, HopperPlan* plan) {
  *plan = plan_hopper_matmul(static_cast<Arithmetic>(arithmetic), *arguments, sms);
}
// row, column and block of a ticket; returns how many tickets there are
int work_of(int64_t M, int64_t P, int64_t R, int columns, int publishes, int ticket, int* work) {
  const hopper::Schedule schedule(M, P, R, columns, publishes != 0);
  const hopper::Work found = schedule.work(ticket);
  work[0] = found.row, work[1] = found.column, work[2] = found.block;
  return schedule.tickets();
}
int launch_matmul(int arithmetic, const HopperPlan* plan, const LoraMatmulArguments* arguments) {
  return launch_hopper_matmul(static_cast<Arithmetic>(arithmetic), *plan, *arguments, nullptr);
}
}
