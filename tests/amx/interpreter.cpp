#include "amx/interpreter.h"

#include <errno.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <optional>

#include "amx/counters.h"
#include "amx/permission.h"
#include "amx/sigill_chain.h"
#include "amx/signal_frame.h"
#include "amx/tile_machine.h"
#include "amx/vex_decoder.h"

namespace kt_amx {
namespace {

std::atomic<bool> emulating{false};

// initial-exec: part of every thread from its start, so that the handler never allocates it.
__attribute__((tls_model("initial-exec"))) constinit thread_local TileMachine machine;

Counter counter_of(Product product) {
  switch (product) {
    case Product::kSignedSigned: return Counter::kTdpbssd;
    case Product::kSignedUnsigned: return Counter::kTdpbsud;
    case Product::kUnsignedSigned: return Counter::kTdpbusd;
    case Product::kUnsignedUnsigned: return Counter::kTdpbuud;
    case Product::kBf16: return Counter::kTdpbf16ps;
  }
  return Counter::kNumCounters;
}

// VPDPBUSD and VPDPBUSDS: every lane of 32 bits gains four products of an unsigned and a signed
// byte, modulo 2^32 or saturated once.
void dot(const Instruction& instruction, SignalFrame& frame) {
  const bool saturates = instruction.operation == Operation::kDotSaturating;
  const int num_bytes = instruction.is_256 ? 32 : 16;
  int32_t sums[8];
  uint8_t left[32];
  int8_t right[32];
  frame.read_vector(instruction.reg, sums);
  frame.read_vector(instruction.vvvv, left);
  if (instruction.rm != kNoRegister) {
    frame.read_vector(instruction.rm, right);
  } else {
    std::memcpy(right, frame.memory_of(instruction), num_bytes);
  }
  for (int lane = 0; lane < num_bytes / 4; ++lane) {
    int64_t sum = sums[lane];
    for (int i = 4 * lane; i < 4 * lane + 4; ++i) sum += left[i] * right[i];
    using Limits = std::numeric_limits<int32_t>;
    if (saturates) sum = std::clamp<int64_t>(sum, Limits::min(), Limits::max());
    sums[lane] = static_cast<int32_t>(sum);
  }
  frame.write_vector(instruction.reg, sums, num_bytes);
  count(saturates ? Counter::kVpdpbusds : Counter::kVpdpbusd);
}

Fault load(const Instruction& instruction, const SignalFrame& frame) {
  const Fault fault = machine.load(instruction.reg, frame.first_row_of(instruction),
                                   frame.stride_bytes_of(instruction));
  if (fault != Fault::kNone) return fault;
  const bool streaming = instruction.operation == Operation::kStreamingLoad;
  const uint64_t bytes = machine.bytes_of(instruction.reg);
  count(streaming ? Counter::kStreamingLoads : Counter::kLoads);
  count(Counter::kBytesLoaded, bytes);
  if (streaming) count(Counter::kStreamingBytesLoaded, bytes);
  return Fault::kNone;
}

Fault store(const Instruction& instruction, const SignalFrame& frame) {
  const Fault fault = machine.store(instruction.reg, frame.first_row_of(instruction),
                                    frame.stride_bytes_of(instruction));
  if (fault != Fault::kNone) return fault;
  count(Counter::kStores);
  count(Counter::kBytesStored, machine.bytes_of(instruction.reg));
  return Fault::kNone;
}

Fault counted(Counter counter, Fault fault) {
  if (fault == Fault::kNone) count(counter);
  return fault;
}

Fault execute(const Instruction& instruction, SignalFrame& frame) {
  const Operation operation = instruction.operation;
  if (operation == Operation::kDot || operation == Operation::kDotSaturating) {
    dot(instruction, frame);
    return Fault::kNone;
  }
  if (!permission_granted()) return Fault::kUndefined;
  switch (operation) {
    case Operation::kLoadConfig:
      return counted(Counter::kConfigs, machine.load_config(frame.memory_of(instruction)));
    case Operation::kStoreConfig:
      machine.store_config(frame.memory_of(instruction));
      return counted(Counter::kConfigStores, Fault::kNone);
    case Operation::kLoad:
    case Operation::kStreamingLoad: return load(instruction, frame);
    case Operation::kStore: return store(instruction, frame);
    case Operation::kZero: return counted(Counter::kZeros, machine.zero(instruction.reg));
    case Operation::kRelease: machine.release(); return counted(Counter::kReleases, Fault::kNone);
    default:
      return counted(
          counter_of(instruction.product),
          machine.multiply(instruction.product, instruction.reg, instruction.rm, instruction.vvvv));
  }
}

// As many instructions as follow one another: a trap costs as much as several tile products. One
// that faults after others traps again, and then is the first.
void on_sigill(int signal, siginfo_t* info, void* context) {
  const int error_number = errno;
  SignalFrame frame(context);
  int num_executed = 0;
  Fault fault = Fault::kUndefined;
  while (const std::optional<Instruction> instruction = decode(frame.code())) {
    fault = execute(*instruction, frame);
    if (fault != Fault::kNone) break;
    frame.step_over(instruction->length);
    ++num_executed;
  }
  if (num_executed > 0) {
    count(Counter::kTraps);
  } else if (fault == Fault::kProtection) {
    pthread_kill(pthread_self(), SIGSEGV);
  } else {
    pass_on(signal, info, context);
  }
  errno = error_number;
}

__attribute__((constructor)) void install() {
  __builtin_cpu_init();
  if (__builtin_cpu_supports("amx-tile")) return;
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return;
  pthread_atfork(nullptr, nullptr, [] { machine.release(); });
  answer_permission_requests();
  take_sigill(&on_sigill);
  emulating = true;
}

}  // namespace
}  // namespace kt_amx

int kt_amx_is_emulating() { return kt_amx::emulating ? 1 : 0; }
