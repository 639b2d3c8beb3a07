"""Layers over DTensors: what each rank computes (`sharding.py`), and styles for `parallelize_module`."""
