// Given codes to panels, panels to codes and values, and the rows of a panel.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <memory>

#include "base/check.h"
#include "base/hadamard.h"
#include "base/span.h"
#include "base/unaligned.h"
#include "format/panel_codes.h"
#include "format/panel_error.h"
#include "format/quantize.h"

namespace kt {
namespace {

// Throws for the first code that the layout has not.
void check_codes(const CodedPanel& panel) {
  const WeightFormatInfo& info = format_info(panel.layout.format);
  const bool is_fp8 = info.code == DType::kFp8;
  // A row with one scale was quantized to -127..127: a -128 in it is damage. Groups are as their
  // files have them, and every kernel takes their -128.
  const int low = info.scales == ScaleForm::kRow ? 1 : 0;
  const int high = is_fp8 ? 0x7e : (1 << dtype_bits(info.code)) - 1;
  const int mask = is_fp8 ? 0x7f : 0xff;
  for (int column = 0; column < kPackedColumns; ++column) {
    const uint8_t* const row = panel.row(column);
    uint8_t smallest = 255, largest = 0;
    for (int64_t k = 0; k < panel.padded_k; ++k) {
      const auto code = static_cast<uint8_t>(row[k] & mask);
      smallest = std::min(smallest, code);
      largest = std::max(largest, code);
    }
    if (smallest >= low && largest <= high) continue;
    int64_t k = 0;
    while ((row[k] & mask) >= low && (row[k] & mask) <= high) ++k;
    const std::string place = text_of("column ", k);
    if (is_fp8) throw PanelError("the weight", column, place, "is NaN; repair the checkpoint");
    const int offset = info.table == nullptr ? info.code_offset : 0;
    const int code = offset == 0 ? row[k] : static_cast<int8_t>(row[k] - offset);
    throw PanelError(text_of("code ", code), column, place,
                     text_of("is outside ", low - offset, "..", high - offset, " of ",
                             panel.layout.name(), "; choose a method that quantizes anew"));
  }
}

// The number types of scales.
struct Bf16 {
  using Bits = uint16_t;
  static constexpr const char* kName = "bf16";
  static Bits to_bits(float value) { return float_to_bf16(value); }
  static float to_float(Bits bits) { return bf16_to_float(bits); }
};
struct Fp16 {
  using Bits = uint16_t;
  static constexpr const char* kName = "fp16";
  static Bits to_bits(float value) { return float_to_fp16(value); }
  static float to_float(Bits bits) { return fp16_to_float(bits); }
};
struct Fp32 {
  using Bits = uint32_t;
  static constexpr const char* kName = "fp32";
  static Bits to_bits(float value) { return std::bit_cast<uint32_t>(value); }
  static float to_float(Bits bits) { return std::bit_cast<float>(bits); }
};

// visit(type, name, values) for what stands beside a group, a block of 256 k and the whole panel,
// in the order of packed_layout.h; bytes have no type and no name.
template <typename Panel, typename Visit>
void visit_group(Panel& panel, Visit&& visit) {
  switch (format_info(panel.layout.format).scales) {
    case ScaleForm::kNone:
    case ScaleForm::kRow: return;
    case ScaleForm::kBf16:
    case ScaleForm::kColumn: return visit(Bf16{}, "scale", panel.scale);
    case ScaleForm::kFp16: return visit(Fp16{}, "scale", panel.scale);
    case ScaleForm::kFp32: return visit(Fp32{}, "scale", panel.scale);
    case ScaleForm::kFp16Zero: visit(Fp16{}, "scale", panel.scale); return visit(panel.zero);
    case ScaleForm::kFp16Min:
      visit(Fp16{}, "scale", panel.scale);
      return visit(Fp16{}, "minimum", panel.minimum);
    case ScaleForm::kBlock: return visit(panel.sub_scale);
    case ScaleForm::kBlockMin: visit(panel.sub_scale); return visit(panel.sub_minimum);
  }
}

template <typename Panel, typename Visit>
void visit_block(Panel& panel, Visit&& visit) {
  visit(Fp16{}, "scale of 256 weights", panel.block_scale);
  if (!panel.block_minimum.empty()) visit(Fp16{}, "minimum of 256 weights", panel.block_minimum);
}

template <typename Panel, typename Visit>
void visit_tail(Panel& panel, Visit&& visit) {
  const ScaleForm form = format_info(panel.layout.format).scales;
  if (form == ScaleForm::kRow) visit(Fp32{}, "scale", panel.scale);
  if (form == ScaleForm::kColumn) visit(Fp32{}, "scale of a row", panel.column_scale);
}

// Writes the 64 values of one group (or block) after the other to `dst`. Each keeps its bits, or is
// refused.
struct Packer {
  int64_t group;
  uint8_t* dst;

  template <typename Type>
  void operator()(Type, const char* name, const std::vector<float>& values) {
    for (int row = 0; row < kPackedColumns; ++row, dst += sizeof(typename Type::Bits)) {
      const float value = values[group * kPackedColumns + row];
      const typename Type::Bits bits = Type::to_bits(value);
      if (Type::to_float(bits) != value || !std::isfinite(value)) [[unlikely]] {
        throw PanelError(text_of(name, " ", value), row, text_of("group ", group),
                         std::isfinite(value)
                             ? text_of("is no number of ", Type::kName,
                                       ", in which the layout keeps it; choose a method that "
                                       "quantizes anew")
                             : "must be finite; repair the checkpoint");
      }
      store(bits, dst);
    }
  }
  void operator()(const std::vector<uint8_t>& bytes) {
    std::memcpy(dst, bytes.data() + group * kPackedColumns, kPackedColumns);
    dst += kPackedColumns;
  }
};

struct Unpacker {
  int64_t group;
  const uint8_t* src;

  template <typename Type>
  void operator()(Type, const char*, std::vector<float>& values) {
    for (int row = 0; row < kPackedColumns; ++row, src += sizeof(typename Type::Bits))
      values[group * kPackedColumns + row] = Type::to_float(load<typename Type::Bits>(src));
  }
  void operator()(std::vector<uint8_t>& bytes) {
    std::memcpy(bytes.data() + group * kPackedColumns, src, kPackedColumns);
    src += kPackedColumns;
  }
};

int64_t num_blocks(const CodedPanel& panel) {
  return std::ssize(panel.block_scale) / kPackedColumns;
}

// int32 compensation of the rows: -128 * sum of the codes.
void pack_compensation(const CodedPanel& panel, uint8_t** dst) {
  for (int column = 0; column < kPackedColumns; ++column) {
    const uint8_t* const row = panel.row(column);
    int32_t sum = 0;
    for (int64_t k = 0; k < panel.padded_k; ++k) sum += row[k] - 128;
    store(-128 * sum, *dst + column * sizeof sum);
  }
  *dst += kPackedColumns * sizeof(int32_t);
}

const void* row_at(const void* matrix, DType dtype, int64_t row, int64_t k) {
  return static_cast<const uint8_t*>(matrix) + row * k * (dtype_bits(dtype) / 8);
}

}  // namespace

void pack_panel(const CodedPanel& panel, uint8_t* dst) {
  const PackedLayout& layout = panel.layout;
  check_codes(panel);
  pack_codes(panel, dst);
  for (int64_t group = 0; group < layout.num_groups(panel.k); ++group)
    visit_group(panel, Packer{group, dst + layout.scale_offset(panel.k, group)});
  for (int64_t block = 0; block < num_blocks(panel); ++block)
    visit_block(panel, Packer{block, dst + layout.block_offset(block)});
  uint8_t* tail = dst + layout.tail_offset(panel.k);
  if (layout.format == WeightFormat::kInt8) pack_compensation(panel, &tail);
  visit_tail(panel, Packer{0, tail});
}

void unpack_panel(const PackedLayout& layout, int64_t k, const uint8_t* packed, CodedPanel* panel) {
  panel->reset(layout, k);
  unpack_codes(packed, panel);
  for (int64_t group = 0; group < layout.num_groups(k); ++group)
    visit_group(*panel, Unpacker{group, packed + layout.scale_offset(k, group)});
  for (int64_t block = 0; block < num_blocks(*panel); ++block)
    visit_block(*panel, Unpacker{block, packed + layout.block_offset(block)});
  const uint8_t* tail = packed + layout.tail_offset(k);
  if (layout.format == WeightFormat::kInt8) tail += kPackedColumns * sizeof(int32_t);
  visit_tail(*panel, Unpacker{0, tail});
}

void pack_panel(const PackedLayout& layout, int64_t k, const void* codes, const float* scales,
                uint8_t* dst) {
  if (layout.format == WeightFormat::kBFloat16) {
    const int64_t padded_k = layout.padded_k(k);
    return for_each_unit<2>(layout, padded_k, dst, [&](int64_t at, int column, uint8_t* part) {
      const auto* const row = static_cast<const uint16_t*>(codes) + column * padded_k;
      std::memcpy(part + column * 4, row + at, 4);
    });
  }
  CodedPanel panel;
  panel.reset(layout, k);
  const int offset = format_info(layout.format).code_offset;
  const bool is_int4 = layout.format == WeightFormat::kInt4;
  KT_CHECK(is_int4 || layout.format == WeightFormat::kInt8,
           format_name(layout.format) << " weights are packed from unsigned codes");
  const int64_t num_groups = layout.num_groups(k);
  for (int column = 0; column < kPackedColumns; ++column) {
    const int8_t* const row = static_cast<const int8_t*>(codes) + column * panel.padded_k;
    for (int64_t i = 0; i < panel.padded_k; ++i)
      panel.row(column)[i] = static_cast<uint8_t>(row[i] + offset);
    for (int64_t group = 0; group < num_groups; ++group) {
      const float scale = scales[column * num_groups + group];
      panel.scale[group * kPackedColumns + column] =
          is_int4 ? bf16_to_float(float_to_bf16(scale)) : scale;
    }
  }
  pack_panel(panel, dst);
}

void unpack_panel(const PackedLayout& layout, int64_t k, const uint8_t* panel, void* codes,
                  float* scales) {
  if (layout.format == WeightFormat::kBFloat16) {
    const int64_t padded_k = layout.padded_k(k);
    return for_each_unit<2>(layout, padded_k, panel,
                            [&](int64_t at, int column, const uint8_t* part) {
                              auto* const row = static_cast<uint16_t*>(codes) + column * padded_k;
                              std::memcpy(row + at, part + column * 4, 4);
                            });
  }
  KT_CHECK(layout.format == WeightFormat::kInt4 || layout.format == WeightFormat::kInt8,
           format_name(layout.format) << " weights are unpacked to unsigned codes");
  CodedPanel coded;
  unpack_panel(layout, k, panel, &coded);
  const int offset = format_info(layout.format).code_offset;
  const int64_t num_groups = layout.num_groups(k);
  for (int column = 0; column < kPackedColumns; ++column) {
    int8_t* const row = static_cast<int8_t*>(codes) + column * coded.padded_k;
    for (int64_t i = 0; i < coded.padded_k; ++i)
      row[i] = static_cast<int8_t>(coded.row(column)[i] - offset);
    for (int64_t group = 0; group < num_groups; ++group)
      scales[column * num_groups + group] = coded.scale[group * kPackedColumns + column];
  }
}

void dequantize_panel(const PackedLayout& layout, int64_t k, const uint8_t* panel, float* w) {
  if (layout.format == WeightFormat::kBFloat16) {
    return for_each_unit<2>(
        layout, layout.padded_k(k), panel, [&](int64_t at, int column, const uint8_t* part) {
          for (int64_t i = at; i < std::min(k, at + 2); ++i, part += 2)
            w[column * k + i] = bf16_to_float(load<uint16_t>(part + column * 4));
        });
  }
  CodedPanel coded;
  unpack_panel(layout, k, panel, &coded);
  const int rotation = layout.rotation_block(k);
  // a rotation mixes what is behind k with what is before it
  coded.k = coded.padded_k;
  const auto row = std::make_unique_for_overwrite<float[]>(static_cast<size_t>(coded.padded_k));
  for (int column = 0; column < kPackedColumns; ++column) {
    coded_values(coded, column, row.get());
    hadamard_rotate(row.get(), coded.padded_k, rotation);
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
