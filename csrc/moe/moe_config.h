// The sizes of one MoE layer and its activation. w13 is gate and up merged, w2 is down (SGLang's
// names).
#pragma once

#include <string>
#include <vector>

#include "format/packed_layout.h"
#include "kernels/kernel.h"

namespace kt {

enum class Projection { kW13 = 0, kW2 = 1 };

struct MoeConfig {
  int layer_idx = 0;  // for messages
  int num_experts = 0;
  int top_k = 0;
  int hidden_size = 0;
  int intermediate_size = 0;
  PackedLayout layouts[2];        // by projection
  Activation activation = {};     // kSilu
  std::vector<int> expert_ids;    // experts that live here, ascending; the others cost no memory
  std::vector<int> reserved_ids;  // others that may be loaded later: address space only until then

  const PackedLayout& layout(Projection projection) const {
    return layouts[static_cast<int>(projection)];
  }
  // Columns of k of a projection: hidden_size for w13, intermediate_size for w2.
  int depth(Projection projection) const {
    return projection == Projection::kW13 ? hidden_size : intermediate_size;
  }
  void set_layout(const PackedLayout& both) { layouts[0] = layouts[1] = both; }
};

// What a name, a limit and an alpha of SGLang's layers stand for; 0: has none.
//
//   silu             kSilu, kSiluLimit with a limit, kSwigluAlpha with an alpha (without a limit:
//                    infinity)
//   silu_then_limit  kSiluThenLimit
//   gelu, gelu_tanh  kGelu, kGeluTanh
//
// Errors  kt::Error, one sentence: another name, a value below 0 or NaN, one that the name has no
//         use for or does not do without.
Activation activation_of(const std::string& name, float limit, float alpha);

// Throws kt::Error, one sentence, for sizes out of range.
void check_moe_config(const MoeConfig& config);

}  // namespace kt
