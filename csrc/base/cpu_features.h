// What this CPU can execute, as a set of feature bits. Reads KT_FORCE_ISA; knows nothing of
// kernels.
#pragma once

#include <cstdint>
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

// The features found, the features in use, and why they differ.
struct CpuFeatures {
  IsaSet found = kIsaReference;
  IsaSet chosen = kIsaReference;
  std::string tier;      // "reference", "avx2", "avx512" or "amx": highest tier of `chosen`
  std::string reason;    // one sentence: how `chosen` came about
  std::string cpu_name;  // brand string
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

// Detected once (CPUID, XGETBV, AMX permission) with KT_FORCE_ISA applied; throws what
// choose_features throws on every call. Thread-safe.
const CpuFeatures& cpu_features();

}  // namespace kt
