// What the layers of one model hand to one another within a pass: the share of a layer's output
// that it deferred.
#pragma once

#include <cstdint>
#include <exception>

#include "moe/moe_scratch.h"

namespace kt {

// At most one share exists at a time. It belongs to the pass whose forward of layer `position` was
// the latest of the chain, and only the next forward of the chain can take it:
//
//   next forward of the chain              the share
//   layer position + 1, same num_tokens    is added to its output
//   anything else                          is dropped: its pass was given up, or split anew
//
// So the passes of a model follow one another: two batches that walk through its layers at the same
// time cannot be told apart and must not be deferred.
//
// Threads   jobs of one engine's stream. Lifetime  held by the layers of the chain; holds none.
// Memory    fp32 [num_tokens, hidden_size], grows to the largest batch that deferred.
class LayerChain {
 public:
  struct Taken {
    const float* share = nullptr;  // valid until begin_share(); null: nothing to add
    bool dropped = false;          // a share of another pass was found and dropped
  };

  // Begins a forward of the layer at `position`.
  // Errors  what went wrong in computing the share that this forward would have taken.
  Taken take(int position, int num_tokens);

  // Room for the share of the latest forward, `values` floats.
  float* begin_share(int64_t values);
  // The share of the layer at `position` is whole; or it is not, for the reason in `error`.
  void end_share(int position, int num_tokens, std::exception_ptr error);

 private:
  GrowingBuffer buffer_;
  bool filled_ = false;
  int position_ = 0;
  int num_tokens_ = 0;
  std::exception_ptr error_;
};

}  // namespace kt
