// The registers of the code that a signal interrupted, as the kernel put them on the stack. What is
// written here is what that code goes on with.
#pragma once

#include <ucontext.h>

#include <cstdint>

#include "amx/vex_decoder.h"

namespace kt_amx {

class SignalFrame {
 public:
  // `context` is the third argument of the handler.
  explicit SignalFrame(void* context) : context_(static_cast<ucontext_t*>(context)) {}

  const uint8_t* code() const;    // at the instruction pointer
  void step_over(int num_bytes);  // moves the instruction pointer

  // Addresses of the instruction at the instruction pointer.
  void* memory_of(const Instruction& instruction) const;          // with the index
  void* first_row_of(const Instruction& instruction) const;       // without it
  int64_t stride_bytes_of(const Instruction& instruction) const;  // the index alone, scaled

  // Registers 0 to 15 of 256 bits.
  void read_vector(int index, void* bytes) const;
  // Overwrites the low `num_bytes` (16 or 32) and zeroes all above, as VEX instructions do.
  //
  // Requires  a zero upper half if those of all registers were zero, as a product of them is: then
  //           the frame holds no upper halves, and it is not made to.
  void write_vector(int index, const void* bytes, int num_bytes);

 private:
  uint64_t general_register(int index) const;
  uint64_t base_of(const Instruction& instruction) const;
  uint8_t* saved_state() const;  // the XSAVE area
  bool has_saved(int component) const;

  ucontext_t* context_;
};

}  // namespace kt_amx
