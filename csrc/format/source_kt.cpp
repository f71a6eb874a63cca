// Sources of the incumbent's converter: INT8 and INT4 in the order of its tiles, one fp32 scale a
// row of each NUMA part.
//
// A part [N, K] is cut into blocks of R rows (INT8 64, INT4 128), these into blocks of 3584 k,
// these into 32 rows, these into steps of S k (64, 128): 2 KB, [2 halves of 16 rows][16 words][16
// rows][4 k]. INT4: k of a step in the low nibbles, k + 64 in the high ones, two's complement, and
// the value is 16 * code * scale.
#include <algorithm>

#include "base/span.h"
#include "base/unaligned.h"
#include "format/source_decoders.h"

namespace kt {
namespace {

constexpr int64_t kColumnBlock = 3584;
constexpr int64_t kTileRows = 32;
constexpr int64_t kTileBytes = 2048;

// Row r of a part [n, k] of INT8 or INT4 to unsigned codes.
void decode_row(const uint8_t* part, int bits, int64_t n, int64_t k, int64_t r, uint8_t* codes) {
  const int64_t row_block = bits == 8 ? 64 : 128, step = bits == 8 ? 64 : 128;
  const int64_t block = r - r % row_block;
  const int64_t block_rows = std::min(row_block, n - block);
  const int64_t tile = r % row_block / kTileRows * kTileRows;
  const int64_t in_step = r % kTileRows / 16 * 1024 + r % 16 * 4;
  for (int64_t begin = 0; begin < k; begin += kColumnBlock) {
    const int64_t columns = std::min(kColumnBlock, k - begin);
    const uint8_t* from =
        part + (block * k + begin * block_rows + tile * columns) * bits / 8 + in_step;
    for (int64_t i = 0; i < columns; i += step, from += kTileBytes, codes += step) {
      for (int64_t word = 0; word < 16; ++word) {
        const auto four = load<uint32_t>(from + word * 64);
        if (bits == 8) {
          store(four ^ 0x80808080u, codes + 4 * word);
        } else {
          store((four & 0x0f0f0f0fu) ^ 0x08080808u, codes + 4 * word);
          store((four >> 4 & 0x0f0f0f0fu) ^ 0x08080808u, codes + 64 + 4 * word);
        }
      }
    }
  }
}

}  // namespace

void decode_kt(const SourceMatrix& matrix, const SourceRows& rows, CodedPanel* panel) {
  const SourceFormat& format = matrix.format;
  const int64_t part_rows = format.by_columns ? matrix.n : matrix.n / format.num_ranges;
  const int64_t part_columns = format.by_columns ? matrix.k / format.num_ranges : matrix.k;
  const int groups = format.by_columns ? format.num_ranges : 1;
  const float factor = format.bits == 8 ? 1.0f : 16.0f;
  for (int64_t i = 0; i < rows.count; ++i) {
    const int64_t row = rows.first + i;
    const int column = rows.column + static_cast<int>(i);
    for (int g = 0; g < groups; ++g) {
      const int64_t part = format.by_columns ? g : row / part_rows;
      const SourcePart& weight = matrix.parts[2 * part];
      const int64_t r = format.by_columns ? row : row % part_rows;
      decode_row(static_cast<const uint8_t*>(weight.data), format.bits, part_rows, part_columns, r,
                 panel->row(column) + g * part_columns);
      panel->scale[g * kPackedColumns + column] = float_at(matrix.parts[2 * part + 1], r) * factor;
    }
  }
}

}  // namespace kt
