// The loop of the peak probes: sums that live in registers and take one multiply-accumulate each an
// iteration. Everything is in an anonymous namespace, so every ISA object has its own.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace kt {
namespace {

// Runs sum = step(sum, a, w) on each of kSums vectors, `iterations` times, and returns something of
// the sums. step captures nothing: what it captured would be kept in memory. Inlined always: the
// loop belongs to the symbol that kernels.inc names.
template <int kSums, typename Sum, typename Operand, typename Step>
__attribute__((always_inline)) inline uint64_t run_peak_sums(int64_t iterations, Operand a,
                                                             Operand w, Step step) {
  static_assert(kSums <= 24);
  using Lane = decltype(Sum{}[0] + 0);
  Sum sum[kSums];
  // equal sums would be computed once
  for (int j = 0; j < kSums; ++j) sum[j] = Sum{} + static_cast<Lane>(j);
  for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 24
    for (int j = 0; j < kSums; ++j) {
      asm volatile("" : "+v"(a), "+v"(w));  // else one product serves all sums
      sum[j] = step(sum[j], a, w);
    }
  }
  Lane all = 0;
  for (const Sum& lanes : sum) all += lanes[0];
  return static_cast<uint64_t>(static_cast<int64_t>(all));
}

}  // namespace
}  // namespace kt
