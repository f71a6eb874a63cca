// Sources of 4-bit integers in words: compressed-tensors' pack-quantized, GPTQ and AWQ.
#include <algorithm>

#include "base/span.h"
#include "format/panel_codes.h"
#include "format/source_decoders.h"

namespace kt {
namespace {

constexpr int64_t kWordCodes = 8;
// AWQ: column c of eight has the nibble kAwqNibble[c] of their word.
constexpr int kAwqNibble[kWordCodes] = {0, 4, 1, 5, 2, 6, 3, 7};

uint32_t word_at(const SourcePart& part, int64_t i) {
  return load<uint32_t>(static_cast<const uint8_t*>(part.data) + 4 * i);
}

// Eight nibbles as bytes, the lowest first.
uint64_t spread_word(uint32_t word) {
  uint64_t x = word;
  x = (x | x << 16) & 0x0000ffff0000ffff;
  x = (x | x << 8) & 0x00ff00ff00ff00ff;
  return (x | x << 4) & 0x0f0f0f0f0f0f0f0f;
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
  const int64_t words = matrix.n / kWordCodes;
  // panels begin at multiples of 32 rows, so at whole words
  for (int64_t k = 0; k < matrix.k; k += kWordCodes) {
    const int64_t count = std::min(kWordCodes, matrix.k - k);
    for (int64_t i = 0; i < rows.count; i += kWordCodes) {
      uint64_t word[kWordCodes] = {};
      for (int64_t j = 0; j < count; ++j)
        word[j] = word_at(weight, (k + j) * words + (rows.first + i) / kWordCodes);
      for (int64_t c = 0; c < kWordCodes; ++c) {
        uint64_t codes = 0;
        for (int64_t j = 0; j < kWordCodes; ++j)
          codes |= (word[j] >> (4 * kAwqNibble[c]) & 15) << (8 * j);
        std::memcpy(panel->row(rows.column + static_cast<int>(i + c)) + k, &codes,
                    static_cast<size_t>(count));
      }
    }
  }
  const auto zero_at = [&](int64_t group, int64_t row) {
    const uint32_t word = word_at(zeros, group * words + row / kWordCodes);
    return static_cast<uint8_t>(word >> (4 * kAwqNibble[row % kWordCodes]) & 15);
  };
  take_scales(matrix, rows, matrix.parts[2], zero_at, panel);
}

}  // namespace kt
