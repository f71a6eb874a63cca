// Limits of an AVX2 core: reading memory, int8 by maddubs and madd, fp32 fma.
#include <immintrin.h>

#include "kernels/kernel.h"

namespace kt {

uint64_t read_probe_avx2(const uint8_t* data, int64_t bytes) {
  constexpr int64_t kAhead = 4096;  // as read_probe_avx512
  constexpr int64_t kStride = 256;
  __m256i sum[8];
  for (__m256i& lane : sum) lane = _mm256_setzero_si256();
  int64_t at = 0;
  for (; at + kStride <= bytes; at += kStride) {
    for (int i = 0; i < 8; ++i) {
      if (i % 2 == 0)
        _mm_prefetch(reinterpret_cast<const char*>(data + at + kAhead + i * 32), _MM_HINT_T0);
      sum[i] = _mm256_xor_si256(
          sum[i], _mm256_load_si256(reinterpret_cast<const __m256i*>(data + at + i * 32)));
    }
  }
  for (; at < bytes; at += 32) {
    sum[0] =
        _mm256_xor_si256(sum[0], _mm256_load_si256(reinterpret_cast<const __m256i*>(data + at)));
  }
  for (int i = 1; i < 8; ++i) sum[0] = _mm256_xor_si256(sum[0], sum[i]);
  alignas(32) uint64_t words[4];
  _mm256_store_si256(reinterpret_cast<__m256i*>(words), sum[0]);
  return words[0] ^ words[1] ^ words[2] ^ words[3];
}

// maddubs, madd and add for each 32 products, four sums in flight.
uint64_t peak_probe_int8_avx2(int64_t iterations) {
  __m256i sum[4];
  for (int j = 0; j < 4; ++j) sum[j] = _mm256_set1_epi32(j);  // equal sums would be computed once
  __m256i a = _mm256_set1_epi8(3);
  __m256i w = _mm256_set1_epi8(5);
  const __m256i ones = _mm256_set1_epi16(1);
  for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 4
    for (__m256i& lane : sum) {
      asm volatile("" : "+x"(a), "+x"(w));  // else one product serves all sums
      const __m256i pairs = _mm256_maddubs_epi16(a, w);
      lane = _mm256_add_epi32(lane, _mm256_madd_epi16(pairs, ones));
    }
  }
  __m256i all = sum[0];
  for (int i = 1; i < 4; ++i) all = _mm256_add_epi32(all, sum[i]);
  return static_cast<uint64_t>(_mm256_extract_epi64(all, 0));
}

uint64_t peak_probe_bf16_avx2(int64_t iterations) {
  __m256 sum[12];
  for (int j = 0; j < 12; ++j)
    sum[j] = _mm256_set1_ps(static_cast<float>(j));  // equal sums would be computed once
  __m256 a = _mm256_set1_ps(0.5f);
  const __m256 w = _mm256_set1_ps(0.25f);
  for (int64_t i = 0; i < iterations; ++i) {
    asm volatile("" : "+x"(a));
#pragma GCC unroll 12
    for (int j = 0; j < 12; ++j) sum[j] = _mm256_fmadd_ps(a, w, sum[j]);
  }
  float all = 0;
  for (const __m256& lane : sum) all += _mm256_cvtss_f32(lane);
  return static_cast<uint64_t>(all);
}

}  // namespace kt
