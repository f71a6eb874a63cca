// torch.ops.kt_kernel, the operators on packed weights: quantize, pack and their inverses. They
// need no layer and no pool; the caller may run them on threads of its own.
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "format/panel_error.h"
#include "format/quantize.h"
#include "torch/tensor_checks.h"

namespace kt {
namespace {

using Packed = std::tuple<at::Tensor, at::Tensor>;

at::Tensor error_tensor(const QuantizationError& error) {
  return at::tensor({error.error, error.signal}, at::kDouble);
}

// Quantizes `panels` panels whose rows panel_rows(p) gives; `matrix` as in with_matrix_rows().
template <typename PanelRowsOf>
Packed quantize_panels(const PackedLayout& layout, const char* matrix, int64_t panels, int64_t k,
                       PanelRowsOf&& panel_rows) {
  check_quantizes(layout);
  at::Tensor packed = at::empty({panels * layout.panel_bytes(k)}, at::kByte);
  QuantizationError total;
  for (int64_t p = 0; p < panels; ++p) {
    QuantizationError error;
    with_matrix_rows(matrix, p, [&] {
      quantize_panel(layout, panel_rows(p),
                     packed.mutable_data_ptr<uint8_t>() + p * layout.panel_bytes(k), &error);
    });
    total.error += error.error;
    total.signal += error.signal;
  }
  return {packed, error_tensor(total)};
}

void check_matrix(const at::Tensor& w, const char* name) {
  check_cpu(w, name);
  float_dtype(w, name);
  KT_CHECK(w.dim() == 2,
           name << " has shape " << w.sizes() << "; it must be [out_features, in_features].");
}

Packed quantize_pack(const at::Tensor& w, c10::string_view layout_name) {
  const PackedLayout layout = PackedLayout::parse(std::string(layout_name));
  check_matrix(w, "w");
  const at::Tensor rows = w.contiguous();
  const int64_t n = w.size(0);
  const int64_t k = w.size(1);
  return quantize_panels(layout, "the matrix", layout.num_panels(n), k, [&](int64_t p) {
    return matrix_panel_rows(rows.const_data_ptr(), float_dtype(rows, "w"), n, k, p);
  });
}

Packed quantize_pack_w13(const at::Tensor& gate, const at::Tensor& up,
                         c10::string_view layout_name) {
  const PackedLayout layout = PackedLayout::parse(std::string(layout_name));
  check_matrix(gate, "gate");
  check_shape(up, gate.sizes(), "up");
  check_cpu(up, "up");
  KT_CHECK(up.scalar_type() == gate.scalar_type(), "gate and up differ in dtype.");
  const at::Tensor gate_rows = gate.contiguous();
  const at::Tensor up_rows = up.contiguous();
  const int64_t k = gate.size(1);
  return quantize_panels(layout, nullptr, num_w13_panels(gate.size(0)), k, [&](int64_t p) {
    return w13_panel_rows(gate_rows.const_data_ptr(), up_rows.const_data_ptr(),
                          float_dtype(gate_rows, "gate"), gate.size(0), k, p);
  });
}

const uint8_t* check_packed(const at::Tensor& packed, const PackedLayout& layout, int64_t panels,
                            int64_t k) {
  check_cpu(packed, "packed");
  KT_CHECK(panels > 0, "intermediate_size must be positive.");
  const int64_t bytes = layout.matrix_bytes(panels * 64, k);
  KT_CHECK(packed.scalar_type() == at::kByte && packed.is_contiguous() && packed.numel() == bytes,
           "packed is " << packed.numel() << " elements of " << c10::toString(packed.scalar_type())
                        << "; " << layout.name() << " needs " << bytes
                        << " contiguous bytes (uint8).");
  return packed.const_data_ptr<uint8_t>();
}

// codes [n, padded_k] (int8, or bf16 for a bf16 layout) and scales [n, groups] fp32, padded to
// whole panels by zeros.
at::Tensor pack(const at::Tensor& codes, const at::Tensor& scales, c10::string_view layout_name,
                int64_t k) {
  const PackedLayout layout = PackedLayout::parse(std::string(layout_name));
  const bool is_bf16 = layout.format == WeightFormat::kBFloat16;
  check_cpu(codes, "codes");
  check_matrix(is_bf16 ? codes : scales, is_bf16 ? "codes" : "scales");
  const at::ScalarType code_type = is_bf16 ? at::kBFloat16 : at::kChar;
  const int64_t n = codes.size(0);
  check_shape(codes, {n, layout.padded_k(k)}, "codes");
  KT_CHECK(codes.scalar_type() == code_type, "codes is " << c10::toString(codes.scalar_type())
                                                         << "; it must be "
                                                         << c10::toString(code_type) << ".");
  if (!is_bf16) check_shape(scales, {n, layout.num_groups(k)}, "scales");

  const int64_t panels = layout.num_panels(n);
  at::Tensor all_codes = at::zeros({panels * 64, layout.padded_k(k)}, codes.options());
  all_codes.narrow(0, 0, n).copy_(codes);
  at::Tensor all_scales = at::zeros({panels * 64, layout.num_groups(k)}, at::kFloat);
  if (!is_bf16) all_scales.narrow(0, 0, n).copy_(scales);
  at::Tensor packed = at::empty({panels * layout.panel_bytes(k)}, at::kByte);
  for (int64_t p = 0; p < panels; ++p) {
    const auto* panel_codes =
        static_cast<const uint8_t*>(all_codes.const_data_ptr()) +
        p * 64 * layout.padded_k(k) * static_cast<int64_t>(codes.element_size());
    with_matrix_rows("the matrix", p, [&] {
      pack_panel(layout, k, panel_codes,
                 all_scales.const_data_ptr<float>() + p * 64 * layout.num_groups(k),
                 packed.mutable_data_ptr<uint8_t>() + p * layout.panel_bytes(k));
    });
  }
  return packed;
}

Packed unpack(const at::Tensor& packed, c10::string_view layout_name, int64_t n, int64_t k) {
  const PackedLayout layout = PackedLayout::parse(std::string(layout_name));
  const int64_t panels = layout.num_panels(n);
  const uint8_t* bytes = check_packed(packed, layout, panels, k);
  const bool is_bf16 = layout.format == WeightFormat::kBFloat16;
  at::Tensor codes =
      at::empty({panels * 64, layout.padded_k(k)}, is_bf16 ? at::kBFloat16 : at::kChar);
  at::Tensor scales = at::zeros({panels * 64, layout.num_groups(k)}, at::kFloat);
  for (int64_t p = 0; p < panels; ++p) {
    auto* panel_codes = static_cast<uint8_t*>(codes.mutable_data_ptr()) +
                        p * 64 * layout.padded_k(k) * static_cast<int64_t>(codes.element_size());
    unpack_panel(layout, k, bytes + p * layout.panel_bytes(k), panel_codes,
                 scales.mutable_data_ptr<float>() + p * 64 * layout.num_groups(k));
  }
  return {codes.narrow(0, 0, n).clone(), scales.narrow(0, 0, n).clone()};
}

// All columns of all panels, [panels * 64, k] fp32.
at::Tensor dequantize_panels(const PackedLayout& layout, const uint8_t* bytes, int64_t panels,
                             int64_t k) {
  at::Tensor w = at::empty({panels * 64, k}, at::kFloat);
  for (int64_t p = 0; p < panels; ++p) {
    dequantize_panel(layout, k, bytes + p * layout.panel_bytes(k),
                     w.mutable_data_ptr<float>() + p * 64 * k);
  }
  return w;
}

at::Tensor dequantize(const at::Tensor& packed, c10::string_view layout_name, int64_t n,
                      int64_t k) {
  const PackedLayout layout = PackedLayout::parse(std::string(layout_name));
  const int64_t panels = layout.num_panels(n);
  return dequantize_panels(layout, check_packed(packed, layout, panels, k), panels, k)
      .narrow(0, 0, n)
      .clone();
}

Packed dequantize_w13(const at::Tensor& packed, c10::string_view layout_name,
                      int64_t intermediate_size, int64_t k) {
  const PackedLayout layout = PackedLayout::parse(std::string(layout_name));
  const int64_t panels = num_w13_panels(intermediate_size);
  const at::Tensor w = dequantize_panels(layout, check_packed(packed, layout, panels, k), panels, k)
                           .reshape({panels, 2, 32, k});
  const auto half = [&](int64_t which) {
    return w.select(1, which).reshape({panels * 32, k}).narrow(0, 0, intermediate_size).clone();
  };
  return {half(0), half(1)};
}

}  // namespace
}  // namespace kt

TORCH_LIBRARY_FRAGMENT(kt_kernel, m) {
  m.def("quantize_pack(Tensor w, str layout) -> (Tensor, Tensor)",
        kt::composite(&kt::quantize_pack));
  m.def("quantize_pack_w13(Tensor gate, Tensor up, str layout) -> (Tensor, Tensor)",
        kt::composite(&kt::quantize_pack_w13));
  m.def("pack(Tensor codes, Tensor scales, str layout, int k) -> Tensor", kt::composite(&kt::pack));
  m.def("unpack(Tensor packed, str layout, int n, int k) -> (Tensor, Tensor)",
        kt::composite(&kt::unpack));
  m.def("dequantize(Tensor packed, str layout, int n, int k) -> Tensor",
        kt::composite(&kt::dequantize));
  m.def(
      "dequantize_w13(Tensor packed, str layout, int intermediate_size, int k) -> (Tensor, Tensor)",
      kt::composite(&kt::dequantize_w13));
}
