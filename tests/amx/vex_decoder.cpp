#include "amx/vex_decoder.h"

#include <cstring>

namespace kt_amx {
namespace {

// Field pp of the VEX prefix.
enum Prefix : uint8_t { kNone, k66, kF3, kF2 };
// What ModRM.rm may be.
enum class Operand { kRegister, kMemory, kEither };

struct Form {
  uint8_t opcode;
  Prefix prefix;
  Operand operand;
  Operation operation;
  Product product = Product::kSignedSigned;
};

constexpr Form kForms[] = {
    {0x49, kNone, Operand::kMemory, Operation::kLoadConfig},
    {0x49, k66, Operand::kMemory, Operation::kStoreConfig},
    {0x49, kNone, Operand::kRegister, Operation::kRelease},
    {0x49, kF2, Operand::kRegister, Operation::kZero},
    {0x4b, kF2, Operand::kMemory, Operation::kLoad},
    {0x4b, k66, Operand::kMemory, Operation::kStreamingLoad},
    {0x4b, kF3, Operand::kMemory, Operation::kStore},
    {0x5e, kF2, Operand::kRegister, Operation::kMultiply, Product::kSignedSigned},
    {0x5e, kF3, Operand::kRegister, Operation::kMultiply, Product::kSignedUnsigned},
    {0x5e, k66, Operand::kRegister, Operation::kMultiply, Product::kUnsignedSigned},
    {0x5e, kNone, Operand::kRegister, Operation::kMultiply, Product::kUnsignedUnsigned},
    {0x5c, kF3, Operand::kRegister, Operation::kMultiply, Product::kBf16},
    {0x50, k66, Operand::kEither, Operation::kDot},
    {0x51, k66, Operand::kEither, Operation::kDotSaturating},
};

// C4, RXB and the map, W vvvv L pp, opcode, ModRM. R, X, B and vvvv are stored inverted.
struct Fields {
  explicit Fields(const uint8_t* code)
      : r(~code[1] >> 7 & 1),
        x(~code[1] >> 6 & 1),
        b(~code[1] >> 5 & 1),
        vvvv(~code[2] >> 3 & 15),
        is_256((code[2] & 4) != 0),
        prefix(static_cast<Prefix>(code[2] & 3)),
        opcode(code[3]),
        mod(code[4] >> 6),
        reg(r << 3 | (code[4] >> 3 & 7)),
        low_rm(code[4] & 7) {}
  int rm() const { return b << 3 | low_rm; }

  int r, x, b, vvvv;
  bool is_256;
  Prefix prefix;
  uint8_t opcode;
  int mod, reg, low_rm;
};

const Form* find_form(const Fields& fields) {
  for (const Form& form : kForms) {
    const bool fits = form.operand == Operand::kEither ||
                      (form.operand == Operand::kRegister) == (fields.mod == 3);
    if (form.opcode == fields.opcode && form.prefix == fields.prefix && fits) return &form;
  }
  return nullptr;
}

// Whether the fields that an instruction has no use for, or limits, are as it demands.
bool is_well_formed(const Form& form, const Fields& fields) {
  switch (form.operation) {
    case Operation::kLoadConfig:
    case Operation::kStoreConfig: return !fields.is_256 && fields.vvvv == 0 && fields.reg == 0;
    case Operation::kLoad:
    case Operation::kStreamingLoad:
    case Operation::kStore:
      return !fields.is_256 && fields.vvvv == 0 && fields.reg < kNumTiles && fields.low_rm == 4;
    case Operation::kZero:
      return !fields.is_256 && fields.vvvv == 0 && fields.reg < kNumTiles && fields.rm() == 0;
    case Operation::kRelease:
      return !fields.is_256 && fields.vvvv == 0 && fields.reg == 0 && fields.rm() == 0;
    case Operation::kMultiply:
      return !fields.is_256 && fields.vvvv < kNumTiles && fields.reg < kNumTiles &&
             fields.rm() < kNumTiles;
    case Operation::kDot:
    case Operation::kDotSaturating: return true;
  }
  return false;
}

// What follows ModRM; `length` is moved behind it.
Address decode_address(const uint8_t* code, const Fields& fields, int* length) {
  Address address;
  bool has_base = true;
  if (fields.low_rm == 4) {
    const uint8_t sib = code[(*length)++];
    address.base = fields.b << 3 | (sib & 7);
    address.shift = sib >> 6;
    const int index = fields.x << 3 | (sib >> 3 & 7);
    if (index != 4) address.index = index;
    has_base = (sib & 7) != 5 || fields.mod != 0;
    if (!has_base) address.base = kNoRegister;
  } else {
    address.base = fields.rm();
    has_base = fields.low_rm != 5 || fields.mod != 0;
    if (!has_base) address.base = kInstructionPointer;
  }
  if (fields.mod == 1) {
    address.displacement = static_cast<int8_t>(code[(*length)++]);
  } else if (fields.mod == 2 || !has_base) {
    std::memcpy(&address.displacement, code + *length, sizeof address.displacement);
    *length += sizeof address.displacement;
  }
  return address;
}

}  // namespace

std::optional<Instruction> decode(const uint8_t* code) {
  constexpr int kMap0f38 = 2;
  // short circuits: a byte is looked at only when those before it are of an instruction that has it
  const bool is_vex = code[0] == 0xc4 && (code[1] & 31) == kMap0f38 && (code[2] & 0x80) == 0;
  if (!is_vex) return std::nullopt;
  const Fields fields(code);
  const Form* form = find_form(fields);
  if (form == nullptr || !is_well_formed(*form, fields)) return std::nullopt;
  Instruction instruction = {.operation = form->operation,
                             .product = form->product,
                             .length = 5,
                             .reg = fields.reg,
                             .vvvv = fields.vvvv,
                             .is_256 = fields.is_256};
  if (fields.mod == 3) {
    instruction.rm = fields.rm();
  } else {
    instruction.address = decode_address(code, fields, &instruction.length);
  }
  return instruction;
}

}  // namespace kt_amx
