// Inputs of the kernel tests: seeded numbers, aligned buffers, bit comparison, and the tolerances
// with their derivation.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <random>
#include <vector>

#include "base/dtype.h"
#include "kernels/kernel.h"

namespace kt {

// Every test draws from its own generator, so a failure repeats whatever else ran.
class RandomNumbers {
 public:
  explicit RandomNumbers(uint64_t seed) : engine_(seed) {}
  // Uniform in [low, high], both included.
  int integer(int low, int high) { return std::uniform_int_distribution<int>(low, high)(engine_); }
  float normal() { return std::normal_distribution<float>()(engine_); }
  uint32_t bits() { return static_cast<uint32_t>(engine_()); }

 private:
  std::mt19937_64 engine_;
};

// A vector on a 64-byte boundary: what kernels require of panels and activations.
template <typename T>
struct LineAllocator {
  using value_type = T;
  LineAllocator() = default;
  template <typename Other>
  LineAllocator(const LineAllocator<Other>&) {
  }  // NOLINT(google-explicit-constructor): an allocator's conversion
  T* allocate(size_t count) {
    return static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t{64}));
  }
  void deallocate(T* data, size_t) { ::operator delete(data, std::align_val_t{64}); }
  bool operator==(const LineAllocator&) const { return true; }
};
template <typename T>
using LineVector = std::vector<T, LineAllocator<T>>;

inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Same bits. A NaN equals any NaN: which operand's payload an addition keeps is the compiler's
// choice of operand order.
inline bool same_float(float a, float b) {
  return float_bits(a) == float_bits(b) || (std::isnan(a) && std::isnan(b));
}

// Index of the first pair that differs, or -1.
inline int64_t first_difference(const float* a, const float* b, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if (!same_float(a[i], b[i])) return i;
  }
  return -1;
}

// Values where a float kernel goes wrong: zeros, subnormals, limits, ties, infinities, NaN.
inline const std::vector<float>& special_floats() {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  static const std::vector<float> values = {0.0f,
                                            -0.0f,
                                            0x1p-149f,
                                            -0x1p-149f,
                                            0x1.fffffcp-127f,
                                            0x1p-126f,
                                            -0x1p-126f,
                                            0x1p-101f,
                                            0x1p-25f,
                                            0x1p-24f,
                                            0x1.8p-24f,
                                            0x1p-14f,
                                            0x1.ffcp-15f,
                                            0.5f,
                                            -0.5f,
                                            1.5f,
                                            2.5f,
                                            -126.5f,
                                            127.0f,
                                            65504.0f,
                                            65519.996f,
                                            65520.0f,
                                            -65536.0f,
                                            79.9f,
                                            -80.0f,
                                            87.9f,
                                            -87.99f,
                                            -88.0f,
                                            -88.00001f,
                                            88.0f,
                                            88.00001f,
                                            -104.0f,
                                            1e30f,
                                            -1e30f,
                                            0x1.fffffep127f,
                                            -0x1.fffffep127f,
                                            kInfinity,
                                            -kInfinity,
                                            std::numeric_limits<float>::quiet_NaN()};
  return values;
}

// Largest error of a bf16 product of k terms against the exact sum, whatever the order.
//
// A product of two bf16 is exact in fp32. Each of the k additions rounds once: relative error u =
// 2^-24 of a partial sum that is at most S = sum |a w|, so k u S to first order; the second-order
// terms are below 1 / 1000 of that for k <= 2^14. vdpbf16ps takes subnormal inputs as zero and
// flushes subnormal results, which changes a term by less than 2^-126 times the other factor, or a
// partial sum by less than 2^-126.
inline double bf16_gemm_tolerance(int k, double sum_of_magnitudes, double largest_magnitude) {
  return 1.001 * k * 0x1p-24 * sum_of_magnitudes + k * 0x1p-126 * (1.0 + 2.0 * largest_magnitude);
}

// Largest error of one rotation against the exact one: log2(block) additions and one
// multiplication, each u = 2^-24 of a value that is at most sum |x| / sqrt(block) after scaling;
// the constant itself is off by u.
inline double rotation_tolerance(int block, double sum_of_magnitudes) {
  return 1.001 * (std::log2(block) + 2) * 0x1p-24 * sum_of_magnitudes /
         std::sqrt(static_cast<double>(block));
}

// Largest relative error of silu for -80 <= x: x / (1 + e) has one rounding in the sum and one in
// the quotient (2 u); an error of e counts at most fully. e = 2^n p(r): the polynomial is truncated
// at r^7 / 7! with |r| <= ln 2 / 2 (2 u), its Horner steps round to about 2 u, and r is off by at
// most 88 * 2^-44 from the second part of ln 2 plus one rounding of r (u / 2), which is the
// relative error of e. In all below 8 u.
constexpr double kSiluTolerance = 8 * 0x1p-24;

// Largest error of an activation against `exact`, its formula on the same fp32 gate, up, limit and
// alpha, in units u = 2^-24 of the result; one for the product with up is in each.
//
//   x * sigmoid(w)  8 u as for silu, and what w is off by: d ln sigmoid(w) = (1 - sigmoid(w)) dw
//   kSwigluAlpha    w is rounded once; so is up + 1
//   kGeluTanh       w is off by 4 u: x^2 and the constant beside it (2 u), the fma, the product
//   kGelu           a * Phi(-a), a = |x|, is off by (17 + a^2 / 2) u: exp(-a^2 / 2) with a^2
//                   rounded once (6 + a^2 / 2); d is off by 2 u and d ln q / d ln d is at most 2.3;
//                   the polynomial by 0.9 u, its steps by 3 u; two products. It is subtracted from
//                   max(x, 0): two more for that and up.
inline double activation_tolerance(const Activation& activation, float gate, double exact) {
  const double x = std::fmin(gate, activation.limit > 0 ? activation.limit : INFINITY);
  const auto off = [](double w) { return std::fabs(w) / (1 + std::exp(w)); };
  double units = 9;
  switch (activation.kind) {
    case ActivationKind::kSwigluAlpha: units = 10 + off(activation.alpha * x); break;
    case ActivationKind::kGeluTanh: units = 9 + 4 * off(1.6 * x + 0.0714 * x * x * x); break;
    case ActivationKind::kGelu: {
      const double tail = std::erfc(std::fabs(x) * M_SQRT1_2) / std::erfc(-x * M_SQRT1_2);
      units = 3 + (17 + x * x / 2) * tail;
      break;
    }
    default: break;
  }
  return units * 0x1p-24 * std::fabs(exact) + 0x1p-140;
}

}  // namespace kt
