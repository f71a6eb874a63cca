// Checks of tensor arguments (each failure is one sentence with the name, the value got and the
// value wanted), and the registration that makes them reachable.
#pragma once

#include <ATen/ATen.h>
#include <torch/library.h>

#include "base/check.h"
#include "base/dtype.h"

namespace kt {

inline DType float_dtype(const at::Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return DType::kFloat32;
    case at::kBFloat16: return DType::kBFloat16;
    case at::kHalf: return DType::kFloat16;
    default: break;
  }
  KT_CHECK(false, name << " is " << c10::toString(tensor.scalar_type())
                       << "; it must be bf16, fp16 or fp32.");
}

inline void check_cpu(const at::Tensor& tensor, const char* name) {
  KT_CHECK(tensor.device().is_cpu(),
           name << " is on " << tensor.device().str() << "; it must be on the CPU.");
}

inline void check_shape(const at::Tensor& tensor, at::IntArrayRef shape, const char* name) {
  KT_CHECK(tensor.sizes() == shape,
           name << " has shape " << tensor.sizes() << "; it must be " << shape << ".");
}

// Layers count experts in int: an id that does not fit must not become another one.
inline int expert_id(int64_t expert) {
  KT_CHECK(expert >= 0 && expert <= INT32_MAX,
           "expert " << expert << " is no expert id; ids are 0 to num_experts - 1.");
  return static_cast<int>(expert);
}

// Registers an operator for every device, without a derivative, so that a tensor on a wrong device
// meets our checks and not a missing kernel; the fake implementations in kt_kernel/ops.py serve
// tracing.
template <typename Function>
torch::CppFunction composite(Function* function) {
  return torch::dispatch(c10::DispatchKey::CompositeExplicitAutograd, function);
}

}  // namespace kt
