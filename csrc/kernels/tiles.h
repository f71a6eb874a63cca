// The AMX tiles of the calling thread: who configured them last. Not for hosts without AMX.
#pragma once

#include <cstdint>

#include "kernels/kernel.h"

namespace kt {

// Bytes from the first of some packed rows to where row i begins (RowPacking::pack_row), with
// row_bytes = k * value_bytes.
inline int64_t packed_row_offset(int64_t i, int64_t row_bytes) {
  return i / kTileRows * kTileRows * row_bytes + i % kTileRows * kTileBytes;
}

// Configures the tiles as the kernels of kernels.inc want them, unless this thread's are so. A load
// of the configuration zeroes the tiles and takes about as long as two products.
void require_tiles();

// After another library configured or released the tiles of this thread: ours count as lost.
void forget_tiles();

// Gives the tiles back before the thread waits for others or leaves the library: a thread that
// holds none saves 8 KB less at each context switch and lets its core sleep deeper. Nothing where
// the thread holds none.
void release_tiles();

}  // namespace kt
