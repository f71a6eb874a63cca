// From float rows to packed panels and back. Deterministic: the bytes depend on nothing but the
// input.
#pragma once

#include <cstdint>

#include "base/dtype.h"
#include "format/coded_panel.h"
#include "format/packed_layout.h"

namespace kt {

// The 64 rows (output features) of one panel.
struct PanelRows {
  const void* row[64] = {};        // null: a padded row of zeros
  DType dtype = DType::kBFloat16;  // kFloat32, kBFloat16 or kFloat16
  int64_t k = 0;
};

// Sums over a tensor, for the manifest: relative error = sqrt(error / signal). Taken before the
// rotation is undone, so over padded_k columns (an orthogonal rotation keeps them, but for k that
// is no multiple of 64).
struct QuantizationError {
  double error = 0;   // sum of (dequantized - w)^2
  double signal = 0;  // sum of w^2
};

// Errors    kt::Error: a layout that keeps the codes of files, which are not made from values.
void check_quantizes(const PackedLayout& layout);

// Quantizes and packs one panel.
//
// int8      per row: scale = max|w| / 127 (w after rotation),
//           code = round_to_nearest_even(w / scale) in -127..127.
// int4      per row and group: the bf16 scale (either sign, so that -8 is used) and codes in -8..7
//           with the least squared error over a search of clip ratios followed by a least-squares
//           refit.
// bf16      round to nearest even (fp16 and fp32 sources), copy (bf16).
// Zeros     rows and groups with max|w| < 2^-100 get scale 0 and codes 0.
// Shapes    dst holds layout.panel_bytes(rows.k). error is added to; it may be null.
// Errors    kt::Error: as check_quantizes(); or NaN, infinity, |w| > 2^50 (int8, int4) or what
//           rounds to infinity (bf16) in the source: PanelError with row and column. dst is then
//           undefined.
// Threads   re-entrant.
void quantize_panel(const PackedLayout& layout, const PanelRows& rows, uint8_t* dst,
                    QuantizationError* error);

// Packs given codes and scales: each keeps its bits.
//
// Errors  PanelError naming row and k or group: a code outside the layout's (-127..127 of int8 with
//         a scale a row; NaN of fp8), a scale that is NaN, infinite or no number of the layout's
//         type. dst is then undefined.
void pack_panel(const CodedPanel& panel, uint8_t* dst);

// Inverse of it: `panel` is a panel of this layout and k.
void unpack_panel(const PackedLayout& layout, int64_t k, const uint8_t* packed, CodedPanel* panel);

// The same for int8, int4 and bf16: signed codes [64, padded_k] int8 and scales [64, num_groups]
// fp32, or bf16 bits [64, padded_k] and no scales. int4 scales are rounded to bf16.
void pack_panel(const PackedLayout& layout, int64_t k, const void* codes, const float* scales,
                uint8_t* dst);
void unpack_panel(const PackedLayout& layout, int64_t k, const uint8_t* panel, void* codes,
                  float* scales);

// The values a panel stands for, rotated back: w [64, k] fp32.
void dequantize_panel(const PackedLayout& layout, int64_t k, const uint8_t* panel, float* w);

// The rows of w13 panel p: gate rows 32p.. in 0-31, up rows 32p.. in 32-63. gate, up
// [intermediate_size, k].
PanelRows w13_panel_rows(const void* gate, const void* up, DType dtype, int64_t intermediate_size,
                         int64_t k, int64_t p);
// Rows 64p.. of w [n, k].
PanelRows matrix_panel_rows(const void* w, DType dtype, int64_t n, int64_t k, int64_t p);
// Panels of w13: ceil(intermediate_size / 32).
int64_t num_w13_panels(int64_t intermediate_size);

}  // namespace kt
