// Checks that every operator with the inputs of a forward makes, wherever the tensors are.
#pragma once

#include <optional>

#include "moe/moe_config.h"
#include "torch/tensor_checks.h"

namespace kt {

// Shapes  hidden_states [num_tokens, hidden_size] bf16, fp16 or fp32; topk_ids [num_tokens, at most
//         config.top_k] of an integer type; topk_weights likewise of a float type; skip
//         [num_experts] bool on the CPU. Returns the type of hidden_states.
// Errors  kt::Error.
inline DType check_forward_arguments(const at::Tensor& hidden_states, const at::Tensor& topk_ids,
                                     const at::Tensor& topk_weights,
                                     const std::optional<at::Tensor>& skip,
                                     const MoeConfig& config) {
  const DType dtype = float_dtype(hidden_states, "hidden_states");
  KT_CHECK(hidden_states.dim() == 2 && hidden_states.size(1) == config.hidden_size,
           "hidden_states has shape " << hidden_states.sizes() << "; it must be [num_tokens, "
                                      << config.hidden_size << "].");
  KT_CHECK(topk_ids.dim() == 2 && topk_ids.size(0) == hidden_states.size(0),
           "topk_ids has shape " << topk_ids.sizes() << "; it must be [" << hidden_states.size(0)
                                 << ", top_k].");
  KT_CHECK(topk_ids.size(1) <= config.top_k,
           "topk_ids names " << topk_ids.size(1) << " experts a token; layer " << config.layer_idx
                             << " was made for " << config.top_k << ".");
  KT_CHECK(
      at::isIntegralType(topk_ids.scalar_type(), /*includeBool=*/false),
      "topk_ids is " << c10::toString(topk_ids.scalar_type()) << "; it must be an integer type.");
  check_shape(topk_weights, topk_ids.sizes(), "topk_weights");
  float_dtype(topk_weights, "topk_weights");
  KT_CHECK(
      hidden_states.size(0) <= INT32_MAX / std::max(config.top_k, 1),
      "hidden_states has " << hidden_states.size(0) << " tokens, more than one call can take.");
  if (skip.has_value()) {
    check_cpu(*skip, "skip");
    check_shape(*skip, {config.num_experts}, "skip");
    KT_CHECK(skip->scalar_type() == at::kBool,
             "skip is " << c10::toString(skip->scalar_type()) << "; it must be bool.");
  }
  return dtype;
}

}  // namespace kt
