#include "format/packed_layout.h"

#include <algorithm>
#include <charconv>
#include <string>
#include <string_view>

#include "base/check.h"
#include "base/span.h"

namespace kt {
namespace {

constexpr int kMinRotation = 32;
constexpr int kMaxRotation = 1024;
constexpr int kMaxGroupSize = 65536;
// Largest n and k: sizes in bytes (n * k * 2) stay below 2^63 and groups of k are ints.
constexpr int64_t kMaxSize = int64_t{1} << 30;

// Takes `prefix` off the front of `text` if it stands there.
bool take(std::string_view& text, std::string_view prefix) {
  if (text.substr(0, prefix.size()) != prefix) return false;
  text.remove_prefix(prefix.size());
  return true;
}

// Takes a decimal number off the front of `text`; -1 if none stands there or it does not fit.
int take_number(std::string_view& text) {
  int value = -1;
  const auto result = std::from_chars(text.data(), text.data() + text.size(), value);
  if (result.ec != std::errc() || value < 0) return -1;
  text.remove_prefix(static_cast<size_t>(result.ptr - text.data()));
  return value;
}

// Why a layout cannot be, or null.
const char* layout_fault(const PackedLayout& layout) {
  if (layout.code != DType::kInt8 && layout.code != DType::kInt4 &&
      layout.code != DType::kBFloat16) {
    return "codes are int8, int4 or bf16";
  }
  if (layout.group_size != 0) {
    if (layout.code != DType::kInt4) return "only int4 has groups";
    if (layout.group_size < 32 || layout.group_size % 32 != 0 ||
        layout.group_size > kMaxGroupSize) {
      return "the group size is a multiple of 32, at most 65536";
    }
  }
  if (layout.max_rotation != 0) {
    if (layout.code == DType::kBFloat16) return "bf16 is not rotated";
    const bool power_of_two = (layout.max_rotation & (layout.max_rotation - 1)) == 0;
    if (layout.max_rotation < kMinRotation || layout.max_rotation > kMaxRotation || !power_of_two) {
      return "the rotation is a power of two from 32 to 1024";
    }
  }
  return nullptr;
}

}  // namespace

std::string PackedLayout::name() const {
  const char* const fault = layout_fault(*this);
  KT_CHECK(fault == nullptr, "no layout has code " << dtype_name(code) << ", group size "
                                                   << group_size << " and rotation " << max_rotation
                                                   << ": " << fault);
  std::string text = dtype_name(code);
  if (group_size != 0) text.append("g").append(std::to_string(group_size));
  if (code == DType::kInt8) text += "_n64k4";
  if (code == DType::kInt4) text += "_n64k8";
  if (code == DType::kBFloat16) text += "_n64k2";
  if (max_rotation != 0) text.append("_r").append(std::to_string(max_rotation));
  return text.append("_v1");
}

PackedLayout PackedLayout::parse(const std::string& name) {
  constexpr const char* kKnownForms =
      "; known forms: int8_n64k4_r512_v1, int4g32_n64k8_r512_v1, int4_n64k8_v1 (one scale a row), "
      "bf16_n64k2_v1; the rotation _r512 may be left out";
  PackedLayout layout;
  std::string_view rest = name;
  bool known = true;
  if (take(rest, "int8")) {
    layout.code = DType::kInt8;
    known = take(rest, "_n64k4");
  } else if (take(rest, "int4")) {
    layout.code = DType::kInt4;
    if (take(rest, "g")) layout.group_size = take_number(rest);
    known = take(rest, "_n64k8");
  } else if (take(rest, "bf16")) {
    layout.code = DType::kBFloat16;
    known = take(rest, "_n64k2");
  } else {
    known = false;
  }
  if (known && take(rest, "_r")) layout.max_rotation = take_number(rest);
  const char* const fault = known ? layout_fault(layout) : nullptr;
  KT_CHECK(fault == nullptr, "unknown packed layout \"" << name << "\": " << fault << kKnownForms);
  // leading zeros, "g0", "r0", other versions and anything after them do not print back
  KT_CHECK(known && layout.name() == name,
           "unknown packed layout \"" << name << "\"" << kKnownForms);
  return layout;
}

int64_t PackedLayout::padded_k(int64_t k) const {
  KT_CHECK(k > 0 && k <= kMaxSize, "k must be from 1 to " << kMaxSize << ", got " << k);
  return round_up(k, code == DType::kBFloat16 ? 32 : 64);
}

int64_t PackedLayout::num_panels(int64_t n) const {
  KT_CHECK(n > 0 && n <= kMaxSize, "n must be from 1 to " << kMaxSize << ", got " << n);
  return ceil_div(n, kPackedColumns);
}

int64_t PackedLayout::panel_bytes(int64_t k) const {
  const int64_t columns = padded_k(k) * kPackedColumns;
  switch (code) {
    case DType::kInt8: return columns + kPackedColumns * int64_t{sizeof(int32_t) + sizeof(float)};
    case DType::kInt4:
      return columns / 2 + num_groups(k) * kPackedColumns * int64_t{sizeof(uint16_t)};
    case DType::kBFloat16: return columns * int64_t{sizeof(uint16_t)};
    default: break;
  }
  throw Error(std::string("no packed layout has codes of ") + dtype_name(code), __FILE__, __LINE__);
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

}  // namespace kt
