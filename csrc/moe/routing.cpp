#include "moe/routing.h"

#include <algorithm>

#include "base/check.h"

namespace kt {
namespace {

// Experts and rows in two passes: count, then place. Walking tokens in order within the placing
// pass gives the (token, slot) order inside each expert.
template <typename Id>
void route_ids(const Id* topk_ids, const float* topk_weights, int num_tokens, int top_k,
               int num_experts, const uint8_t* skip, Routing& routing) {
  std::vector<int32_t>& count = routing.count;
  count.assign(num_experts, 0);
  int64_t num_rows = 0;
  for (int64_t i = 0; i < int64_t{num_tokens} * top_k; ++i) {
    const Id id = topk_ids[i];
    if (id == -1) continue;
    KT_CHECK(id >= 0 && id < num_experts,
             "topk_ids[" << i / top_k << ", " << i % top_k << "] is " << id
                         << ", but expert ids are -1 (absent) or 0 to " << num_experts - 1 << ".");
    if (skip != nullptr && skip[id]) continue;
    ++count[id];
    ++num_rows;
  }

  routing.experts.clear();
  routing.offsets.assign(1, 0);
  routing.max_rows = 0;
  for (int expert = 0; expert < num_experts; ++expert) {
    if (count[expert] == 0) continue;
    const int32_t begin = routing.offsets.back();
    routing.experts.push_back(expert);
    routing.offsets.push_back(begin + count[expert]);
    routing.max_rows = std::max(routing.max_rows, count[expert]);
    count[expert] = begin;  // from here on: where the next row of this expert goes
  }

  routing.token.resize(num_rows);
  routing.weight.resize(num_rows);
  for (int64_t i = 0; i < int64_t{num_tokens} * top_k; ++i) {
    const Id id = topk_ids[i];
    if (id == -1 || (skip != nullptr && skip[id])) continue;
    const int32_t row = count[id]++;
    routing.token[row] = static_cast<int32_t>(i / top_k);
    routing.weight[row] = topk_weights[i];
  }
}

}  // namespace

void route(const void* topk_ids, DType id_dtype, const float* topk_weights, int num_tokens,
           int top_k, int num_experts, const uint8_t* skip, Routing& routing) {
  if (id_dtype == DType::kInt64) {
    route_ids(static_cast<const int64_t*>(topk_ids), topk_weights, num_tokens, top_k, num_experts,
              skip, routing);
  } else {
    KT_CHECK(id_dtype == DType::kInt32,
             "topk_ids is " << dtype_name(id_dtype) << "; it must be int32 or int64.");
    route_ids(static_cast<const int32_t*>(topk_ids), topk_weights, num_tokens, top_k, num_experts,
              skip, routing);
  }
}

}  // namespace kt
