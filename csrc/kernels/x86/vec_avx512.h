// Sixteen fp32 lanes: the operations rowwise.h is written in. vec_avx2.h has the same names for
// eight lanes. Include exactly one of them, in an ISA object. Everything is in an anonymous
// namespace.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace kt {
namespace {

using Vec = __m512;
using IntVec = __m512i;
constexpr int kLanes = 16;

inline Vec load(const float* src) { return _mm512_loadu_ps(src); }
inline void store(float* dst, Vec v) { _mm512_storeu_ps(dst, v); }
inline Vec broadcast(float value) { return _mm512_set1_ps(value); }
inline IntVec broadcast_int(int32_t value) { return _mm512_set1_epi32(value); }

inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
// a * b + c, rounded once.
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec negate(Vec v) { return _mm512_xor_ps(v, _mm512_set1_ps(-0.0f)); }
inline Vec absolute(Vec v) { return _mm512_andnot_ps(_mm512_set1_ps(-0.0f), v); }
// A NaN in v stays: max and min return their second operand then.
inline Vec clamp_low(Vec v, Vec low) { return _mm512_max_ps(low, v); }
inline Vec clamp_high(Vec v, Vec high) { return _mm512_min_ps(high, v); }
// +0 in the lanes where x < limit, v in the others and where x is NaN.
inline Vec zero_below(Vec v, Vec x, Vec limit) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, limit, _CMP_NLT_UQ), v);
}

inline IntVec bits(Vec v) { return _mm512_castps_si512(v); }
inline Vec from_bits(IntVec v) { return _mm512_castsi512_ps(v); }
inline IntVec add_int(IntVec a, IntVec b) { return _mm512_add_epi32(a, b); }
inline IntVec and_int(IntVec a, IntVec b) { return _mm512_and_si512(a, b); }
inline IntVec max_int(IntVec a, IntVec b) { return _mm512_max_epi32(a, b); }
template <int kCount>
inline IntVec shift_left(IntVec v) {
  return _mm512_slli_epi32(v, kCount);
}
// Nearest even, by MXCSR.
inline IntVec round_to_int(Vec v) { return _mm512_cvtps_epi32(v); }

inline int32_t sum_lanes(IntVec v) { return _mm512_reduce_add_epi32(v); }
inline int32_t max_lanes(IntVec v) { return _mm512_reduce_max_epi32(v); }

inline Vec load_wide_bf16(const uint16_t* src) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src));
  return from_bits(shift_left<16>(_mm512_cvtepu16_epi32(half)));
}
inline Vec load_wide_fp16(const uint16_t* src) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(src)));
}
// Round to nearest even; NaN: upper payload bits, made quiet. (vcvtneps2bf16 would flush
// subnormals.)
inline void store_narrow_bf16(uint16_t* dst, Vec v) {
  const IntVec wide = bits(v);
  const IntVec upper = _mm512_srli_epi32(wide, 16);
  const IntVec odd = and_int(upper, broadcast_int(1));
  const IntVec rounded = _mm512_srli_epi32(add_int(wide, add_int(odd, broadcast_int(0x7fff))), 16);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const IntVec chosen = _mm512_mask_or_epi32(rounded, is_nan, upper, broadcast_int(0x40));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst), _mm512_cvtepi32_epi16(chosen));
}
inline void store_narrow_fp16(uint16_t* dst, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst),
                      _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

// 32 integers in -128..127 plus offset, as bytes.
inline void store_codes(uint8_t* dst, const IntVec (&v)[32 / kLanes], int32_t offset) {
  const IntVec shift = broadcast_int(offset);
  for (int i = 0; i < 2; ++i) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(dst) + i,
                     _mm512_cvtepi32_epi8(add_int(v[i], shift)));
  }
}

// One Hadamard stage inside the vector: lanes i and i + d become (u + v, u - v). u - v is taken as
// u + (-v).
template <int kDistance>
inline Vec stage(Vec swapped, Vec own) {
  constexpr __mmask16 kUpper = kDistance == 1   ? 0xaaaa
                               : kDistance == 2 ? 0xcccc
                               : kDistance == 4 ? 0xf0f0
                                                : 0xff00;
  return _mm512_add_ps(swapped, _mm512_mask_xor_ps(own, kUpper, own, _mm512_set1_ps(-0.0f)));
}
inline Vec butterfly_lanes(Vec v) {
  v = stage<1>(_mm512_permute_ps(v, 0xb1), v);
  v = stage<2>(_mm512_permute_ps(v, 0x4e), v);
  v = stage<4>(_mm512_shuffle_f32x4(v, v, 0xb1), v);
  return stage<8>(_mm512_shuffle_f32x4(v, v, 0x4e), v);
}

}  // namespace
}  // namespace kt
