// Limit of vpdpbusd.
#include <immintrin.h>

#include "kernels/kernel.h"

namespace kt {

uint64_t peak_probe_int8_avx512vnni(int64_t iterations) {
  // not __m512i: more than 16 such accumulators spill
  typedef int32_t Int32x16 __attribute__((vector_size(64)));
  Int32x16 sum[24];
  for (int j = 0; j < 24; ++j) sum[j] = Int32x16{} + j;  // equal sums would be computed once
  __m512i a = _mm512_set1_epi8(3);
  const __m512i w = _mm512_set1_epi8(5);
  for (int64_t i = 0; i < iterations; ++i) {
    asm volatile("" : "+v"(a));
#pragma GCC unroll 24
    for (int j = 0; j < 24; ++j) {
      sum[j] =
          reinterpret_cast<Int32x16>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum[j]), a, w));
    }
  }
  int64_t all = 0;
  for (const Int32x16& lane : sum) all += lane[0];
  return static_cast<uint64_t>(all);
}

}  // namespace kt
