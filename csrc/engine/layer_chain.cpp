#include "engine/layer_chain.h"

#include <utility>

namespace kt {

LayerChain::Taken LayerChain::take(int position, int num_tokens) {
  if (!filled_) return {};
  filled_ = false;
  const std::exception_ptr error = std::exchange(error_, nullptr);
  if (position != position_ + 1 || num_tokens != num_tokens_) return {nullptr, true};
  if (error) std::rethrow_exception(error);
  return {reinterpret_cast<const float*>(buffer_.reserve(0)), false};
}

float* LayerChain::begin_share(int64_t values) {
  filled_ = false;
  return reinterpret_cast<float*>(buffer_.reserve(values * static_cast<int64_t>(sizeof(float))));
}

void LayerChain::end_share(int position, int num_tokens, std::exception_ptr error) {
  filled_ = true;
  position_ = position;
  num_tokens_ = num_tokens;
  error_ = std::move(error);
}

}  // namespace kt
