// Limits of a plain AVX-512 core: reading memory, int8 by maddubs and madd, fp32 fma.
#include <immintrin.h>

#include "kernels/kernel.h"

namespace kt {

// Eight lines in flight and a prefetch of 4 KB ahead: with plain loads one Zen4 core reads 22 GB/s,
// with these 31-34.
uint64_t read_probe_avx512(const uint8_t* data, int64_t bytes) {
  constexpr int64_t kAhead = 4096;
  constexpr int64_t kStride = 512;
  __m512i sum[8];
  for (__m512i& lane : sum) lane = _mm512_setzero_si512();
  int64_t at = 0;
  for (; at + kStride <= bytes; at += kStride) {
    for (int i = 0; i < 8; ++i) {
      _mm_prefetch(reinterpret_cast<const char*>(data + at + kAhead + i * 64), _MM_HINT_T0);
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
  Int32x16 sum[8];
  for (int j = 0; j < 8; ++j) sum[j] = Int32x16{} + j;  // equal sums would be computed once
  __m512i a = _mm512_set1_epi8(3);
  __m512i w = _mm512_set1_epi8(5);
  const __m512i ones = _mm512_set1_epi16(1);
  for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 8
    for (Int32x16& lane : sum) {
      asm volatile("" : "+v"(a), "+v"(w));  // else one product serves all sums
      const __m512i pairs = _mm512_maddubs_epi16(a, w);
      lane += reinterpret_cast<Int32x16>(_mm512_madd_epi16(pairs, ones));
    }
  }
  int64_t all = 0;
  for (const Int32x16& lane : sum) all += lane[0];
  return static_cast<uint64_t>(all);
}

uint64_t peak_probe_bf16_avx512(int64_t iterations) {
  __m512 sum[24];
  for (int j = 0; j < 24; ++j)
    sum[j] = _mm512_set1_ps(static_cast<float>(j));  // equal sums would be computed once
  __m512 a = _mm512_set1_ps(0.5f);
  const __m512 w = _mm512_set1_ps(0.25f);
  for (int64_t i = 0; i < iterations; ++i) {
    asm volatile("" : "+v"(a));
#pragma GCC unroll 24
    for (int j = 0; j < 24; ++j) sum[j] = _mm512_fmadd_ps(a, w, sum[j]);
  }
  float all = 0;
  for (const __m512& lane : sum) all += _mm512_cvtss_f32(lane);
  return static_cast<uint64_t>(all);
}

}  // namespace kt
