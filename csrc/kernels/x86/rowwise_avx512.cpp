#include "kernels/x86/vec_avx512.h"
// The vector type comes first: rowwise.h is written in its terms.
#include "kernels/x86/rowwise.h"

namespace kt {

extern const RowwiseOps rowwise_avx512;
const RowwiseOps rowwise_avx512 = rowwise_ops("rowwise_avx512");

}  // namespace kt
