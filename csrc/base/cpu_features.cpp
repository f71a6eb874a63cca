#include "base/cpu_features.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <sstream>
#include <string_view>
#include <system_error>

#include "base/check.h"

namespace kt {
namespace {

// `needs` is what kernels of the feature rely on beside it: AMX kernels finish their tiles with
// AVX-512, and everything above AVX2 calls AVX2 code for its tails.
struct Feature {
  IsaSet bit;
  const char* name;
  const char* short_name;  // without "avx512"; the same as `name` where that would be empty
  IsaSet needs;
};
constexpr Feature kFeatures[] = {
    {kIsaAvx2, "avx2", "avx2", 0},
    {kIsaAvx512, "avx512", "avx512", kIsaAvx2},
    {kIsaAvx512Vnni, "avx512vnni", "vnni", kIsaAvx512},
    {kIsaAvx512Bf16, "avx512bf16", "bf16", kIsaAvx512},
    {kIsaAvx512Vbmi, "avx512vbmi", "vbmi", kIsaAvx512},
    {kIsaAvxVnni, "avxvnni", "avxvnni", kIsaAvx2},
    {kIsaAmxInt8, "amxint8", "amxint8", kIsaAvx512},
    {kIsaAmxBf16, "amxbf16", "amxbf16", kIsaAvx512},
};

struct Tier {
  const char* name;
  IsaSet marks;   // any of these bits puts a set into the tier
  IsaSet allows;  // every feature at or below the tier
};
constexpr IsaSet kAvx2Tier = kIsaAvx2 | kIsaAvxVnni;
constexpr IsaSet kAvx512Tier =
    kAvx2Tier | kIsaAvx512 | kIsaAvx512Vnni | kIsaAvx512Bf16 | kIsaAvx512Vbmi;
constexpr IsaSet kAmxTier = kAvx512Tier | kIsaAmxInt8 | kIsaAmxBf16;
constexpr Tier kTiers[] = {
    {"reference", kIsaReference, kIsaReference},
    {"avx2", kIsaAvx2, kAvx2Tier},
    {"avx512", kIsaAvx512, kAvx512Tier},
    {"amx", kIsaAmxInt8 | kIsaAmxBf16, kAmxTier},
};
constexpr int kNumTiers = static_cast<int>(std::size(kTiers));

int tier_index(IsaSet isa) {
  int index = kNumTiers - 1;
  while (index > 0 && (isa & kTiers[index].marks) == 0) --index;
  return index;
}

// Drops features whose needs are gone. One pass is enough: a need stands before what needs it.
IsaSet drop_dependent(IsaSet isa) {
  for (const Feature& feature : kFeatures) {
    if ((isa & feature.needs) != feature.needs) isa &= ~feature.bit;
  }
  return isa;
}

constexpr const char* kAllowedWords =
    "a tier (reference, avx2, avx512, amx), then removed features, each behind a comma: -avx2, "
    "-avx512, -avx512vnni or -vnni, -avx512bf16 or -bf16, -avx512vbmi or -vbmi, -avxvnni, "
    "-amxint8, -amxbf16";

int parse_tier(std::string_view word, const char* force) {
  for (int index = 0; index < kNumTiers; ++index) {
    if (word == kTiers[index].name) return index;
  }
  KT_CHECK(false, "KT_FORCE_ISA=\"" << force << "\" starts with \"" << word
                                    << "\", which is no tier; give " << kAllowedWords << ".");
  return 0;
}

IsaSet parse_removed(std::string_view word, const char* force) {
  for (const Feature& feature : kFeatures) {
    if (!word.empty() && word.front() == '-' &&
        (word.substr(1) == feature.name || word.substr(1) == feature.short_name)) {
      return feature.bit;
    }
  }
  KT_CHECK(false, "KT_FORCE_ISA=\"" << force << "\" has the unknown word \"" << word << "\"; give "
                                    << kAllowedWords << ".");
  return 0;
}

struct CpuidLeaf {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

// All zero where the CPU does not have the leaf.
CpuidLeaf cpuid(uint32_t leaf, uint32_t subleaf) {
  CpuidLeaf regs;
  if (__get_cpuid_count(leaf, subleaf, &regs.eax, &regs.ebx, &regs.ecx, &regs.edx) == 0) return {};
  return regs;
}

bool bit(uint32_t word, int index) { return ((word >> index) & 1u) != 0; }

// Which register states the operating system saves. Needs OSXSAVE.
uint64_t read_xcr0() {
  uint32_t low = 0;
  uint32_t high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t{high} << 32) | low;
}

// The text in `count` registers.
std::string register_text(const uint32_t* words, size_t count) {
  std::string text(count * sizeof *words, '\0');
  std::memcpy(text.data(), words, text.size());
  return text;
}

std::string vendor_string() {
  const CpuidLeaf regs = cpuid(0, 0);
  const uint32_t words[3] = {regs.ebx, regs.edx, regs.ecx};
  return register_text(words, 3);
}

std::string brand_string() {
  if (cpuid(0x80000000u, 0).eax < 0x80000004u) return "unknown CPU";
  std::string text;
  for (uint32_t part = 0; part < 3; ++part) {
    const CpuidLeaf regs = cpuid(0x80000002u + part, 0);
    const uint32_t words[4] = {regs.eax, regs.ebx, regs.ecx, regs.edx};
    text += register_text(words, 4);
  }
  text.resize(std::strlen(text.c_str()));
  const size_t first = text.find_first_not_of(' ');
  if (first == std::string::npos) return "unknown CPU";
  return text.substr(first, text.find_last_not_of(' ') - first + 1);
}

// Linux gives the 8 KiB of tile registers only to processes that ask (Documentation/arch/x86/
// xstate.rst); granted once, every thread of the process has them. Returns 0 or the errno. Through
// libc's syscall(), which a test can interpose.
int request_tiles() {
  constexpr long kArchReqXcompPerm = 0x1023;
  constexpr long kXfeatureXtiledata = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtiledata) == 0 ? 0 : errno;
}

// States of XCR0.
constexpr uint64_t kYmmState = 0x6;       // SSE and AVX halves
constexpr uint64_t kZmmState = 0xe6;      // and masks, upper halves, upper registers
constexpr uint64_t kTileState = 0x60000;  // tile configuration and data

struct CpuidBit {
  uint32_t CpuReadings::* word;
  int index;
  const char* name;  // as /proc/cpuinfo has it
  bool in(const CpuReadings& readings) const { return bit(readings.*word, index); }
};
constexpr CpuidBit kOsxsave = {&CpuReadings::leaf1_ecx, 27, "osxsave"};
constexpr CpuidBit kAvx2Bits[] = {{&CpuReadings::leaf1_ecx, 28, "avx"},
                                  {&CpuReadings::leaf1_ecx, 12, "fma"},
                                  {&CpuReadings::leaf1_ecx, 29, "f16c"},
                                  {&CpuReadings::leaf7_ebx, 5, "avx2"}};
constexpr CpuidBit kAvxVnniBit = {&CpuReadings::leaf7_1_eax, 4, "avx_vnni"};
constexpr CpuidBit kAvx512Bits[] = {{&CpuReadings::leaf7_ebx, 16, "avx512f"},
                                    {&CpuReadings::leaf7_ebx, 17, "avx512dq"},
                                    {&CpuReadings::leaf7_ebx, 30, "avx512bw"},
                                    {&CpuReadings::leaf7_ebx, 31, "avx512vl"}};
constexpr CpuidBit kVnniBit = {&CpuReadings::leaf7_ecx, 11, "avx512_vnni"};
constexpr CpuidBit kBf16Bit = {&CpuReadings::leaf7_1_eax, 5, "avx512_bf16"};
constexpr CpuidBit kVbmiBit = {&CpuReadings::leaf7_ecx, 1, "avx512vbmi"};
constexpr CpuidBit kTileBit = {&CpuReadings::leaf7_edx, 24, "amx_tile"};
constexpr CpuidBit kTileInt8Bit = {&CpuReadings::leaf7_edx, 25, "amx_int8"};
constexpr CpuidBit kTileBf16Bit = {&CpuReadings::leaf7_edx, 22, "amx_bf16"};

// What CPUID or XCR0 lacks for a tier, as a part of a sentence; empty where both have all of it.
template <size_t kCount>
std::string lack(const CpuReadings& readings, const CpuidBit (&bits)[kCount], uint64_t state) {
  std::string missing;
  for (const CpuidBit& wanted : bits) {
    if (!wanted.in(readings)) missing += (missing.empty() ? "" : ", ") + std::string(wanted.name);
  }
  if (!missing.empty()) return "CPUID does not report " + missing;
  if ((readings.xcr0 & state) == state) return "";
  std::ostringstream text;
  text << "XCR0 is 0x" << std::hex << readings.xcr0 << " and lacks 0x" << (state & ~readings.xcr0);
  return text.str();
}

std::string lack_of_avx2(const CpuReadings& readings) {
  if (kOsxsave.in(readings)) return lack(readings, kAvx2Bits, kYmmState);
  return "the operating system saves no vector registers (CPUID does not report osxsave)";
}

// Whether tiles may be used is the kernel's word. CPUID and XCR0 only explain why it was not asked.
std::string lack_of_tiles(const CpuReadings& readings) {
  if (!readings.tile_errno.has_value()) {
    constexpr CpuidBit kTileBits[] = {kTileBit};
    const std::string text = lack(readings, kTileBits, kTileState);
    if (text.empty()) return "the kernel was not asked for tiles";
    if (!kTileBit.in(readings)) return text;
    return text +
           ", the tiles, which take Linux 5.16 or newer and a hypervisor that passes them on";
  }
  if (*readings.tile_errno != 0) {
    const std::string refusal = "the kernel does not grant tiles (errno " +
                                std::to_string(*readings.tile_errno) + ", " +
                                std::generic_category().message(*readings.tile_errno) + ")";
    if (!kTileBit.in(readings)) return refusal + ", which CPUID does not report either (amx_tile)";
    if (*readings.tile_errno == ENOSPC) {
      return refusal + ": a thread's alternate signal stack is too small for them; give it 16 KB";
    }
    return refusal + ", which takes Linux 5.16 or newer and a sandbox that allows arch_prctl";
  }
  const bool any = kTileInt8Bit.in(readings) || kTileBf16Bit.in(readings);
  return kTileBit.in(readings) && !any ? "CPUID does not report amx_int8, amx_bf16" : "";
}

// Whether a KT_FORCE_ISA value asks for tiles: it skips what CPUID says of them, and nothing else.
bool forces_tiles(const char* force) {
  const std::string_view text(force == nullptr ? "" : force);
  return text.substr(0, text.find(',')) == "amx";
}

// `left_out` as in Detection.
CpuFeatures choose(IsaSet found, const std::string& left_out, const char* force) {
  const std::string end = left_out.empty() ? "." : "; " + left_out + ".";
  CpuFeatures features;
  features.found = found;
  if (force == nullptr || *force == '\0') {
    features.chosen = found;
    features.tier = isa_tier(found);
    features.reason =
        "KT_FORCE_ISA is not set, so everything found is used: " + isa_name(found) + end;
    return features;
  }
  features.forced = true;
  const std::string_view text(force);
  size_t word_end = std::min(text.find(','), text.size());
  const int tier = parse_tier(text.substr(0, word_end), force);
  KT_CHECK(tier <= tier_index(found),
           "KT_FORCE_ISA=\"" << force << "\" asks for the tier " << kTiers[tier].name
                             << ", but this host has only: " << isa_name(found) << "; give "
                             << isa_tier(found) << " or a lower tier, or unset it" << end);
  IsaSet chosen = found & kTiers[tier].allows;
  while (word_end < text.size()) {
    const size_t begin = word_end + 1;
    word_end = std::min(text.find(',', begin), text.size());
    chosen &= ~parse_removed(text.substr(begin, word_end - begin), force);
  }
  features.chosen = drop_dependent(chosen);
  features.tier = isa_tier(features.chosen);
  features.reason = "KT_FORCE_ISA=\"" + std::string(force) + "\" leaves " +
                    isa_name(features.chosen) + " of " + isa_name(found) + end;
  return features;
}

}  // namespace

std::string isa_name(IsaSet isa) {
  std::string names;
  for (const Feature& feature : kFeatures) {
    if ((isa & feature.bit) == 0) continue;
    if (!names.empty()) names += ' ';
    names += feature.name;
  }
  return names.empty() ? "reference" : names;
}

std::string isa_tier(IsaSet isa) { return kTiers[tier_index(isa)].name; }

CpuReadings read_cpu(bool ask_for_tiles) {
  CpuReadings readings;
  readings.vendor = vendor_string();
  readings.brand = brand_string();
  readings.max_leaf = cpuid(0, 0).eax;
  readings.leaf1_ecx = cpuid(1, 0).ecx;
  const CpuidLeaf extended = cpuid(7, 0);
  readings.leaf7_ebx = extended.ebx;
  readings.leaf7_ecx = extended.ecx;
  readings.leaf7_edx = extended.edx;
  if (extended.eax >= 1) readings.leaf7_1_eax = cpuid(7, 1).eax;
  if (kOsxsave.in(readings)) readings.xcr0 = read_xcr0();
  const bool has_tiles = kTileBit.in(readings) && (readings.xcr0 & kTileState) == kTileState;
  if (has_tiles || ask_for_tiles) readings.tile_errno = request_tiles();
  return readings;
}

Detection detect_features(const CpuReadings& readings) {
  Detection result;
  std::string lacking = lack_of_avx2(readings);
  if (!lacking.empty()) {
    result.left_out = "not avx2, because " + lacking;
    return result;
  }
  result.found = kIsaAvx2;
  if (kAvxVnniBit.in(readings)) result.found |= kIsaAvxVnni;
  lacking = lack(readings, kAvx512Bits, kZmmState);
  if (!lacking.empty()) {
    result.left_out = "not avx512, because " + lacking;
    return result;
  }
  result.found |= kIsaAvx512;
  if (kVnniBit.in(readings)) result.found |= kIsaAvx512Vnni;
  if (kBf16Bit.in(readings)) result.found |= kIsaAvx512Bf16;
  if (kVbmiBit.in(readings)) result.found |= kIsaAvx512Vbmi;
  lacking = lack_of_tiles(readings);
  if (!lacking.empty()) {
    result.left_out = "not amx, because " + lacking;
  } else if (!kTileBit.in(readings)) {
    result.found |= kIsaAmxInt8 | kIsaAmxBf16;
    result.left_out =
        "amx although CPUID does not report amx_tile, because the kernel grants tiles";
  } else {
    if (kTileInt8Bit.in(readings)) result.found |= kIsaAmxInt8;
    if (kTileBf16Bit.in(readings)) result.found |= kIsaAmxBf16;
  }
  return result;
}

CpuFeatures choose_features(IsaSet found, const char* force) { return choose(found, "", force); }

CpuFeatures choose_features(const CpuReadings& readings, const char* force) {
  const Detection detection = detect_features(readings);
  CpuFeatures features = choose(detection.found, detection.left_out, force);
  features.cpu_name = readings.brand;
  return features;
}

const CpuReadings& cpu_readings() {
  static const CpuReadings readings = read_cpu(forces_tiles(std::getenv("KT_FORCE_ISA")));
  return readings;
}

const CpuFeatures& cpu_features() {
  // An initializer that throws leaves the static unset, so that every call throws.
  static const CpuFeatures features = choose_features(cpu_readings(), std::getenv("KT_FORCE_ISA"));
  return features;
}

}  // namespace kt
