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

#include "format/packed_layout.h"
#include "format/quantize.h"
#include "kernels/registry.h"
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
  std::vector<uint16_t> w_bf16;
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
  if (p.layout.code == DType::kBFloat16) {
    p.w_bf16.assign(int64_t{kColumns} * p.k, 0);
    for (int64_t i = 0; i < int64_t{n} * p.k; ++i) p.w_bf16[i] = float_to_bf16(random.normal());
    pack_panel(p.layout, p.k, p.w_bf16.data(), nullptr, p.panel.data());
    return;
  }
  const int low = p.layout.code == DType::kInt4 ? -8 : -127;
  const int high = p.layout.code == DType::kInt4 ? 7 : 127;
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
}

// The group sizes that make a difference to a kernel; 0 is the whole row.
inline std::vector<int> group_sizes_of(DType weight_dtype) {
  if (weight_dtype != DType::kInt4) return {0};
  return {32, 64, 96, 128, 0};
}

inline PackedLayout layout_of(DType weight_dtype, int group_size) {
  return {weight_dtype, weight_dtype == DType::kInt4 ? group_size : 0, 0};
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
inline Problem make_special_scales_problem(DType weight_dtype, int group_size) {
  Problem p =
      make_problem(layout_of(weight_dtype, group_size), 7, 192, 50, false, Fill::kRandom, 5);
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

// c [m, kStride] of one kernel; the kernel's own ExpandFn is applied first if it has one.
inline std::vector<float> run_gemm(GemmFn gemm, ExpandFn expand, DType a_dtype, const Problem& p) {
  LineVector<uint8_t> scratch;
  const uint8_t* panel = p.panel.data();
  if (expand != nullptr) {
    scratch.resize(int64_t{p.k} * kColumns + int64_t{p.num_groups} * kColumns * 4);
    expand(panel, p.k, p.group_size, scratch.data());
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
  args.a_group_sum = p.layout.code == DType::kInt4 ? p.group_sum.data() : nullptr;
  args.a_group_sum_stride = p.num_groups;
  args.panel = panel;
  args.next_panel = p.k % 128 == 0 ? p.panel.data() : nullptr;
  args.c = c.data();
  args.c_stride = kStride;
  args.m = p.m;
  args.k = p.k;
  args.group_size = p.layout.code == DType::kInt4 ? p.group_size : 0;
  gemm(args);
  return c;
}

inline void expect_only_c_written(const std::vector<float>& c, int m) {
  for (size_t i = 0; i < c.size(); ++i) {
    if (static_cast<int>(i / kStride) < m && i % kStride < kColumns) continue;
    ASSERT_EQ(c[i], kUntouched) << "float " << i << " is outside c [" << m << ", 64]";
  }
}

inline std::vector<float> reference_result(const Problem& p) {
  return p.layout.code == DType::kInt8
             ? run_gemm(gemm_s8_int8_fp32_1x64x4_reference, nullptr, DType::kInt8, p)
             : run_gemm(gemm_s8_int4_fp32_1x64x8_reference, nullptr, DType::kInt8, p);
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
  const std::vector<float> c = run_gemm(kernel.gemm, kernel.expand, kernel.a_dtype, p);
  expect_only_c_written(c, p.m);
  if (p.layout.code == DType::kBFloat16) {
    expect_matches_bf16(p, c);
    return;
  }
  const std::vector<float> expected = reference_result(p);
  const int64_t at = first_difference(c.data(), expected.data(), static_cast<int64_t>(c.size()));
  ASSERT_EQ(at, -1) << "row " << at / kStride << " column " << at % kStride << " is " << c[at]
                    << ", the reference gives " << expected[at];
}

// expect_correct() for every depth, number of rows and group size, with and without gathered rows
// and padding columns.
inline void expect_correct_for_all_shapes(const GemmKernel& kernel) {
  uint64_t seed = 1;
  for (int group_size : group_sizes_of(kernel.weight_dtype)) {
    for (int k : kDepths) {
      for (int m : kRowCounts) {
        const bool gather = (++seed % 2) == 0;
        const int n = seed % 3 == 0 ? 64 : 64 - static_cast<int>(seed % 61);
        SCOPED_TRACE(testing::Message() << "m " << m << " k " << k << " n " << n << " group "
                                        << group_size << (gather ? " gathered" : ""));
        expect_correct(kernel, make_problem(layout_of(kernel.weight_dtype, group_size), m, k, n,
                                            gather, Fill::kRandom, seed));
        if (testing::Test::HasFatalFailure()) return;
      }
    }
  }
}

}  // namespace kt
