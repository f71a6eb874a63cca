#include "format/coded_panel.h"

#include <algorithm>
#include <array>

#include "base/check.h"
#include "base/dtype.h"
#include "base/span.h"

namespace kt {
namespace {

// What a group's codes become values by: (x - offset) * scale, or x * scale + minimum.
struct GroupScale {
  float scale = 0;
  float minimum = 0;
  int offset = 0;
};

GroupScale scale_of_group(const CodedPanel& panel, const WeightFormatInfo& info, int64_t group,
                          int column) {
  const int64_t at = group * kPackedColumns + column;
  const int64_t block =
      group * panel.group_size / kSuperBlock * kPackedColumns + column;  // of two-level forms
  switch (info.scales) {
    case ScaleForm::kFp16Zero: return {panel.scale[at], 0, panel.zero[at]};
    case ScaleForm::kFp16Min: return {panel.scale[at], panel.minimum[at], 0};
    case ScaleForm::kBlock:
      return {
          panel.block_scale[block] * static_cast<float>(static_cast<int8_t>(panel.sub_scale[at])),
          0, info.code_offset};
    case ScaleForm::kBlockMin:
      return {panel.block_scale[block] * static_cast<float>(panel.sub_scale[at]),
              -(panel.block_minimum[block] * static_cast<float>(panel.sub_minimum[at])), 0};
    default: return {panel.scale[at], 0, info.code_offset};
  }
}

const std::array<float, 256>& fp8_values() {
  static const std::array<float, 256> values = [] {
    std::array<float, 256> all;
    for (int code = 0; code < 256; ++code) all[code] = fp8_to_float(static_cast<uint8_t>(code));
    return all;
  }();
  return values;
}

}  // namespace

void CodedPanel::reset(const PackedLayout& new_layout, int64_t new_k) {
  layout = new_layout;
  k = new_k;
  padded_k = layout.padded_k(k);
  group_size = layout.effective_group_size(k);
  code_stride = (padded_k / 64 | 1) * 64;
  const WeightFormatInfo& info = format_info(layout.format);
  const ScaleForm form = info.scales;
  KT_CHECK(form != ScaleForm::kNone, info.name << " weights have no codes");
  const auto groups = static_cast<size_t>(layout.num_groups(k) * kPackedColumns);
  const auto blocks = static_cast<size_t>(ceil_div(padded_k, kSuperBlock) * kPackedColumns);
  const bool is_block_min = form == ScaleForm::kBlockMin;
  const bool has_blocks = form == ScaleForm::kBlock || is_block_min;
  // the code of a zero; a table may have none, and then only whole groups are padded
  const int zero_code = info.table == nullptr ? info.code_offset : 0;
  codes.assign(static_cast<size_t>(code_stride * kPackedColumns), static_cast<uint8_t>(zero_code));
  scale.assign(has_blocks ? 0 : groups, 0.0f);
  zero.assign(form == ScaleForm::kFp16Zero ? groups : 0, 0);
  minimum.assign(form == ScaleForm::kFp16Min ? groups : 0, 0.0f);
  sub_scale.assign(has_blocks ? groups : 0, 0);
  sub_minimum.assign(is_block_min ? groups : 0, 0);
  block_scale.assign(has_blocks ? blocks : 0, 0.0f);
  block_minimum.assign(is_block_min ? blocks : 0, 0.0f);
  column_scale.assign(form == ScaleForm::kColumn ? kPackedColumns : 0, 0.0f);
}

void coded_values(const CodedPanel& panel, int column, float* w) {
  const WeightFormatInfo& info = format_info(panel.layout.format);
  const uint8_t* const code = panel.row(column);
  for (int64_t begin = 0, group = 0; begin < panel.k; begin += panel.group_size, ++group) {
    const int64_t end = std::min(panel.k, begin + panel.group_size);
    const GroupScale by = scale_of_group(panel, info, group, column);
    if (info.code == DType::kFp8) {
      const std::array<float, 256>& values = fp8_values();
      for (int64_t i = begin; i < end; ++i) w[i] = values[code[i]] * by.scale;
    } else if (info.table != nullptr) {
      for (int64_t i = begin; i < end; ++i)
        w[i] = static_cast<float>(info.table[code[i] & 15] - by.offset) * by.scale;
    } else {
      for (int64_t i = begin; i < end; ++i)
        w[i] = static_cast<float>(code[i] - by.offset) * by.scale;
    }
    if (!panel.minimum.empty() || !panel.block_minimum.empty()) {
      for (int64_t i = begin; i < end; ++i) w[i] += by.minimum;
    }
  }
  if (panel.column_scale.empty()) return;
  for (int64_t i = 0; i < panel.k; ++i) w[i] *= panel.column_scale[column];
}

}  // namespace kt
