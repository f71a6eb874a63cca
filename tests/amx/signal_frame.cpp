#include "amx/signal_frame.h"

#include <cpuid.h>

#include <cstring>

namespace kt_amx {
namespace {

// Layout of the XSAVE area in its standard form, which signal frames have (manual, volume 1,
// section 13.4): 16 bytes a register of SSE at 160, the header at 512, the upper halves of AVX at
// 576, those of AVX-512 where CPUID says.
constexpr int kSseOffset = 160;
constexpr int kHeaderOffset = 512;
constexpr int kAvxOffset = 576;
constexpr int kAvx = 2;
constexpr int kZmmHalves = 6;

// Read once, at start-up: CPUID leaves a virtual machine.
uint32_t find_zmm_offset() {
  unsigned size = 0, offset = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(13, kZmmHalves, &size, &offset, &ecx, &edx) != 0 ? offset : 0;
}
const uint32_t kZmmOffset = find_zmm_offset();

}  // namespace

const uint8_t* SignalFrame::code() const {
  return reinterpret_cast<const uint8_t*>(context_->uc_mcontext.gregs[REG_RIP]);
}

void SignalFrame::step_over(int num_bytes) { context_->uc_mcontext.gregs[REG_RIP] += num_bytes; }

uint64_t SignalFrame::general_register(int index) const {
  constexpr int kOrder[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                            REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  return context_->uc_mcontext.gregs[kOrder[index]];
}

void* SignalFrame::memory_of(const Instruction& instruction) const {
  const uint64_t offset = static_cast<uint64_t>(stride_bytes_of(instruction));
  return reinterpret_cast<void*>(base_of(instruction) + offset);
}

void* SignalFrame::first_row_of(const Instruction& instruction) const {
  return reinterpret_cast<void*>(base_of(instruction));
}

uint64_t SignalFrame::base_of(const Instruction& instruction) const {
  const Address& address = instruction.address;
  uint64_t sum = static_cast<uint64_t>(int64_t{address.displacement});
  if (address.base == kInstructionPointer) {
    sum += reinterpret_cast<uint64_t>(code()) + instruction.length;
  } else if (address.base != kNoRegister) {
    sum += general_register(address.base);
  }
  return sum;
}

int64_t SignalFrame::stride_bytes_of(const Instruction& instruction) const {
  const Address& address = instruction.address;
  if (address.index == kNoRegister) return 0;
  return static_cast<int64_t>(general_register(address.index) << address.shift);
}

uint8_t* SignalFrame::saved_state() const {
  return reinterpret_cast<uint8_t*>(context_->uc_mcontext.fpregs);
}

bool SignalFrame::has_saved(int component) const {
  uint64_t saved;
  std::memcpy(&saved, saved_state() + kHeaderOffset, sizeof saved);
  return (saved >> component & 1) != 0;
}

void SignalFrame::read_vector(int index, void* bytes) const {
  char* halves = static_cast<char*>(bytes);
  std::memcpy(halves, saved_state() + kSseOffset + 16 * index, 16);
  std::memset(halves + 16, 0, 16);
  // a component that is not saved is in its initial state, all zero; its bytes mean nothing
  if (has_saved(kAvx)) std::memcpy(halves + 16, saved_state() + kAvxOffset + 16 * index, 16);
}

void SignalFrame::write_vector(int index, const void* bytes, int num_bytes) {
  char halves[32] = {};
  std::memcpy(halves, bytes, num_bytes);
  std::memcpy(saved_state() + kSseOffset + 16 * index, halves, 16);
  if (has_saved(kAvx)) {
    std::memcpy(saved_state() + kAvxOffset + 16 * index, halves + 16, 16);
  }
  if (has_saved(kZmmHalves)) std::memset(saved_state() + kZmmOffset + 32 * index, 0, 32);
}

}  // namespace kt_amx
