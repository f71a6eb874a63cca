// fp32 to pairs of bf16 along k, on AVX-512 BF16. In an anonymous namespace.
#pragma once

#include <immintrin.h>

namespace kt {
namespace {

// Two vectors of fp32 as the pairs (even[i], odd[i]) of bf16, rounded to nearest even. Subnormals
// become zero.
inline __m512i pairs_of(__m512 even, __m512 odd) {
  const __m512i halves = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even));
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, halves);
}

}  // namespace
}  // namespace kt
