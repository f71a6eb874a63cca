// fp8 codes (e4m3fn) as bf16 on AVX-512 VBMI, exactly: the bytes of the 128 magnitudes out of two
// tables of 128, the sign from the code. Shifting a code into a bf16 instead would make a subnormal
// of it, which dpbf16 takes as zero. Everything is in an anonymous namespace.
#pragma once

#include "kernels/x86/gemm_avx512.h"

namespace kt {
namespace {

struct Fp8Tables {
  alignas(64) uint8_t high[128];  // of the bf16 of a magnitude
  alignas(64) uint8_t low[128];
};

constexpr Fp8Tables make_fp8_tables() {
  Fp8Tables tables{};
  for (int code = 0; code < 128; ++code) {
    const int exponent = code >> 3, mantissa = code & 7;
    int bits = (exponent + 120) << 7 | mantissa << 4;
    if (code == 127) bits = 0x7fc0;  // NaN
    if (exponent == 0) {
      int top = 2;  // a subnormal is mantissa * 2^-9
      while (top > 0 && mantissa >> top == 0) --top;
      bits = mantissa == 0 ? 0 : (top + 118) << 7 | ((mantissa << (7 - top)) & 0x7f);
    }
    tables.high[code] = static_cast<uint8_t>(bits >> 8);
    tables.low[code] = static_cast<uint8_t>(bits);
  }
  return tables;
}
constexpr Fp8Tables kFp8Tables = make_fp8_tables();

// A line of codes, 4 k of 16 columns, as two vectors of bf16: k, k + 1 and k + 2, k + 3.
struct Fp8Pairs {
  __m512i first, second;
};
[[gnu::always_inline]] inline Fp8Pairs load_fp8(const uint8_t* line) {
  const auto look_up = [](const uint8_t* table, __m512i codes) KT_INLINE {
    return _mm512_permutex2var_epi8(_mm512_load_si512(table), codes, _mm512_load_si512(table + 64));
  };
  const __m512i codes = _mm512_load_si512(line);
  const __m512i sign = _mm512_and_si512(codes, _mm512_set1_epi8(-128));
  const __m512i high = _mm512_or_si512(look_up(kFp8Tables.high, codes), sign);
  const __m512i low = look_up(kFp8Tables.low, codes);
  return {_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)};
}

}  // namespace
}  // namespace kt
