// The scalar truth of every product, on plain x86-64: one reader of packed panels, one of expanded
// ones, and one sum over either. Written to be read, not to be fast.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "base/dtype.h"
#include "base/weight_format.h"
#include "kernels/kernel.h"

namespace kt {
namespace {

constexpr int kColumns = kPanelColumns;
constexpr int kStep = 4 * kColumns;  // bytes of four lines

int64_t source_row(const GemmArgs& args, int i) {
  return args.row_idx != nullptr ? args.row_idx[i] : i;
}

template <typename Element>
const Element* activation_row(const GemmArgs& args, int64_t row) {
  const auto* bytes = static_cast<const uint8_t*>(args.a) + row * args.a_stride_bytes;
  return reinterpret_cast<const Element*>(bytes);
}

template <typename Value>
Value value_at(const uint8_t* source, int64_t index) {
  Value value;
  std::memcpy(&value, source + index * static_cast<int64_t>(sizeof value), sizeof value);
  return value;
}

float bf16_at(const uint8_t* source, int64_t index) {
  return bf16_to_float(value_at<uint16_t>(source, index));
}

float fp16_at(const uint8_t* source, int64_t index) {
  return fp16_to_float(value_at<uint16_t>(source, index));
}

// ---- codes: `codes` are those of a group, k counts from its begin ----

int low_bits4(const uint8_t* lines, int k, int column) {
  const int byte = lines[column * 4 + k % 4];
  return k % 8 < 4 ? byte & 15 : byte >> 4;
}

int two_bits(const uint8_t* lines, int k, int column) {
  return lines[column * 4 + k % 4] >> (k % 16 / 4 * 2) & 3;
}

// One bit of k: 16 columns have `words` uint64, of 4 k each.
int one_bit(const uint8_t* lines, int words, int k, int column) {
  const auto word = value_at<uint64_t>(lines, column / 16 * words + k / 4 % words);
  return static_cast<int>(word >> (column % 16 * 4 + k % 4) & 1);
}

// The unsigned code; of fp8 its byte.
int unsigned_code(DType type, const uint8_t* codes, int k, int column) {
  const uint8_t* step;
  switch (type) {
    case DType::kInt8: return (codes[k / 4 * kStep + column * 4 + k % 4] + 128) % 256;
    case DType::kFp8:
      return codes[k / 4 * kStep + column / 4 * 16 + k % 4 / 2 * 8 + column % 4 * 2 + k % 2];
    case DType::kInt6:
      step = codes + k / 16 * 3 * kStep;
      return low_bits4(step + k % 16 / 8 * kStep, k, column) +
             16 * two_bits(step + 2 * kStep, k, column);
    case DType::kInt5:
      step = codes + k / 8 * (kStep + 64);
      return low_bits4(step, k, column) + 16 * one_bit(step + kStep, 2, k, column);
    case DType::kInt3:
      step = codes + k / 16 * (kStep + 128);
      return two_bits(step, k, column) + 4 * one_bit(step + kStep, 4, k, column);
    case DType::kInt2: return two_bits(codes + k / 16 * kStep, k, column);
    default: return low_bits4(codes + k / 8 * kStep, k, column);  // int4, fp4, iq4
  }
}

// ---- panels ----

int bytes_of_scales(ScaleForm scales) {
  switch (scales) {
    case ScaleForm::kBlock: return 1;
    case ScaleForm::kFp16Zero: return 3;
    case ScaleForm::kFp32:
    case ScaleForm::kFp16Min: return 4;
    default: return 2;
  }
}

// A packed panel of groups.
class PackedPanel {
 public:
  PackedPanel(const WeightFormatInfo& info, const uint8_t* panel, int k, int group_size)
      : info_(info), panel_(panel), k_(k), group_size_(group_size) {
    if (info.scales == ScaleForm::kBlock) head_bytes_ = 2;
    if (info.scales == ScaleForm::kBlockMin) head_bytes_ = 4;
  }

  int code(int k, int column) const {
    const int group = k / group_size_;
    const int code =
        unsigned_code(info_.code, panel_ + codes_at(group), k - group * group_size_, column);
    return info_.table != nullptr ? info_.table[code] : code;
  }
  int zero(int group, int column) const {
    if (info_.scales != ScaleForm::kFp16Zero) return info_.code_offset;
    return scales(group)[2 * kColumns + column];
  }
  float scale(int group, int column) const {
    const uint8_t* const source = scales(group);
    switch (info_.scales) {
      case ScaleForm::kBf16:
      case ScaleForm::kColumn: return bf16_at(source, column);
      case ScaleForm::kFp32: return value_at<float>(source, column);
      case ScaleForm::kBlock:
        return fp16_at(head(group), column) * static_cast<float>(value_at<int8_t>(source, column));
      case ScaleForm::kBlockMin:
        return fp16_at(head(group), column) * static_cast<float>(source[column]);
      default: return fp16_at(source, column);
    }
  }
  bool has_minimum() const {
    return info_.scales == ScaleForm::kFp16Min || info_.scales == ScaleForm::kBlockMin;
  }
  float minimum(int group, int column) const {
    const uint8_t* const source = scales(group);
    if (info_.scales == ScaleForm::kFp16Min) return fp16_at(source, kColumns + column);
    return -(fp16_at(head(group), kColumns + column) *
             static_cast<float>(source[kColumns + column]));
  }
  bool has_column_scale() const { return info_.scales == ScaleForm::kColumn; }
  float column_scale(int column) const {
    return value_at<float>(panel_ + codes_at((k_ + group_size_ - 1) / group_size_), column);
  }

 private:
  int64_t code_bytes(int64_t k) const { return k * kColumns * dtype_bits(info_.code) / 8; }
  // Heads stand before each 256 k; groups of those formats end there.
  int64_t num_heads(int64_t k) const { return head_bytes_ == 0 ? 0 : k / kSuperBlock + 1; }
  int64_t begin(int group) const { return std::min<int64_t>(int64_t{group} * group_size_, k_); }
  int64_t codes_at(int group) const {
    return code_bytes(begin(group)) + kColumns * (int64_t{group} * bytes_of_scales(info_.scales) +
                                                  num_heads(begin(group)) * head_bytes_);
  }
  const uint8_t* scales(int group) const {
    return panel_ + codes_at(group) + code_bytes(begin(group + 1) - begin(group));
  }
  const uint8_t* head(int group) const {
    const int first = static_cast<int>(begin(group) / kSuperBlock * kSuperBlock / group_size_);
    return panel_ + codes_at(first) - head_bytes_ * kColumns;
  }

  const WeightFormatInfo& info_;
  const uint8_t* panel_;
  int k_;
  int group_size_;
  int head_bytes_ = 0;
};

// What expand() made of one.
class ExpandedPanel {
 public:
  ExpandedPanel(const WeightFormatInfo& info, const GemmArgs& args)
      : info_(info),
        offset_(args.code_offset),
        codes_(args.panel),
        scales_(codes_ + int64_t{args.k} * kColumns),
        more_(scales_ + (args.k + args.group_size - 1) / args.group_size * kStep) {}

  int code(int k, int column) const { return codes_[k / 4 * kStep + column * 4 + k % 4]; }
  int zero(int group, int column) const {
    if (info_.scales != ScaleForm::kFp16Zero) return offset_;
    return value_at<int32_t>(more_, group * kColumns + column);
  }
  float scale(int group, int column) const {
    return value_at<float>(scales_, group * kColumns + column);
  }
  bool has_minimum() const {
    return info_.scales == ScaleForm::kFp16Min || info_.scales == ScaleForm::kBlockMin;
  }
  float minimum(int group, int column) const {
    return value_at<float>(more_, group * kColumns + column);
  }
  bool has_column_scale() const { return info_.scales == ScaleForm::kColumn; }
  float column_scale(int column) const { return value_at<float>(more_, column); }

 private:
  const WeightFormatInfo& info_;
  int offset_;
  const uint8_t* codes_;
  const uint8_t* scales_;
  const uint8_t* more_;  // zeros, minima or the scales of columns
};

// ---- sums ----

// One output before the column's scale. codes: those of the column.
template <typename Panel>
float sum_groups(const GemmArgs& args, const Panel& panel, const uint8_t* codes, int64_t row,
                 int column) {
  const auto* const a = activation_row<int8_t>(args, row);
  const float* const a_scale =
      args.a_scale + row * (args.a_block < args.k ? args.a_scale_stride : 1);
  float acc = 0.0f;
  for (int block = 0, begin = 0; begin < args.k; begin += args.a_block, ++block) {
    const int end = std::min(begin + args.a_block, args.k);
    float part = 0.0f;
    for (int at = begin; at < end; at += args.group_size) {
      const int group = at / args.group_size;
      const int zero = panel.zero(group, column);
      int32_t sum = 0, sum_of_a = 0;
      for (int k = at; k < std::min(at + args.group_size, end); ++k) {
        sum += a[k] * (codes[k] - zero);
        sum_of_a += a[k];
      }
      part = std::fma(static_cast<float>(sum), panel.scale(group, column), part);
      if (panel.has_minimum())
        part = std::fma(static_cast<float>(sum_of_a), panel.minimum(group, column), part);
    }
    acc = block == 0 ? part * a_scale[0] : std::fma(part, a_scale[block], acc);
  }
  return acc;
}

template <typename Panel>
void multiply_groups(const GemmArgs& args, const Panel& panel) {
  uint8_t codes[kMaxIntegerK];
  for (int j = 0; j < kColumns; ++j) {
    for (int k = 0; k < args.k; ++k) codes[k] = static_cast<uint8_t>(panel.code(k, j));
    for (int i = 0; i < args.m; ++i) {
      const float sum = sum_groups(args, panel, codes, source_row(args, i), j);
      args.c[i * args.c_stride + j] = panel.has_column_scale() ? sum * panel.column_scale(j) : sum;
    }
  }
}

void multiply_packed(WeightFormat format, const GemmArgs& args) {
  multiply_groups(args, PackedPanel(format_info(format), args.panel, args.k, args.group_size));
}

void multiply_expanded(WeightFormat format, const GemmArgs& args) {
  multiply_groups(args, ExpandedPanel(format_info(format), args));
}

void expand(WeightFormat format, const uint8_t* source, int32_t k, int32_t group_size,
            uint8_t* scratch) {
  const WeightFormatInfo& info = format_info(format);
  const PackedPanel panel(info, source, k, group_size);
  const int num_groups = (k + group_size - 1) / group_size;
  uint8_t* const scales = scratch + int64_t{k} * kColumns;
  uint8_t* const more = scales + num_groups * kStep;
  for (int j = 0; j < kColumns; ++j) {
    for (int at = 0; at < k; ++at)
      scratch[at / 4 * kStep + j * 4 + at % 4] = static_cast<uint8_t>(panel.code(at, j));
    const auto put = [j](uint8_t* table, int group, auto value) {
      std::memcpy(table + (group * kColumns + j) * 4, &value, 4);
    };
    for (int g = 0; g < num_groups; ++g) {
      put(scales, g, panel.scale(g, j));
      if (info.scales == ScaleForm::kFp16Zero) put(more, g, int32_t{panel.zero(g, j)});
      if (panel.has_minimum()) put(more, g, panel.minimum(g, j));
    }
    if (panel.has_column_scale()) put(more, 0, panel.column_scale(j));
  }
}

// fp8: the products of a group are summed, then scaled.
void multiply_fp8(WeightFormat format, const GemmArgs& args) {
  const PackedPanel panel(format_info(format), args.panel, args.k, args.group_size);
  for (int i = 0; i < args.m; ++i) {
    const auto* a = activation_row<uint16_t>(args, source_row(args, i));
    for (int j = 0; j < kColumns; ++j) {
      float acc = 0.0f;
      for (int group = 0, begin = 0; begin < args.k; begin += args.group_size, ++group) {
        float sum = 0.0f;
        for (int k = begin; k < std::min(begin + args.group_size, args.k); ++k)
          sum += bf16_to_float(a[k]) * fp8_to_float(static_cast<uint8_t>(panel.code(k, j)));
        acc = std::fma(sum, panel.scale(group, j), acc);
      }
      args.c[i * args.c_stride + j] = acc;
    }
  }
}

void expand_fp8(WeightFormat format, const uint8_t* source, int32_t k, int32_t group_size,
                uint8_t* scratch) {
  const PackedPanel panel(format_info(format), source, k, group_size);
  for (int j = 0; j < kColumns; ++j) {
    for (int at = 0; at < k; ++at) {
      const float code = fp8_to_float(static_cast<uint8_t>(panel.code(at, j)));
      const uint16_t value = float_to_bf16(code * panel.scale(at / group_size, j));
      std::memcpy(scratch + at / 2 * kStep + j * 4 + at % 2 * 2, &value, sizeof value);
    }
  }
}

// A product of two bf16 values is exact in fp32 (16 bits of mantissa), so this rounds as an fma
// does.
void multiply_bf16(const GemmArgs& args) {
  for (int i = 0; i < args.m; ++i) {
    const auto* a = activation_row<uint16_t>(args, source_row(args, i));
    for (int j = 0; j < kColumns; ++j) {
      float acc = 0.0f;
      for (int k = 0; k < args.k; ++k)
        acc += bf16_to_float(a[k]) * bf16_at(args.panel, (k / 2 * kColumns + j) * 2 + k % 2);
      args.c[i * args.c_stride + j] = acc;
    }
  }
}

}  // namespace

void gemm_s8_int8_fp32_1x64x4_reference(const GemmArgs& args) {
  const auto* codes = reinterpret_cast<const int8_t*>(args.panel);
  const uint8_t* scales = args.panel + int64_t{args.k} * kColumns + kColumns * 4;
  for (int i = 0; i < args.m; ++i) {
    const int64_t row = source_row(args, i);
    const auto* a = activation_row<int8_t>(args, row);
    for (int j = 0; j < kColumns; ++j) {
      int32_t sum = 0;
      for (int k = 0; k < args.k; ++k) sum += int32_t{a[k]} * codes[k / 4 * kStep + j * 4 + k % 4];
      args.c[i * args.c_stride + j] =
          (static_cast<float>(sum) * value_at<float>(scales, j)) * args.a_scale[row];
    }
  }
}

void gemm_bf16_bf16_fp32_1x64x2_reference(const GemmArgs& args) { multiply_bf16(args); }

// The rows of a format: packed, expanded, and what expands.
#define KT_INTEGER_FORMAT(name, step, format)                                         \
  void gemm_s8_##name##_fp32_1x64x##step##_reference(const GemmArgs& args) {          \
    multiply_packed(WeightFormat::format, args);                                      \
  }                                                                                   \
  void gemm_s8_##name##x_fp32_1x64x4_reference(const GemmArgs& args) {                \
    multiply_expanded(WeightFormat::format, args);                                    \
  }                                                                                   \
  void expand_##name##_reference(const uint8_t* panel, int32_t k, int32_t group_size, \
                                 uint8_t* scratch) {                                  \
    expand(WeightFormat::format, panel, k, group_size, scratch);                      \
  }
KT_INTEGER_FORMAT(int8h, 4, kInt8H)
KT_INTEGER_FORMAT(int8f, 4, kInt8F)
KT_INTEGER_FORMAT(int6k, 16, kInt6K)
KT_INTEGER_FORMAT(int5h, 8, kInt5H)
KT_INTEGER_FORMAT(int5m, 8, kInt5M)
KT_INTEGER_FORMAT(int5km, 8, kInt5KM)
KT_INTEGER_FORMAT(int4, 8, kInt4)
KT_INTEGER_FORMAT(int4h, 8, kInt4H)
KT_INTEGER_FORMAT(int4f, 8, kInt4F)
KT_INTEGER_FORMAT(int4z, 8, kInt4Z)
KT_INTEGER_FORMAT(int4m, 8, kInt4M)
KT_INTEGER_FORMAT(int4km, 8, kInt4KM)
KT_INTEGER_FORMAT(int3k, 16, kInt3K)
KT_INTEGER_FORMAT(int2km, 16, kInt2KM)
KT_INTEGER_FORMAT(fp4, 8, kFp4)
KT_INTEGER_FORMAT(fp4c, 8, kFp4C)
KT_INTEGER_FORMAT(iq4h, 8, kIq4H)
KT_INTEGER_FORMAT(iq4k, 8, kIq4K)
#undef KT_INTEGER_FORMAT

#define KT_FP8_FORMAT(name, format)                                                             \
  void gemm_bf16_##name##_fp32_1x64x4_reference(const GemmArgs& args) {                         \
    multiply_fp8(WeightFormat::format, args);                                                   \
  }                                                                                             \
  void gemm_bf16_##name##b_fp32_1x64x2_reference(const GemmArgs& args) { multiply_bf16(args); } \
  void expand_##name##_bf16_reference(const uint8_t* panel, int32_t k, int32_t group_size,      \
                                      uint8_t* scratch) {                                       \
    expand_fp8(WeightFormat::format, panel, k, group_size, scratch);                            \
  }
KT_FP8_FORMAT(fp8, kFp8)
KT_FP8_FORMAT(fp8f, kFp8F)
#undef KT_FP8_FORMAT

}  // namespace kt
