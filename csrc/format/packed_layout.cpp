#include "format/packed_layout.h"

#include <algorithm>
#include <string>
#include <string_view>

#include "base/check.h"
#include "base/parsing.h"
#include "base/span.h"

namespace kt {
namespace {

constexpr int kMinRotation = 32;
constexpr int kMaxRotation = 1024;
constexpr int kMaxGroupSize = 65536;
constexpr int kMinActivationBlock = 128;

bool is_two_level(ScaleForm scales) {
  return scales == ScaleForm::kBlock || scales == ScaleForm::kBlockMin;
}

// Why a layout cannot be, or null.
const char* layout_fault(const PackedLayout& layout) {
  const ScaleForm scales = format_info(layout.format).scales;
  if (is_two_level(scales)) {
    if (layout.group_size != 16 && layout.group_size != 32)
      return "the group size of two-level scales is 16 or 32";
  } else if (layout.group_size != 0) {
    if (!has_groups(layout.format)) return "int8 and bf16 have no groups";
    const int unit = scales == ScaleForm::kColumn ? 16 : 32;
    if (layout.group_size < unit || layout.group_size % unit != 0 ||
        layout.group_size > kMaxGroupSize) {
      return "the group size is a multiple of 32 (fp4c: 16), at most 65536";
    }
  }
  if (layout.max_rotation != 0) {
    if (layout.format != WeightFormat::kInt8 && layout.format != WeightFormat::kInt4)
      return "only int8 and int4 are rotated";
    const bool power_of_two = (layout.max_rotation & (layout.max_rotation - 1)) == 0;
    if (layout.max_rotation < kMinRotation || layout.max_rotation > kMaxRotation || !power_of_two) {
      return "the rotation is a power of two from 32 to 1024";
    }
  }
  return nullptr;
}

// Takes the longest name of a format off the front of `text`; null if none stands there.
const WeightFormatInfo* take_format(std::string_view& text) {
  const WeightFormatInfo* found = nullptr;
  size_t length = 0;
  for (const WeightFormatInfo& info : list_weight_formats()) {
    const std::string_view name = info.name;
    if (name.size() <= length || text.substr(0, name.size()) != name) continue;
    found = &info;
    length = name.size();
  }
  text.remove_prefix(length);
  return found;
}

// Bytes of one group's scales, and of what stands before each 256 k.
int64_t scale_bytes(ScaleForm scales) {
  switch (scales) {
    case ScaleForm::kNone:
    case ScaleForm::kRow: return 0;
    case ScaleForm::kBlock: return 1;
    case ScaleForm::kBf16:
    case ScaleForm::kFp16:
    case ScaleForm::kBlockMin:
    case ScaleForm::kColumn: return 2;
    case ScaleForm::kFp16Zero: return 3;
    case ScaleForm::kFp32:
    case ScaleForm::kFp16Min: return 4;
  }
  return 0;
}

int64_t super_block_bytes(ScaleForm scales) {
  if (scales == ScaleForm::kBlock) return 2;
  return scales == ScaleForm::kBlockMin ? 4 : 0;
}

// What stands behind the last group.
int64_t tail_bytes(ScaleForm scales) {
  if (scales == ScaleForm::kRow) return sizeof(int32_t) + sizeof(float);
  return scales == ScaleForm::kColumn ? sizeof(float) : 0;
}

}  // namespace

std::string PackedLayout::name() const {
  const WeightFormatInfo& info = format_info(format);
  const char* const fault = layout_fault(*this);
  KT_CHECK(fault == nullptr, "no layout has the format " << info.name << ", group size "
                                                         << group_size << " and rotation "
                                                         << max_rotation << ": " << fault);
  std::string text = info.name;
  if (group_size != 0) text.append("g").append(std::to_string(group_size));
  text.append("_n64k").append(std::to_string(info.step_k));
  if (max_rotation != 0) text.append("_r").append(std::to_string(max_rotation));
  return text.append("_v1");
}

PackedLayout PackedLayout::parse(const std::string& name) {
  constexpr const char* kKnownForms =
      "; known forms: int8_n64k4_r512_v1, int4g32_n64k8_r512_v1, int4_n64k8_v1 (one scale a row), "
      "bf16_n64k2_v1, int6kg16_n64k16_v1 and the like; the rotation _r512 may be left out";
  PackedLayout layout;
  std::string_view rest = name;
  const WeightFormatInfo* const info = take_format(rest);
  const char* fault = nullptr;
  if (info != nullptr) {
    layout.format = info->format;
    if (take(rest, "g")) layout.group_size = take_number(rest);
    take(rest, "_n64k" + std::to_string(info->step_k));
    if (take(rest, "_r")) layout.max_rotation = take_number(rest);
    fault = layout_fault(layout);
  }
  KT_CHECK(fault == nullptr, "unknown packed layout \"" << name << "\": " << fault << kKnownForms);
  // leading zeros, "g0", "r0", other versions and anything after them do not print back
  KT_CHECK(info != nullptr && layout.name() == name,
           "unknown packed layout \"" << name << "\"" << kKnownForms);
  return layout;
}

int64_t PackedLayout::padded_k(int64_t k) const {
  KT_CHECK(k > 0 && k <= kMaxMatrixSize, "k must be from 1 to " << kMaxMatrixSize << ", got " << k);
  return round_up(k, format == WeightFormat::kBFloat16 ? 32 : 64);
}

int64_t PackedLayout::num_panels(int64_t n) const {
  KT_CHECK(n > 0 && n <= kMaxMatrixSize, "n must be from 1 to " << kMaxMatrixSize << ", got " << n);
  return ceil_div(n, kPackedColumns);
}

int64_t PackedLayout::panel_bytes(int64_t k) const {
  const WeightFormatInfo& info = format_info(format);
  const int64_t padded = padded_k(k);
  const int64_t groups = has_groups(format) ? num_groups(k) : 0;
  return padded * kPackedColumns * dtype_bits(info.code) / 8 +
         kPackedColumns * (groups * scale_bytes(info.scales) +
                           ceil_div(padded, kSuperBlock) * super_block_bytes(info.scales) +
                           tail_bytes(info.scales));
}

int64_t PackedLayout::code_offset(int64_t at) const {
  const WeightFormatInfo& info = format_info(format);
  const int64_t groups = group_size == 0 ? 0 : at / group_size;
  return kPackedColumns * (at * dtype_bits(info.code) / 8 + groups * scale_bytes(info.scales) +
                           (at / kSuperBlock + 1) * super_block_bytes(info.scales));
}

int64_t PackedLayout::scale_offset(int64_t k, int64_t group) const {
  const WeightFormatInfo& info = format_info(format);
  const int64_t end = std::min((group + 1) * effective_group_size(k), padded_k(k));
  return kPackedColumns * (end * dtype_bits(info.code) / 8 + group * scale_bytes(info.scales) +
                           ceil_div(end, kSuperBlock) * super_block_bytes(info.scales));
}

int64_t PackedLayout::block_offset(int64_t block) const {
  const int64_t header = super_block_bytes(format_info(format).scales);
  return code_offset(block * kSuperBlock) - kPackedColumns * header;
}

int64_t PackedLayout::tail_offset(int64_t k) const {
  return panel_bytes(k) - kPackedColumns * tail_bytes(format_info(format).scales);
}

int64_t PackedLayout::matrix_bytes(int64_t n, int64_t k) const {
  return num_panels(n) * panel_bytes(k);
}

int PackedLayout::num_groups(int64_t k) const {
  return static_cast<int>(ceil_div(padded_k(k), effective_group_size(k)));
}

int PackedLayout::effective_group_size(int64_t k) const {
  const int64_t whole_row = padded_k(k);
  return static_cast<int>(group_size == 0 ? whole_row : std::min<int64_t>(group_size, whole_row));
}

int PackedLayout::rotation_block(int64_t k) const {
  const int64_t row = padded_k(k);
  return static_cast<int>(std::min<int64_t>(row & -row, max_rotation));
}

bool PackedLayout::has_row_scales() const {
  return max_rotation != 0 || group_size == 0 || takes_bf16_rows(format);
}

int64_t PackedLayout::activation_block(int64_t k) const {
  const int64_t row = padded_k(k);
  if (has_row_scales()) return row;
  int64_t block = group_size;
  while (block < kMinActivationBlock || block % 64 != 0) block += group_size;
  return std::min(block, row);
}

int PackedLayout::num_activation_blocks(int64_t k) const {
  return static_cast<int>(ceil_div(padded_k(k), activation_block(k)));
}

}  // namespace kt
