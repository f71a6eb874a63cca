// The scalar truth of every kernel contract, on plain x86-64. Written to be read, not to be fast.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "base/dtype.h"
#include "base/hadamard.h"
#include "kernels/kernel.h"

namespace kt {
namespace {

constexpr int kColumns = kPanelColumns;

int64_t source_row(const GemmArgs& args, int i) {
  return args.row_idx != nullptr ? args.row_idx[i] : i;
}

template <typename Element>
const Element* activation_row(const GemmArgs& args, int64_t row) {
  const auto* bytes = static_cast<const uint8_t*>(args.a) + row * args.a_stride_bytes;
  return reinterpret_cast<const Element*>(bytes);
}

uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

float bits_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Bytes of one full int4 group: its codes, then 64 bf16 scales.
int64_t int4_group_bytes(int group_size) {
  return int64_t{group_size} * kColumns / 2 + kColumns * 2;
}

// Unsigned code (q + 8) of column `column` at the k-th column of its group.
uint32_t int4_code(const uint8_t* group, int k, int column) {
  const uint8_t byte = group[(k / 8 * kColumns + column) * 4 + k % 4];
  return k % 8 < 4 ? byte & 15u : byte >> 4;
}

// Bits of group scale `column`, whose group holds `columns_of_k` codes a column.
uint16_t int4_scale(const uint8_t* group, int columns_of_k, int column) {
  uint16_t bits;
  std::memcpy(&bits, group + int64_t{columns_of_k} * kColumns / 2 + column * 2, sizeof bits);
  return bits;
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
      for (int k = 0; k < args.k; ++k) {
        sum += int32_t{a[k]} * codes[(k / 4 * kColumns + j) * 4 + k % 4];
      }
      float scale;
      std::memcpy(&scale, scales + j * 4, sizeof scale);
      args.c[i * args.c_stride + j] = (static_cast<float>(sum) * scale) * args.a_scale[row];
    }
  }
}

void gemm_s8_int4_fp32_1x64x8_reference(const GemmArgs& args) {
  for (int i = 0; i < args.m; ++i) {
    const int64_t row = source_row(args, i);
    const auto* a = activation_row<int8_t>(args, row);
    for (int j = 0; j < kColumns; ++j) {
      float acc = 0.0f;
      const uint8_t* group = args.panel;
      for (int begin = 0; begin < args.k; begin += args.group_size) {
        const int size = std::min(args.group_size, args.k - begin);
        int32_t sum = 0;
        for (int k = 0; k < size; ++k) {
          sum += int32_t{a[begin + k]} * (static_cast<int32_t>(int4_code(group, k, j)) - 8);
        }
        acc = std::fma(static_cast<float>(sum), bf16_to_float(int4_scale(group, size, j)), acc);
        group += int4_group_bytes(size);
      }
      args.c[i * args.c_stride + j] = acc * args.a_scale[row];
    }
  }
}

void expand_int4_reference(const uint8_t* panel, int32_t k, int32_t group_size, uint8_t* scratch) {
  uint8_t* scales = scratch + int64_t{k} * kColumns;
  const uint8_t* group = panel;
  for (int begin = 0; begin < k; begin += group_size) {
    const int size = std::min(group_size, k - begin);
    for (int j = 0; j < kColumns; ++j) {
      for (int step = 0; step < size; ++step) {
        const int at = begin + step;
        scratch[(at / 4 * kColumns + j) * 4 + at % 4] =
            static_cast<uint8_t>(int4_code(group, step, j));
      }
      const float scale = bf16_to_float(int4_scale(group, size, j));
      std::memcpy(scales + j * 4, &scale, sizeof scale);
    }
    group += int4_group_bytes(size);
    scales += kColumns * 4;
  }
}

void gemm_s8_int4x_fp32_1x64x4_reference(const GemmArgs& args) {
  const uint8_t* scales = args.panel + int64_t{args.k} * kColumns;
  for (int i = 0; i < args.m; ++i) {
    const int64_t row = source_row(args, i);
    const auto* a = activation_row<int8_t>(args, row);
    for (int j = 0; j < kColumns; ++j) {
      float acc = 0.0f;
      for (int begin = 0, g = 0; begin < args.k; begin += args.group_size, ++g) {
        const int end = std::min(begin + args.group_size, args.k);
        int32_t sum = 0;
        for (int k = begin; k < end; ++k) {
          sum += int32_t{a[k]} * (int32_t{args.panel[(k / 4 * kColumns + j) * 4 + k % 4]} - 8);
        }
        float scale;
        std::memcpy(&scale, scales + (g * kColumns + j) * 4, sizeof scale);
        acc = std::fma(static_cast<float>(sum), scale, acc);
      }
      args.c[i * args.c_stride + j] = acc * args.a_scale[row];
    }
  }
}

// A product of two bf16 values is exact in fp32 (16 bits of mantissa), so this rounds as an fma
// does.
void gemm_bf16_bf16_fp32_1x64x2_reference(const GemmArgs& args) {
  const auto* weights = reinterpret_cast<const uint16_t*>(args.panel);
  for (int i = 0; i < args.m; ++i) {
    const auto* a = activation_row<uint16_t>(args, source_row(args, i));
    for (int j = 0; j < kColumns; ++j) {
      float acc = 0.0f;
      for (int k = 0; k < args.k; ++k) {
        acc += bf16_to_float(a[k]) * bf16_to_float(weights[(k / 2 * kColumns + j) * 2 + k % 2]);
      }
      args.c[i * args.c_stride + j] = acc;
    }
  }
}

namespace {

void load_bf16(const uint16_t* src, float* dst, int32_t n, int32_t padded_n) {
  for (int i = 0; i < n; ++i) dst[i] = bf16_to_float(src[i]);
  for (int i = n; i < padded_n; ++i) dst[i] = 0.0f;
}

// vcvtph2ps makes a NaN quiet, so this does too.
void load_fp16(const uint16_t* src, float* dst, int32_t n, int32_t padded_n) {
  for (int i = 0; i < n; ++i) {
    const bool is_nan = (src[i] & 0x7fffu) > 0x7c00u;
    dst[i] = fp16_to_float(static_cast<uint16_t>(is_nan ? src[i] | 0x200u : src[i]));
  }
  for (int i = n; i < padded_n; ++i) dst[i] = 0.0f;
}

void store_bf16(const float* src, uint16_t* dst, int32_t n) {
  for (int i = 0; i < n; ++i) dst[i] = float_to_bf16(src[i]);
}

// vcvtps2ph keeps the upper bits of a NaN's payload, so this does too.
void store_fp16(const float* src, uint16_t* dst, int32_t n) {
  for (int i = 0; i < n; ++i) {
    const uint32_t bits = float_bits(src[i]);
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    const uint32_t nan = ((bits >> 16) & 0x8000u) | 0x7e00u | ((bits >> 13) & 0x3ffu);
    dst[i] = is_nan ? static_cast<uint16_t>(nan) : float_to_fp16(src[i]);
  }
}

void rotate(float* x, int32_t n, int32_t block) { hadamard_rotate(x, n, block); }

void quantize(const float* x, int32_t n, int32_t offset, uint8_t* codes, float* scale,
              int32_t group_size, int32_t* group_sum) {
  constexpr uint32_t kSmallestAmax = 0x0d800000u;  // 2^-100
  constexpr uint32_t kInfinity = 0x7f800000u;
  // For non-negative floats the order of the bits is the order of the values, and NaN is above
  // infinity.
  uint32_t amax_bits = 0;
  for (int i = 0; i < n; ++i) amax_bits = std::max(amax_bits, float_bits(x[i]) & 0x7fffffffu);
  float inverse = 0.0f;
  if (amax_bits < kSmallestAmax) {
    *scale = 0.0f;
  } else if (amax_bits >= kInfinity) {
    *scale = bits_float(0x7fc00000u);
  } else {
    *scale = bits_float(amax_bits) / 127.0f;
    inverse = 127.0f / bits_float(amax_bits);
  }
  const int num_groups = group_sum != nullptr ? (n + group_size - 1) / group_size : 0;
  for (int g = 0; g < num_groups; ++g) group_sum[g] = 0;
  for (int i = 0; i < n; ++i) {
    const int32_t code = inverse != 0.0f ? static_cast<int32_t>(std::lrintf(x[i] * inverse)) : 0;
    codes[i] = static_cast<uint8_t>(code + offset);
    if (group_sum != nullptr) group_sum[i / group_size] += code;
  }
}

// The steps of silu in x86/rowwise.h, one for one.
float silu(float x) {
  float t = -x;
  t = t < -80.0f ? -80.0f : t;
  t = t > 88.0f ? 88.0f : t;
  const float shifted = std::fma(t, 0x1.715476p+0f, 0x1.8p+23f);
  const float power = shifted - 0x1.8p+23f;
  float r = std::fma(power, -0x1.62e400p-1f, t);
  r = std::fma(power, -0x1.7f7d1cp-20f, r);
  float p = 0x1.6c16c2p-10f;
  p = std::fma(p, r, 0x1.111112p-7f);
  p = std::fma(p, r, 0x1.555556p-5f);
  p = std::fma(p, r, 0x1.555556p-3f);
  p = std::fma(p, r, 0.5f);
  p = std::fma(p, r, 1.0f);
  p = std::fma(p, r, 1.0f);
  const float exponential = p * bits_float((float_bits(shifted) + 127u) << 23);
  return x < -88.0f ? 0.0f : x / (1.0f + exponential);
}

void silu_and_mul(const float* gate, const float* up, float* out, int32_t n) {
  for (int i = 0; i < n; ++i) out[i] = silu(gate[i]) * up[i];
}

void add_scaled(const float* x, float weight, float* out, int32_t n) {
  for (int i = 0; i < n; ++i) out[i] = std::fma(weight, x[i], out[i]);
}

}  // namespace

extern const RowwiseOps rowwise_reference;
const RowwiseOps rowwise_reference = {"rowwise_reference", load_bf16, load_fp16, store_bf16,
                                      store_fp16,          rotate,    quantize,  silu_and_mul,
                                      add_scaled};

}  // namespace kt
