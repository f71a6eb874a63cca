#include "moe/moe_config.h"

#include <limits>

#include "base/check.h"
#include "kernels/kernel.h"

namespace kt {

// format and kernels know nothing of each other
static_assert(kPackedColumns == kPanelColumns);

Activation activation_of(const std::string& name, float limit, float alpha) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  KT_CHECK(limit >= 0, "swiglu_limit is " << limit << "; it must be at least 0, and 0 is none.");
  KT_CHECK(alpha >= 0 && alpha < kInfinity,
           "swiglu_alpha is " << alpha << "; it must be finite and at least 0, and 0 is none.");
  const bool is_silu = name == "silu";
  const bool limits = is_silu || name == "silu_then_limit";
  KT_CHECK(limits || name == "gelu" || name == "gelu_tanh",
           "activation '" << name
                          << "' is unknown; it must be silu, silu_then_limit, gelu or gelu_tanh.");
  KT_CHECK(limits || limit == 0,
           "activation " << name << " has no limit, but swiglu_limit is " << limit << ".");
  KT_CHECK(is_silu || alpha == 0,
           "activation " << name << " has no alpha, but swiglu_alpha is " << alpha << ".");
  if (!limits) return {name == "gelu" ? ActivationKind::kGelu : ActivationKind::kGeluTanh, 0, 0};
  if (!is_silu) {
    KT_CHECK(limit > 0, "activation silu_then_limit needs a swiglu_limit above 0.");
    return {ActivationKind::kSiluThenLimit, limit, 0};
  }
  if (alpha > 0) return {ActivationKind::kSwigluAlpha, limit > 0 ? limit : kInfinity, alpha};
  return {limit > 0 ? ActivationKind::kSiluLimit : ActivationKind::kSilu, limit, 0};
}

void check_moe_config(const MoeConfig& config) {
  const auto positive = [&](const char* name, int value) {
    KT_CHECK(value > 0, "layer " << config.layer_idx << ": " << name << " is " << value
                                 << "; it must be positive.");
  };
  positive("num_experts", config.num_experts);
  positive("num_experts_per_tok", config.top_k);
  positive("hidden_size", config.hidden_size);
  positive("moe_intermediate_size", config.intermediate_size);
  KT_CHECK(config.top_k <= config.num_experts,
           "layer " << config.layer_idx << ": num_experts_per_tok is " << config.top_k
                    << ", more than the " << config.num_experts << " experts.");
  // The activation loops and SIMD stores work on whole vectors of 16 columns.
  KT_CHECK(config.hidden_size % 16 == 0 && config.intermediate_size % 16 == 0,
           "layer " << config.layer_idx << ": hidden_size " << config.hidden_size
                    << " and moe_intermediate_size " << config.intermediate_size
                    << " must be multiples of 16.");
  for (const Projection projection : {Projection::kW13, Projection::kW2}) {
    const PackedLayout& layout = config.layout(projection);
    const int k = config.depth(projection);
    KT_CHECK(takes_bf16_rows(layout.format) || layout.padded_k(k) <= kMaxIntegerK,
             "layer " << config.layer_idx << ": size " << k
                      << " overflows the 32-bit sums of the integer kernels; "
                      << "the limit is " << kMaxIntegerK << ", use BF16.");
  }
  std::vector<char> placed(config.num_experts, 0);
  for (const auto* ids : {&config.expert_ids, &config.reserved_ids}) {
    const char* const name = ids == &config.expert_ids ? "expert_ids" : "reserved_ids";
    int previous = -1;
    for (const int expert : *ids) {
      KT_CHECK(expert > previous && expert < config.num_experts,
               "layer " << config.layer_idx << ": " << name << " must ascend within 0 to "
                        << config.num_experts - 1 << ", got " << expert << " after " << previous
                        << ".");
      KT_CHECK(!placed[expert], "layer " << config.layer_idx << ": expert " << expert
                                         << " is in both expert_ids and reserved_ids.");
      placed[expert] = 1;
      previous = expert;
    }
  }
}

}  // namespace kt
