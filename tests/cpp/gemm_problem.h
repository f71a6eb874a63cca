// What tests of GEMM rows share: made-up panels with activations, a call of a row on them, and what
// the contracts of kernel.h give for them.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <limits>
#include <vector>

#include "base/span.h"
#include "format/packed_layout.h"
#include "format/quantize.h"
#include "kernels/registry.h"
#include "kernels/tiles.h"
#include "panel_values.h"
#include "random_tensors.h"

namespace kt {

constexpr int kColumns = kPanelColumns;
constexpr int kStride = kColumns + 8;  // of c: the 8 columns behind each row must stay as they are
constexpr float kUntouched = 12345.0f;

inline const int kRowCounts[] = {0, 1, 2, 3, 5, 6, 7, 8, 13, 64};
inline const int kDepths[] = {64, 128, 192, 576, 1024};

// One panel with activations, in every form a kernel may ask for.
struct Problem {
  PackedLayout layout;
  int m = 0;
  int k = 0;
  int num_rows = 0;  // of a; at least m
  int group_size = 0;
  int num_groups = 0;
  int a_block = 0;
  int num_blocks = 0;
  LineVector<uint8_t> panel;
  LineVector<uint8_t> a_int8;
  LineVector<uint8_t> a_uint8;
  LineVector<uint16_t> a_bf16;
  PanelValues values;            // groups only
  std::vector<int8_t> w_int8;    // [64, k] int8 with a scale a row only
  std::vector<float> w_scale;    // [64] the same
  std::vector<uint16_t> w_bf16;  // [64, k]; of groups as bf16
  std::vector<float> a_scale;    // [num_rows, a_scale_stride]
  std::vector<int32_t> group_sum;
  std::vector<int32_t> row_idx;  // empty: rows in order

  int64_t row(int i) const { return row_idx.empty() ? i : row_idx[i]; }
  // One more than there are blocks; rows of one scale have them side by side.
  int64_t a_scale_stride() const { return num_blocks == 1 ? 1 : num_blocks + 1; }
  bool is_bf16() const { return takes_bf16_rows(layout.format); }
};

inline int activation_code(Fill fill, RandomNumbers& random, int position) {
  switch (fill) {
    case Fill::kRandom: return random.integer(-127, 127);
    case Fill::kLargest: return 127;
    case Fill::kSmallest: return -127;
    case Fill::kAlternating: return position % 2 == 0 ? -127 : 127;
  }
  return 0;
}

inline void make_activations(Problem* problem, Fill fill, bool gather, RandomNumbers& random) {
  Problem& p = *problem;
  p.num_rows = std::max(1, gather ? p.m + 5 : p.m);
  const int64_t count = int64_t{p.num_rows} * p.k;
  p.a_int8.resize(count);
  p.a_uint8.resize(count);
  p.a_bf16.resize(count);
  p.group_sum.assign(int64_t{p.num_rows} * p.num_groups, 0);
  for (int64_t i = 0; i < count; ++i) {
    const int value = activation_code(fill, random, static_cast<int>(i % p.k / 2));
    p.a_int8[i] = static_cast<uint8_t>(value);
    p.a_uint8[i] = static_cast<uint8_t>(value + 128);
    p.a_bf16[i] = float_to_bf16(random.normal());
    p.group_sum[i / p.k * p.num_groups + i % p.k / p.group_size] += value;
  }
  for (int64_t i = 0; i < p.num_rows * p.a_scale_stride(); ++i)
    p.a_scale.push_back(0.001f + 0.01f * std::fabs(random.normal()));
  if (gather) {
    for (int i = 0; i < p.m; ++i) p.row_idx.push_back(random.integer(0, p.num_rows - 1));
  }
}

// A panel whose last 64 - n columns are padding.
inline void make_panel(Problem* problem, Fill fill, int n, RandomNumbers& random) {
  Problem& p = *problem;
  p.w_bf16.assign(int64_t{kColumns} * p.k, 0);
  if (has_groups(p.layout.format)) {
    p.values = make_panel_values(p.layout, p.k, n, fill, random, ScaleRange::kWide);
    p.panel = p.values.bytes;
    for (int64_t i = 0; i < int64_t{kColumns} * p.k; ++i)
      p.w_bf16[i] = p.values.bf16_value(static_cast<int>(i % p.k), static_cast<int>(i / p.k));
    return;
  }
  p.panel.resize(p.layout.panel_bytes(p.k));
  if (p.is_bf16()) {
    for (int64_t i = 0; i < int64_t{n} * p.k; ++i) p.w_bf16[i] = float_to_bf16(random.normal());
    pack_panel(p.layout, p.k, p.w_bf16.data(), nullptr, p.panel.data());
    return;
  }
  p.w_int8.assign(int64_t{kColumns} * p.k, 0);
  p.w_scale.assign(kColumns, 0.0f);
  const WeightFormatInfo& info = format_info(p.layout.format);
  for (int64_t i = 0; i < int64_t{n} * p.k; ++i)
    p.w_int8[i] = static_cast<int8_t>(fill_code(fill, random, info, static_cast<int>(i)) - 128);
  for (int j = 0; j < n; ++j) p.w_scale[j] = 0.01f * random.normal();
  pack_panel(p.layout, p.k, p.w_int8.data(), p.w_scale.data(), p.panel.data());
}

// The group sizes of a format that make a difference to kernels; 0 is the whole row.
inline std::vector<int> group_sizes_of(WeightFormat format) {
  switch (format_info(format).scales) {
    case ScaleForm::kNone:
    case ScaleForm::kRow: return {0};
    case ScaleForm::kBlock:
    case ScaleForm::kBlockMin: return {16, 32};
    case ScaleForm::kColumn: return {16, 32, 48, 0};
    default: return {32, 64, 96, 128, 192, 0};
  }
}

struct Grouping {
  int group_size;
  bool row_scales;  // of activations; else they have one each block
};

// The groups that a row is for.
inline std::vector<Grouping> groupings_of(const GemmKernel& kernel) {
  std::vector<Grouping> found;
  for (const int group_size : group_sizes_of(kernel.weights)) {
    for (const bool row_scales : {true, false}) {
      // blocks of 64 and 192 are in no way different from those of 96 and 128
      const bool has_blocks = group_size != 0 && group_size != 64 && group_size != 192 &&
                              !takes_bf16_rows(kernel.weights);
      if ((row_scales || has_blocks) && kernel.fits_groups(group_size, row_scales))
        found.push_back({group_size, row_scales});
    }
  }
  return found;
}

inline PackedLayout layout_of(WeightFormat weights, int group_size) {
  return {weights, has_groups(weights) ? group_size : 0, 0};
}

inline Problem make_problem(PackedLayout layout, int m, int k, int n, bool gather, Fill fill,
                            uint64_t seed, bool row_scales = true) {
  RandomNumbers random(seed);
  Problem p;
  p.layout = layout;
  p.m = m;
  p.k = k;
  p.group_size = layout.effective_group_size(k);
  p.num_groups = layout.num_groups(k);
  p.a_block = row_scales ? k : static_cast<int>(layout.activation_block(k));
  p.num_blocks = ceil_div(k, p.a_block);
  make_activations(&p, fill, gather, random);
  make_panel(&p, fill, n, random);
  return p;
}

// Every other row of activations gets the opposite sign.
inline void negate_odd_rows(Problem* problem) {
  Problem& p = *problem;
  for (int64_t i = 0; i < int64_t{p.num_rows} * p.k; ++i) {
    if (i / p.k % 2 == 0) continue;
    const int value = -static_cast<int8_t>(p.a_int8[i]);
    p.a_int8[i] = static_cast<uint8_t>(value);
    p.a_uint8[i] = static_cast<uint8_t>(value + 128);
  }
  for (int row = 1; row < p.num_rows; row += 2) {
    for (int g = 0; g < p.num_groups; ++g) p.group_sum[row * p.num_groups + g] *= -1;
  }
}

// Seven rows under scales of zero, NaN, and from subnormal to large.
inline Problem make_special_scales_problem(WeightFormat weights, Grouping grouping) {
  Problem p = make_problem(layout_of(weights, grouping.group_size), 7, 192, 50, false,
                           Fill::kRandom, 5, grouping.row_scales);
  const float scales[] = {
      0.0f, std::numeric_limits<float>::quiet_NaN(), 0x1p-140f, 0x1p-120f, 1.0f, 0x1p100f, 3.0f};
  const int64_t stride = p.a_scale_stride();
  for (int i = 0; i < 7; ++i) std::fill_n(p.a_scale.begin() + i * stride, stride, scales[i]);
  // A row of scale zero or NaN has codes of zero, as quantize writes them.
  for (int i = 0; i < 2; ++i) {
    std::fill_n(p.a_int8.begin() + i * p.k, p.k, uint8_t{0});
    std::fill_n(p.a_uint8.begin() + i * p.k, p.k, uint8_t{128});
    std::fill_n(p.group_sum.begin() + i * p.num_groups, p.num_groups, 0);
  }
  return p;
}

// Rows 0 .. m - 1 of a problem as the kernel's RowPacking wants them; rows of the last tile that
// are none are large and not zero.
inline LineVector<uint8_t> pack_rows(const GemmKernel& kernel, const Problem& p,
                                     const uint8_t* codes, int64_t code_bytes) {
  const int64_t row_bytes = int64_t{p.k} * kernel.packing->value_bytes;
  LineVector<uint8_t> packed(ceil_div(std::max(p.m, 1), kTileRows) * kTileRows * row_bytes, 0x7b);
  for (int i = 0; i < p.m; ++i) {
    kernel.packing->pack_row(
        codes + p.row(i) * p.k * code_bytes, p.k, p.a_scale.data() + p.row(i) * p.a_scale_stride(),
        p.a_block,
        packed.data() + i / kTileRows * kTileRows * row_bytes + i % kTileRows * kTileBytes);
  }
  return packed;
}

// c [m, kStride] of one kernel; the kernel's own ExpandFn is applied first if it has one, and its
// RowPacking.
inline std::vector<float> run_gemm(const GemmKernel& kernel, const Problem& p) {
  const DType a_dtype = kernel.a_dtype;
  LineVector<uint8_t> scratch;
  const uint8_t* panel = p.panel.data();
  if (kernel.expand != nullptr) {
    scratch.resize(expanded_bytes(p.k, p.num_groups));
    kernel.expand(panel, p.k, p.group_size, scratch.data());
    panel = scratch.data();
  }
  std::vector<float> c(int64_t{std::max(p.m, 1)} * kStride, kUntouched);
  const bool is_bf16 = a_dtype == DType::kBFloat16;
  GemmArgs args = {};
  args.a = is_bf16                    ? static_cast<const void*>(p.a_bf16.data())
           : a_dtype == DType::kUint8 ? static_cast<const void*>(p.a_uint8.data())
                                      : static_cast<const void*>(p.a_int8.data());
  args.a_stride_bytes = int64_t{p.k} * (is_bf16 ? 2 : 1);
  args.row_idx = p.row_idx.empty() ? nullptr : p.row_idx.data();
  args.a_scale = is_bf16 ? nullptr : p.a_scale.data();
  // not read where a row has one scale
  args.a_scale_stride = p.num_blocks == 1 ? int64_t{1} << 40 : p.a_scale_stride();
  args.a_group_sum = has_groups(p.layout.format) && !is_bf16 ? p.group_sum.data() : nullptr;
  args.a_group_sum_stride = p.num_groups;
  args.panel = panel;
  args.next_panel = p.k % 128 == 0 ? p.panel.data() : nullptr;
  args.c = c.data();
  args.c_stride = kStride;
  args.m = p.m;
  args.k = p.k;
  args.group_size = p.group_size;
  args.a_block = p.a_block;
  args.code_offset = format_info(p.layout.format).code_offset;
  LineVector<uint8_t> packed;
  if (kernel.packing != nullptr) {
    packed = pack_rows(kernel, p, static_cast<const uint8_t*>(args.a), is_bf16 ? 2 : 1);
    args.a = packed.data();
    args.a_stride_bytes = 0;
    require_tiles();
  }
  kernel.gemm(args);
  release_tiles();
  return c;
}

inline void expect_only_c_written(const std::vector<float>& c, int m) {
  for (size_t i = 0; i < c.size(); ++i) {
    if (static_cast<int>(i / kStride) < m && i % kStride < kColumns) continue;
    ASSERT_EQ(c[i], kUntouched) << "float " << i << " is outside c [" << m << ", 64]";
  }
}

// One output of groups of integers, by the formula of kernel.h.
inline float group_result(const Problem& p, int64_t row, int j) {
  const PanelValues& v = p.values;
  float acc = 0;
  for (int b = 0; b < p.num_blocks; ++b) {
    float part = 0;
    const int end = std::min((b + 1) * p.a_block, p.k);
    for (int at = b * p.a_block; at < end; at += p.group_size) {
      const int64_t g = v.group_at(at, j);
      int32_t sum = 0;
      for (int k = at; k < std::min(at + p.group_size, end); ++k) {
        const auto a = static_cast<int8_t>(p.a_int8[row * p.k + k]);
        sum += a * (v.codes[int64_t{j} * p.k + k] - v.zero[g]);
      }
      part = std::fma(static_cast<float>(sum), v.scale[g], part);
      if (v.minimum.empty()) continue;
      const int32_t sum_of_a = p.group_sum[row * p.num_groups + at / p.group_size];
      part = std::fma(static_cast<float>(sum_of_a), v.minimum[g], part);
    }
    const float a_scale = p.a_scale[row * p.a_scale_stride() + b];
    acc = b == 0 ? part * a_scale : std::fma(part, a_scale, acc);
  }
  return v.column.empty() ? acc : acc * v.column[j];
}

inline float int8_result(const Problem& p, int64_t row, int j) {
  int32_t sum = 0;
  for (int64_t k = 0; k < p.k; ++k)
    sum += static_cast<int8_t>(p.a_int8[row * p.k + k]) * p.w_int8[int64_t{j} * p.k + k];
  return static_cast<float>(sum) * p.w_scale[j] * p.a_scale[row];
}

// What every row that adds up integers gives, bit for bit.
inline std::vector<float> integer_result(const Problem& p) {
  std::vector<float> c(int64_t{std::max(p.m, 1)} * kStride, kUntouched);
  for (int i = 0; i < p.m; ++i) {
    for (int j = 0; j < kColumns; ++j) {
      c[i * kStride + j] =
          has_groups(p.layout.format) ? group_result(p, p.row(i), j) : int8_result(p, p.row(i), j);
    }
  }
  return c;
}

// What TDPBF16PS does, from the words of Intel's manual: subnormal operands and results are zero.
inline float flush_subnormal(float x) {
  return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x;
}

// One output of products in tiles, 32 k each: even and odd k in sums of their own, one fma each;
// then their sum is added to the output.
inline float tile_dot(const std::vector<float>& a, const std::vector<float>& w) {
  float c = 0;
  for (size_t begin = 0; begin < a.size(); begin += 32) {
    float parts[2] = {0, 0};
    for (size_t k = begin; k < begin + 32; ++k) {
      const float x = flush_subnormal(a[k]), y = flush_subnormal(w[k]);
      parts[k % 2] = flush_subnormal(std::fma(x, y, parts[k % 2]));
    }
    c = flush_subnormal(c + flush_subnormal(parts[0] + parts[1]));
  }
  return c;
}

// What a kernel that multiplies bf16 in tiles gives, bit for bit.
inline std::vector<float> tile_result(const Problem& p) {
  std::vector<float> c(int64_t{std::max(p.m, 1)} * kStride, kUntouched);
  std::vector<float> a(p.k), w(p.k);
  for (int i = 0; i < p.m; ++i) {
    const float* const a_scale = p.a_scale.data() + p.row(i) * p.a_scale_stride();
    for (int k = 0; k < p.k; ++k) {
      const int64_t at = p.row(i) * p.k + k;
      const float code = static_cast<int8_t>(p.a_int8[at]);
      a[k] = p.is_bf16()         ? bf16_to_float(p.a_bf16[at])
             : p.num_blocks == 1 ? code
                                 : bf16_to_float(float_to_bf16(code * a_scale[k / p.a_block]));
    }
    for (int j = 0; j < kColumns; ++j) {
      for (int k = 0; k < p.k; ++k) w[k] = bf16_to_float(p.w_bf16[int64_t{j} * p.k + k]);
      const bool scaled = !p.is_bf16() && p.num_blocks == 1;
      c[i * kStride + j] = tile_dot(a, w) * (scaled ? a_scale[0] : 1.0f);
    }
  }
  return c;
}

// Products of bf16 activations: of weights as bf16, or of fp8 codes and their scales.
inline void expect_matches_exact_sum(const Problem& p, bool weights_are_bf16,
                                     const std::vector<float>& c) {
  // the scale of a group is one more rounding of each product, or of its sum
  const int roundings = weights_are_bf16 ? p.k : p.k + p.num_groups + 2;
  std::vector<double> w(p.k);
  for (int j = 0; j < kColumns; ++j) {
    for (int k = 0; k < p.k; ++k) {
      w[k] =
          weights_are_bf16 ? bf16_to_float(p.w_bf16[int64_t{j} * p.k + k]) : p.values.value(k, j);
    }
    for (int i = 0; i < p.m; ++i) {
      double exact = 0, magnitude = 0, largest = 0;
      for (int k = 0; k < p.k; ++k) {
        const double a = bf16_to_float(p.a_bf16[p.row(i) * p.k + k]);
        exact += a * w[k];
        magnitude += std::fabs(a * w[k]);
        largest = std::max({largest, std::fabs(a), std::fabs(w[k])});
      }
      ASSERT_NEAR(c[i * kStride + j], exact, bf16_gemm_tolerance(roundings, magnitude, largest))
          << "row " << i << " column " << j;
    }
  }
}

inline void expect_correct(const GemmKernel& kernel, const Problem& p) {
  const std::vector<float> c = run_gemm(kernel, p);
  expect_only_c_written(c, p.m);
  if (p.is_bf16()) {
    const bool is_fp8 = has_groups(p.layout.format);
    expect_matches_exact_sum(p, !is_fp8 || kernel.expand != nullptr, c);
  }
  if (kernel.rounds() && kernel.packing == nullptr) return;
  const std::vector<float> expected = kernel.rounds() ? tile_result(p) : integer_result(p);
  const int64_t at = first_difference(c.data(), expected.data(), static_cast<int64_t>(c.size()));
  ASSERT_EQ(at, -1) << "row " << at / kStride << " column " << at % kStride << " is " << c[at]
                    << ", not " << expected[at];
}

// expect_correct() for every depth, number of rows and grouping, with and without gathered rows and
// padding columns.
inline void expect_correct_for_all_shapes(const GemmKernel& kernel) {
  uint64_t seed = 1;
  for (const Grouping& grouping : groupings_of(kernel)) {
    for (int k : kDepths) {
      for (int m : kRowCounts) {
        const bool gather = (++seed % 2) == 0;
        const int n = seed % 3 == 0 ? 64 : 64 - static_cast<int>(seed % 61);
        SCOPED_TRACE(testing::Message()
                     << "m " << m << " k " << k << " n " << n << " group " << grouping.group_size
                     << (gather ? " gathered" : "") << (grouping.row_scales ? "" : ", blocks"));
        expect_correct(kernel, make_problem(layout_of(kernel.weights, grouping.group_size), m, k, n,
                                            gather, Fill::kRandom, seed, grouping.row_scales));
        if (testing::Test::HasFatalFailure()) return;
      }
    }
  }
}

}  // namespace kt
