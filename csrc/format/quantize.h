// From float rows to packed panels and back. Deterministic: the bytes depend on nothing but the
// input.
#pragma once

#include <cstdint>

#include "base/dtype.h"
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
// Errors    kt::Error for NaN, infinity, |w| > 2^50 (int8, int4) or what rounds to infinity (bf16)
//           in the source; it names row and column of the panel. dst is then undefined.
// Threads   re-entrant.
void quantize_panel(const PackedLayout& layout, const PanelRows& rows, uint8_t* dst,
                    QuantizationError* error);

// Packs given codes [64, padded_k] int8 and scales [64, num_groups] fp32 (bf16 layouts: codes is
// bf16 bits, no scales). int4 scales are rounded to bf16.
//
// Errors  kt::Error for a code outside the layout's range (int8 -127..127, int4 -8..7) or a scale
//         that is not finite.
void pack_panel(const PackedLayout& layout, int64_t k, const void* codes, const float* scales,
                uint8_t* dst);

// Inverse of pack_panel: codes [64, padded_k] (int8, or bf16 bits) and scales [64, num_groups].
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
