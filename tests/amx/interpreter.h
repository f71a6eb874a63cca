// The test-only stand-in for AMX: libkt_amx_interpreter.so, loaded by LD_PRELOAD or linked into a
// test, runs the tile instructions (and the VEX forms of VPDPBUSD and VPDPBUSDS) of the process on
// a host without them. Its constructor installs a handler of SIGILL; there is nothing to call.
//
// | piece                | what it stands in for                                               |
// |----------------------|---------------------------------------------------------------------|
// | SIGILL handler       | the instructions: executes, steps over, goes on with the next       |
// | syscall()            | Linux granting tiles to who asks: arch_prctl(ARCH_REQ_XCOMP_PERM,   |
// |                      | 18); without it, or with KT_TEST_AMX_PERMISSION=refused (EINVAL),   |
// |                      | a tile instruction is illegal, as it is there                       |
// | sigaction(),signal() | a program's own disposition of SIGILL: kept, and used for what is   |
// |                      | not an instruction of ours or faults                                |
//
// Errors    #UD is SIGILL and #GP SIGSEGV, as on the hardware; a bad memory operand is a SIGSEGV
//           inside the interpreter (under AddressSanitizer a report of it).
// Threads   every thread has its own tiles, unconfigured at its start; so has a fork()'s child.
// Limits    signal handlers see the tiles of the code that they interrupt; a system call that is
//           made without libc's syscall() is not seen; a thread that blocks SIGILL is killed.
#pragma once

#include <cstdint>

#define KT_AMX_EXPORT __attribute__((visibility("default")))

extern "C" {

// 0 on a host with AMX, where nothing is installed and real instructions run, and on one without
// AVX2 and FMA, which the interpreter is made of; else 1.
KT_AMX_EXPORT int kt_amx_is_emulating();

// Executed since the start or the last reset, by all threads; instructions that fault do not count.
//
// "traps"  "configs" (LDTILECFG)  "config_stores" (STTILECFG)  "releases" (TILERELEASE)
// "loads" (TILELOADD)  "streaming_loads" (TILELOADDT1)  "stores" (TILESTORED)  "zeros" (TILEZERO)
// "tdpbssd"  "tdpbsud"  "tdpbusd"  "tdpbuud"  "tdpbf16ps"  "vpdpbusd"  "vpdpbusds"
// "bytes_loaded" (by both loads)  "streaming_bytes_loaded" (by TILELOADDT1)  "bytes_stored"
//
// UINT64_MAX for any other name.
KT_AMX_EXPORT uint64_t kt_amx_counter(const char* name);
KT_AMX_EXPORT void kt_amx_counters_reset();

}  // extern "C"
