// From topk_ids to rows grouped by expert. Pure functions on small arrays.
#pragma once

#include <cstdint>
#include <vector>

#include "base/dtype.h"

namespace kt {

// Which experts are computed here: experts marked in `skip` (they live on the GPU) and ids of -1
// are dropped.
//
// Order  experts ascending; within an expert by (token, slot) ascending. This is the order of the
//        weighted sum.
struct Routing {
  std::vector<int32_t> experts;  // experts with at least one row, ascending
  std::vector<int32_t>
      offsets;  // experts.size() + 1: rows of experts[i] are offsets[i] .. offsets[i + 1]
  std::vector<int32_t> token;  // token of each row
  std::vector<float> weight;   // its topk_weight
  int max_rows = 0;            // largest number of rows of one expert
  std::vector<int32_t> count;  // scratch of route()
  int num_rows() const { return static_cast<int>(token.size()); }
};

// topk_ids [num_tokens, top_k] (kInt32 or kInt64), topk_weights [num_tokens, top_k] fp32, both
// contiguous. skip [num_experts] of 0/1, or null. `routing` is overwritten and keeps its capacity.
//
// Errors  kt::Error for an id below -1 or >= num_experts (names token, slot, id and the limit).
void route(const void* topk_ids, DType id_dtype, const float* topk_weights, int num_tokens,
           int top_k, int num_experts, const uint8_t* skip, Routing& routing);

}  // namespace kt
