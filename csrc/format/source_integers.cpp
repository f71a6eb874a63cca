// Sources of 4-bit integers in words: compressed-tensors' pack-quantized, GPTQ and AWQ.
#include <emmintrin.h>

#include <algorithm>
#include <bit>

#include "base/check.h"
#include "base/span.h"
#include "base/unaligned.h"
#include "format/source_decoders.h"

namespace kt {
namespace {

constexpr int64_t kWordCodes = 8;
// AWQ: nibble i of a word is of column kAwqColumn[i] of eight.
constexpr int kAwqColumn[kWordCodes] = {0, 2, 4, 6, 1, 3, 5, 7};

uint32_t word_at(const SourcePart& part, int64_t i) {
  return load<uint32_t>(static_cast<const uint8_t*>(part.data) + 4 * i);
}

// A panel has a few words of each of many rows that are far apart: too little for the caches' own
// prefetch. So many k ahead they are asked for.
constexpr int64_t kPrefetchRows = 64;

void prefetch(const SourcePart& part, int64_t word, int64_t count) {
  const auto* const bytes = static_cast<const uint8_t*>(part.data) + 4 * word;
  for (int64_t at = 0; at < 4 * count; at += 64) __builtin_prefetch(bytes + at);
}

// Eight nibbles as bytes, the lowest first.
uint64_t spread_word(uint32_t word) {
  uint64_t x = word;
  x = (x | x << 16) & 0x0000ffff0000ffff;
  x = (x | x << 8) & 0x00ff00ff00ff00ff;
  return (x | x << 4) & 0x0f0f0f0f0f0f0f0f;
}

// Byte i of word j becomes byte j of word i.
void transpose_bytes(uint64_t words[kWordCodes]) {
  __m128i row[kWordCodes], pair[4], low[2], high[2];
  for (int i = 0; i < kWordCodes; ++i) row[i] = _mm_cvtsi64_si128(static_cast<int64_t>(words[i]));
  for (int i = 0; i < 4; ++i) pair[i] = _mm_unpacklo_epi8(row[2 * i], row[2 * i + 1]);
  for (int i = 0; i < 2; ++i) {
    low[i] = _mm_unpacklo_epi16(pair[2 * i], pair[2 * i + 1]);
    high[i] = _mm_unpackhi_epi16(pair[2 * i], pair[2 * i + 1]);
  }
  const __m128i out[4] = {_mm_unpacklo_epi32(low[0], low[1]), _mm_unpackhi_epi32(low[0], low[1]),
                          _mm_unpacklo_epi32(high[0], high[1]),
                          _mm_unpackhi_epi32(high[0], high[1])};
  std::memcpy(words, out, sizeof out);
}

// Scales [groups, n] and, where the panel has them, zero points: zero_at(group, row of the matrix).
// What is padded within a group becomes the code nearest to its zero.
template <typename ZeroAt>
void take_scales(const SourceMatrix& matrix, const SourceRows& rows, const SourcePart& scales,
                 ZeroAt&& zero_at, CodedPanel* panel) {
  const int64_t groups = scales.shape[0];
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t i = 0; i < rows.count; ++i) {
      const int64_t at = g * kPackedColumns + rows.column + i;
      panel->scale[at] = float_at(scales, g * matrix.n + rows.first + i);
      if (!panel->zero.empty()) panel->zero[at] = zero_at(g, rows.first + i);
    }
  }
  const int64_t padded_end = std::min(panel->padded_k, groups * panel->group_size);
  if (panel->zero.empty() || padded_end <= matrix.k) return;
  for (int64_t i = 0; i < rows.count; ++i) {
    const int column = rows.column + static_cast<int>(i);
    const uint8_t zero = panel->zero[(groups - 1) * kPackedColumns + column];
    std::fill(panel->row(column) + matrix.k, panel->row(column) + padded_end,
              std::min<uint8_t>(zero, 15));
  }
}

}  // namespace

void decode_pack_quantized(const SourceMatrix& matrix, const SourceRows& rows, CodedPanel* panel) {
  const SourcePart& weight = matrix.parts[0];
  const SourcePart& scale = matrix.parts[1];
  const int64_t row_bytes = weight.shape[1] * (dtype_bits(weight.dtype) / 8);
  const int64_t groups = scale.shape[1];
  for (int64_t i = 0; i < rows.count; ++i) {
    const int64_t row = rows.first + i;
    const int column = rows.column + static_cast<int>(i);
    spread_nibbles(static_cast<const uint8_t*>(weight.data) + row * row_bytes, matrix.k,
                   panel->row(column));
    for (int64_t g = 0; g < groups; ++g)
      panel->scale[g * kPackedColumns + column] = float_at(scale, row * groups + g);
  }
}

void check_stored_zeros(const SourceMatrix& matrix) {
  const SourcePart& zeros = matrix.parts[2];
  const int64_t count = zeros.shape[0] * zeros.shape[1];
  for (int64_t i = 0; i < count && matrix.format.zero_offset != 0; ++i) {
    const uint64_t nibbles = spread_word(word_at(zeros, i));
    const uint64_t fifteens = (nibbles + 0x0101010101010101) & 0x1010101010101010;
    if (fifteens == 0) continue;
    KT_CHECK(false, matrix.format.name
                        << " weights [" << matrix.n << ", " << matrix.k
                        << "] store zero point 15 for row "
                        << i % zeros.shape[1] * kWordCodes + std::countr_zero(fifteens) / 8
                        << ", group " << i / zeros.shape[1]
                        << ", which readers of the format take for 0 or for 16; quantize "
                           "the model again with checkpoint_format gptq_v2");
  }
}

bool is_symmetric(const SourceMatrix& matrix) {
  const SourcePart& zeros = matrix.parts[2];
  const uint32_t eight =
      0x88888888u - 0x11111111u * static_cast<uint32_t>(matrix.format.zero_offset);
  for (int64_t i = 0; i < zeros.shape[0] * zeros.shape[1]; ++i)
    if (word_at(zeros, i) != eight) return false;
  return true;
}

void decode_gptq(const SourceMatrix& matrix, const SourceRows& rows, CodedPanel* panel) {
  const SourcePart& weight = matrix.parts[0];
  const SourcePart& zeros = matrix.parts[2];
  for (int64_t k = 0; k < matrix.k; k += kWordCodes) {
    const int64_t first = k / kWordCodes * matrix.n + rows.first;
    if (k + kPrefetchRows < matrix.k)
      prefetch(weight, first + kPrefetchRows / kWordCodes * matrix.n, rows.count);
    uint8_t* code = panel->row(rows.column) + k;
    for (int64_t i = 0; i < rows.count; ++i, code += panel->code_stride)
      store(spread_word(word_at(weight, first + i)), code);
  }
  const auto zero_at = [&](int64_t group, int64_t row) {
    const uint32_t word = word_at(zeros, group * (matrix.n / kWordCodes) + row / kWordCodes);
    const uint32_t stored = word >> (row % kWordCodes * 4) & 15;
    return static_cast<uint8_t>(stored + static_cast<uint32_t>(matrix.format.zero_offset));
  };
  take_scales(matrix, rows, matrix.parts[1], zero_at, panel);
}

void decode_awq(const SourceMatrix& matrix, const SourceRows& rows, CodedPanel* panel) {
  const SourcePart& weight = matrix.parts[0];
  const SourcePart& zeros = matrix.parts[1];
  const int64_t row_words = matrix.n / kWordCodes;
  // panels begin at multiples of 32 rows, so at whole words; what is written behind k is padding of
  // its group, which take_scales() sets
  for (int64_t k = 0; k < matrix.k; k += kWordCodes) {
    const int64_t count = std::min(kWordCodes, matrix.k - k);
    for (int64_t j = k + kPrefetchRows; j < std::min(matrix.k, k + kPrefetchRows + kWordCodes); ++j)
      prefetch(weight, j * row_words + rows.first / kWordCodes, rows.count / kWordCodes);
    for (int64_t i = 0; i < rows.count; i += kWordCodes) {
      uint64_t words[kWordCodes] = {};
      for (int64_t j = 0; j < count; ++j)
        words[j] =
            spread_word(word_at(weight, (k + j) * row_words + (rows.first + i) / kWordCodes));
      transpose_bytes(words);
      for (int64_t nibble = 0; nibble < kWordCodes; ++nibble) {
        const int column = rows.column + static_cast<int>(i) + kAwqColumn[nibble];
        store(words[nibble], panel->row(column) + k);
      }
    }
  }
  const auto zero_at = [&](int64_t group, int64_t row) {
    const uint64_t nibbles = spread_word(word_at(zeros, group * row_words + row / kWordCodes));
    // the inverse of kAwqColumn
    const int64_t nibble = row % 2 * 4 + row % kWordCodes / 2;
    return static_cast<uint8_t>(nibbles >> (8 * nibble));
  };
  take_scales(matrix, rows, matrix.parts[2], zero_at, panel);
}

}  // namespace kt
