// The scalar Walsh-Hadamard rotation: what RowwiseOps::rotate computes, bit for bit. Not for ISA
// objects: it has inline functions.
#pragma once

#include <cmath>
#include <cstdint>

namespace kt {

// In place, for each block of `block` columns: x = H x / sqrt(block), H the Sylvester-Hadamard
// matrix of order `block`. Butterflies with distance 1, 2, 4, ..., block / 2:
//
//   (u, v) -> (u + v, u - v), each result one rounded fp32 operation
//
// and at the end one multiplication by float(1 / sqrt(block)). The transform is its own inverse.
//
// Requires  block a power of two that divides n; block 0 or 1: x is left as it is.
inline void hadamard_rotate(float* x, int64_t n, int64_t block) {
  if (block <= 1) return;
  const float scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(block)));
  for (int64_t start = 0; start < n; start += block) {
    float* const part = x + start;
    for (int64_t distance = 1; distance < block; distance *= 2) {
      for (int64_t i = 0; i < block; i += 2 * distance) {
        for (int64_t j = i; j < i + distance; ++j) {
          const float u = part[j];
          const float v = part[j + distance];
          part[j] = u + v;
          part[j + distance] = u - v;
        }
      }
    }
    for (int64_t i = 0; i < block; ++i) part[i] *= scale;
  }
}

}  // namespace kt
