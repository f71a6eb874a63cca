// Eight fp32 lanes: the operations rowwise.h is written in. vec_avx512.h has the same names for
// sixteen lanes. Include exactly one of them, in an ISA object. Everything is in an anonymous
// namespace.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace kt {
namespace {

using Vec = __m256;
using IntVec = __m256i;
constexpr int kLanes = 8;

inline Vec load(const float* src) { return _mm256_loadu_ps(src); }
inline void store(float* dst, Vec v) { _mm256_storeu_ps(dst, v); }
inline Vec broadcast(float value) { return _mm256_set1_ps(value); }
inline IntVec broadcast_int(int32_t value) { return _mm256_set1_epi32(value); }

inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
// a * b + c, rounded once.
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec negate(Vec v) { return _mm256_xor_ps(v, _mm256_set1_ps(-0.0f)); }
inline Vec absolute(Vec v) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v); }
// A NaN in v stays: max and min return their second operand then.
inline Vec clamp_low(Vec v, Vec low) { return _mm256_max_ps(low, v); }
inline Vec clamp_high(Vec v, Vec high) { return _mm256_min_ps(high, v); }
// +0 in the lanes where x < limit, v in the others and where x is NaN.
inline Vec zero_below(Vec v, Vec x, Vec limit) {
  return _mm256_andnot_ps(_mm256_cmp_ps(x, limit, _CMP_LT_OQ), v);
}

inline IntVec bits(Vec v) { return _mm256_castps_si256(v); }
inline Vec from_bits(IntVec v) { return _mm256_castsi256_ps(v); }
inline IntVec add_int(IntVec a, IntVec b) { return _mm256_add_epi32(a, b); }
inline IntVec and_int(IntVec a, IntVec b) { return _mm256_and_si256(a, b); }
inline IntVec max_int(IntVec a, IntVec b) { return _mm256_max_epi32(a, b); }
template <int kCount>
inline IntVec shift_left(IntVec v) {
  return _mm256_slli_epi32(v, kCount);
}
// Nearest even, by MXCSR.
inline IntVec round_to_int(Vec v) { return _mm256_cvtps_epi32(v); }

inline __m128i fold(IntVec v, __m128i (*op)(__m128i, __m128i)) {
  __m128i half = op(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  half = op(half, _mm_shuffle_epi32(half, 0x4e));
  return op(half, _mm_shuffle_epi32(half, 0xb1));
}
inline int32_t sum_lanes(IntVec v) {
  return _mm_cvtsi128_si32(fold(v, [](__m128i a, __m128i b) { return _mm_add_epi32(a, b); }));
}
inline int32_t max_lanes(IntVec v) {
  return _mm_cvtsi128_si32(fold(v, [](__m128i a, __m128i b) { return _mm_max_epi32(a, b); }));
}

inline Vec load_wide_bf16(const uint16_t* src) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(src));
  return from_bits(shift_left<16>(_mm256_cvtepu16_epi32(half)));
}
inline Vec load_wide_fp16(const uint16_t* src) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src)));
}
// Round to nearest even; NaN: upper payload bits, made quiet.
inline void store_narrow_bf16(uint16_t* dst, Vec v) {
  const IntVec wide = bits(v);
  const IntVec upper = _mm256_srli_epi32(wide, 16);
  const IntVec odd = and_int(upper, broadcast_int(1));
  const IntVec rounded = _mm256_srli_epi32(add_int(wide, add_int(odd, broadcast_int(0x7fff))), 16);
  const IntVec quiet = _mm256_or_si256(upper, broadcast_int(0x40));
  const IntVec is_nan = bits(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const IntVec chosen = _mm256_blendv_epi8(rounded, quiet, is_nan);
  const __m128i packed =
      _mm_packus_epi32(_mm256_castsi256_si128(chosen), _mm256_extracti128_si256(chosen, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(dst), packed);
}
inline void store_narrow_fp16(uint16_t* dst, Vec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(dst), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

// 32 integers in -128..127 plus offset, as bytes.
inline void store_codes(uint8_t* dst, const IntVec (&v)[32 / kLanes], int32_t offset) {
  const IntVec low = _mm256_packs_epi32(v[0], v[1]);
  const IntVec high = _mm256_packs_epi32(v[2], v[3]);
  // The packs work inside 128-bit halves: dwords are then 0 2 4 6 of the low halves, 1 3 5 7 of the
  // high ones.
  const IntVec order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const IntVec codes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
  const IntVec shifted = _mm256_add_epi8(codes, _mm256_set1_epi8(static_cast<char>(offset)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst), shifted);
}

// One Hadamard stage inside the vector: lanes i and i + d become (u + v, u - v). u - v is taken as
// u + (-v).
inline Vec stage(Vec swapped, Vec own, __m256 sign) {
  return _mm256_add_ps(swapped, _mm256_xor_ps(own, sign));
}
inline Vec butterfly_lanes(Vec v) {
  v = stage(_mm256_permute_ps(v, 0xb1), v, _mm256_setr_ps(0, -0.0f, 0, -0.0f, 0, -0.0f, 0, -0.0f));
  v = stage(_mm256_permute_ps(v, 0x4e), v, _mm256_setr_ps(0, 0, -0.0f, -0.0f, 0, 0, -0.0f, -0.0f));
  return stage(_mm256_permute2f128_ps(v, v, 1), v,
               _mm256_setr_ps(0, 0, 0, 0, -0.0f, -0.0f, -0.0f, -0.0f));
}

}  // namespace
}  // namespace kt
