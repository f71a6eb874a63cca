// Which experts of a batch a layer computes at once, and which it leaves for the time of the next
// layer. A pure function on small arrays.
#pragma once

#include <cstdint>
#include <vector>

#include "base/dtype.h"

namespace kt {

// The two parts of one forward, as masks for route(): every expert that is not in `skip` is
// computed by exactly one of them, with its full weights.
struct DeferralSplit {
  std::vector<uint8_t> skip_now;       // [num_experts] what the first part leaves out
  std::vector<uint8_t> skip_deferred;  // [num_experts] what the second part leaves out
  std::vector<int32_t> deferred;       // experts of the second part that have a row, ascending
};

// Per token, the slots with the top_k - max_deferred largest topk_weights are protected (equal
// weights: the lower slot first; NaN counts as the largest). An expert that any token of the batch
// protects is computed now, for all tokens; the others are deferred.
//
//   protected_k = clamp(top_k - max_deferred, 0, top_k)
//   now         = experts of { ids[t, s] : rank of weights[t, s] among t's slots < protected_k }
//
// A slot of -1 is no expert: it takes no place and is never computed. An expert in `skip` (on the
// GPU) takes its place like any other, as in kt-kernel, so max_deferred bounds what a token misses
// in its own layer whatever the placement. Ids out of range are left to route(), which refuses
// them.
//
// Shapes  as route(): topk_ids, topk_weights [num_tokens, top_k]; skip [num_experts] or null.
// Memory  `split` is overwritten and keeps its capacity.
void split_deferred(const void* topk_ids, DType id_dtype, const float* topk_weights, int num_tokens,
                    int top_k, int num_experts, const uint8_t* skip, int max_deferred,
                    DeferralSplit& split);

}  // namespace kt
