// The scalar truth of the row operations, on plain x86-64; that of products is in
// reference_gemm.cpp. Written to be read, not to be fast.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "base/dtype.h"
#include "base/hadamard.h"
#include "kernels/kernel.h"

namespace kt {
namespace {

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
