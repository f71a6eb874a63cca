// Element types of tensors and weights, and scalar conversions. Not for ISA objects: it has inline
// functions.
#pragma once

#include <cstdint>
#include <cstring>

namespace kt {

// The codes of packed weights below 8 bits have no dtype of torch's: kFp4 is E2M1, kIq4 the table
// of llama.cpp's IQ4_NL, kFp8 e4m3fn. kE8M0: powers of two, scales of the MX formats.
enum class DType : uint8_t {
  kFloat32,
  kBFloat16,
  kFloat16,
  kInt8,
  kUint8,
  kInt6,
  kInt5,
  kInt4,
  kInt3,
  kInt2,
  kInt32,
  kInt64,
  kFp8,
  kFp4,
  kIq4,
  kE8M0,
};

inline const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return "fp32";
    case DType::kBFloat16: return "bf16";
    case DType::kFloat16: return "fp16";
    case DType::kInt8: return "int8";
    case DType::kUint8: return "uint8";
    case DType::kInt6: return "int6";
    case DType::kInt5: return "int5";
    case DType::kInt4: return "int4";
    case DType::kInt3: return "int3";
    case DType::kInt2: return "int2";
    case DType::kInt32: return "int32";
    case DType::kInt64: return "int64";
    case DType::kFp8: return "fp8";
    case DType::kFp4: return "fp4";
    case DType::kIq4: return "iq4";
    case DType::kE8M0: return "e8m0";
  }
  return "unknown";
}

inline int dtype_bits(DType dtype) {
  switch (dtype) {
    case DType::kInt2: return 2;
    case DType::kInt3: return 3;
    case DType::kInt4:
    case DType::kFp4:
    case DType::kIq4: return 4;
    case DType::kInt5: return 5;
    case DType::kInt6: return 6;
    case DType::kInt8:
    case DType::kUint8:
    case DType::kFp8:
    case DType::kE8M0: return 8;
    case DType::kBFloat16:
    case DType::kFloat16: return 16;
    case DType::kFloat32:
    case DType::kInt32: return 32;
    case DType::kInt64: return 64;
  }
  return 0;
}

inline float bf16_to_float(uint16_t bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

// Round to nearest even; a NaN stays a (quiet) NaN.
inline uint16_t float_to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float fp16_to_float(uint16_t half) {
  const uint32_t sign = uint32_t{half & 0x8000u} << 16;
  const uint32_t exponent = (half >> 10) & 0x1fu;
  const uint32_t mantissa = half & 0x3ffu;
  uint32_t bits;
  if (exponent == 0x1fu) {
    bits = sign | 0x7f800000u | (mantissa << 13);
  } else if (exponent != 0) {
    bits = sign | ((exponent + 112u) << 23) | (mantissa << 13);
  } else {
    // zero or subnormal: the value is mantissa * 2^-24, exact in fp32
    const float magnitude = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
    std::memcpy(&bits, &magnitude, sizeof bits);
    bits |= sign;
  }
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Round to nearest even, overflow to infinity, subnormals kept.
inline uint16_t float_to_fp16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {
    // below 2^-14: adding 2^-1 aligns the last kept bit with the last fp32 mantissa bit (2^-24)
    float aligned;
    std::memcpy(&aligned, &magnitude, sizeof aligned);
    aligned += 0.5f;
    uint32_t aligned_bits;
    std::memcpy(&aligned_bits, &aligned, sizeof aligned_bits);
    return static_cast<uint16_t>(sign | (aligned_bits - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

// e4m3fn: exponent bias 7, no infinity; both NaN become a quiet NaN.
inline float fp8_to_float(uint8_t code) {
  const uint32_t sign = uint32_t{code & 0x80u} << 24;
  const uint32_t magnitude = code & 0x7fu;
  uint32_t bits = (magnitude << 20) + (120u << 23);
  if (magnitude == 0x7fu) {
    bits = 0x7fc00000u;
  } else if (magnitude < 8u) {
    // zero or subnormal: a multiple of 2^-9, exact in fp32
    const float value = static_cast<float>(magnitude) * 0x1p-9f;
    std::memcpy(&bits, &value, sizeof bits);
  }
  bits |= sign;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace kt
