// Real instructions, as the compiler and the assembler emit them, do what the models say. On a host
// with AMX this runs on the hardware and is the check of the models.
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <cerrno>
#include <string>
#include <vector>

#include "amx/interpreter.h"
#include "amx/tile_instructions.h"

namespace kt_amx {
namespace {

constexpr Product kProducts[] = {Product::kSignedSigned, Product::kSignedUnsigned,
                                 Product::kUnsignedSigned, Product::kUnsignedUnsigned,
                                 Product::kBf16};

class Instructions : public testing::Test {
 protected:
  void SetUp() override { ASSERT_EQ(request_tiles(), 0); }
  void TearDown() override { _tile_release(); }

  std::mt19937 random_{7};
};

void expect_count(const char* name, uint64_t value) {
  if (kt_amx_is_emulating()) {
    EXPECT_EQ(kt_amx_counter(name), value) << name;
  }
}

TEST_F(Instructions, ProductsOfEveryShape) {
  for (int m = 1; m <= 16; ++m) {
    for (int n = 1; n <= 16; ++n) {
      for (int k = 1; k <= 16; ++k) {
        const TileConfig config = config_of_product(m, n, k);
        const Floats floats = static_cast<Floats>((m + n + k) % 5);
        for (const Product product : kProducts) {
          const bool is_float = product == Product::kBf16;
          const TileBytes a = is_float ? random_bf16_tile(floats, random_) : random_bytes(random_);
          const TileBytes b = is_float ? random_bf16_tile(floats, random_) : random_bytes(random_);
          const TileBytes c = random_float_tile(floats, random_);
          ASSERT_TRUE(same_sums(product, executed_product(product, config, c, a, b),
                                reference_product(product, config, c, a, b)))
              << "product " << static_cast<int>(product) << " m " << m << " n " << n << " k " << k;
        }
      }
    }
  }
}

TEST_F(Instructions, SumsStayInTheTileOverManyProducts) {
  const TileConfig config = config_of_product(16, 16, 16);
  for (const Product product : kProducts) {
    TileBytes expected;
    load_config(config);
    _tile_zero(0);
    for (int step = 0; step < 50; ++step) {
      const TileBytes a = random_bf16_tile(Floats::kTame, random_);
      const TileBytes b = random_bf16_tile(Floats::kTame, random_);
      barrier();
      _tile_loadd(1, a.bytes.data(), 64);
      _tile_loadd(2, b.bytes.data(), 64);
      multiply(product);
      expected = reference_product(product, config, expected, a, b);
    }
    EXPECT_TRUE(same_sums(product, stored_sums(), expected)) << static_cast<int>(product);
  }
}

TEST_F(Instructions, TheConfigurationIsStoredAndReleased) {
  const TileConfig config = config_of_product(3, 5, 7);
  const TileConfig none;
  load_config(config);
  TileConfig stored = stored_config();
  EXPECT_EQ(std::memcmp(&stored, &config, sizeof stored), 0);
  _tile_release();
  stored = stored_config();
  EXPECT_EQ(std::memcmp(&stored, &none, sizeof stored), 0);
}

// Loads rows at `address` with a stride into tile 0; how, is what is tested.
using Load = void (*)(const char* address, int64_t stride);

// By a base register, with the stride halved and a displacement of 8 bits.
#define KT_BY_BASE(name)                                                \
  [](const char* address, int64_t stride) {                             \
    __asm__ volatile("xchg %%rax, %%" name "\n tileloadd -0x40(%%" name \
                     ", %%rcx, 2), %%tmm0\n xchg %%rax, %%" name        \
                     :                                                  \
                     : "a"(address + 0x40), "c"(stride / 2)             \
                     : "memory");                                       \
  }

// By an index register, a quarter of the stride, with a displacement of 32 bits.
#define KT_BY_INDEX(name)                                                       \
  [](const char* address, int64_t stride) {                                     \
    __asm__ volatile("xchg %%rcx, %%" name "\n tileloadd 0x1000(%%rax, %%" name \
                     ", 4), %%tmm0\n xchg %%rcx, %%" name                       \
                     :                                                          \
                     : "a"(address - 0x1000), "c"(stride / 4)                   \
                     : "memory");                                               \
  }

const Load kLoads[] = {
    KT_BY_BASE("rax"),
    KT_BY_BASE("rdx"),
    KT_BY_BASE("rbx"),
    KT_BY_BASE("rbp"),
    KT_BY_BASE("rsi"),
    KT_BY_BASE("rdi"),
    KT_BY_BASE("r8"),
    KT_BY_BASE("r9"),
    KT_BY_BASE("r10"),
    KT_BY_BASE("r11"),
    KT_BY_BASE("r12"),
    KT_BY_BASE("r13"),
    KT_BY_BASE("r14"),
    KT_BY_BASE("r15"),
    KT_BY_INDEX("rcx"),
    KT_BY_INDEX("rdx"),
    KT_BY_INDEX("rbx"),
    KT_BY_INDEX("rbp"),
    KT_BY_INDEX("rsi"),
    KT_BY_INDEX("rdi"),
    KT_BY_INDEX("r8"),
    KT_BY_INDEX("r9"),
    KT_BY_INDEX("r10"),
    KT_BY_INDEX("r11"),
    KT_BY_INDEX("r12"),
    KT_BY_INDEX("r13"),
    KT_BY_INDEX("r14"),
    KT_BY_INDEX("r15"),
    // base rcx, index rax
    [](const char* address, int64_t stride) {
      __asm__ volatile("tileloadd (%%rcx, %%rax, 1), %%tmm0"
                       :
                       : "c"(address), "a"(stride)
                       : "memory");
    },
    // the streaming load; a scale of 8
    [](const char* address, int64_t stride) {
      __asm__ volatile("tileloaddt1 (%0, %1, 8), %%tmm0"
                       :
                       : "r"(address), "r"(stride / 8)
                       : "memory");
    },
};

TEST_F(Instructions, LoadsByEveryRegister) {
  const TileConfig config = config_of_product(16, 16, 16);
  std::vector<uint8_t> memory(4096);
  for (uint8_t& byte : memory) byte = static_cast<uint8_t>(random_());
  for (const int64_t stride : {64, 128, 192, 0, -128}) {
    const uint8_t* const first = memory.data() + (stride < 0 ? 15 * 128 : 0);
    TileBytes expected;
    for (int row = 0; row < 16; ++row) {
      std::memcpy(&expected.bytes[64 * row], first + row * stride, 64);
    }
    for (const Load& load : kLoads) {
      load_config(config);
      load(reinterpret_cast<const char*>(first), stride);
      EXPECT_EQ(stored_sums(), expected) << "load " << &load - kLoads << " stride " << stride;
    }
  }
}

TEST_F(Instructions, AddressesWithoutIndexOrBaseOnTheStackAndNearTheCode) {
  const TileBytes memory = random_bytes(random_);
  const uint8_t* const address = memory.bytes.data();
  load_config(config_of_product(4, 2, 2));
  TileBytes repeated;  // without an index register the stride is zero
  for (int row = 0; row < 4; ++row) repeated.set(row, 0, memory.at<uint64_t>(0, 0));
  __asm__ volatile("tileloadd (%0), %%tmm0" : : "r"(address) : "memory");
  EXPECT_EQ(stored_sums(), repeated);

  TileBytes strided;  // without a base the index is address and stride at once
  load_config(config_of_product(1, 2, 2));
  strided.set(0, 0, memory.at<uint64_t>(0, 0));
  const uint64_t absolute = 0x10000000;
  void* const low = mmap(reinterpret_cast<void*>(absolute), 4096, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
  ASSERT_EQ(low, reinterpret_cast<void*>(absolute));
  std::memcpy(low, address, 64);
  __asm__ volatile("tileloadd 0x10000000(, %0, 1), %%tmm0" : : "r"(uint64_t{0}) : "memory");
  EXPECT_EQ(stored_sums(), strided);
  _tile_zero(0);
  __asm__ volatile("tileloadd 0x10000000, %%tmm0" : : : "memory");
  EXPECT_EQ(stored_sums(), strided);
  munmap(low, 4096);

  _tile_zero(0);
  // 128: the red zone below the stack pointer
  __asm__ volatile(
      "lea -128(%%rsp), %%rsp\n push %0\n tileloadd (%%rsp, %1, 1), %%tmm0\n pop %0\n"
      "lea 128(%%rsp), %%rsp"
      :
      : "r"(memory.at<uint64_t>(0, 0)), "r"(int64_t{64})
      : "memory");
  EXPECT_EQ(stored_sums(), strided);

  __asm__ volatile(
      "jmp 2f\n .balign 64\n 1: .byte 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 12\n"
      ".zero 31\n .byte 9\n .zero 15\n 2: ldtilecfg 1b(%%rip)"
      :
      :
      : "memory");
  const TileConfig stored = stored_config();
  EXPECT_EQ(stored.rows[0], 9);
  EXPECT_EQ(stored.colsb[0], 12);
}

TEST_F(Instructions, StoresWithAStrideTouchTheShapeAlone) {
  load_config(config_of_product(3, 2, 4));
  const TileBytes source = random_bytes(random_);
  barrier();
  _tile_loadd(0, source.bytes.data(), 64);
  const TileBytes before = random_bytes(random_);
  TileBytes memory = before;
  TileBytes expected = before;
  for (int row = 0; row < 3; ++row) {
    expected.set(8 - 2 * row, 0, source.at<uint64_t>(row, 0));
  }
  barrier();
  __asm__ volatile("tilestored %%tmm0, 0x200(%0, %1, 4)"
                   :
                   : "r"(memory.bytes.data()), "r"(int64_t{-32})
                   : "memory");
  EXPECT_EQ(memory, expected);
}

TEST_F(Instructions, OtherRegistersAndFlagsStayAsTheyWere) {
  load_config(config_of_product(16, 16, 16));
  const TileBytes before = random_bytes(random_);
  TileBytes after;
  uint8_t carry = 0;
  uint8_t zero = 1;
  errno = ERANGE;
  __asm__ volatile(
      "vmovups (%2), %%ymm0\n vmovups 32(%2), %%ymm15\n"
      "xor %%eax, %%eax\n cmp $1, %%eax\n"  // carry set, zero clear
      "tilezero %%tmm0\n tdpbssd %%tmm2, %%tmm1, %%tmm0\n"
      "setc %0\n setz %1\n vmovups %%ymm0, (%3)\n vmovups %%ymm15, 32(%3)"
      : "=&q"(carry), "=&q"(zero)
      : "r"(before.bytes.data()), "r"(after.bytes.data())
      : "rax", "xmm0", "xmm15", "cc", "memory");
  EXPECT_EQ(carry, 1);
  EXPECT_EQ(zero, 0);
  EXPECT_EQ(errno, ERANGE);
  EXPECT_EQ(std::memcmp(after.bytes.data(), before.bytes.data(), 64), 0);
}

TEST_F(Instructions, AreCounted) {
  const TileBytes memory = random_bytes(random_);
  kt_amx_counters_reset();
  load_config(config_of_product(3, 5, 7));  // c 60 bytes, a 84, b 140
  load_operands(memory, memory, memory);
  for (int product = 0; product < 5; ++product) {
    for (int i = 0; i <= product; ++i) multiply(kProducts[product]);
  }
  stored_sums();
  stored_config();
  _tile_zero(0);
  _tile_zero(1);
  _tile_release();
  expect_count("configs", 1);
  expect_count("config_stores", 1);
  expect_count("loads", 2);
  expect_count("streaming_loads", 1);
  expect_count("stores", 1);
  expect_count("zeros", 2);
  expect_count("releases", 1);
  expect_count("tdpbssd", 1);
  expect_count("tdpbsud", 2);
  expect_count("tdpbusd", 3);
  expect_count("tdpbuud", 4);
  expect_count("tdpbf16ps", 5);
  expect_count("bytes_loaded", 60 + 84 + 140);
  expect_count("streaming_bytes_loaded", 140);
  expect_count("bytes_stored", 60);
  EXPECT_EQ(kt_amx_counter("loads of anything"), UINT64_MAX);
  kt_amx_counters_reset();
  expect_count("tdpbf16ps", 0);
  expect_count("bytes_loaded", 0);
}

TEST_F(Instructions, ThatFollowOneAnotherCostOneTrap) {
  load_config(config_of_product(16, 16, 16));
  kt_amx_counters_reset();
  __asm__ volatile(
      "tilezero %%tmm0\n tilezero %%tmm1\n tdpbssd %%tmm2, %%tmm1, %%tmm0\n nop\n"
      "tilezero %%tmm0\n tilezero %%tmm1" ::
          : "memory");
  expect_count("traps", 2);
  expect_count("zeros", 4);
}

}  // namespace
}  // namespace kt_amx
