// Instances of lora_matmul.cuh, each direction and type in a source file of its own: they compile side by side.
#pragma once

#include "shape.cuh"

namespace fused_lora::cuda::hopper {

template <typename Element, bool W_ALONG_Q>
int launch_shape(const HopperPlan& plan, bool drops, const Arguments& arguments, void* stream);

extern template int launch_shape<BFloat16, true>(const HopperPlan&, bool, const Arguments&, void*);
extern template int launch_shape<BFloat16, false>(const HopperPlan&, bool, const Arguments&, void*);
extern template int launch_shape<Half, true>(const HopperPlan&, bool, const Arguments&, void*);
extern template int launch_shape<Half, false>(const HopperPlan&, bool, const Arguments&, void*);

}  // namespace fused_lora::cuda::hopper
