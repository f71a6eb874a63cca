// The stand-in for the kernel's permission to use tiles (Linux: Documentation/arch/x86/xstate.rst),
// behind a syscall() that takes the place of libc's.
#pragma once

namespace kt_amx {

// From here on the two requests are answered instead of forwarded.
void answer_permission_requests();

// Whether the process has asked and was granted; a fork()'s child inherits it.
bool permission_granted();

}  // namespace kt_amx
