/* Control of libfake_cuda.so, a test double of the CUDA driver with real asynchrony. Not part of
 * any wheel. Plain C, so that ctypes can call it; streams are the driver's handles.
 *
 * What the double is
 *   stream         a thread that runs its operations in order; "device memory" is host memory
 *   event          a point in a stream; cuStreamWaitEvent orders streams by it
 *   graph          nodes with the edges that capture found, their arguments constants; a launch
 *                  runs independent chains on threads of their own; launches of one graph follow
 *                  each other
 *   host function  called on the one callback thread of the device, in the order they become due;
 *                  calling the driver inside is refused (800) and reported
 *   wait value     polls the word (acquire) and lets the stream go on at once; write value stores
 *                  it (release) after all earlier writes of its stream
 *   capture        as the driver: an unsafe call (host or device allocation and free, event query)
 *                  while a capture in GLOBAL mode runs fails with 900 and invalidates the capture
 *   handles        0 and 1 are the legacy default stream, 2 that of the calling thread. While a
 *                  blocking stream is captured, use of the legacy stream fails with 906 and
 *                  invalidates the capture; to ask whether it captures fails only
 * What it is not: the default streams have no implicit order with others, child graphs are refused,
 * one device.
 *
 * Misuse that hardware may let pass by luck is reported as a violation; fake_cuda_report() has the
 * texts. Every function may be called from any thread. */
#ifndef FAKE_CUDA_H_
#define FAKE_CUDA_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FAKE_CUDA_API __attribute__((visibility("default")))

/* Counters, planned failures, modes, reports as at the start; handles and what runs stay. */
FAKE_CUDA_API void fake_cuda_restore_defaults(void);
/* Ends what runs as by a context error, then starts anew without an error: streams, events, graphs
 * and executables of before are no handles any more, memory that was not freed stays. No other
 * thread may be inside a call. */
FAKE_CUDA_API void fake_cuda_reset(void);

/* Time. Each operation starts after a random delay of 0 to max_us in about half of all cases; each
 * stream draws from its own sequence of `seed`. Default: no delays. */
FAKE_CUDA_API void fake_cuda_set_delays(uint64_t seed, int max_us);
/* A paused stream starts no further operation. */
FAKE_CUDA_API void fake_cuda_pause(void* stream);
FAKE_CUDA_API void fake_cuda_resume(void* stream);

/* A kernel: fn(arg) on the stream's thread; captured like any other operation. CUresult. */
FAKE_CUDA_API int fake_cuda_launch(void* stream, void (*fn)(void*), void* arg);
/* A kernel that ends the context with CUresult `error`, as an illegal access does. */
FAKE_CUDA_API int fake_cuda_launch_fault(void* stream, int error);

/* Counters: calls of a driver function by its exported name; operations enqueued and not done. */
FAKE_CUDA_API uint64_t fake_cuda_calls(const char* function);
FAKE_CUDA_API uint64_t fake_cuda_pending(void);
/* Live bytes of cuMemHostAlloc. */
FAKE_CUDA_API uint64_t fake_cuda_host_bytes(void);

/* Failures. The nth call from now (1: the next) of a function, named as exported, gives `error`. */
FAKE_CUDA_API void fake_cuda_fail_call(const char* function, int nth, int error);
/* From now on every call fails with `error`; nothing enqueued runs, no host function is called. */
FAKE_CUDA_API void fake_cuda_fail_context(int error);
/* 0: host functions are enqueued and never called, without an error. 1: called. */
FAKE_CUDA_API void fake_cuda_set_host_functions(int enabled);
/* 0: wait and write value are refused with 801; 1: they work; 2: accepted, and a wait never ends.
 * FAKE_CUDA_STREAM_MEMORY_OPERATIONS in the environment sets it for child processes. */
FAKE_CUDA_API void fake_cuda_set_stream_memory_operations(int mode);
FAKE_CUDA_API void fake_cuda_set_driver_version(int version);
FAKE_CUDA_API void fake_cuda_set_device_count(int count);

/* 1: operations of all streams pass through one queue in the order of the calls, so that one which
 * cannot start yet holds up all behind it. Default: CUDA_DEVICE_MAX_CONNECTIONS=1 in the
 * environment. Set while nothing is enqueued. */
FAKE_CUDA_API void fake_cuda_set_shared_channel(int enabled);
/* 1: what a device-to-host copy writes appears in memory when a later operation that depends on the
 * copy starts (other than such a copy), when the host synchronizes with it, or after 1 s. */
FAKE_CUDA_API void fake_cuda_set_store_buffer(int enabled);

/* Operations are there, none has ended for this long, none is a kernel at work, no stream is
 * paused: a deadlock. It is reported with what each stream waits for; the context fails with 702,
 * so that nothing hangs. Default 30000; 0: never. */
FAKE_CUDA_API void fake_cuda_set_deadlock_timeout(int milliseconds);
FAKE_CUDA_API int fake_cuda_deadlocked(void);

FAKE_CUDA_API int fake_cuda_violations(void);
/* Violations and the deadlock, one a line. Returns the length without the final 0. */
FAKE_CUDA_API size_t fake_cuda_report(char* text, size_t size);

#ifdef __cplusplus
}
#endif
#endif
