#include "moe/activation_rows.h"

#include <algorithm>

#include "base/span.h"

namespace kt {
namespace {

constexpr int64_t kLine = 64;

int64_t code_bytes(const PackedLayout& layout) { return takes_bf16_rows(layout.format) ? 2 : 1; }

int64_t rows_bytes(int64_t rows, int64_t row_bytes) { return round_up(rows * row_bytes, kLine); }

}  // namespace

int64_t activation_bytes(const PackedLayout& layout, int64_t k, int64_t rows) {
  return rows_bytes(rows, layout.padded_k(k) * code_bytes(layout)) +
         rows_bytes(rows, layout.num_activation_blocks(k) * int64_t{sizeof(float)}) +
         rows_bytes(rows, layout.num_groups(k) * int64_t{sizeof(int32_t)});
}

ActivationRows activations_at(const PackedLayout& layout, int64_t k, int64_t rows, uint8_t* base) {
  ActivationRows out;
  out.stride_bytes = layout.padded_k(k) * code_bytes(layout);
  out.codes = base;
  base += rows_bytes(rows, out.stride_bytes);
  out.scale = reinterpret_cast<float*>(base);
  out.scale_stride = layout.num_activation_blocks(k);
  base += rows_bytes(rows, out.scale_stride * int64_t{sizeof(float)});
  if (has_groups(layout.format) && !takes_bf16_rows(layout.format)) {
    out.group_sum = reinterpret_cast<int32_t*>(base);
    out.group_sum_stride = layout.num_groups(k);
  }
  return out;
}

void quantize_row(const RowwiseOps& ops, const PackedLayout& layout, int64_t k, int32_t offset,
                  float* row, int64_t row_idx, const ActivationRows& out) {
  const int64_t padded = layout.padded_k(k);
  uint8_t* const codes = out.codes + row_idx * out.stride_bytes;
  if (takes_bf16_rows(layout.format)) {
    ops.store_bf16(row, reinterpret_cast<uint16_t*>(codes), static_cast<int32_t>(padded));
    return;
  }
  const int rotation = layout.rotation_block(k);
  if (rotation > 0) ops.rotate(row, static_cast<int32_t>(padded), rotation);
  const int32_t group_size = layout.effective_group_size(k);
  const int64_t block = layout.activation_block(k);
  float* scale = out.scale + row_idx * out.scale_stride;
  int32_t* group_sum =
      out.group_sum == nullptr ? nullptr : out.group_sum + row_idx * out.group_sum_stride;
  for (int64_t begin = 0; begin < padded; begin += block, ++scale) {
    const int32_t count = static_cast<int32_t>(std::min(block, padded - begin));
    ops.quantize(row + begin, count, offset, codes + begin, scale, std::min(group_size, count),
                 group_sum);
    if (group_sum != nullptr) group_sum += block / group_size;
  }
}

}  // namespace kt
