// Rows for tiles as they are. Anonymous namespace only.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels/kernel.h"

namespace kt {
namespace {

// RowPacking::pack_row of values of so many bytes.
template <int kValueBytes>
void pack_bytes(const uint8_t* codes, int32_t k, const float*, int32_t, uint8_t* packed) {
  for (int32_t at = 0; at < kValueBytes * k; at += kTileBytes, packed += kTileRows * kTileBytes)
    _mm512_storeu_si512(packed, _mm512_loadu_si512(codes + at));
}

}  // namespace
}  // namespace kt
