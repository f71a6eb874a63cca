// Scalar models of the tile products that share nothing with the interpreter: integers of 64 bits,
// and the rounding of TDPBF16PS worked out in double.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

namespace kt_amx {

inline float bf16_value(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

// Denormals are zeros, of the same sign.
inline float daz(float x) {
  return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x;
}

// The exact `sum + rest` with |rest| <= ulp(sum) / 2, rounded to odd: a later rounding to fewer
// bits then is that of the exact value.
inline double to_odd(double sum, double rest) {
  if (rest == 0 || (std::bit_cast<uint64_t>(sum) & 1) != 0) return sum;
  return std::nextafter(sum, rest > 0 ? HUGE_VAL : -HUGE_VAL);
}

// To the nearest float, ties to even; zero if the value, rounded to 24 bits with an unbounded
// exponent, is smaller than any normal float.
inline float to_float_flushed(double x) {
  constexpr double kNormal = std::numeric_limits<float>::min();
  constexpr double kShift = 0x1p100;  // makes the float below normal
  if (!(std::fabs(x) < 2 * kNormal)) return static_cast<float>(x);
  const double rounded = static_cast<float>(x * kShift) / kShift;
  return std::fabs(rounded) < kNormal ? std::copysign(0.0f, static_cast<float>(std::copysign(1, x)))
                                      : static_cast<float>(rounded);
}

// a * b + c in one rounding. a * b of two floats with 24 bits each is exact in double.
inline float fma_flushed(float a, float b, float c) {
  const double product = double{daz(a)} * double{daz(b)};
  const double addend = daz(c);
  const double sum = product + addend;
  if (!std::isfinite(sum)) return static_cast<float>(sum);
  // Knuth's exact error of a sum
  const double part = sum - product;
  const double rest = (product - (sum - part)) + (addend - part);
  return to_float_flushed(to_odd(sum, rest));
}

inline float add_flushed(float a, float b) { return fma_flushed(a, 1.0f, b); }

// One element of c += a b by TDPBF16PS: a(i) and b(i) are the bits of element i of its row of a and
// its column of b, 2 * depth of each.
template <typename A, typename B>
float bf16_element(float c, int depth, A a, B b) {
  float even = 0;
  float odd = 0;
  for (int l = 0; l < depth; ++l) {
    even = fma_flushed(bf16_value(a(2 * l)), bf16_value(b(2 * l)), even);
    odd = fma_flushed(bf16_value(a(2 * l + 1)), bf16_value(b(2 * l + 1)), odd);
  }
  return add_flushed(c, add_flushed(even, odd));
}

// Same bits, or both not a number: the manual does not say which one.
inline bool same_float(float x, float y) {
  return std::bit_cast<uint32_t>(x) == std::bit_cast<uint32_t>(y) ||
         (std::isnan(x) && std::isnan(y));
}

}  // namespace kt_amx
