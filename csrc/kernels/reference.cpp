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

// The steps of the activations in x86/rowwise.h, one for one. As there, clamps keep a NaN.
float clamp_low(float x, float low) { return x < low ? low : x; }
float clamp_high(float x, float high) { return x > high ? high : x; }

float exponential(float t) {
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
  return p * bits_float((float_bits(shifted) + 127u) << 23);
}

float times_sigmoid(float x, float w) {
  const float t = clamp_high(clamp_low(-w, -80.0f), 88.0f);
  return w < -88.0f ? 0.0f : x / (1.0f + exponential(t));
}

float gelu(float x) {
  const float a = clamp_high(std::fabs(x), 13.0f);
  const float d = 1.0f / std::fma(a, 0x1.666666p-2f, 1.0f);
  float q = -0x1.dcb1a8p-6f;
  q = std::fma(q, d, 0x1.26566cp-3f);
  q = std::fma(q, d, -0x1.054e7ep-2f);
  q = std::fma(q, d, 0x1.44b716p-3f);
  q = std::fma(q, d, -0x1.73703cp-6f);
  q = std::fma(q, d, 0x1.af60cap-4f);
  q = std::fma(q, d, 0x1.eb0a30p-4f);
  q = std::fma(q, d, 0x1.1e6c2ap-3f);
  q = std::fma(q, d, 0x1.1df20cp-3f);
  const float tail = exponential((a * a) * -0.5f) * (q * d);
  return clamp_low(x, 0.0f) - a * tail;
}

float gelu_tanh(float x) {
  const float inner = std::fma(x * x, 0x1.2444f2p-4f, 0x1.988454p+0f);
  return times_sigmoid(x, x * inner);
}

float activated(ActivationKind kind, float gate, float up, float limit, float alpha) {
  const float limited = clamp_high(gate, limit);
  const float limited_up = clamp_high(clamp_low(up, -limit), limit);
  switch (kind) {
    case ActivationKind::kSilu: return times_sigmoid(gate, gate) * up;
    case ActivationKind::kSiluLimit: return times_sigmoid(limited, limited) * limited_up;
    case ActivationKind::kSiluThenLimit:
      return clamp_high(times_sigmoid(gate, gate), limit) * limited_up;
    case ActivationKind::kSwigluAlpha:
      return times_sigmoid(limited, alpha * limited) * (limited_up + 1.0f);
    case ActivationKind::kGelu: return gelu(gate) * up;
    case ActivationKind::kGeluTanh: return gelu_tanh(gate) * up;
  }
  return 0.0f;
}

template <ActivationKind kKind>
void activate(const float* gate, const float* up, float* out, int32_t n, float limit, float alpha) {
  for (int i = 0; i < n; ++i) out[i] = activated(kKind, gate[i], up[i], limit, alpha);
}

void add_scaled(const float* x, float weight, float* out, int32_t n) {
  for (int i = 0; i < n; ++i) out[i] = std::fma(weight, x[i], out[i]);
}

}  // namespace

extern const RowwiseOps rowwise_reference;
const RowwiseOps rowwise_reference = {
    "rowwise_reference",
    load_bf16,
    load_fp16,
    store_bf16,
    store_fp16,
    rotate,
    quantize,
    {activate<ActivationKind::kSilu>, activate<ActivationKind::kSiluLimit>,
     activate<ActivationKind::kSiluThenLimit>, activate<ActivationKind::kSwigluAlpha>,
     activate<ActivationKind::kGelu>, activate<ActivationKind::kGeluTanh>},
    add_scaled};

}  // namespace kt
