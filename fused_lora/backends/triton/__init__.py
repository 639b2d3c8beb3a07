"""The Triton kernels: `backend.py` is their way in, and imports Triton when it is first called."""
