// The codes and scales of every packed format, and of expanded panels, on AVX2: 4 k of 8 columns as
// 32 bytes, and 8 columns of a group's scales. format/packed_layout.h and kernel.h have the bytes.
// Anonymous namespace only.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels/x86/gemm_avx2.h"

namespace kt {
namespace {

// ---- codes ----
//
// load(step, quad, column, v): k 4 * quad .. 4 * quad + 3 of a step, columns column + 8 v .. + 7,
// column a multiple of 16. Unsigned bytes up to kLargest, or signed ones where that is 128.

inline __m256i low_bits(__m256i line, int half) {
  return _mm256_and_si256(half == 0 ? line : _mm256_srli_epi16(line, 4), _mm256_set1_epi8(15));
}

// 2 bits of 4 k, of 16 k in a line, as bits from `at` on.
inline __m256i two_bits(__m256i line, int quad, int at) {
  const int down = 2 * quad - at;
  const __m256i moved = down > 0 ? _mm256_srli_epi16(line, down) : _mm256_slli_epi16(line, -down);
  return _mm256_and_si256(moved, _mm256_set1_epi8(static_cast<char>(3 << at)));
}

// `value` in each byte whose bit of the 32 at `bits` is set.
inline __m256i spread_bits(const uint8_t* bits, int value) {
  const __m256i source =
      _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
  const __m256i all = _mm256_shuffle_epi8(broadcast_dword(bits), source);
  const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(all, bit), bit);
  return _mm256_and_si256(set, _mm256_set1_epi8(static_cast<char>(value)));
}

struct Codes4 {
  static constexpr int kLargest = 15, kStepK = 8, kBytes = 256;
  static __m256i load(const uint8_t* step, int quad, int column, int v) {
    return low_bits(load_bytes(step + column * 4 + v * 32), quad);
  }
};

struct Codes5 {
  static constexpr int kLargest = 31, kStepK = 8, kBytes = 320;
  static __m256i load(const uint8_t* step, int quad, int column, int v) {
    const uint8_t* const bits = step + kStepBytes + column + v / 2 * 16 + quad * 8 + v % 2 * 4;
    return _mm256_or_si256(Codes4::load(step, quad, column, v), spread_bits(bits, 16));
  }
};

struct Codes6 {
  static constexpr int kLargest = 63, kStepK = 16, kBytes = 768;
  static __m256i load(const uint8_t* step, int quad, int column, int v) {
    const __m256i low = Codes4::load(step + quad / 2 * kStepBytes, quad % 2, column, v);
    const uint8_t* const upper = step + 2 * kStepBytes + column * 4 + v * 32;
    return _mm256_or_si256(low, two_bits(load_bytes(upper), quad, 4));
  }
};

struct Codes2 {
  static constexpr int kLargest = 3, kStepK = 16, kBytes = 256;
  static __m256i load(const uint8_t* step, int quad, int column, int v) {
    return two_bits(load_bytes(step + column * 4 + v * 32), quad, 0);
  }
};

struct Codes3 {
  static constexpr int kLargest = 7, kStepK = 16, kBytes = 384;
  static __m256i load(const uint8_t* step, int quad, int column, int v) {
    const uint8_t* const bits = step + kStepBytes + column * 2 + v / 2 * 32 + quad * 8 + v % 2 * 4;
    return _mm256_or_si256(Codes2::load(step, quad, column, v), spread_bits(bits, 4));
  }
};

inline __m256i look_up(const int8_t (&table)[16], __m256i codes) {
  const __m128i values = _mm_load_si128(reinterpret_cast<const __m128i*>(table));
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(values), codes);
}

// 2 * E2M1 + 12
struct CodesFp4 {
  static constexpr int kLargest = 24, kStepK = 8, kBytes = 256;
  alignas(16) static constexpr int8_t kTable[16] = {12, 13, 14, 15, 16, 18, 20, 24,
                                                    12, 11, 10, 9,  8,  6,  4,  0};
  static __m256i load(const uint8_t* step, int quad, int column, int v) {
    return look_up(kTable, Codes4::load(step, quad, column, v));
  }
};

// The values themselves: 128 less than the unsigned codes.
struct CodesIq4 {
  static constexpr int kLargest = 128, kStepK = 8, kBytes = 256;
  alignas(16) static constexpr int8_t kTable[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                                    1,    13,   25,  38,  53,  69,  89,  113};
  static __m256i load(const uint8_t* step, int quad, int column, int v) {
    return look_up(kTable, Codes4::load(step, quad, column, v));
  }
};

struct Codes8 {
  static constexpr int kLargest = 128, kStepK = 4, kBytes = 256;
  static __m256i load(const uint8_t* step, int, int column, int v) {
    return load_bytes(step + column * 4 + v * 32);
  }
};

// Unsigned codes of an expanded panel. kPackedBytes: of one k before.
template <int kLargestCode, int kPackedBytes>
struct ExpandedCodes {
  static constexpr int kFetchedBytes = kPackedBytes;
  static constexpr int kLargest = kLargestCode, kStepK = 4, kBytes = 256;
  static __m256i load(const uint8_t* step, int, int column, int v) {
    const __m256i codes = load_bytes(step + column * 4 + v * 32);
    if constexpr (kLargest < 128) return codes;
    return _mm256_xor_si256(codes, _mm256_set1_epi8(static_cast<char>(0x80)));
  }
};

// ---- scales ----

// Where those of a group are: behind its codes, and the d and e of its 256 k; or in the tables of
// an expanded panel, and its zeros or minima.
struct GroupScales {
  const uint8_t* scales;
  const uint8_t* more;
};

inline __m256 load_fp16(const uint8_t* source) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
}
inline __m256 load_fp32(const uint8_t* source) {
  return _mm256_loadu_ps(reinterpret_cast<const float*>(source));
}
inline __m256i load_uint8(const uint8_t* source) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(source)));
}

// kBytes of a group, kHeadBytes before each 256 k.
struct PlainScales {
  static constexpr int kHeadBytes = 0;
  static constexpr bool kExpanded = false, kMinimum = false, kZero = false, kColumn = false;
};

struct ScalesBf16 : PlainScales {
  static constexpr int kBytes = 128;
  static __m256 scale(GroupScales at, int column) {
    return load_bf16_scales(at.scales + column * 2);
  }
};

struct ScalesColumn : ScalesBf16 {
  static constexpr bool kColumn = true;
};

struct ScalesFp16 : PlainScales {
  static constexpr int kBytes = 128;
  static __m256 scale(GroupScales at, int column) { return load_fp16(at.scales + column * 2); }
};

struct ScalesFp32 : PlainScales {
  static constexpr int kBytes = 256;
  static __m256 scale(GroupScales at, int column) { return load_fp32(at.scales + column * 4); }
};

struct ScalesFp16Zero : ScalesFp16 {
  static constexpr int kBytes = 192;
  static constexpr bool kZero = true;
  static __m256i zero(GroupScales at, int column) { return load_uint8(at.scales + 128 + column); }
};

struct ScalesFp16Min : ScalesFp16 {
  static constexpr int kBytes = 256;
  static constexpr bool kMinimum = true;
  static __m256 minimum(GroupScales at, int column) {
    return load_fp16(at.scales + 128 + column * 2);
  }
};

struct ScalesBlock : PlainScales {
  static constexpr int kBytes = 64, kHeadBytes = 128;
  static __m256 scale(GroupScales at, int column) {
    const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(at.scales + column));
    return _mm256_mul_ps(load_fp16(at.more + column * 2),
                         _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes)));
  }
};

struct ScalesBlockMin : PlainScales {
  static constexpr int kBytes = 128, kHeadBytes = 256;
  static constexpr bool kMinimum = true;
  static __m256 scale(GroupScales at, int column) {
    return product(at.more + column * 2, at.scales + column);
  }
  static __m256 minimum(GroupScales at, int column) {
    const __m256 above = product(at.more + 128 + column * 2, at.scales + 64 + column);
    return _mm256_xor_ps(above, _mm256_set1_ps(-0.0f));
  }

 private:
  static __m256 product(const uint8_t* halves, const uint8_t* codes) {
    return _mm256_mul_ps(load_fp16(halves), _mm256_cvtepi32_ps(load_uint8(codes)));
  }
};

// Those of `Packed` behind an expansion.
template <typename Packed>
struct ExpandedScales {
  static constexpr int kBytes = 0, kHeadBytes = 0;
  static constexpr bool kExpanded = true, kMinimum = Packed::kMinimum, kZero = Packed::kZero,
                        kColumn = Packed::kColumn;
  static __m256 scale(GroupScales at, int column) { return load_fp32(at.scales + column * 4); }
  static __m256 minimum(GroupScales at, int column) { return load_fp32(at.more + column * 4); }
  static __m256i zero(GroupScales at, int column) { return load_bytes(at.more + column * 4); }
};

}  // namespace
}  // namespace kt
