#include "moe/deferral.h"

#include <algorithm>
#include <cmath>

#include "base/check.h"

namespace kt {
namespace {

// Whether the slot of weight a ranks before the slot of weight b.
bool goes_before(float a, float b, bool a_is_earlier) {
  const bool a_nan = std::isnan(a);
  const bool b_nan = std::isnan(b);
  if (a_nan || b_nan) return a_nan && (!b_nan || a_is_earlier);
  return a > b || (a == b && a_is_earlier);
}

// kUsed: some token names the expert. kProtected: some token protects it.
constexpr uint8_t kUsed = 1;
constexpr uint8_t kProtected = 2;

// marks [num_experts] is filled with the flags above. A rank is counted for every slot: top_k is
// small, and no order of slots has to be kept.
template <typename Id>
void mark_experts(const Id* topk_ids, const float* topk_weights, int num_tokens, int top_k,
                  int num_experts, int num_protected, std::vector<uint8_t>& marks) {
  marks.assign(num_experts, 0);
  for (int64_t t = 0; t < num_tokens; ++t) {
    const Id* ids = topk_ids + t * top_k;
    const float* weights = topk_weights + t * top_k;
    for (int s = 0; s < top_k; ++s) {
      if (ids[s] < 0 || ids[s] >= num_experts) continue;
      int rank = 0;
      for (int other = 0; other < top_k; ++other) {
        rank += other != s && ids[other] >= 0 && goes_before(weights[other], weights[s], other < s);
      }
      marks[ids[s]] |= rank < num_protected ? kUsed | kProtected : kUsed;
    }
  }
}

}  // namespace

void split_deferred(const void* topk_ids, DType id_dtype, const float* topk_weights, int num_tokens,
                    int top_k, int num_experts, const uint8_t* skip, int max_deferred,
                    DeferralSplit& split) {
  const int num_protected = std::clamp(top_k - max_deferred, 0, top_k);
  std::vector<uint8_t>& marks = split.skip_deferred;
  if (id_dtype == DType::kInt64) {
    mark_experts(static_cast<const int64_t*>(topk_ids), topk_weights, num_tokens, top_k,
                 num_experts, num_protected, marks);
  } else {
    KT_CHECK(id_dtype == DType::kInt32,
             "topk_ids is " << dtype_name(id_dtype) << "; it must be int32 or int64.");
    mark_experts(static_cast<const int32_t*>(topk_ids), topk_weights, num_tokens, top_k,
                 num_experts, num_protected, marks);
  }
  split.skip_now.resize(num_experts);
  split.deferred.clear();
  for (int expert = 0; expert < num_experts; ++expert) {
    const bool elsewhere = skip != nullptr && skip[expert] != 0;
    const bool is_protected = (marks[expert] & kProtected) != 0;
    const bool deferred = marks[expert] == kUsed && !elsewhere;
    if (deferred) split.deferred.push_back(expert);
    split.skip_now[expert] = elsewhere || !is_protected;
    split.skip_deferred[expert] = !deferred;
  }
}

}  // namespace kt
