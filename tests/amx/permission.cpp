#include "amx/permission.h"

#include <errno.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cstdarg>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "amx/interpreter.h"

namespace kt_amx {
namespace {

constexpr long kGetPermission = 0x1022;      // ARCH_GET_XCOMP_PERM
constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
constexpr long kTileData = 18;
constexpr uint64_t kTileConfigBit = uint64_t{1} << 17;
constexpr uint64_t kTileDataBit = uint64_t{1} << kTileData;

std::atomic<bool> answering{false};
std::atomic<bool> granted{false};

bool refuses() {
  const char* wish = std::getenv("KT_TEST_AMX_PERMISSION");
  return wish != nullptr && std::strcmp(wish, "refused") == 0;
}

// The result of the kernel: -4095 to -1 is an error number, negated.
long forward(long number, const long (&arguments)[6]) {
  register long r10 __asm__("r10") = arguments[3];
  register long r8 __asm__("r8") = arguments[4];
  register long r9 __asm__("r9") = arguments[5];
  long result;
  __asm__ volatile("syscall"
                   : "=a"(result)
                   : "a"(number), "D"(arguments[0]), "S"(arguments[1]), "d"(arguments[2]), "r"(r10),
                     "r"(r8), "r"(r9)
                   : "rcx", "r11", "memory");
  return result;
}

long request_permission() {
  if (refuses()) return -EINVAL;
  granted = true;
  return 0;
}

// What the host says, and the tiles. Linux below 5.16 does not know the question.
long get_permission(const long (&arguments)[6]) {
  const long result = forward(SYS_arch_prctl, arguments);
  uint64_t* const answer = reinterpret_cast<uint64_t*>(arguments[1]);
  if (result == -EINVAL) *answer = 0;
  if (result != 0 && result != -EINVAL) return result;
  *answer |= kTileConfigBit | (granted ? kTileDataBit : 0);
  return 0;
}

}  // namespace

void answer_permission_requests() { answering = true; }

bool permission_granted() { return granted.load(std::memory_order_relaxed); }

}  // namespace kt_amx

// Reads six arguments, whatever the caller passed, as libc's does.
extern "C" KT_AMX_EXPORT long syscall(long number, ...) noexcept {
  long arguments[6];
  va_list list;
  va_start(list, number);
  for (long& argument : arguments) argument = va_arg(list, long);
  va_end(list);
  using namespace kt_amx;
  long result;
  if (answering && number == SYS_arch_prctl && arguments[0] == kRequestPermission &&
      arguments[1] == kTileData) {
    result = request_permission();
  } else if (answering && number == SYS_arch_prctl && arguments[0] == kGetPermission) {
    result = get_permission(arguments);
  } else {
    result = forward(number, arguments);
  }
  if (result >= 0 || result < -4095) return result;
  errno = static_cast<int>(-result);
  return -1;
}
