// int4 to bf16 for tiles: weights with their scales, and rows of int8 codes, which bf16 holds
// exactly.
#include <immintrin.h>

#include "kernels/kernel.h"

namespace kt {

extern const RowPacking pack_bf16_amxbf16;
extern const RowPacking pack_int8_bf16_amxbf16;

namespace {

constexpr int kStepBytes = 256;  // of the packed panel (8 k) and of the scratch (2 k)

// Two vectors of fp32 as the pairs (even[i], odd[i]) of bf16, rounded to nearest even. Subnormals
// become zero.
inline __m512i pairs_of(__m512 even, __m512 odd) {
  const __m512i halves = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even));
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, halves);
}

// 16 columns of one packed step, 8 k, as four steps of pairs.
inline void expand_line(__m512i codes, __m512 scale, uint8_t* scratch) {
  // a code selects its value by its low four bits; the bits above them are not looked at
  const __m512 values = _mm512_set_ps(7, 6, 5, 4, 3, 2, 1, 0, -1, -2, -3, -4, -5, -6, -7, -8);
  const auto value = [&](__m512i shifted) {
    return _mm512_mul_ps(_mm512_permutexvar_ps(shifted, values), scale);
  };
  // byte j of a column: k + j in the low, k + 4 + j in the high nibble
  const __m512 low[4] = {value(codes), value(_mm512_srli_epi32(codes, 8)),
                         value(_mm512_srli_epi32(codes, 16)), value(_mm512_srli_epi32(codes, 24))};
  const __m512 high[4] = {value(_mm512_srli_epi32(codes, 4)), value(_mm512_srli_epi32(codes, 12)),
                          value(_mm512_srli_epi32(codes, 20)), value(_mm512_srli_epi32(codes, 28))};
  _mm512_store_si512(scratch, pairs_of(low[0], low[1]));
  _mm512_store_si512(scratch + kStepBytes, pairs_of(low[2], low[3]));
  _mm512_store_si512(scratch + 2 * kStepBytes, pairs_of(high[0], high[1]));
  _mm512_store_si512(scratch + 3 * kStepBytes, pairs_of(high[2], high[3]));
}

void pack_row(const uint8_t* codes, int32_t k, const float* scales, int32_t a_block,
              uint8_t* packed) {
  for (int32_t at = 0; at < k; at += 32, packed += kTileRows * kTileBytes) {
    const auto* const source = reinterpret_cast<const __m128i*>(codes + at);
    // times 1 where the row has one scale, which is left to the end
    const __m512 scale = _mm512_set1_ps(a_block < k ? scales[at / a_block] : 1.0f);
    const auto value = [&](int i) {
      const __m512i wide = _mm512_cvtepi8_epi32(_mm_loadu_si128(source + i));
      return _mm512_mul_ps(_mm512_cvtepi32_ps(wide), scale);
    };
    _mm512_storeu_si512(packed, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(value(1), value(0))));
  }
}

void pack_bytes(const uint8_t* codes, int32_t k, const float*, int32_t, uint8_t* packed) {
  for (int32_t at = 0; at < 2 * k; at += kTileBytes, packed += kTileRows * kTileBytes)
    _mm512_storeu_si512(packed, _mm512_loadu_si512(codes + at));
}

}  // namespace

void expand_int4_bf16_amxbf16(const uint8_t* panel, int32_t k, int32_t group_size,
                              uint8_t* scratch) {
  for (int32_t begin = 0; begin < k; begin += group_size) {
    const int32_t size = k - begin < group_size ? k - begin : group_size;
    const uint8_t* const scales = panel + int64_t{size} * kPanelColumns / 2;
    for (int line = 0; line < 4; ++line) {
      const __m256i bits = _mm256_load_si256(reinterpret_cast<const __m256i*>(scales + 32 * line));
      const __m512 scale = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
      for (int32_t step = 0; step < size / 8; ++step) {
        expand_line(_mm512_load_si512(panel + step * kStepBytes + 64 * line), scale,
                    scratch + int64_t{step} * 4 * kStepBytes + 64 * line);
      }
    }
    panel = scales + 2 * kPanelColumns;
    scratch += int64_t{size} / 2 * kStepBytes;
  }
}

const RowPacking pack_bf16_amxbf16 = {"pack_bf16_amxbf16", 2, pack_bytes};
const RowPacking pack_int8_bf16_amxbf16 = {"pack_int8_bf16_amxbf16", 2, pack_row};

}  // namespace kt
