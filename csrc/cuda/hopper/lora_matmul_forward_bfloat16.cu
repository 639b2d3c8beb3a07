#include "lora_matmul.cuh"

namespace fused_lora::cuda::hopper {

template int launch_shape<BFloat16, true>(const HopperPlan&, bool, const Arguments&, void*);

}  // namespace fused_lora::cuda::hopper
