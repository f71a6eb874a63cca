// What the AVX2 panel kernels share: row blocks and tile widths for 16 vector registers. Anonymous
// namespace only.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels/kernel.h"

namespace kt {
namespace {

constexpr int kStepBytes = 256;  // one packed k-step: 64 columns x 4 bytes

// Vectors of 8 columns in a tile of so many rows. One row reads whole k-steps, so its panel is one
// ascending stream.
constexpr int tile_vectors(int rows) { return rows == 1 ? 8 : rows == 2 ? 4 : 2; }

// m rows in the fewest blocks of at most max_rows, as even as possible (of at most 6, 7 rows are 4
// + 3 and not 6 + 1).
inline int block_rows(int m, int begin, int max_rows) {
  const int rest = m - begin;
  const int blocks = (rest + max_rows - 1) / max_rows;
  return (rest + blocks - 1) / blocks;
}

inline int64_t source_row(const GemmArgs& args, int i) {
  return args.row_idx != nullptr ? args.row_idx[i] : i;
}

inline const uint8_t* activation_row(const GemmArgs& args, int i) {
  return static_cast<const uint8_t*>(args.a) + source_row(args, i) * args.a_stride_bytes;
}

inline __m256i load_bytes(const void* src) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(src));
}
inline void store_bytes(void* dst, __m256i v) {
  _mm256_storeu_si256(static_cast<__m256i*>(dst), v);
}

// The four bytes at src in every lane.
inline __m256i broadcast_dword(const void* src) {
  return _mm256_castps_si256(_mm256_broadcast_ss(static_cast<const float*>(src)));
}

// Pins a value to a register at this point. Without it GCC 12 gathers the products of a whole
// k-step before it adds them, and spills: 26 stack accesses a k-step in a 6x16 tile, none with it.
inline void pin(__m256i& v) { asm("" : "+x"(v)); }

// Asks for bytes `offset` .. `offset + bytes` of up to `rows` rows of activations from row `begin`
// on. A panel reads its rows anew, from the L3 where the panel before it was of another expert, in
// pieces too short for the caches' own prefetch: a row block fetches those of the next one.
inline void prefetch_rows(const GemmArgs& args, int begin, int rows, int64_t offset,
                          int64_t bytes) {
  for (int i = begin; i < args.m && i < begin + rows; ++i) {
    const uint8_t* a = activation_row(args, i) + offset;
    for (int64_t at = 0; at < bytes; at += 64)
      _mm_prefetch(reinterpret_cast<const char*>(a + at), _MM_HINT_T0);
  }
}

// Lines the int8 and bf16 tiles ask for while they work on step s. One row runs through the panel
// once and looks a little ahead in it; more rows pass over their chunk several times, and each pass
// fetches its columns of the next chunk.
struct Prefetch {
  const uint8_t* next;  // the chunk after this one
  int64_t step_bytes;   // kStepBytes, or 0 where an earlier row block has asked already

  template <int kRows>
  void step(const uint8_t* lines, int64_t s, int column) const {
    constexpr int kAheadBytes = 4096;
    const auto* base = reinterpret_cast<const char*>(lines) + kAheadBytes;
    if constexpr (kRows > 1)
      base = reinterpret_cast<const char*>(next) + s * step_bytes + column * 4;
    for (int line = 0; line < tile_vectors(kRows) / 2; ++line) {
      _mm_prefetch(base + line * 64, kRows == 1 ? _MM_HINT_T0 : _MM_HINT_T1);
    }
  }
};

// The end of an int8 product: c holds the integer sums; makes them c = (float(sum) * w_scale) *
// a_scale.
inline void scale_int8_sums(const GemmArgs& args) {
  const uint8_t* scales = args.panel + int64_t{args.k} * kPanelColumns + kPanelColumns * 4;
  for (int i = 0; i < args.m; ++i) {
    const __m256 a_scale = _mm256_set1_ps(args.a_scale[source_row(args, i)]);
    float* c = args.c + i * args.c_stride;
    for (int j = 0; j < kPanelColumns; j += 8) {
      const __m256 w_scale = _mm256_castsi256_ps(load_bytes(scales + j * 4));
      const __m256 sum = _mm256_cvtepi32_ps(load_bytes(c + j));
      _mm256_storeu_ps(c + j, _mm256_mul_ps(_mm256_mul_ps(sum, w_scale), a_scale));
    }
  }
}

// 8 bf16 scales as fp32.
inline __m256 load_bf16_scales(const uint8_t* source) {
  const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16));
}

// The start of a tile of groups, whose results accumulate in memory: they are touched once a group,
// the registers hold the integer sums.
template <int kRows>
inline void clear_tile(float* part, int64_t stride) {
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < tile_vectors(kRows); ++v)
      _mm256_storeu_ps(part + r * stride + v * 8, _mm256_setzero_ps());
  }
}

// The end of a block of activations: c = part * a_scale, or fma(part, a_scale, c) behind the first
// block. part may be c.
template <int kRows>
inline void fold_block(const GemmArgs& args, int begin, int64_t block, const float* part,
                       int64_t part_stride, float* c) {
  const int64_t scale_stride = args.a_block < args.k ? args.a_scale_stride : 1;
  for (int r = 0; r < kRows; ++r) {
    const __m256 a_scale =
        _mm256_set1_ps(args.a_scale[source_row(args, begin + r) * scale_stride + block]);
    for (int v = 0; v < tile_vectors(kRows); ++v) {
      float* const dst = c + r * args.c_stride + v * 8;
      const __m256 sum = _mm256_loadu_ps(part + r * part_stride + v * 8);
      _mm256_storeu_ps(dst, block == 0 ? _mm256_mul_ps(sum, a_scale)
                                       : _mm256_fmadd_ps(sum, a_scale, _mm256_loadu_ps(dst)));
    }
  }
}

}  // namespace
}  // namespace kt
