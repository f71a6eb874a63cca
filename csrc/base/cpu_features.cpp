#include "base/cpu_features.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <string_view>

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

std::string brand_string() {
  if (cpuid(0x80000000u, 0).eax < 0x80000004u) return "unknown CPU";
  char text[49] = {};
  for (uint32_t part = 0; part < 3; ++part) {
    const CpuidLeaf regs = cpuid(0x80000002u + part, 0);
    const uint32_t words[4] = {regs.eax, regs.ebx, regs.ecx, regs.edx};
    std::memcpy(text + 16 * part, words, sizeof words);
  }
  std::string_view name(text);
  const size_t first = name.find_first_not_of(' ');
  if (first == std::string_view::npos) return "unknown CPU";
  const size_t last = name.find_last_not_of(' ');
  return std::string(name.substr(first, last - first + 1));
}

struct Detection {
  IsaSet found = kIsaReference;
  std::string cpu_name;
  std::string note;  // empty, or why a feature of the CPU was not counted
};

// Linux gives the 8 KiB of tile registers only to processes that ask (Documentation/arch/x86/
// xstate.rst); granted once, every thread of the process has them.
bool request_amx_permission() {
  constexpr int kArchReqXcompPerm = 0x1023;
  constexpr int kXfeatureXtiledata = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtiledata) == 0;
}

Detection detect() {
  constexpr uint64_t kYmmState = 0x6;       // SSE and AVX halves
  constexpr uint64_t kZmmState = 0xe6;      // and masks, upper halves, upper registers
  constexpr uint64_t kTileState = 0x60000;  // tile configuration and data
  Detection result;
  result.cpu_name = brand_string();
  const CpuidLeaf basic = cpuid(1, 0);
  if (!bit(basic.ecx, 27)) return result;  // no OSXSAVE: the OS saves SSE only
  const uint64_t saved = read_xcr0();
  const CpuidLeaf extended = cpuid(7, 0);
  const CpuidLeaf extended1 = extended.eax >= 1 ? cpuid(7, 1) : CpuidLeaf{};

  IsaSet found = 0;
  if ((saved & kYmmState) == kYmmState && bit(basic.ecx, 28) && bit(basic.ecx, 12) &&
      bit(basic.ecx, 29) && bit(extended.ebx, 5)) {
    found |= kIsaAvx2;
    if (bit(extended1.eax, 4)) found |= kIsaAvxVnni;
  }
  if ((saved & kZmmState) == kZmmState && bit(extended.ebx, 16) && bit(extended.ebx, 17) &&
      bit(extended.ebx, 30) && bit(extended.ebx, 31)) {
    found |= kIsaAvx512;
    if (bit(extended.ecx, 11)) found |= kIsaAvx512Vnni;
    if (bit(extended1.eax, 5)) found |= kIsaAvx512Bf16;
    if (bit(extended.ecx, 1)) found |= kIsaAvx512Vbmi;
  }
  const bool tiles = bit(extended.edx, 24);
  if (tiles && (saved & kTileState) == kTileState && request_amx_permission()) {
    if (bit(extended.edx, 25)) found |= kIsaAmxInt8;
    if (bit(extended.edx, 22)) found |= kIsaAmxBf16;
  } else if (tiles) {
    result.note =
        " The CPU has AMX, but the kernel does not grant its tiles: it takes Linux 5.16 "
        "or newer, and a hypervisor or sandbox that passes them on.";
  }
  result.found = drop_dependent(found);
  return result;
}

CpuFeatures detect_and_choose() {
  static const Detection detection = detect();
  CpuFeatures features = choose_features(detection.found, std::getenv("KT_FORCE_ISA"));
  features.cpu_name = detection.cpu_name;
  features.reason += detection.note;
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

CpuFeatures choose_features(IsaSet found, const char* force) {
  CpuFeatures features;
  features.found = found;
  if (force == nullptr || *force == '\0') {
    features.chosen = found;
    features.tier = isa_tier(found);
    features.reason = "KT_FORCE_ISA is not set: everything found is used.";
    return features;
  }
  const std::string_view text(force);
  size_t end = std::min(text.find(','), text.size());
  const int tier = parse_tier(text.substr(0, end), force);
  KT_CHECK(tier <= tier_index(found),
           "KT_FORCE_ISA=\"" << force << "\" asks for the tier " << kTiers[tier].name
                             << ", but this host has only: " << isa_name(found) << "; give "
                             << isa_tier(found) << " or a lower tier, or unset it.");
  IsaSet chosen = found & kTiers[tier].allows;
  while (end < text.size()) {
    const size_t begin = end + 1;
    end = std::min(text.find(',', begin), text.size());
    chosen &= ~parse_removed(text.substr(begin, end - begin), force);
  }
  features.chosen = drop_dependent(chosen);
  features.tier = isa_tier(features.chosen);
  features.reason = "KT_FORCE_ISA=\"" + std::string(force) + "\" leaves " +
                    isa_name(features.chosen) + " of " + isa_name(found) + ".";
  return features;
}

const CpuFeatures& cpu_features() {
  // An initializer that throws leaves the static unset, so that every call throws.
  static const CpuFeatures features = detect_and_choose();
  return features;
}

}  // namespace kt
