from .functional import lora_linear
from .layer import FusedLoRALinear
