// Limits of a plain AVX-512 core: reading memory, int8 by maddubs and madd, fp32 fma.
#include <immintrin.h>

#include "kernels/kernel.h"
#include "kernels/x86/peak_sums.h"

namespace kt {

// Eight lines in flight and a prefetch of 4 KB ahead: on a quiet host one Zen4 core reads 22 GB/s
// with plain loads and 31-34 with these. Into the L2: while a neighbour's thread ran on the same
// core, a prefetch into the L1 read 22.9 GB/s, less than plain loads (25.7), one into the L2 26.0.
uint64_t read_probe_avx512(const uint8_t* data, int64_t bytes) {
  constexpr int64_t kAhead = 4096;
  constexpr int64_t kStride = 512;
  __m512i sum[8];
  for (__m512i& lane : sum) lane = _mm512_setzero_si512();
  int64_t at = 0;
  for (; at + kStride <= bytes; at += kStride) {
    for (int i = 0; i < 8; ++i) {
      _mm_prefetch(reinterpret_cast<const char*>(data + at + kAhead + i * 64), _MM_HINT_T1);
      sum[i] = _mm512_xor_si512(sum[i], _mm512_load_si512(data + at + i * 64));
    }
  }
  for (; at < bytes; at += 64) sum[0] = _mm512_xor_si512(sum[0], _mm512_load_si512(data + at));
  for (int i = 1; i < 8; ++i) sum[0] = _mm512_xor_si512(sum[0], sum[i]);
  alignas(64) uint64_t words[8];
  _mm512_store_si512(words, sum[0]);
  uint64_t all = 0;
  for (const uint64_t word : words) all ^= word;
  return all;
}

// maddubs, madd and add for each 64 products, eight sums in flight.
uint64_t peak_probe_int8_avx512(int64_t iterations) {
  typedef int32_t Int32x16 __attribute__((vector_size(64)));
  const auto step = [](Int32x16 sum, __m512i a, __m512i w) {
    const __m512i pairs = _mm512_maddubs_epi16(a, w);
    return sum + reinterpret_cast<Int32x16>(_mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
  };
  return run_peak_sums<8, Int32x16>(iterations, _mm512_set1_epi8(3), _mm512_set1_epi8(5), step);
}

uint64_t peak_probe_bf16_avx512(int64_t iterations) {
  const auto step = [](__m512 sum, __m512 a, __m512 w) { return _mm512_fmadd_ps(a, w, sum); };
  return run_peak_sums<24, __m512>(iterations, _mm512_set1_ps(0.5f), _mm512_set1_ps(0.25f), step);
}

}  // namespace kt
