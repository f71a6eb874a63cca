#include "kernels/tiles.h"

#include <pthread.h>

#include "kernels/kernel.h"

namespace kt {

#define KT_TILES(symbol, isa)        \
  extern const TileControl symbol;   \
  namespace {                        \
  const TileControl& tiles = symbol; \
  }
#include "kernels/kernels.inc"

namespace {

thread_local bool configured = false;

// The kernel gives a fork's thread no tiles, but a copy of its parent's `configured`.
[[maybe_unused]] const bool forgets_in_forks = pthread_atfork(nullptr, nullptr, forget_tiles) == 0;

}  // namespace

void require_tiles() {
  if (configured) return;
  tiles.configure();
  configured = true;
}

void forget_tiles() { configured = false; }

void release_tiles() {
  if (!configured) return;
  tiles.release();
  configured = false;
}

}  // namespace kt
