"""LoRA layers of other libraries, computed by ``lora_linear``. Each module imports the library that it is for."""
