// Who else wants SIGILL: the disposition that the program had or asks for later (Python's
// faulthandler does), kept here while the kernel's stays ours.
#pragma once

#include <signal.h>

namespace kt_amx {

using SignalHandler = void (*)(int signal, siginfo_t* info, void* context);

// Makes `handler` the disposition of SIGILL for good.
//
// Mask  every signal but those of faults is blocked while it runs: what it does is one instruction
//       for handlers of other signals.
void take_sigill(SignalHandler handler);

// Does what would have happened without us. Call from the handler, with its arguments, and return.
void pass_on(int signal, siginfo_t* info, void* context);

}  // namespace kt_amx
