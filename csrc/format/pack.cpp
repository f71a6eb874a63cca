// Given codes to panels, panels to codes and values, and the rows of a panel.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

#include "base/check.h"
#include "base/hadamard.h"
#include "base/span.h"
#include "format/quantize.h"

namespace kt {
namespace {

// Calls body(k, column, word) for the 32-bit word of every k-step (codes_per_word of k) and column
// of a panel part of `count` k. Blocks of k keep the lines in cache while the columns go by.
template <typename Byte, typename Body>
void for_each_word(Byte* part, int64_t count, int codes_per_word, Body&& body) {
  constexpr int64_t kBlock = 64;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = std::min(count, begin + kBlock);
    for (int column = 0; column < kPackedColumns; ++column) {
      for (int64_t k = begin; k < end; k += codes_per_word) {
        body(k, column, part + k / codes_per_word * kPackedStepBytes + column * 4);
      }
    }
  }
}

void check_codes(const int8_t* codes, int64_t padded_k, int low, int high) {
  for (int column = 0; column < kPackedColumns; ++column) {
    const int8_t* const row = codes + column * padded_k;
    int smallest = 0, largest = 0;
    for (int64_t k = 0; k < padded_k; ++k) {
      smallest = std::min<int>(smallest, row[k]);
      largest = std::max<int>(largest, row[k]);
    }
    if (smallest >= low && largest <= high) continue;
    int64_t k = 0;
    while (row[k] >= low && row[k] <= high) ++k;
    KT_CHECK(false, "code " << int{row[k]} << " at row " << column << ", column " << k
                            << " of the panel is outside " << low << ".." << high
                            << " of the layout");
  }
}

void check_scales(const float* scales, int64_t num_groups, float limit) {
  for (int64_t i = 0; i < kPackedColumns * num_groups; ++i) {
    KT_CHECK(std::abs(scales[i]) <= limit, "scale " << scales[i] << " at row " << i / num_groups
                                                    << ", group " << i % num_groups
                                                    << " of the panel must be finite");
  }
}

void pack_int8(int64_t padded_k, const int8_t* codes, const float* scales, uint8_t* dst) {
  // -128 is kept out: |a| * |w| of two neighbours must fit the int16 of the AVX2 product
  check_codes(codes, padded_k, -127, 127);
  check_scales(scales, 1, std::numeric_limits<float>::max());
  int32_t compensation[kPackedColumns] = {};
  for_each_word(dst, padded_k, 4, [&](int64_t k, int column, uint8_t* word) {
    const int8_t* const code = codes + column * padded_k + k;
    compensation[column] -= 128 * (code[0] + code[1] + code[2] + code[3]);
    std::memcpy(word, code, 4);
  });
  uint8_t* const tail = dst + padded_k * kPackedColumns;
  std::memcpy(tail, compensation, sizeof compensation);
  std::memcpy(tail + sizeof compensation, scales, kPackedColumns * sizeof(float));
}

void pack_int4(const PackedLayout& layout, int64_t k, const int8_t* codes, const float* scales,
               uint8_t* dst) {
  const int64_t padded_k = layout.padded_k(k);
  const int64_t group_size = layout.effective_group_size(k);
  const int64_t num_groups = layout.num_groups(k);
  check_codes(codes, padded_k, -8, 7);
  check_scales(scales, num_groups, 0x1.fep127f);  // the largest bf16
  for (int64_t group = 0; group < num_groups; ++group) {
    const int64_t begin = group * group_size;
    const int64_t count = std::min(group_size, padded_k - begin);
    for_each_word(dst, count, 8, [&](int64_t k_in_group, int column, uint8_t* word) {
      const int8_t* const code = codes + column * padded_k + begin + k_in_group;
      for (int j = 0; j < 4; ++j)
        word[j] = static_cast<uint8_t>((code[j] + 8) | ((code[4 + j] + 8) << 4));
    });
    dst += count / 8 * kPackedStepBytes;
    for (int column = 0; column < kPackedColumns; ++column) {
      const uint16_t bits = float_to_bf16(scales[column * num_groups + group]);
      std::memcpy(dst + column * sizeof bits, &bits, sizeof bits);
    }
    dst += kPackedColumns * sizeof(uint16_t);
  }
}

void unpack_int4(const PackedLayout& layout, int64_t k, const uint8_t* panel, int8_t* codes,
                 float* scales) {
  const int64_t padded_k = layout.padded_k(k);
  const int64_t group_size = layout.effective_group_size(k);
  const int64_t num_groups = layout.num_groups(k);
  for (int64_t group = 0; group < num_groups; ++group) {
    const int64_t begin = group * group_size;
    const int64_t count = std::min(group_size, padded_k - begin);
    for_each_word(panel, count, 8, [&](int64_t k_in_group, int column, const uint8_t* word) {
      int8_t* const code = codes + column * padded_k + begin + k_in_group;
      for (int j = 0; j < 4; ++j) {
        code[j] = static_cast<int8_t>((word[j] & 15) - 8);
        code[4 + j] = static_cast<int8_t>((word[j] >> 4) - 8);
      }
    });
    panel += count / 8 * kPackedStepBytes;
    for (int column = 0; column < kPackedColumns; ++column) {
      uint16_t bits;
      std::memcpy(&bits, panel + column * sizeof bits, sizeof bits);
      scales[column * num_groups + group] = bf16_to_float(bits);
    }
    panel += kPackedColumns * sizeof(uint16_t);
  }
}

const void* row_at(const void* matrix, DType dtype, int64_t row, int64_t k) {
  return static_cast<const uint8_t*>(matrix) + row * k * (dtype_bits(dtype) / 8);
}

}  // namespace

void pack_panel(const PackedLayout& layout, int64_t k, const void* codes, const float* scales,
                uint8_t* dst) {
  const int64_t padded_k = layout.padded_k(k);
  switch (layout.format) {
    case WeightFormat::kInt8:
      return pack_int8(padded_k, static_cast<const int8_t*>(codes), scales, dst);
    case WeightFormat::kInt4:
      return pack_int4(layout, k, static_cast<const int8_t*>(codes), scales, dst);
    case WeightFormat::kBFloat16:
      return for_each_word(dst, padded_k, 2, [&](int64_t first, int column, uint8_t* word) {
        std::memcpy(word, static_cast<const uint16_t*>(codes) + column * padded_k + first, 4);
      });
    default: KT_CHECK(false, "no packed layout has codes of " << format_name(layout.format));
  }
}

void unpack_panel(const PackedLayout& layout, int64_t k, const uint8_t* panel, void* codes,
                  float* scales) {
  const int64_t padded_k = layout.padded_k(k);
  switch (layout.format) {
    case WeightFormat::kInt8:
      for_each_word(panel, padded_k, 4, [&](int64_t first, int column, const uint8_t* word) {
        std::memcpy(static_cast<int8_t*>(codes) + column * padded_k + first, word, 4);
      });
      std::memcpy(scales, panel + padded_k * kPackedColumns + kPackedColumns * sizeof(int32_t),
                  kPackedColumns * sizeof(float));
      return;
    case WeightFormat::kInt4:
      return unpack_int4(layout, k, panel, static_cast<int8_t*>(codes), scales);
    case WeightFormat::kBFloat16:
      return for_each_word(panel, padded_k, 2, [&](int64_t first, int column, const uint8_t* word) {
        std::memcpy(static_cast<uint16_t*>(codes) + column * padded_k + first, word, 4);
      });
    default: KT_CHECK(false, "no packed layout has codes of " << format_name(layout.format));
  }
}

void dequantize_panel(const PackedLayout& layout, int64_t k, const uint8_t* panel, float* w) {
  const int64_t padded_k = layout.padded_k(k);
  const int64_t num_groups = layout.num_groups(k);
  const int64_t group_size = layout.effective_group_size(k);
  const auto codes =
      std::make_unique_for_overwrite<uint16_t[]>(static_cast<size_t>(kPackedColumns * padded_k));
  const auto scales =
      std::make_unique_for_overwrite<float[]>(static_cast<size_t>(kPackedColumns * num_groups));
  const auto row = std::make_unique_for_overwrite<float[]>(static_cast<size_t>(padded_k));
  unpack_panel(layout, k, panel, codes.get(), scales.get());
  for (int column = 0; column < kPackedColumns; ++column) {
    if (layout.format == WeightFormat::kBFloat16) {
      for (int64_t i = 0; i < padded_k; ++i) row[i] = bf16_to_float(codes[column * padded_k + i]);
    } else {
      const auto* const code = reinterpret_cast<const int8_t*>(codes.get()) + column * padded_k;
      for (int64_t group = 0; group < num_groups; ++group) {
        const float scale = scales[column * num_groups + group];
        const int64_t end = std::min(padded_k, (group + 1) * group_size);
        for (int64_t i = group * group_size; i < end; ++i)
          row[i] = static_cast<float>(code[i]) * scale;
      }
      hadamard_rotate(row.get(), padded_k, layout.rotation_block(k));
    }
    std::memcpy(w + column * k, row.get(), static_cast<size_t>(k) * sizeof(float));
  }
}

PanelRows w13_panel_rows(const void* gate, const void* up, DType dtype, int64_t intermediate_size,
                         int64_t k, int64_t p) {
  constexpr int kHalf = kPackedColumns / 2;
  KT_CHECK(p >= 0 && p < num_w13_panels(intermediate_size),
           "w13 panel " << p << " is outside 0.." << num_w13_panels(intermediate_size) - 1);
  PanelRows rows;
  rows.dtype = dtype;
  rows.k = k;
  const int64_t count = std::min<int64_t>(kHalf, intermediate_size - p * kHalf);
  for (int64_t i = 0; i < count; ++i) {
    rows.row[i] = row_at(gate, dtype, p * kHalf + i, k);
    rows.row[kHalf + i] = row_at(up, dtype, p * kHalf + i, k);
  }
  return rows;
}

PanelRows matrix_panel_rows(const void* w, DType dtype, int64_t n, int64_t k, int64_t p) {
  KT_CHECK(p >= 0 && p < ceil_div(n, kPackedColumns),
           "panel " << p << " is outside 0.." << ceil_div(n, kPackedColumns) - 1);
  PanelRows rows;
  rows.dtype = dtype;
  rows.k = k;
  const int64_t count = std::min<int64_t>(kPackedColumns, n - p * kPackedColumns);
  for (int64_t i = 0; i < count; ++i) rows.row[i] = row_at(w, dtype, p * kPackedColumns + i, k);
  return rows;
}

int64_t num_w13_panels(int64_t intermediate_size) { return ceil_div(intermediate_size, 32); }

}  // namespace kt
