// The CPU's part of the operators whose schemas are in ../bindings.cpp.
#include "operators.h"

#include <torch/library.h>

TORCH_LIBRARY_IMPL(fused_lora_native, CPU, m) {
  m.impl("lora_matmul", &fused_lora::cpu::lora_matmul);
  m.impl("adapter_grad", &fused_lora::cpu::adapter_grad);
  m.impl("dropout_mask", &fused_lora::cpu::dropout_mask);
}
