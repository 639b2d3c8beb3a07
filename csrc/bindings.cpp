// The operators' schemas, and the Python module whose import loads this library and so registers them. Each device's
// folder registers its implementations. fused_lora/reference.py says what they mean; fused_lora/backends/native.py
// calls them.
#include <Python.h>
#include <torch/library.h>

TORCH_LIBRARY(fused_lora_native, m) {
  m.def(
      "lora_matmul(Tensor a, Tensor w, Tensor u, Tensor v, Tensor? bias, float scale, "
      "Tensor? seed, float dropout_p, bool dropout_on_output) -> (Tensor out, Tensor h)");
  // for people: why such a call on a GPU is not served by Hopper's kernels; empty where it is
  m.def(
      "why_not_hopper(Tensor a, Tensor w, Tensor u, Tensor v, Tensor? seed, float dropout_p, "
      "bool dropout_on_output) -> str");
  m.def(
      "adapter_grad(Tensor? x, Tensor? g, Tensor? dy, Tensor? h, float scale, "
      "Tensor? seed, float dropout_p, ScalarType dtype_A, ScalarType dtype_B) -> (Tensor? dA, Tensor? dB)");
  // the mask over 1 - p: (rows, cols)
  m.def("dropout_mask(Tensor seed, int rows, int cols, float dropout_p, ScalarType dtype) -> Tensor");
  // with autograd: lora_linear.cpp
  m.def(
      "lora_linear(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? bias, float scale, "
      "Tensor? seed, float dropout_p) -> Tensor");
}

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
