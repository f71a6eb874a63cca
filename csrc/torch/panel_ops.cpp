// torch.ops.kt_kernel.multiply_panel: one row of the kernel table on one panel, for its tests. Rows
// that other libraries add exist in this extension only, so they cannot be tested without Torch.
#include <torch/library.h>

#include "base/span.h"
#include "format/packed_layout.h"
#include "kernels/registry.h"
#include "kernels/tiles.h"
#include "torch/tensor_checks.h"

namespace kt {
namespace {

const GemmKernel& find_gemm(c10::string_view name) {
  for (const GemmKernel& kernel : list_gemm_kernels()) {
    if (name == kernel.name) return kernel;
  }
  KT_CHECK(false, "there is no GEMM kernel " << name << "; list_kernels() names them.");
}

at::ScalarType scalar_type(DType a_dtype) {
  if (a_dtype == DType::kBFloat16) return at::kBFloat16;
  return a_dtype == DType::kUint8 ? at::kByte : at::kChar;
}

void check_type(const at::Tensor& tensor, at::ScalarType type, const char* name) {
  check_cpu(tensor, name);
  KT_CHECK(tensor.scalar_type() == type, name << " is " << c10::toString(tensor.scalar_type())
                                              << "; it must be " << c10::toString(type) << ".");
}

void check_contiguous(const at::Tensor& tensor, const char* name) {
  KT_CHECK(tensor.is_contiguous(), name << " has strides; it must be contiguous.");
}

// The rows of `args` as tiles want them.
at::Tensor packed_rows(const RowPacking& packing, const GemmArgs& args) {
  const int64_t row_bytes = int64_t{args.k} * packing.value_bytes;
  const int64_t tiles = ceil_div(args.m, kTileRows);
  at::Tensor packed = at::empty({tiles * kTileRows * row_bytes}, at::kByte);
  const auto* const codes = static_cast<const uint8_t*>(args.a);
  for (int32_t i = 0; i < args.m; ++i) {
    const int64_t row = args.row_idx == nullptr ? i : args.row_idx[i];
    packing.pack_row(codes + row * args.a_stride_bytes, args.k, args.a_scale, args.k,
                     packed.mutable_data_ptr<uint8_t>() + packed_row_offset(i, row_bytes));
  }
  return packed;
}

// c[i, j] = sum_k a[row(i), k] * w[j, k], scaled, as kernel.h has it: a [rows, k] and c [m, 64]
// with columns side by side, row_idx [m] int32, a_scale [rows] fp32 (int8 only), panel
// [panel_bytes(k)].
void multiply_panel(c10::string_view name, const at::Tensor& a,
                    const std::optional<at::Tensor>& row_idx,
                    const std::optional<at::Tensor>& a_scale, const at::Tensor& panel,
                    at::Tensor c) {
  const GemmKernel& kernel = find_gemm(name);
  KT_CHECK(
      !has_groups(kernel.weights),
      kernel.name << " multiplies weights with groups; give a kernel of int8 or bf16 weights.");
  KT_CHECK((kernel.isa & ~cpu_features().chosen) == 0,
           kernel.name << " needs " << isa_name(kernel.isa)
                       << ", but in use are: " << isa_name(cpu_features().chosen) << ".");
  check_type(a, scalar_type(kernel.a_dtype), "a");
  check_type(c, at::kFloat, "c");
  check_type(panel, at::kByte, "panel");
  KT_CHECK(a.dim() == 2 && c.dim() == 2, "a and c must be matrices.");
  const int64_t k = a.size(1);
  const int64_t m = c.size(0);
  const PackedLayout layout{kernel.weights, 0, 0};
  KT_CHECK(a.stride(1) == 1 && layout.padded_k(k) == k && k <= kMaxIntegerK,
           "a has shape " << a.sizes() << "; it must be [rows, k], with columns side by side and k "
                          << "padded as its layout has it, at most " << kMaxIntegerK << ".");
  if (kernel.a_dtype != DType::kBFloat16 && a.numel() > 0) {
    const int zero = kernel.a_dtype == DType::kUint8 ? 128 : 0;
    KT_CHECK(a.min().item<int>() - zero >= -127,
             "a has a code of -128; kernels take codes of -127 to 127.");
  }
  check_shape(c, {m, kPanelColumns}, "c");
  KT_CHECK(c.stride(1) == 1, "c must have its columns side by side.");
  check_shape(panel, {layout.panel_bytes(k)}, "panel");
  check_contiguous(panel, "panel");
  for (const at::Tensor& tensor : {a, panel}) {
    KT_CHECK(reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 64 == 0,
             "a and panel must begin at a multiple of 64 bytes.");
  }

  GemmArgs args{};
  args.a = a.const_data_ptr();
  args.a_stride_bytes = a.stride(0) * static_cast<int64_t>(a.element_size());
  if (row_idx.has_value()) {
    check_type(*row_idx, at::kInt, "row_idx");
    check_shape(*row_idx, {m}, "row_idx");
    check_contiguous(*row_idx, "row_idx");
    KT_CHECK(m == 0 || (row_idx->min().item<int>() >= 0 && row_idx->max().item<int>() < a.size(0)),
             "row_idx names rows outside 0 to " << a.size(0) - 1 << ".");
    args.row_idx = row_idx->const_data_ptr<int32_t>();
  }
  KT_CHECK(row_idx.has_value() || m <= a.size(0), "c has more rows than a; give row_idx.");
  if (kernel.weights == WeightFormat::kInt8) {
    KT_CHECK(a_scale.has_value(), kernel.name << " needs a_scale.");
    check_type(*a_scale, at::kFloat, "a_scale");
    check_shape(*a_scale, {a.size(0)}, "a_scale");
    check_contiguous(*a_scale, "a_scale");
    args.a_scale = a_scale->const_data_ptr<float>();
  }
  args.panel = panel.const_data_ptr<uint8_t>();
  args.c = c.mutable_data_ptr<float>();
  args.c_stride = c.stride(0);
  args.m = static_cast<int32_t>(m);
  args.k = static_cast<int32_t>(k);
  args.group_size = args.k;
  args.a_block = args.k;
  at::Tensor packed;
  if (kernel.packing != nullptr) {
    packed = packed_rows(*kernel.packing, args);
    args.a = packed.const_data_ptr();
    require_tiles();
  }
  kernel.gemm(args);
  release_tiles();
}

}  // namespace
}  // namespace kt

TORCH_LIBRARY_FRAGMENT(kt_kernel, m) {
  m.def(
      "multiply_panel(str kernel, Tensor a, Tensor? row_idx, Tensor? a_scale, Tensor panel, "
      "Tensor(a!) c) -> ()",
      kt::composite(&kt::multiply_panel));
}
