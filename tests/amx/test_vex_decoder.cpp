// The decoder against the assembler: every register, every form of address, and what is not ours.
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <cstring>
#include <initializer_list>
#include <vector>

#include "amx/vex_decoder.h"

// Tables of code, in the order in which the tests below count.
__asm__(R"(
  .pushsection .rodata

kt_code_sib:
  .irp base, rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15
    .irp index, rax, rcx, rdx, rbx, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15
      .irp scale, 1, 2, 4, 8
        .irp disp, 0, 0x12, -0x80, 0x12345, -0x7fffffff
          tileloadd \disp(%\base, %\index, \scale), %tmm5
          ldtilecfg \disp(%\base, %\index, \scale)
          {vex} vpdpbusd \disp(%\base, %\index, \scale), %ymm3, %ymm12
        .endr
      .endr
    .endr
  .endr
kt_code_sib_end:

kt_code_base:
  .irp base, rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15
    .irp disp, 0, 0x12, -0x80, 0x12345, -0x7fffffff
      tilestored %tmm2, \disp(%\base)
      sttilecfg \disp(%\base)
      {vex} vpdpbusds \disp(%\base), %xmm15, %xmm0
    .endr
  .endr
kt_code_base_end:

kt_code_no_base:
  .irp index, rax, rcx, rdx, rbx, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15
    .irp scale, 1, 2, 4, 8
      tileloaddt1 0x1234(, %\index, \scale), %tmm7
      sttilecfg -0x1234(, %\index, \scale)
    .endr
  .endr
kt_code_no_base_end:

kt_code_absolute:
  tileloadd 0x1234, %tmm0
  ldtilecfg -0x10
  ldtilecfg 0x1234(%rip)
  sttilecfg -0x10(%rip)
  {vex} vpdpbusd 0x1234(%rip), %ymm1, %ymm2
kt_code_absolute_end:

kt_code_products:
  .irp c, 0, 1, 2, 3, 4, 5, 6, 7
    .irp a, 0, 1, 2, 3, 4, 5, 6, 7
      .irp b, 0, 1, 2, 3, 4, 5, 6, 7
        .if (\c - \a) && (\c - \b) && (\a - \b)
          tdpbssd %tmm\b, %tmm\a, %tmm\c
          tdpbsud %tmm\b, %tmm\a, %tmm\c
          tdpbusd %tmm\b, %tmm\a, %tmm\c
          tdpbuud %tmm\b, %tmm\a, %tmm\c
          tdpbf16ps %tmm\b, %tmm\a, %tmm\c
        .endif
      .endr
    .endr
  .endr
kt_code_products_end:

kt_code_tiles:
  .irp tile, 0, 1, 2, 3, 4, 5, 6, 7
    tilezero %tmm\tile
    tileloadd (%rax, %rcx, 1), %tmm\tile
    tileloaddt1 (%rax, %rcx, 1), %tmm\tile
    tilestored %tmm\tile, (%rax, %rcx, 1)
  .endr
  tilerelease
kt_code_tiles_end:

kt_code_vectors:
  .irp d, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
    .irp u, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
      .irp s, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
        {vex} vpdpbusd %ymm\s, %ymm\u, %ymm\d
        {vex} vpdpbusds %xmm\s, %xmm\u, %xmm\d
      .endr
    .endr
  .endr
kt_code_vectors_end:

kt_code_foreign:
  ud2
  nop
  vpmaddwd %ymm1, %ymm2, %ymm3
  {evex} vpdpbusd %ymm1, %ymm2, %ymm3
  {vex} vpdpwssd %ymm1, %ymm2, %ymm3
  vpshufb %ymm1, %ymm2, %ymm3
  vfmadd231ps %ymm1, %ymm2, %ymm3
kt_code_foreign_end:
  .popsection
)");

#define KT_CODE(name)                                                              \
  extern "C" const uint8_t kt_code_##name[] __attribute__((visibility("hidden"))); \
  extern "C" const uint8_t kt_code_##name##_end[] __attribute__((visibility("hidden")))
KT_CODE(sib);
KT_CODE(base);
KT_CODE(no_base);
KT_CODE(absolute);
KT_CODE(products);
KT_CODE(tiles);
KT_CODE(vectors);
KT_CODE(foreign);

namespace kt_amx {
namespace {

constexpr int kRsp = 4;
constexpr int32_t kDisplacements[] = {0, 0x12, -0x80, 0x12345, -0x7fffffff};
constexpr Product kProducts[] = {Product::kSignedSigned, Product::kSignedUnsigned,
                                 Product::kUnsignedSigned, Product::kUnsignedUnsigned,
                                 Product::kBf16};

// Two pages of which the second cannot be read; code is looked at where it ends with the first.
class PageEnd {
 public:
  PageEnd() {
    pages_ = static_cast<uint8_t*>(
        mmap(nullptr, 2 * kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(pages_ + kPage, kPage, PROT_NONE);
  }
  ~PageEnd() { munmap(pages_, 2 * kPage); }
  std::optional<Instruction> decode_at_end(const uint8_t* code, int length) {
    uint8_t* const place = pages_ + kPage - length;
    std::memcpy(place, code, length);
    return decode(place);
  }

 private:
  static constexpr size_t kPage = 4096;
  uint8_t* pages_;
};

// Reads a table of code instruction by instruction.
class Listing {
 public:
  Listing(const uint8_t* begin, const uint8_t* end) : code_(begin), end_(end) {}
  ~Listing() { EXPECT_EQ(code_, end_) << "the table holds more than was expected"; }

  // The next instruction is `expected`, whatever its length, which is given by the one after it.
  void expect(Instruction expected) {
    if (failed_) return;
    failed_ = code_ >= end_;
    ASSERT_FALSE(failed_) << "the table holds " << index_ << " instructions only";
    const std::optional<Instruction> found = decode(code_);
    if (found) expected.length = found->length;
    failed_ = !found || !(*found == expected);
    ASSERT_FALSE(failed_) << "instruction " << index_ << " begins with "
                          << testing::PrintToString(std::vector<int>(code_, code_ + 10));
    ASSERT_TRUE(page_.decode_at_end(code_, found->length) == found) << index_;
    code_ += found->length;
    ++index_;
  }

 private:
  const uint8_t* code_;
  const uint8_t* end_;
  int index_ = 0;
  bool failed_ = false;
  PageEnd page_;
};

TEST(VexDecoder, AddressesWithBaseAndIndex) {
  Listing listing(kt_code_sib, kt_code_sib_end);
  for (int base = 0; base < 16; ++base) {
    for (int index = 0; index < 16; ++index) {
      if (index == kRsp) continue;
      for (int shift = 0; shift < 4; ++shift) {
        for (const int32_t displacement : kDisplacements) {
          const Address address = {base, index, shift, displacement};
          listing.expect({.operation = Operation::kLoad, .reg = 5, .address = address});
          listing.expect({.operation = Operation::kLoadConfig, .address = address});
          listing.expect({.operation = Operation::kDot,
                          .reg = 12,
                          .vvvv = 3,
                          .is_256 = true,
                          .address = address});
        }
      }
    }
  }
}

TEST(VexDecoder, AddressesWithBaseAlone) {
  Listing listing(kt_code_base, kt_code_base_end);
  for (int base = 0; base < 16; ++base) {
    for (const int32_t displacement : kDisplacements) {
      const Address address = {.base = base, .displacement = displacement};
      listing.expect({.operation = Operation::kStore, .reg = 2, .address = address});
      listing.expect({.operation = Operation::kStoreConfig, .address = address});
      listing.expect({.operation = Operation::kDotSaturating, .vvvv = 15, .address = address});
    }
  }
}

TEST(VexDecoder, AddressesWithoutBase) {
  Listing listing(kt_code_no_base, kt_code_no_base_end);
  for (int index = 0; index < 16; ++index) {
    if (index == kRsp) continue;
    for (int shift = 0; shift < 4; ++shift) {
      listing.expect({.operation = Operation::kStreamingLoad,
                      .reg = 7,
                      .address = {kNoRegister, index, shift, 0x1234}});
      listing.expect(
          {.operation = Operation::kStoreConfig, .address = {kNoRegister, index, shift, -0x1234}});
    }
  }
}

TEST(VexDecoder, AbsoluteAddressesAndThoseFromTheInstructionPointer) {
  Listing listing(kt_code_absolute, kt_code_absolute_end);
  const Address near_code = {.base = kInstructionPointer, .displacement = 0x1234};
  listing.expect({.operation = Operation::kLoad, .address = {.displacement = 0x1234}});
  listing.expect({.operation = Operation::kLoadConfig, .address = {.displacement = -0x10}});
  listing.expect({.operation = Operation::kLoadConfig, .address = near_code});
  listing.expect({.operation = Operation::kStoreConfig,
                  .address = {.base = kInstructionPointer, .displacement = -0x10}});
  listing.expect(
      {.operation = Operation::kDot, .reg = 2, .vvvv = 1, .is_256 = true, .address = near_code});
}

TEST(VexDecoder, ProductsOfAllTiles) {
  Listing listing(kt_code_products, kt_code_products_end);
  for (int c = 0; c < 8; ++c) {
    for (int a = 0; a < 8; ++a) {
      for (int b = 0; b < 8; ++b) {
        if (c == a || c == b || a == b) continue;
        for (const Product product : kProducts) {
          listing.expect({.operation = Operation::kMultiply,
                          .product = product,
                          .reg = c,
                          .rm = a,
                          .vvvv = b});
        }
      }
    }
  }
}

TEST(VexDecoder, InstructionsOnAllTiles) {
  Listing listing(kt_code_tiles, kt_code_tiles_end);
  const Address address = {.base = 0, .index = 1};
  for (int tile = 0; tile < 8; ++tile) {
    listing.expect({.operation = Operation::kZero, .reg = tile, .rm = 0});
    listing.expect({.operation = Operation::kLoad, .reg = tile, .address = address});
    listing.expect({.operation = Operation::kStreamingLoad, .reg = tile, .address = address});
    listing.expect({.operation = Operation::kStore, .reg = tile, .address = address});
  }
  listing.expect({.operation = Operation::kRelease, .rm = 0});
}

TEST(VexDecoder, AllVectorRegisters) {
  Listing listing(kt_code_vectors, kt_code_vectors_end);
  for (int d = 0; d < 16; ++d) {
    for (int u = 0; u < 16; ++u) {
      for (int s = 0; s < 16; ++s) {
        listing.expect(
            {.operation = Operation::kDot, .reg = d, .rm = s, .vvvv = u, .is_256 = true});
        listing.expect({.operation = Operation::kDotSaturating, .reg = d, .rm = s, .vvvv = u});
      }
    }
  }
}

TEST(VexDecoder, OtherInstructionsAreNotOurs) {
  // at every byte, so also in the middle of an instruction
  for (const uint8_t* code = kt_code_foreign; code < kt_code_foreign_end; ++code) {
    EXPECT_FALSE(decode(code)) << code - kt_code_foreign;
  }
}

TEST(VexDecoder, MalformedEncodingsAreNotOurs) {
  using Bytes = std::vector<uint8_t>;
  const auto ours = [](Bytes code) {
    code.resize(16);
    return decode(code.data()).has_value();
  };
  const Bytes load = {0xc4, 0xe2, 0x7b, 0x4b, 0x04, 0x08};
  const Bytes product = {0xc4, 0xe2, 0x6b, 0x5e, 0xc1};
  const Bytes release = {0xc4, 0xe2, 0x78, 0x49, 0xc0};
  const Bytes zero = {0xc4, 0xe2, 0x7b, 0x49, 0xc0};
  const Bytes config = {0xc4, 0xe2, 0x78, 0x49, 0x00};
  const auto changed = [](Bytes code, int byte, int mask) {
    code[byte] = static_cast<uint8_t>(code[byte] ^ mask);
    return code;
  };
  for (const Bytes& code : {load, product, release, zero, config}) {
    ASSERT_TRUE(ours(code));
    EXPECT_FALSE(ours(changed(code, 0, 0x01))) << "two-byte prefix";
    EXPECT_FALSE(ours(changed(code, 1, 0x01))) << "map";
    EXPECT_FALSE(ours(changed(code, 1, 0x80))) << "R: a register above 7";
    EXPECT_FALSE(ours(changed(code, 2, 0x80))) << "W";
    EXPECT_FALSE(ours(changed(code, 2, 0x40))) << "a bit of vvvv";
    EXPECT_FALSE(ours(changed(code, 2, 0x04))) << "L";
    EXPECT_FALSE(ours(changed(code, 3, 0x02))) << "opcode";
  }
  EXPECT_FALSE(ours(changed(product, 1, 0x20))) << "B: a tile above 7";
  EXPECT_FALSE(ours(changed(product, 4, 0xc0))) << "a product from memory";
  EXPECT_FALSE(ours(changed(load, 4, 0x01))) << "a load without SIB";
  EXPECT_FALSE(ours(changed(load, 4, 0xc0))) << "a load from a tile";
  EXPECT_FALSE(ours(changed(release, 4, 0x01)));
  EXPECT_FALSE(ours(changed(release, 4, 0x08)));
  EXPECT_FALSE(ours(changed(zero, 4, 0x01)));
  EXPECT_FALSE(ours(changed(config, 4, 0x08)));
  EXPECT_FALSE(ours({0xc4, 0xe2, 0x6b, 0x5c, 0xc1})) << "TDPFP16PS";
}

}  // namespace
}  // namespace kt_amx
