// The machine's own limits, measured with the pool and the weights a bench is about to use.
#pragma once

#include "engine/engine.h"

namespace kt {

// Bytes per second of all workers reading all packed weights of a layer once, each worker what lies
// on its node.
double probe_read(EngineLayer& layer);

// Operations per second of all workers multiplying on registers for about `milliseconds`, as the
// layer's kernels do; where those of w13 and w2 multiply different types, for so long each, and as
// many a second as a forward could do at both.
double probe_peak(EngineLayer& layer, int milliseconds);

// Nanoseconds of dispatching an empty job to the pool and joining it, the median of many.
double probe_dispatch(Engine& engine);

}  // namespace kt
