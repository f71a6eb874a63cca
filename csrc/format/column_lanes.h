// Four columns side by side in one vector: the arithmetic of quantize.cpp. Not for ISA objects.
//
// The lanes of a vector are columns of the panel and k runs through memory, so every sum over k has
// one order and the bits do not depend on how wide the machine's vectors are. GCC vector types and
// SSE: every x86-64 has them.
#pragma once

#include <xmmintrin.h>

#include <cstdint>
#include <cstring>

namespace kt {

typedef float F4 __attribute__((vector_size(16)));
typedef int32_t I4 __attribute__((vector_size(16)));

constexpr int kLanes = 4;

inline F4 all_lanes(float value) { return F4{value, value, value, value}; }
inline I4 all_lanes(int32_t value) { return I4{value, value, value, value}; }
inline I4 bits_of(F4 value) { return reinterpret_cast<I4>(value); }
inline F4 floats_of(I4 bits) { return reinterpret_cast<F4>(bits); }

inline F4 load_lanes(const float* from) {
  F4 value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <typename V>
void store_lanes(V value, void* to) {
  std::memcpy(to, &value, sizeof value);
}

// Intrinsics: of a vector `a < b ? a : b` GCC 12 makes a comparison and three logical operations.
inline F4 min_lanes(F4 a, F4 b) { return _mm_min_ps(a, b); }
inline F4 max_lanes(F4 a, F4 b) { return _mm_max_ps(a, b); }
inline F4 clamp_lanes(F4 value, F4 low, F4 high) { return min_lanes(max_lanes(value, low), high); }
// Lanes of a where the comparison holds (-1), of b elsewhere (0).
inline F4 select_lanes(I4 condition, F4 a, F4 b) {
  return floats_of((condition & bits_of(a)) | (~condition & bits_of(b)));
}
inline F4 abs_lanes(F4 value) { return floats_of(bits_of(value) & 0x7fffffff); }

// Both round to nearest even, |value| < 2^22: adding 1.5 * 2^23 leaves the integer in the low
// mantissa bits.
constexpr float kRoundingMagic = 12582912.0f;
constexpr int32_t kRoundingMagicBits = 0x4b400000;
inline F4 round_lanes(F4 value) { return (value + kRoundingMagic) - kRoundingMagic; }
inline I4 integers_of(F4 value) { return bits_of(value + kRoundingMagic) - kRoundingMagicBits; }

// fp32 rounded to bf16 (nearest even), as fp32; finite values only.
inline F4 round_to_bf16(F4 value) {
  const I4 bits = bits_of(value);
  return floats_of((bits + 0x7fff + ((bits >> 16) & 1)) & static_cast<int32_t>(0xffff0000));
}

// column[i] lane r = row[r] lane i, and back.
inline void transpose_lanes(const F4 row[4], F4 column[4]) {
  const F4 low01 = __builtin_shufflevector(row[0], row[1], 0, 4, 1, 5);
  const F4 high01 = __builtin_shufflevector(row[0], row[1], 2, 6, 3, 7);
  const F4 low23 = __builtin_shufflevector(row[2], row[3], 0, 4, 1, 5);
  const F4 high23 = __builtin_shufflevector(row[2], row[3], 2, 6, 3, 7);
  column[0] = __builtin_shufflevector(low01, low23, 0, 1, 4, 5);
  column[1] = __builtin_shufflevector(low01, low23, 2, 3, 6, 7);
  column[2] = __builtin_shufflevector(high01, high23, 0, 1, 4, 5);
  column[3] = __builtin_shufflevector(high01, high23, 2, 3, 6, 7);
}

}  // namespace kt
