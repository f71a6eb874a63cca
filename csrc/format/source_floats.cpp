// Sources whose codes are small floats: FP8 with scales of blocks, rows or 32 k; MXFP4 and NVFP4.
#include <cmath>
#include <cstring>

#include "base/check.h"
#include "base/span.h"
#include "format/source_decoders.h"

namespace kt {
namespace {

const uint8_t* bytes_of(const SourcePart& part) { return static_cast<const uint8_t*>(part.data); }

}  // namespace

void decode_fp8(const SourceMatrix& matrix, const SourceRows& rows, CodedPanel* panel) {
  const SourceFormat& format = matrix.format;
  const SourcePart& scale = matrix.parts[1];
  const int64_t width = format.block_columns == 0 ? matrix.k : format.block_columns;
  const int64_t groups = ceil_div(matrix.k, width);
  for (int64_t i = 0; i < rows.count; ++i) {
    const int64_t row = rows.first + i;
    const int column = rows.column + static_cast<int>(i);
    std::memcpy(panel->row(column), bytes_of(matrix.parts[0]) + row * matrix.k,
                static_cast<size_t>(matrix.k));
    const int64_t first = row / format.block_rows * groups;
    for (int64_t g = 0; g < groups; ++g) {
      panel->scale[g * kPackedColumns + column] =
          format.e8m0 ? e8m0_to_float(bytes_of(scale)[first + g], 1.0f)
                      : float_at(scale, first + g);
    }
  }
}

void decode_fp4(const SourceMatrix& matrix, const SourceRows& rows, CodedPanel* panel) {
  // codes stand for 2 * E2M1, so the other factor is half of what is stored: that of the group, or
  // of the whole matrix
  const bool is_nvfp4 = matrix.format.kind == SourceKind::kNvFp4;
  const int64_t groups = matrix.k / (is_nvfp4 ? 16 : 32);
  const float factor = is_nvfp4 ? float_at(matrix.parts[2], 0) : 0.0f;
  const float half = factor * 0.5f;
  KT_CHECK(half * 2.0f == factor || !std::isfinite(factor),
           "the factor " << factor << " of nvfp4 weights has no exact half; it must be at least "
                         << 0x1p-126f << " in magnitude");
  for (int64_t i = 0; i < rows.count; ++i) {
    const int64_t row = rows.first + i;
    const int column = rows.column + static_cast<int>(i);
    spread_nibbles(bytes_of(matrix.parts[0]) + row * (matrix.k / 2), matrix.k, panel->row(column));
    const uint8_t* const scales = bytes_of(matrix.parts[1]) + row * groups;
    for (int64_t g = 0; g < groups; ++g) {
      panel->scale[g * kPackedColumns + column] =
          is_nvfp4 ? fp8_to_float(scales[g]) : e8m0_to_float(scales[g], 0.5f);
    }
    if (is_nvfp4) panel->column_scale[column] = half;
  }
}

}  // namespace kt
