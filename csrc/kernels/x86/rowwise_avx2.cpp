#include "kernels/x86/vec_avx2.h"
// The vector type comes first: rowwise.h is written in its terms.
#include "kernels/x86/rowwise.h"

namespace kt {

extern const RowwiseOps rowwise_avx2;
const RowwiseOps rowwise_avx2 = rowwise_ops("rowwise_avx2");

}  // namespace kt
