// The row operations of kernel.h in terms of vec_avx2.h or vec_avx512.h, which is included before
// this file. Every lane does the steps of reference.cpp in the same order, so every tier gives the
// same bits (a NaN may differ in sign and payload). Everything is in an anonymous namespace.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/kernel.h"

namespace kt {
namespace {

// ---- conversions; a tail goes through one vector on the stack ----

void load_bf16(const uint16_t* src, float* dst, int32_t n, int32_t padded_n) {
  int32_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(dst + i, load_wide_bf16(src + i));
  if (i < n) {
    uint16_t tail[kLanes] = {};
    float wide[kLanes];
    std::memcpy(tail, src + i, sizeof(uint16_t) * (n - i));
    store(wide, load_wide_bf16(tail));
    std::memcpy(dst + i, wide, sizeof(float) * (n - i));
  }
  if (n < padded_n) std::memset(dst + n, 0, sizeof(float) * (padded_n - n));
}

void load_fp16(const uint16_t* src, float* dst, int32_t n, int32_t padded_n) {
  int32_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(dst + i, load_wide_fp16(src + i));
  if (i < n) {
    uint16_t tail[kLanes] = {};
    float wide[kLanes];
    std::memcpy(tail, src + i, sizeof(uint16_t) * (n - i));
    store(wide, load_wide_fp16(tail));
    std::memcpy(dst + i, wide, sizeof(float) * (n - i));
  }
  if (n < padded_n) std::memset(dst + n, 0, sizeof(float) * (padded_n - n));
}

void store_bf16(const float* src, uint16_t* dst, int32_t n) {
  int32_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store_narrow_bf16(dst + i, load(src + i));
  if (i < n) {
    float tail[kLanes] = {};
    uint16_t narrow[kLanes];
    std::memcpy(tail, src + i, sizeof(float) * (n - i));
    store_narrow_bf16(narrow, load(tail));
    std::memcpy(dst + i, narrow, sizeof(uint16_t) * (n - i));
  }
}

void store_fp16(const float* src, uint16_t* dst, int32_t n) {
  int32_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store_narrow_fp16(dst + i, load(src + i));
  if (i < n) {
    float tail[kLanes] = {};
    uint16_t narrow[kLanes];
    std::memcpy(tail, src + i, sizeof(float) * (n - i));
    store_narrow_fp16(narrow, load(tail));
    std::memcpy(dst + i, narrow, sizeof(uint16_t) * (n - i));
  }
}

// ---- rotation ----

// Stages between whole vectors: distances 1, 2, ..., kCount / 2 in units of the array.
template <int kCount>
inline void butterfly_across(Vec (&v)[kCount]) {
#pragma GCC unroll 8
  for (int distance = 1; distance < kCount; distance *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
      if (i & distance) continue;
      const Vec lower = v[i];
      const Vec upper = v[i + distance];
      v[i] = add(lower, upper);
      v[i + distance] = sub(lower, upper);
    }
  }
}

// The first stages: those inside a vector and those between kCount neighbours.
template <int kCount>
void rotate_neighbours(float* x, int32_t n) {
  for (int32_t i = 0; i < n; i += kCount * kLanes) {
    Vec v[kCount];
#pragma GCC unroll 8
    for (int j = 0; j < kCount; ++j) v[j] = butterfly_lanes(load(x + i + j * kLanes));
    butterfly_across(v);
#pragma GCC unroll 8
    for (int j = 0; j < kCount; ++j) store(x + i + j * kLanes, v[j]);
  }
}

// The next stages: distances stride, 2 * stride, ..., kCount / 2 * stride elements.
template <int kCount>
void rotate_strided(float* x, int32_t n, int32_t stride) {
  for (int32_t begin = 0; begin < n; begin += kCount * stride) {
    for (int32_t i = begin; i < begin + stride; i += kLanes) {
      Vec v[kCount];
#pragma GCC unroll 8
      for (int j = 0; j < kCount; ++j) v[j] = load(x + i + j * stride);
      butterfly_across(v);
#pragma GCC unroll 8
      for (int j = 0; j < kCount; ++j) store(x + i + j * stride, v[j]);
    }
  }
}

void rotate(float* x, int32_t n, int32_t block) {
  const int log2_block = __builtin_ctz(static_cast<uint32_t>(block));
  // float(1 / sqrt(block)): a power of two, times float(1 / sqrt(2)) for odd exponents.
  float scale = log2_block % 2 == 0 ? 1.0f : 0x1.6a09e6p-1f;
  for (int i = 0; i < log2_block / 2; ++i) scale *= 0.5f;
  const Vec scales = broadcast(scale);

  // One block at a time stays in the L1 cache (1024 values are 4 KB).
  for (int32_t begin = 0; begin < n; begin += block) {
    float* values = x + begin;
    int32_t done;
    if (block >= 8 * kLanes) {
      rotate_neighbours<8>(values, block);
      done = 8 * kLanes;
    } else if (block == 4 * kLanes) {
      rotate_neighbours<4>(values, block);
      done = block;
    } else {
      rotate_neighbours<2>(values, block);
      done = block;
    }
    while (done < block) {
      const int32_t rest = block / done;
      if (rest >= 8) {
        rotate_strided<8>(values, block, done);
        done *= 8;
      } else if (rest == 4) {
        rotate_strided<4>(values, block, done);
        done *= 4;
      } else {
        rotate_strided<2>(values, block, done);
        done *= 2;
      }
    }
    for (int32_t i = 0; i < block; i += kLanes) store(values + i, mul(load(values + i), scales));
  }
}

// ---- quantization ----

// Adds 32 codes from column i on to the sums of their groups, 16 at a time.
inline void add_halves(const IntVec (&codes)[32 / kLanes], int32_t i, int32_t group_size,
                       int32_t* group_sum) {
  constexpr int kHalf = 16 / kLanes;
  for (int half = 0; half < 2; ++half) {
    IntVec sum = codes[half * kHalf];
    for (int j = 1; j < kHalf; ++j) sum = add_int(sum, codes[half * kHalf + j]);
    group_sum[(i + half * 16) / group_size] += sum_lanes(sum);
  }
}

void quantize(const float* x, int32_t n, int32_t offset, uint8_t* codes, float* scale,
              int32_t group_size, int32_t* group_sum) {
  constexpr int kVecs = 32 / kLanes;
  constexpr int32_t kSmallestAmax = 0x0d800000;  // 2^-100
  constexpr int32_t kInfinity = 0x7f800000;
  // For non-negative floats the order of the bits is the order of the values, and NaN is above
  // infinity.
  const IntVec magnitude = broadcast_int(0x7fffffff);
  IntVec largest[kVecs];
  for (int j = 0; j < kVecs; ++j) largest[j] = broadcast_int(0);
  for (int32_t i = 0; i < n; i += 32) {
    for (int j = 0; j < kVecs; ++j) {
      largest[j] = max_int(largest[j], and_int(bits(load(x + i + j * kLanes)), magnitude));
    }
  }
  for (int j = 1; j < kVecs; ++j) largest[0] = max_int(largest[0], largest[j]);
  const int32_t amax_bits = max_lanes(largest[0]);
  const int num_groups = group_sum != nullptr ? (n + group_size - 1) / group_size : 0;
  if (amax_bits < kSmallestAmax || amax_bits >= kInfinity) {
    const uint32_t scale_bits = amax_bits < kSmallestAmax ? 0 : 0x7fc00000;
    std::memcpy(scale, &scale_bits, sizeof *scale);
    std::memset(codes, offset, static_cast<size_t>(n));
    if (num_groups > 0) std::memset(group_sum, 0, sizeof(int32_t) * num_groups);
    return;
  }
  float amax;
  std::memcpy(&amax, &amax_bits, sizeof amax);
  *scale = amax / 127.0f;
  const Vec inverse = broadcast(127.0f / amax);

  const bool whole_steps = group_sum == nullptr || group_size % 32 == 0;
  const int32_t sum_every = group_sum != nullptr && whole_steps ? group_size : n;
  if (!whole_steps) std::memset(group_sum, 0, sizeof(int32_t) * num_groups);
  int32_t group = 0;
  for (int32_t begin = 0; begin < n; begin += sum_every) {
    const int32_t end = begin + sum_every < n ? begin + sum_every : n;
    IntVec sums = broadcast_int(0);
    for (int32_t i = begin; i < end; i += 32) {
      IntVec rounded[kVecs];
      for (int j = 0; j < kVecs; ++j) {
        rounded[j] = round_to_int(mul(load(x + i + j * kLanes), inverse));
        sums = add_int(sums, rounded[j]);
      }
      if (!whole_steps) add_halves(rounded, i, group_size, group_sum);
      store_codes(codes + i, rounded, offset);
    }
    if (group_sum != nullptr && whole_steps) group_sum[group++] = sum_lanes(sums);
  }
}

// ---- activations and the weighted sum ----

// exp(t) for -87 <= t <= 88, where 2^power is a normal number; relative error below
// 6 * 2^-24 + |error of t|.
//
//   shifted = fma(t, 1/ln 2, 1.5 * 2^23): its low mantissa bits are round(t / ln 2) = power
//   r = t - power * ln 2, in two parts (Cody and Waite); |r| <= ln 2 / 2
//   exp(t) = 2^power * p(r), p the Taylor polynomial of degree 6: relative error of p below 2^-22
//
// A NaN runs through all of it: 2^power is a factor and not an addition to the exponent bits.
inline Vec exponential(Vec t) {
  const Vec shifted = fma(t, broadcast(0x1.715476p+0f), broadcast(0x1.8p+23f));
  const Vec power = sub(shifted, broadcast(0x1.8p+23f));
  Vec r = fma(power, broadcast(-0x1.62e400p-1f), t);
  r = fma(power, broadcast(-0x1.7f7d1cp-20f), r);
  Vec p = broadcast(0x1.6c16c2p-10f);
  p = fma(p, r, broadcast(0x1.111112p-7f));
  p = fma(p, r, broadcast(0x1.555556p-5f));
  p = fma(p, r, broadcast(0x1.555556p-3f));
  p = fma(p, r, broadcast(0.5f));
  p = fma(p, r, broadcast(1.0f));
  p = fma(p, r, broadcast(1.0f));
  return mul(p, from_bits(shift_left<23>(add_int(bits(shifted), broadcast_int(127)))));
}

// x * sigmoid(w) = x / (1 + exp(-w)), and +0 for w < -88, where the exact result is above
// -2^-126 |x| (and -inf / inf would be NaN). -w is clamped to [-80, 88]: below, 1 + exp(-w) is 1;
// above, the result is replaced. The clamps keep a NaN.
inline Vec times_sigmoid(Vec x, Vec w) {
  Vec t = clamp_low(negate(w), broadcast(-80.0f));
  t = clamp_high(t, broadcast(88.0f));
  const Vec result = div(x, add(broadcast(1.0f), exponential(t)));
  return zero_below(result, w, broadcast(-88.0f));
}

// x * Phi(x) = max(x, 0) - a * Phi(-a), a = |x|, which is cut to 13: x < -13 gives the value at
// -13, above -2^-123.
//
//   Phi(-a) = exp(-a^2 / 2) * q(d), d = 1 / (1 + 0.35 a), q of degree 9 without constant: minimax
//   of the relative error over 0 <= a <= 13 (Remez), 0.9 * 2^-24
//
// Relative error below (20 + x^2 / 2) * 2^-24.
inline Vec gelu(Vec x) {
  const Vec a = clamp_high(absolute(x), broadcast(13.0f));
  const Vec d = div(broadcast(1.0f), fma(a, broadcast(0x1.666666p-2f), broadcast(1.0f)));
  Vec q = broadcast(-0x1.dcb1a8p-6f);
  q = fma(q, d, broadcast(0x1.26566cp-3f));
  q = fma(q, d, broadcast(-0x1.054e7ep-2f));
  q = fma(q, d, broadcast(0x1.44b716p-3f));
  q = fma(q, d, broadcast(-0x1.73703cp-6f));
  q = fma(q, d, broadcast(0x1.af60cap-4f));
  q = fma(q, d, broadcast(0x1.eb0a30p-4f));
  q = fma(q, d, broadcast(0x1.1e6c2ap-3f));
  q = fma(q, d, broadcast(0x1.1df20cp-3f));
  const Vec tail = mul(exponential(mul(mul(a, a), broadcast(-0.5f))), mul(q, d));
  return sub(clamp_low(x, broadcast(0.0f)), mul(a, tail));
}

// The formula of tanh as x * sigmoid(w), since (1 + tanh(z)) / 2 = sigmoid(2 z):
// w = x * (2 sqrt(2/pi) + 2 sqrt(2/pi) 0.044715 * x^2).
inline Vec gelu_tanh(Vec x) {
  const Vec inner = fma(mul(x, x), broadcast(0x1.2444f2p-4f), broadcast(0x1.988454p+0f));
  return times_sigmoid(x, mul(x, inner));
}

template <ActivationKind kKind>
inline Vec activated(Vec gate, Vec up, Vec limit, Vec alpha) {
  if constexpr (kKind == ActivationKind::kGelu) return mul(gelu(gate), up);
  if constexpr (kKind == ActivationKind::kGeluTanh) return mul(gelu_tanh(gate), up);
  if constexpr (kKind == ActivationKind::kSilu) return mul(times_sigmoid(gate, gate), up);
  const Vec limited_up = clamp_high(clamp_low(up, negate(limit)), limit);
  if constexpr (kKind == ActivationKind::kSiluThenLimit)
    return mul(clamp_high(times_sigmoid(gate, gate), limit), limited_up);
  const Vec limited = clamp_high(gate, limit);
  if constexpr (kKind == ActivationKind::kSiluLimit)
    return mul(times_sigmoid(limited, limited), limited_up);
  return mul(times_sigmoid(limited, mul(alpha, limited)), add(limited_up, broadcast(1.0f)));
}

template <ActivationKind kKind>
void activate(const float* gate, const float* up, float* out, int32_t n, float limit, float alpha) {
  const Vec limits = broadcast(limit);
  const Vec alphas = broadcast(alpha);
  for (int32_t i = 0; i < n; i += kLanes)
    store(out + i, activated<kKind>(load(gate + i), load(up + i), limits, alphas));
}

void add_scaled(const float* x, float weight, float* out, int32_t n) {
  const Vec weights = broadcast(weight);
  for (int32_t i = 0; i < n; i += kLanes) store(out + i, fma(weights, load(x + i), load(out + i)));
}

// One row of a registry's list, under the name of the tier.
constexpr RowwiseOps rowwise_ops(const char* name) {
  return {name,
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
}

}  // namespace
}  // namespace kt
