// Reads the machine code of the instructions that the interpreter knows: AMX-TILE, AMX-INT8 and
// AMX-BF16, and VPDPBUSD and VPDPBUSDS of AVX-VNNI. Looks at bytes only.
#pragma once

#include <cstdint>
#include <optional>

#include "amx/tile_machine.h"

namespace kt_amx {

enum class Operation {
  kLoadConfig,
  kStoreConfig,
  kLoad,
  kStreamingLoad,  // TILELOADDT1
  kStore,
  kZero,
  kRelease,
  kMultiply,       // reg += rm vvvv
  kDot,            // VPDPBUSD: reg += vvvv (unsigned) rm (signed)
  kDotSaturating,  // VPDPBUSDS
};

constexpr int kNoRegister = -1;
constexpr int kInstructionPointer = 16;  // of the instruction that follows

// base + (index << shift) + displacement. The loads and stores of tiles take base + displacement
// for the first row and index << shift for the stride.
struct Address {
  int base = kNoRegister;  // 0 to 15 as the hardware counts them: rax, rcx, rdx, rbx, rsp, ...
  int index = kNoRegister;
  int shift = 0;
  int32_t displacement = 0;
  bool operator==(const Address&) const = default;
};

struct Instruction {
  Operation operation;
  Product product = Product::kSignedSigned;  // of kMultiply
  int length = 0;                            // in bytes
  int reg = 0;                               // register or tile of ModRM.reg
  int rm = kNoRegister;                      // of ModRM.rm; kNoRegister: in memory, at `address`
  int vvvv = 0;
  bool is_256 = false;
  Address address = {};
  bool operator==(const Instruction&) const = default;
};

// The instruction at `code`; nothing for any other, malformed encodings of these included (they are
// #UD). Reads no byte beyond the instruction.
std::optional<Instruction> decode(const uint8_t* code);

}  // namespace kt_amx
