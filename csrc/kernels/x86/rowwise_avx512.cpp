#include "kernels/x86/vec_avx512.h"
// The vector type comes first: rowwise.h is written in its terms.
#include "kernels/x86/rowwise.h"

namespace kt {

extern const RowwiseOps rowwise_avx512;
const RowwiseOps rowwise_avx512 = {"rowwise_avx512", load_bf16,    load_fp16,
                                   store_bf16,       store_fp16,   rotate,
                                   quantize,         silu_and_mul, add_scaled};

}  // namespace kt
