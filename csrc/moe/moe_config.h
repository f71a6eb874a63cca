// The sizes of one MoE layer. w13 is gate and up merged, w2 is down (SGLang's names).
#pragma once

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
  Activation activation = {};     // silu(gate) * up
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

// Throws kt::Error, one sentence, for sizes out of range.
void check_moe_config(const MoeConfig& config);

}  // namespace kt
