// Rows of activations as the GEMM kernels read them: codes, the scales of their blocks and the sums
// of their groups.
#pragma once

#include <cstdint>

#include "format/packed_layout.h"
#include "kernels/kernel.h"

namespace kt {

struct ActivationRows {
  uint8_t* codes = nullptr;  // [rows, padded k] int8, int8 + 128 or bf16
  int64_t stride_bytes = 0;
  float* scale = nullptr;  // [rows, blocks]; int8 only
  int64_t scale_stride = 0;
  int32_t* group_sum = nullptr;  // [rows, groups]; groups of integers only
  int64_t group_sum_stride = 0;
};

// Bytes of so many rows beside weights [., k] of a layout.
int64_t activation_bytes(const PackedLayout& layout, int64_t k, int64_t rows);

// The same rows at `base`, which is 64-byte aligned.
ActivationRows activations_at(const PackedLayout& layout, int64_t k, int64_t rows, uint8_t* base);

// row [padded k] fp32, zeros behind k, becomes row `row_idx` of `out`: rounded to bf16, or rotated
// as the layout has it and quantized, one scale each block. `row` is overwritten by its rotation.
// offset is 128 where the kernels take codes + 128, else 0. Re-entrant.
void quantize_row(const RowwiseOps& ops, const PackedLayout& layout, int64_t k, int32_t offset,
                  float* row, int64_t row_idx, const ActivationRows& out);

}  // namespace kt
