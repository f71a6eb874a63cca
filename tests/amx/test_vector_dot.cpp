// VPDPBUSD and VPDPBUSDS in their VEX forms, which hosts with AVX-512 VNNI need not have.
#include <gtest/gtest.h>
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <random>

#include "amx/interpreter.h"

namespace kt_amx {
namespace {

struct alignas(64) Vector {
  int32_t lanes[16] = {};
  bool operator==(const Vector&) const = default;
};

// The first `num_lanes` of sums + u8 s8, and zeros.
Vector reference(const Vector& sums, const Vector& u, const Vector& s, int num_lanes,
                 bool saturates) {
  Vector result;
  for (int lane = 0; lane < num_lanes; ++lane) {
    uint8_t unsigned_bytes[4];
    int8_t signed_bytes[4];
    std::memcpy(unsigned_bytes, &u.lanes[lane], 4);
    std::memcpy(signed_bytes, &s.lanes[lane], 4);
    int64_t sum = sums.lanes[lane];
    for (int i = 0; i < 4; ++i) sum += unsigned_bytes[i] * signed_bytes[i];
    using Limits = std::numeric_limits<int32_t>;
    if (saturates) sum = std::clamp<int64_t>(sum, Limits::min(), Limits::max());
    result.lanes[lane] = static_cast<int32_t>(sum);
  }
  return result;
}

Vector random_vector(std::mt19937& random) {
  Vector vector;
  for (int32_t& lane : vector.lanes) lane = static_cast<int32_t>(random());
  return vector;
}

// Sums near the ends of int32, so that they wrap around or saturate.
Vector extreme_sums(std::mt19937& random) {
  Vector vector;
  for (int32_t& lane : vector.lanes) {
    lane = static_cast<int32_t>((random() % 2 ? 0x7fffffffu : 0x80000000u) ^ (random() & 0x7fff));
  }
  return vector;
}

Vector by_intrinsic(const Vector& sums, const Vector& u, const Vector& s, bool wide,
                    bool saturates) {
  Vector result;
  if (wide) {
    const auto load = [](const Vector& v) {
      return _mm256_load_si256(reinterpret_cast<const __m256i*>(v.lanes));
    };
    const __m256i found = saturates ? _mm256_dpbusds_avx_epi32(load(sums), load(u), load(s))
                                    : _mm256_dpbusd_avx_epi32(load(sums), load(u), load(s));
    _mm256_store_si256(reinterpret_cast<__m256i*>(result.lanes), found);
  } else {
    const auto load = [](const Vector& v) {
      return _mm_load_si128(reinterpret_cast<const __m128i*>(v.lanes));
    };
    const __m128i found = saturates ? _mm_dpbusds_avx_epi32(load(sums), load(u), load(s))
                                    : _mm_dpbusd_avx_epi32(load(sums), load(u), load(s));
    _mm_store_si128(reinterpret_cast<__m128i*>(result.lanes), found);
  }
  return result;
}

TEST(VectorDot, BothKindsAndWidthsAreExact) {
  std::mt19937 random(11);
  for (int repeat = 0; repeat < 500; ++repeat) {
    const Vector u = random_vector(random);
    const Vector s = random_vector(random);
    const Vector sums = repeat % 2 ? extreme_sums(random) : random_vector(random);
    for (const bool wide : {false, true}) {
      for (const bool saturates : {false, true}) {
        ASSERT_EQ(by_intrinsic(sums, u, s, wide, saturates),
                  reference(sums, u, s, wide ? 8 : 4, saturates))
            << wide << saturates;
      }
    }
  }
}

// d, u and s loaded in full, the instruction, and d stored in full.
#define KT_DOT(move, prefix, d, u, s, instruction)                                            \
  __asm__ volatile(move " %1, %%" prefix d "\n" move " %2, %%" prefix u "\n" move             \
                        " %3, %%" prefix s "\n %{vex%} " instruction "\n" move " %%" prefix d \
                        ", %0"                                                                \
                   : "=m"(result)                                                             \
                   : "m"(sums), "m"(unsigned_bytes), "m"(signed_bytes)                        \
                   : "xmm" d, "xmm" u, "xmm" s, "memory")

class DotRegisters : public testing::Test {
 protected:
  void SetUp() override {
    std::mt19937 random(12);
    sums = random_vector(random);
    unsigned_bytes = random_vector(random);
    signed_bytes = random_vector(random);
  }
  Vector expected(int num_lanes) const {
    return reference(sums, unsigned_bytes, signed_bytes, num_lanes, false);
  }

  Vector sums, unsigned_bytes, signed_bytes, result;
};

TEST_F(DotRegisters, AllSixteenAreReachedAndBitsAboveAreZeroed) {
  KT_DOT("vmovups", "ymm", "0", "1", "2", "vpdpbusd %%ymm2, %%ymm1, %%ymm0");
  EXPECT_EQ(result, expected(8));
  KT_DOT("vmovups", "ymm", "15", "8", "9", "vpdpbusd %%ymm9, %%ymm8, %%ymm15");
  EXPECT_EQ(result, expected(8));
  KT_DOT("vmovups", "ymm", "7", "12", "3", "vpdpbusd %%ymm3, %%ymm12, %%ymm7");
  EXPECT_EQ(result, expected(8));
  KT_DOT("vmovups", "ymm", "10", "4", "13", "vpdpbusd %%xmm13, %%xmm4, %%xmm10");
  EXPECT_EQ(result, expected(4));
}

TEST_F(DotRegisters, UpperHalvesOfAvx512AreZeroed) {
  if (!__builtin_cpu_supports("avx512f")) return;  // there are none
  KT_DOT("vmovups", "zmm", "0", "1", "2", "vpdpbusd %%ymm2, %%ymm1, %%ymm0");
  EXPECT_EQ(result, expected(8));
  KT_DOT("vmovups", "zmm", "15", "8", "9", "vpdpbusd %%xmm9, %%xmm8, %%xmm15");
  EXPECT_EQ(result, expected(4));
}

TEST_F(DotRegisters, WithoutUpperHalvesInUse) {
  result.lanes[4] = 1;
  __asm__ volatile(
      "vzeroall\n vmovups %1, %%xmm0\n vmovups %2, %%xmm1\n"
      "%{vex%} vpdpbusd %3, %%ymm1, %%ymm0\n vmovups %%ymm0, %0"
      : "=m"(result)
      : "m"(sums), "m"(unsigned_bytes), "m"(signed_bytes)
      : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10",
        "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");
  EXPECT_EQ(result, expected(4));
}

TEST_F(DotRegisters, OperandsInMemory) {
  const char* const places = reinterpret_cast<const char*>(&signed_bytes) - 192;
  __asm__ volatile(
      "vmovups %1, %%ymm11\n vmovups %2, %%ymm5\n"
      "%{vex%} vpdpbusd 0x80(%3, %4, 8), %%ymm5, %%ymm11\n vmovups %%ymm11, %0"
      : "=m"(result)
      : "m"(sums), "m"(unsigned_bytes), "r"(places), "r"(int64_t{8}), "m"(signed_bytes)
      : "xmm11", "xmm5");
  EXPECT_EQ(result, expected(8));
  // from the instruction pointer: bytes of 1, 2, 3, 4 in every lane
  for (int32_t& lane : signed_bytes.lanes) lane = 0x04030201;
  __asm__ volatile(
      "vmovups %1, %%ymm11\n vmovups %2, %%ymm5\n jmp 2f\n 1: .rept 8\n .byte 1, 2, 3, 4\n .endr\n"
      "2: %{vex%} vpdpbusd 1b(%%rip), %%ymm5, %%ymm11\n vmovups %%ymm11, %0"
      : "=m"(result)
      : "m"(sums), "m"(unsigned_bytes)
      : "xmm11", "xmm5");
  EXPECT_EQ(result, expected(8));
}

TEST_F(DotRegisters, AreCountedWhereTheHostHasNoSuchInstruction) {
  if (!kt_amx_is_emulating() || __builtin_cpu_supports("avxvnni")) return;
  kt_amx_counters_reset();
  EXPECT_NE(by_intrinsic(sums, unsigned_bytes, signed_bytes, true, false), sums);
  EXPECT_NE(by_intrinsic(sums, unsigned_bytes, signed_bytes, true, true), sums);
  EXPECT_NE(by_intrinsic(sums, unsigned_bytes, signed_bytes, false, true), sums);
  EXPECT_EQ(kt_amx_counter("vpdpbusd"), 1u);
  EXPECT_EQ(kt_amx_counter("vpdpbusds"), 2u);
}

}  // namespace
}  // namespace kt_amx
