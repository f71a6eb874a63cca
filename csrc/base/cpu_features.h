// What this CPU can execute, as a set of feature bits. Reads KT_FORCE_ISA; knows nothing of
// kernels.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace kt {

// A set of features a kernel needs or a host has. Bits are OR-ed.
using IsaSet = uint32_t;
constexpr IsaSet kIsaReference = 0;         // plain x86-64
constexpr IsaSet kIsaAvx2 = 1u << 0;        // AVX2, FMA and F16C, with the OS saving ymm
constexpr IsaSet kIsaAvx512 = 1u << 1;      // F, BW, DQ, VL, with the OS saving zmm and masks
constexpr IsaSet kIsaAvx512Vnni = 1u << 2;  // EVEX vpdpbusd
constexpr IsaSet kIsaAvx512Bf16 = 1u << 3;  // EVEX vdpbf16ps
constexpr IsaSet kIsaAvx512Vbmi = 1u << 4;  // vpermi2b
constexpr IsaSet kIsaAvxVnni = 1u << 5;     // VEX vpdpbusd
constexpr IsaSet kIsaAmxInt8 = 1u << 6;     // tiles with int8, permission granted
constexpr IsaSet kIsaAmxBf16 = 1u << 7;     // tiles with bf16, permission granted

// What the CPU and the operating system say of themselves: all that detection goes by.
struct CpuReadings {
  std::string vendor;        // CPUID leaf 0
  std::string brand;         // leaves 0x80000002..4, without spaces around it
  uint32_t max_leaf = 0;     // leaf 0
  uint32_t leaf1_ecx = 0;    // bit 27: OSXSAVE
  uint32_t leaf7_ebx = 0;    // subleaf 0
  uint32_t leaf7_ecx = 0;    // subleaf 0
  uint32_t leaf7_edx = 0;    // subleaf 0
  uint32_t leaf7_1_eax = 0;  // subleaf 1
  uint64_t xcr0 = 0;         // register states that the system saves; 0 without OSXSAVE
  // errno of the request for AMX tiles, 0 where the kernel granted them; empty: not asked.
  std::optional<int> tile_errno;
};

// Reads them. Asks for the tiles (for the whole process, for good) where CPUID and XCR0 have them;
// with `ask_for_tiles`, anywhere.
CpuReadings read_cpu(bool ask_for_tiles);

// What detect_features() found.
struct Detection {
  IsaSet found = kIsaReference;
  // Which tier of the next higher ones is not counted and why, as a part of a sentence; or what is
  // odd with the found ones. Empty: everything is counted.
  std::string left_out;
};

// A pure function of the readings. AMX counts where the kernel granted tiles, even if CPUID does
// not report it: read_cpu() asks there only when told to.
Detection detect_features(const CpuReadings& readings);

// The features found, the features in use, and why they differ.
struct CpuFeatures {
  IsaSet found = kIsaReference;
  IsaSet chosen = kIsaReference;
  std::string tier;      // "reference", "avx2", "avx512" or "amx": highest tier of `chosen`
  std::string reason;    // one sentence: how `chosen` came about
  std::string cpu_name;  // brand string
  bool forced = false;   // KT_FORCE_ISA had a say
};

// Names of the set bits in ascending order, e.g. "avx2 avx512 avx512vnni"; "reference" for the
// empty set.
std::string isa_name(IsaSet isa);

// Tier of a set: the name of the highest of reference < avx2 < avx512 < amx it holds.
std::string isa_tier(IsaSet isa);

// Applies a KT_FORCE_ISA value to what was found.
//
// Grammar  tier[,-feature]...   tiers reference avx2 avx512 amx; features as isa_name prints them,
//          with or without the "avx512" prefix ("-vnni" and "-avx512vnni" are the same). A tier
//          allows every feature at or below it that the host has. Empty or null: everything found.
// Errors   kt::Error naming the value and the allowed words, or a tier the host lacks.
CpuFeatures choose_features(IsaSet found, const char* force);

// The same for what detect_features() finds in the readings, with the CPU's name, and with what is
// left out in the reason.
CpuFeatures choose_features(const CpuReadings& readings, const char* force);

// The readings of this host, made once. KT_FORCE_ISA=amx asks for the tiles whatever CPUID says.
// Thread-safe.
const CpuReadings& cpu_readings();

// choose_features() of cpu_readings() and KT_FORCE_ISA, made once; throws what that throws on every
// call. Thread-safe.
const CpuFeatures& cpu_features();

}  // namespace kt
