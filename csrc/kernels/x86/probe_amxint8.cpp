// Limit of tdpbusd: four products in flight.
#include "kernels/x86/gemm_amx.h"

namespace kt {

uint64_t peak_probe_int8_amxint8(int64_t iterations) { return multiply_zeros<U8S8>(iterations); }

}  // namespace kt
