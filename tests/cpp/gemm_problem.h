// What tests of GEMM rows share: made-up panels with activations, a call of a row on them, and the
// comparison with the reference row of the same contract.
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
#include "random_tensors.h"

namespace kt {

void gemm_s8_int8_fp32_1x64x4_reference(const GemmArgs& args);
void gemm_s8_int4_fp32_1x64x8_reference(const GemmArgs& args);

constexpr int kColumns = kPanelColumns;
constexpr int kStride = kColumns + 8;  // of c: the 8 columns behind each row must stay as they are
constexpr float kUntouched = 12345.0f;

inline const int kRowCounts[] = {0, 1, 2, 3, 5, 6, 7, 8, 13, 64};
inline const int kDepths[] = {64, 128, 192, 576, 1024};

enum class Fill { kRandom, kLargest, kSmallest, kAlternating };

// One panel with activations, in every form a kernel may ask for.
struct Problem {
  PackedLayout layout;
  int m = 0;
  int k = 0;
  int num_rows = 0;  // of a; at least m
  int group_size = 0;
  int num_groups = 0;
  LineVector<uint8_t> panel;
  LineVector<uint8_t> a_int8;
  LineVector<uint8_t> a_uint8;
  LineVector<uint16_t> a_bf16;
  std::vector<uint16_t> w_bf16;  // [64, k]; of int4: code * scale, rounded
  std::vector<float> a_scale;
  std::vector<int32_t> group_sum;
  std::vector<int32_t> row_idx;  // empty: rows in order

  int64_t row(int i) const { return row_idx.empty() ? i : row_idx[i]; }
};

// One code in [low, high].
inline int fill_code(Fill fill, RandomNumbers& random, int low, int high, int position) {
  switch (fill) {
    case Fill::kRandom: return random.integer(low, high);
    case Fill::kLargest: return high;
    case Fill::kSmallest: return low;
    case Fill::kAlternating: return position % 2 == 0 ? low : high;
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
    const int value = fill_code(fill, random, -127, 127, static_cast<int>(i % p.k / 2));
    p.a_int8[i] = static_cast<uint8_t>(value);
    p.a_uint8[i] = static_cast<uint8_t>(value + 128);
    p.a_bf16[i] = float_to_bf16(random.normal());
    p.group_sum[i / p.k * p.num_groups + i % p.k / p.group_size] += value;
  }
  for (int i = 0; i < p.num_rows; ++i)
    p.a_scale.push_back(0.001f + 0.01f * std::fabs(random.normal()));
  if (gather) {
    for (int i = 0; i < p.m; ++i) p.row_idx.push_back(random.integer(0, p.num_rows - 1));
  }
}

// A panel whose last 64 - n columns are padding.
inline void make_panel(Problem* problem, Fill fill, int n, RandomNumbers& random) {
  Problem& p = *problem;
  p.panel.resize(p.layout.panel_bytes(p.k));
  if (p.layout.format == WeightFormat::kBFloat16) {
    p.w_bf16.assign(int64_t{kColumns} * p.k, 0);
    for (int64_t i = 0; i < int64_t{n} * p.k; ++i) p.w_bf16[i] = float_to_bf16(random.normal());
    pack_panel(p.layout, p.k, p.w_bf16.data(), nullptr, p.panel.data());
    return;
  }
  const int low = p.layout.format == WeightFormat::kInt4 ? -8 : -127;
  const int high = p.layout.format == WeightFormat::kInt4 ? 7 : 127;
  std::vector<int8_t> codes(int64_t{kColumns} * p.k, 0);
  std::vector<float> scales(int64_t{kColumns} * p.num_groups, 0.0f);
  for (int64_t i = 0; i < int64_t{n} * p.k; ++i) {
    codes[i] = static_cast<int8_t>(fill_code(fill, random, low, high, static_cast<int>(i % p.k)));
  }
  for (int64_t i = 0; i < int64_t{n} * p.num_groups; ++i) {
    // int4 scales are stored as bf16 and may be negative.
    scales[i] = bf16_to_float(float_to_bf16(0.01f * random.normal()));
  }
  pack_panel(p.layout, p.k, codes.data(), scales.data(), p.panel.data());
  p.w_bf16.resize(codes.size());
  for (int64_t i = 0; i < int64_t{kColumns} * p.k; ++i) {
    const float scale = scales[i / p.k * p.num_groups + i % p.k / p.group_size];
    p.w_bf16[i] = float_to_bf16(static_cast<float>(codes[i]) * scale);
  }
}

// The group sizes that make a difference to a kernel and that it is for; 0 is the whole row.
inline std::vector<int> group_sizes_of(const GemmKernel& kernel) {
  if (kernel.weights != WeightFormat::kInt4) return {0};
  if (kernel.groups == Groups::kWide) return {128, 192, 0};
  if (kernel.groups == Groups::kNarrow) return {32, 64, 96};
  return {32, 64, 96, 128, 0};
}

inline PackedLayout layout_of(WeightFormat weights, int group_size) {
  return {weights, weights == WeightFormat::kInt4 ? group_size : 0, 0};
}

inline Problem make_problem(PackedLayout layout, int m, int k, int n, bool gather, Fill fill,
                            uint64_t seed) {
  RandomNumbers random(seed);
  Problem p;
  p.layout = layout;
  p.m = m;
  p.k = k;
  p.group_size = std::min<int>(layout.effective_group_size(k), k);
  p.num_groups = layout.num_groups(k);
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
inline Problem make_special_scales_problem(WeightFormat weights, int group_size) {
  Problem p = make_problem(layout_of(weights, group_size), 7, 192, 50, false, Fill::kRandom, 5);
  const float scales[] = {
      0.0f, std::numeric_limits<float>::quiet_NaN(), 0x1p-140f, 0x1p-120f, 1.0f, 0x1p100f, 3.0f};
  std::copy(std::begin(scales), std::end(scales), p.a_scale.begin());
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
        codes + p.row(i) * p.k * code_bytes, p.k,
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
    scratch.resize(int64_t{p.k} * kColumns * 2 + int64_t{p.num_groups} * kColumns * 4);
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
  args.a_group_sum = p.layout.format == WeightFormat::kInt4 ? p.group_sum.data() : nullptr;
  args.a_group_sum_stride = p.num_groups;
  args.panel = panel;
  args.next_panel = p.k % 128 == 0 ? p.panel.data() : nullptr;
  args.c = c.data();
  args.c_stride = kStride;
  args.m = p.m;
  args.k = p.k;
  args.group_size = p.layout.format == WeightFormat::kInt4 ? p.group_size : 0;
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

inline std::vector<float> run_gemm(GemmFn gemm, DType a_dtype, const Problem& p) {
  GemmKernel kernel{};
  kernel.a_dtype = a_dtype;
  kernel.gemm = gemm;
  return run_gemm(kernel, p);
}

inline void expect_only_c_written(const std::vector<float>& c, int m) {
  for (size_t i = 0; i < c.size(); ++i) {
    if (static_cast<int>(i / kStride) < m && i % kStride < kColumns) continue;
    ASSERT_EQ(c[i], kUntouched) << "float " << i << " is outside c [" << m << ", 64]";
  }
}

inline std::vector<float> reference_result(const Problem& p) {
  return p.layout.format == WeightFormat::kInt8
             ? run_gemm(gemm_s8_int8_fp32_1x64x4_reference, DType::kInt8, p)
             : run_gemm(gemm_s8_int4_fp32_1x64x8_reference, DType::kInt8, p);
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
  const bool is_int4 = p.layout.format == WeightFormat::kInt4;
  std::vector<float> c(int64_t{std::max(p.m, 1)} * kStride, kUntouched);
  std::vector<float> a(p.k), w(p.k);
  for (int i = 0; i < p.m; ++i) {
    for (int k = 0; k < p.k; ++k) {
      const int64_t at = p.row(i) * p.k + k;
      a[k] = is_int4 ? static_cast<int8_t>(p.a_int8[at]) : bf16_to_float(p.a_bf16[at]);
    }
    for (int j = 0; j < kColumns; ++j) {
      for (int k = 0; k < p.k; ++k) w[k] = bf16_to_float(p.w_bf16[int64_t{j} * p.k + k]);
      c[i * kStride + j] = tile_dot(a, w) * (is_int4 ? p.a_scale[p.row(i)] : 1.0f);
    }
  }
  return c;
}

inline void expect_matches_bf16(const Problem& p, const std::vector<float>& c) {
  for (int i = 0; i < p.m; ++i) {
    for (int j = 0; j < kColumns; ++j) {
      double exact = 0, magnitude = 0, largest = 0;
      for (int k = 0; k < p.k; ++k) {
        const double a = bf16_to_float(p.a_bf16[p.row(i) * p.k + k]);
        const double w = bf16_to_float(p.w_bf16[int64_t{j} * p.k + k]);
        exact += a * w;
        magnitude += std::fabs(a * w);
        largest = std::max({largest, std::fabs(a), std::fabs(w)});
      }
      ASSERT_NEAR(c[i * kStride + j], exact, bf16_gemm_tolerance(p.k, magnitude, largest))
          << "row " << i << " column " << j;
    }
  }
}

inline void expect_correct(const GemmKernel& kernel, const Problem& p) {
  const std::vector<float> c = run_gemm(kernel, p);
  expect_only_c_written(c, p.m);
  if (p.layout.format == WeightFormat::kBFloat16) expect_matches_bf16(p, c);
  if (kernel.rounds() && kernel.packing == nullptr) return;
  const std::vector<float> expected = kernel.rounds() ? tile_result(p) : reference_result(p);
  const int64_t at = first_difference(c.data(), expected.data(), static_cast<int64_t>(c.size()));
  ASSERT_EQ(at, -1) << "row " << at / kStride << " column " << at % kStride << " is " << c[at]
                    << ", the reference gives " << expected[at];
}

// expect_correct() for every depth, number of rows and group size, with and without gathered rows
// and padding columns.
inline void expect_correct_for_all_shapes(const GemmKernel& kernel) {
  uint64_t seed = 1;
  for (int group_size : group_sizes_of(kernel)) {
    for (int k : kDepths) {
      for (int m : kRowCounts) {
        const bool gather = (++seed % 2) == 0;
        const int n = seed % 3 == 0 ? 64 : 64 - static_cast<int>(seed % 61);
        SCOPED_TRACE(testing::Message() << "m " << m << " k " << k << " n " << n << " group "
                                        << group_size << (gather ? " gathered" : ""));
        expect_correct(kernel, make_problem(layout_of(kernel.weights, group_size), m, k, n, gather,
                                            Fill::kRandom, seed));
        if (testing::Test::HasFatalFailure()) return;
      }
    }
  }
}

}  // namespace kt
