// The GPU's part of the operators whose schemas are in ../bindings.cpp: checks, memory, stream, one launch each.
#include <ATen/Context.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>
#include <torch/version.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <exception>
#include <limits>
#include <optional>
#include <string>
#include <thread>
#include <tuple>

#include "../tensors.h"
#include "engine.h"
#include "kernels/launches.h"
#include "workspace.h"

namespace fused_lora::cuda {
namespace {

constexpr int32_t kLanes = 1 << 16;

// As torch_internals.allows_tf32: the older question raises once one of PyTorch's newer settings was made.
bool allows_tf32() {
  const at::Context& context = at::globalContext();
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 10
  return context.float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) == at::Float32Precision::TF32;
#elif TORCH_VERSION_MINOR == 9
  return context.float32Precision("cuda", "matmul") == "tf32";
#else
  return context.float32MatmulPrecision() != at::Float32MatmulPrecision::HIGHEST;
#endif
}

Arithmetic arithmetic_for(const char* name, at::ScalarType dtype) {
  if (dtype == at::kBFloat16) return Arithmetic::kBFloat16;
  if (dtype == at::kHalf) return Arithmetic::kHalf;
  TORCH_CHECK_TYPE(dtype == at::kFloat, name, " must be float32, bfloat16 or float16 on a GPU, got ", dtype);
  return allows_tf32() ? Arithmetic::kTf32 : Arithmetic::kExact;
}

void check_device(const char* name, const at::Tensor& tensor, at::Device device) {
  TORCH_CHECK_VALUE(tensor.device() == device, name, " must be on ", device, ", got ", tensor.device());
}

// Kernels convert float32 to 16 bits as they read it; any other adapter's dtype is converted here: it is small.
at::Tensor readable(const at::Tensor& adapter, at::ScalarType dtype) {
  return adapter.scalar_type() == dtype || adapter.scalar_type() == at::kFloat ? adapter : adapter.to(dtype);
}

Matrix matrix(const at::Tensor& tensor, at::ScalarType dtype) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1),
          tensor.scalar_type() == at::kFloat && dtype != at::kFloat};
}

DropoutArguments dropout_for(const std::optional<at::Tensor>& seed, double p, at::Device device) {
  if (!seed) return {nullptr, 0, 1.0f};
  check_shape("seed", *seed, {1});
  check_dtype("seed", *seed, at::kLong);
  check_device("seed", *seed, device);
  TORCH_CHECK_VALUE(p >= 0 && p < 1, "dropout_p must be in [0, 1), got ", p);
  const int32_t threshold = std::min(static_cast<int32_t>(std::nearbyint(p * kLanes)), kLanes - 1);
  return {seed->const_data_ptr<int64_t>(), threshold, static_cast<float>(kLanes) / (kLanes - threshold)};
}

struct Facts {
  int32_t sms, capability;  // 90 for 9.0
};

// As many blocks as a launch of Hopper's lora_matmul has, where a test wants fewer than there are SMs. They take
// tickets, so any even number of them computes the same.
std::atomic<int64_t> most_blocks{std::numeric_limits<int32_t>::max()};

void limit_blocks(int64_t most) {
  TORCH_CHECK_VALUE(most >= 2 && most % 2 == 0, "most must be an even number of 2 or more, got ", most);
  most_blocks = most;
}

// Asked once of each device.
Facts facts_of(at::Device device) {
  static std::array<std::atomic<Facts>, 1 << (8 * sizeof(c10::DeviceIndex))> known{};
  std::atomic<Facts>& kept = known[static_cast<uint8_t>(device.index())];
  Facts facts = kept;
  if (facts.sms == 0) {
    int major = 0, minor = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&facts.sms, cudaDevAttrMultiProcessorCount, device.index()));
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device.index()));
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device.index()));
    facts.capability = 10 * major + minor;
    kept = facts;
  }
  return facts;
}

// Zeros that no memory pool of the calling thread owns: a pool is current on one thread alone, and this is another.
// torch.compile(mode="reduce-overhead") makes a pool current before it captures, and refuses tensors that stay in it.
at::Tensor zeros_outside_pools(int64_t count, const at::TensorOptions& options) {
  at::Tensor made;
  std::exception_ptr failure;
  std::thread([&] {
    try {
      const c10::cuda::CUDAGuard on_device(options.device());
      made = at::zeros({count}, options);
      // they are written on this thread's stream, and used on another
      c10::cuda::getCurrentCUDAStream().synchronize();
    } catch (...) {
      failure = std::current_exception();
    }
  }).join();
  if (failure) std::rethrow_exception(failure);
  return made;
}

// What the launches of a stream use in turn, each after the other: a call allocates its results alone.
//   counters: zeros by which blocks of one launch hand results to each other; a launch leaves them zero.
//   slots: parts of sums, written before they are read.
// While a graph is captured nothing may be kept that was not there before: a stream with too little gets memory of the
// graph's own, which the graph zeroes.
struct Scratch {
  at::Tensor counters, slots;

  // plan: of any engine.  arguments: get the addresses.
  template <typename AnyPlan, typename Arguments>
  Scratch(const AnyPlan& plan, at::Device device, cudaStream_t stream, Arguments& arguments)
      : counters(of_stream(kCounters, plan.counters, device, stream)),
        slots(plan.slot_floats == 0 ? at::Tensor() : of_stream(kSlots, plan.slot_floats, device, stream)) {
    arguments.counters = counters.mutable_data_ptr<int32_t>();
    arguments.slots = slots.defined() ? slots.mutable_data_ptr<float>() : nullptr;
  }

 private:
  enum Kind { kCounters, kSlots };

  static at::Tensor of_stream(Kind kind, int64_t count, at::Device device, cudaStream_t stream) {
    // never destroyed: the CUDA runtime may be gone by then
    static auto& kept = *new std::array<Workspace<at::Tensor>, 2>;
    const auto options = at::TensorOptions().dtype(kind == kCounters ? at::kInt : at::kFloat).device(device);
    const auto found = kept[kind].at_least(count, device.index(), stream, [&](int64_t size) {
      const bool captures = c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
      return captures ? std::nullopt : std::make_optional(zeros_outside_pools(size, options));
    });
    if (found) return *found;
    return kind == kCounters ? at::zeros({count}, options) : at::empty({count}, options);
  }
};

// A launch that fails says of which sizes it was.
void check_launch(int status, const char* name, const char* of, at::IntArrayRef sizes) {
  if (status == cudaSuccess) return;
  // what it has left behind is not the next call's
  (void)cudaGetLastError();
  TORCH_CHECK(false, "the launch of ", name, " for ", of, " = ", sizes,
              " failed: ", cudaGetErrorString(static_cast<cudaError_t>(status)));
}

// The operands of a lora_matmul, checked, as its kernels take them; results and scratch are not there yet.
struct Matmul {
  Arithmetic arithmetic;
  LoraMatmulArguments arguments;
  // what the arguments point to
  at::Tensor a2, u2, v2, bias2;

  Matmul(const at::Tensor& a, const at::Tensor& w, const at::Tensor& u, const at::Tensor& v,
         const std::optional<at::Tensor>& bias, double scale, const std::optional<at::Tensor>& seed, double dropout_p,
         bool dropout_on_output)
      : arithmetic(arithmetic_for("a", a.scalar_type())), a2(rows("a", a)) {
    check_matmul_operands(a2, w, u, v, bias);
    check_device("w", w, a.device());
    check_device("u", u, a.device());
    check_device("v", v, a.device());
    if (bias) check_device("bias", *bias, a.device());
    const at::ScalarType dtype = a.scalar_type();
    u2 = readable(u, dtype), v2 = readable(v, dtype);
    if (bias) bias2 = bias->contiguous();
    arguments = {a2.size(0),
                 w.size(1),
                 w.size(0),
                 u.size(1),
                 matrix(a2, dtype),
                 matrix(w, dtype),
                 matrix(u2, dtype),
                 matrix(v2, dtype),
                 bias ? bias2.const_data_ptr() : nullptr,
                 static_cast<float>(scale),
                 dropout_on_output,
                 dropout_for(seed, dropout_p, a.device())};
  }

  const char* why_not_hopper() const {
    return cuda::why_not_hopper(facts_of(a2.device()).capability, arithmetic, arguments);
  }

  void launch(at::Tensor& out, at::Tensor& h) {
    arguments.out = out.mutable_data_ptr(), arguments.h = h.mutable_data_ptr();
    const auto stream = c10::cuda::getCurrentCUDAStream();
    const std::array<int64_t, 4> sizes{arguments.M, arguments.P, arguments.Q, arguments.R};
    const auto [M, P, Q, R] = sizes;
    const int32_t sms = facts_of(a2.device()).sms;
    // the driver has the last word on what its tensor maps take; the portable kernels need none
    int status = kTensorMapRefused;
    if (why_not_hopper() == nullptr) {
      HopperPlan plan = plan_hopper_matmul(arithmetic, arguments, sms);
      plan.blocks = static_cast<int32_t>(std::min<int64_t>(plan.blocks, most_blocks));
      const Scratch scratch(plan, a2.device(), stream, arguments);
      status = launch_hopper_matmul(arithmetic, plan, arguments, stream);
    }
    if (status == kTensorMapRefused) {
      const Plan plan = plan_lora_matmul(arithmetic, M, P, Q, R, sms);
      const Scratch scratch(plan, a2.device(), stream, arguments);
      arguments.split = plan.split;
      status = launch_lora_matmul(arithmetic, plan, arguments, stream);
    }
    check_launch(status, "lora_matmul", "(M, P, Q, R)", sizes);
  }
};

std::tuple<at::Tensor, at::Tensor> lora_matmul(const at::Tensor& a, const at::Tensor& w, const at::Tensor& u,
                                               const at::Tensor& v, const std::optional<at::Tensor>& bias, double scale,
                                               const std::optional<at::Tensor>& seed, double dropout_p,
                                               bool dropout_on_output) {
  // autograd is the caller's: fused_lora/functional.py
  const at::AutoDispatchBelowADInplaceOrView guard;
  const c10::cuda::CUDAGuard on_device(a.device());
  Matmul matmul(a, w, u, v, bias, scale, seed, dropout_p, dropout_on_output);
  auto shape = a.sizes().vec();
  shape.back() = matmul.arguments.P;
  at::Tensor out = at::empty(shape, a.options()), h = at::empty({matmul.arguments.M, matmul.arguments.R}, a.options());
  if (out.numel() > 0 || h.numel() > 0) matmul.launch(out, h);
  return {out, h};
}

// Why another engine than Hopper's serves such a call of lora_matmul; empty where Hopper's does.
std::string explain(const at::Tensor& a, const at::Tensor& w, const at::Tensor& u, const at::Tensor& v,
                    const std::optional<at::Tensor>& seed, double dropout_p, bool dropout_on_output) {
  const Matmul matmul(a, w, u, v, std::nullopt, 1.0, seed, dropout_p, dropout_on_output);
  const char* why = matmul.why_not_hopper();
  return why == nullptr ? "" : why;
}

// A gradient as its kernel stores it: float32 unless it is of the operands' dtype.
at::Tensor gradient(at::IntArrayRef shape, at::ScalarType wanted, const at::Tensor& like) {
  return at::empty(shape, like.options().dtype(wanted == like.scalar_type() ? wanted : at::kFloat));
}

void launch(Arithmetic arithmetic, AdapterGradArguments& arguments, at::Device device) {
  const std::array<int64_t, 4> sizes{arguments.M, arguments.dA.columns, arguments.dB.columns, arguments.R};
  const auto [M, K, N, R] = sizes;
  const auto [sms, capability] = facts_of(device);
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const auto launched = [&](const Plan& plan, const auto& launch_it) {
    const Scratch scratch(plan, device, stream, arguments);
    arguments.split = plan.split;
    return launch_it(arithmetic, arguments, stream);
  };
  int status = kTensorMapRefused;
  if (why_not_hopper(capability, arithmetic, arguments) == nullptr) {
    status = launched(plan_hopper_adapter_grad(arguments, sms), launch_hopper_adapter_grad);
  }
  if (status == kTensorMapRefused)
    status = launched(plan_adapter_grad(arithmetic, M, K, N, R, sms), launch_adapter_grad);
  check_launch(status, "adapter_grad", "(M, K, N, R)", sizes);
}

std::tuple<std::optional<at::Tensor>, std::optional<at::Tensor>> adapter_grad(
    const std::optional<at::Tensor>& x, const std::optional<at::Tensor>& g, const std::optional<at::Tensor>& dy,
    const std::optional<at::Tensor>& h, double scale, const std::optional<at::Tensor>& seed, double dropout_p,
    at::ScalarType dtype_A, at::ScalarType dtype_B) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  check_floating("dtype_A", dtype_A);
  check_floating("dtype_B", dtype_B);
  const bool wants_A = x && g, wants_B = dy && h;
  if (!wants_A && !wants_B) return {};
  const at::Tensor& like = wants_A ? *x : *dy;
  const at::ScalarType dtype = like.scalar_type();
  const Arithmetic arithmetic = arithmetic_for(wants_A ? "x" : "dy", dtype);
  const DropoutArguments dropout = dropout_for(seed, dropout_p, like.device());
  AdapterGradArguments arguments{};
  std::optional<at::Tensor> x2, dy2, dA, dB;
  const c10::cuda::CUDAGuard on_device(like.device());
  if (wants_A) {
    x2 = rows("x", *x);
    check_low_rank("g", *g, "x", *x2);
    check_device("g", *g, like.device());
    dA = gradient({g->size(1), x2->size(1)}, dtype_A, like);
    arguments.M = g->size(0), arguments.R = g->size(1);
    arguments.dA = {matrix(*x2, dtype),     matrix(*g, dtype), x2->size(1),   1,
                    dA->mutable_data_ptr(), dA->stride(0),     dA->stride(1), dA->scalar_type() == at::kFloat};
  }
  if (wants_B) {
    dy2 = rows("dy", *dy);
    check_low_rank("h", *h, "dy", *dy2);
    check_dtype("dy", *dy2, dtype);
    check_device("dy", *dy2, like.device());
    check_device("h", *h, like.device());
    if (wants_A) check_shape("h", *h, g->sizes());
    dB = gradient({dy2->size(1), h->size(1)}, dtype_B, like);
    arguments.M = h->size(0), arguments.R = h->size(1);
    arguments.dB = {matrix(*dy2, dtype),    matrix(*h, dtype), dy2->size(1),  0,
                    dB->mutable_data_ptr(), dB->stride(1),     dB->stride(0), dB->scalar_type() == at::kFloat};
  }
  const int64_t elements = (dA ? dA->numel() : 0) + (dB ? dB->numel() : 0);
  if (elements > 0) {
    arguments.scale = static_cast<float>(scale);
    arguments.dropout = dropout;
    launch(arithmetic, arguments, like.device());
  }
  return {dA ? std::make_optional(in_dtype(*dA, dtype_A)) : dA, dB ? std::make_optional(in_dtype(*dB, dtype_B)) : dB};
}

// The mask over 1 - p, as what dropout on the output leaves of ones: (rows, cols).
at::Tensor dropout_mask(const at::Tensor& seed, int64_t rows, int64_t cols, double dropout_p, at::ScalarType dtype) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const auto options = seed.options().dtype(dtype);
  const at::Tensor one = at::ones({1, 1}, options), column = one.expand({rows, 1}), row = one.expand({1, cols});
  return std::get<0>(lora_matmul(column, at::zeros({1, cols}, options), one, row, std::nullopt, 1.0, seed, dropout_p,
                                 /*dropout_on_output=*/true));
}

}  // namespace
}  // namespace fused_lora::cuda

TORCH_LIBRARY_IMPL(fused_lora_native, CUDA, m) {
  m.impl("lora_matmul", &fused_lora::cuda::lora_matmul);
  m.impl("why_not_hopper", &fused_lora::cuda::explain);
  m.impl("adapter_grad", &fused_lora::cuda::adapter_grad);
  m.impl("dropout_mask", &fused_lora::cuda::dropout_mask);
}

// for tests
TORCH_LIBRARY_FRAGMENT(fused_lora_native, m) { m.def("limit_blocks(int most) -> ()", &fused_lora::cuda::limit_blocks); }
