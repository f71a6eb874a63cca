// Limit of vdpbf16ps.
#include <immintrin.h>

#include "kernels/kernel.h"

namespace kt {

uint64_t peak_probe_bf16_avx512bf16(int64_t iterations) {
  __m512 sum[24];
  for (int j = 0; j < 24; ++j)
    sum[j] = _mm512_set1_ps(static_cast<float>(j));  // equal sums would be computed once
  __m512i a = _mm512_set1_epi32(0x3f003f00);         // two bf16 of 0.5
  const __m512i w = _mm512_set1_epi32(0x3e803e80);   // two bf16 of 0.25
  for (int64_t i = 0; i < iterations; ++i) {
    asm volatile("" : "+v"(a));
#pragma GCC unroll 24
    for (int j = 0; j < 24; ++j) {
      sum[j] =
          _mm512_dpbf16_ps(sum[j], reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(w));
    }
  }
  float all = 0;
  for (const __m512& lane : sum) all += _mm512_cvtss_f32(lane);
  return static_cast<uint64_t>(all);
}

}  // namespace kt
