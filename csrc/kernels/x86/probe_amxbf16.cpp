// Limit of tdpbf16ps: four products in flight.
#include "kernels/x86/gemm_amx.h"

namespace kt {

uint64_t peak_probe_bf16_amxbf16(int64_t iterations) { return multiply_zeros<Bf16>(iterations); }

}  // namespace kt
