// torch.ops.kt_kernel, the operators on matrices as checkpoints have them (format/source.h). All
// but load_source need no layer and no pool; the caller may run them on threads of its own. repack
// and repack_w13 are for work on formats and for tests: layers pack with load_source.
#include <torch/library.h>

#include <vector>

#include "engine/engine.h"
#include "format/panel_error.h"
#include "format/quantize.h"
#include "format/source.h"
#include "torch/tensor_checks.h"

namespace kt {
namespace {

DType part_dtype(const at::Tensor& part, const std::string& source) {
  switch (part.scalar_type()) {
    case at::kFloat: return DType::kFloat32;
    case at::kBFloat16: return DType::kBFloat16;
    case at::kHalf: return DType::kFloat16;
    case at::kByte: return DType::kUint8;
    case at::kChar: return DType::kInt8;
    case at::kInt: return DType::kInt32;
    case at::kFloat8_e4m3fn: return DType::kFp8;
    case at::kFloat8_e8m0fnu: return DType::kE8M0;
    case at::kFloat4_e2m1fn_x2: return DType::kFp4;
    default: break;
  }
  KT_CHECK(false, "a tensor of " << source << " weights is " << c10::toString(part.scalar_type())
                                 << ", which none of their tensors can be.");
}

// A matrix with the tensors that own its bytes.
struct Opened {
  std::vector<at::Tensor> alive;
  SourceMatrix matrix;
};

Opened open_parts(const SourceFormat& format, at::TensorList parts, int64_t n, int64_t k) {
  Opened opened;
  std::vector<SourcePart> views;
  for (const at::Tensor& part : parts) {
    check_cpu(part, "a tensor of weights");
    at::Tensor whole = part.contiguous();
    // a file may have put its floats at any byte
    constexpr uintptr_t kAlignment = 4;
    if (reinterpret_cast<uintptr_t>(whole.const_data_ptr()) % kAlignment != 0)
      whole = whole.clone();
    views.push_back({whole.const_data_ptr(), part_dtype(whole, format.name), whole.sizes().vec()});
    opened.alive.push_back(std::move(whole));
  }
  opened.matrix = open_source(format, std::move(views), n, k);
  return opened;
}

Opened open_parts(c10::string_view source, at::TensorList parts, int64_t n, int64_t k) {
  return open_parts(SourceFormat::parse(std::string(source)), parts, n, k);
}

std::string layout_of_source(at::TensorList parts, c10::string_view source, int64_t n, int64_t k,
                             bool with_zeros) {
  return source_layout(open_parts(source, parts, n, k).matrix, with_zeros).name();
}

// `matrix` as in with_matrix_rows().
template <typename RowsOf>
at::Tensor pack_panels(const PackedLayout& layout, const char* matrix, int64_t panels, int64_t k,
                       RowsOf&& rows_of) {
  at::Tensor packed = at::empty({panels * layout.panel_bytes(k)}, at::kByte);
  for (int64_t p = 0; p < panels; ++p) {
    with_matrix_rows(matrix, p, [&] {
      pack_source_panel(layout, rows_of(p),
                        packed.mutable_data_ptr<uint8_t>() + p * layout.panel_bytes(k));
    });
  }
  return packed;
}

at::Tensor repack(at::TensorList parts, c10::string_view source, c10::string_view layout_name,
                  int64_t n, int64_t k) {
  const PackedLayout layout = PackedLayout::parse(std::string(layout_name));
  const Opened opened = open_parts(source, parts, n, k);
  check_source_layout(opened.matrix, layout);
  return pack_panels(layout, "the matrix", layout.num_panels(n), k,
                     [&](int64_t p) { return matrix_source_rows(opened.matrix, p); });
}

at::Tensor repack_w13(at::TensorList gate, at::TensorList up, c10::string_view source,
                      c10::string_view layout_name, int64_t n, int64_t k) {
  const PackedLayout layout = PackedLayout::parse(std::string(layout_name));
  const Opened opened_gate = open_parts(source, gate, n, k);
  const Opened opened_up = open_parts(source, up, n, k);
  check_source_layout(opened_gate.matrix, layout);
  check_source_layout(opened_up.matrix, layout);
  return pack_panels(layout, nullptr, num_w13_panels(n), k, [&](int64_t p) {
    return w13_source_rows(opened_gate.matrix, opened_up.matrix, p);
  });
}

at::Tensor decode_source(at::TensorList parts, c10::string_view source, int64_t n, int64_t k) {
  const Opened opened = open_parts(source, parts, n, k);
  at::Tensor w = at::empty({n, k}, at::kFloat);
  for (int64_t row = 0; row < n; row += kPackedColumns) {
    decode_rows(opened.matrix, row, std::min<int64_t>(kPackedColumns, n - row),
                w.mutable_data_ptr<float>() + row * k);
  }
  return w;
}

// gate, up and down are the parts of all experts, one expert after the other.
void load_source(int64_t layer, at::IntArrayRef experts, c10::string_view w13_source,
                 c10::string_view w2_source, at::TensorList gate, at::TensorList up,
                 at::TensorList down) {
  const std::shared_ptr<EngineLayer> target = find_layer(layer);
  const MoeConfig& config = target->layer.config();
  const SourceFormat w13 = SourceFormat::parse(std::string(w13_source));
  const SourceFormat w2 = SourceFormat::parse(std::string(w2_source));
  const auto parts_of = [&](at::TensorList all, const SourceFormat& format, const char* name,
                            size_t i) {
    const auto count = static_cast<size_t>(format.num_parts());
    KT_CHECK(all.size() == count * experts.size(),
             name << " has " << all.size() << " tensors; " << experts.size() << " experts of "
                  << format.name << " have " << count << " each.");
    return all.slice(i * count, count);
  };
  std::vector<at::Tensor> alive;
  const auto take = [&](at::TensorList parts, const SourceFormat& format, int64_t n, int64_t k) {
    Opened opened = open_parts(format, parts, n, k);
    alive.insert(alive.end(), opened.alive.begin(), opened.alive.end());
    return opened.matrix;
  };
  std::vector<ExpertStore::Encoded> sources;
  for (size_t i = 0; i < experts.size(); ++i) {
    const int64_t hidden = config.hidden_size, inner = config.intermediate_size;
    sources.push_back({expert_id(experts[i]),
                       take(parts_of(gate, w13, "gate", i), w13, inner, hidden),
                       take(parts_of(up, w13, "up", i), w13, inner, hidden),
                       take(parts_of(down, w2, "down", i), w2, hidden, inner)});
  }
  target->engine->run([&] { target->layer.store().load_sources(sources); });
}

}  // namespace
}  // namespace kt

TORCH_LIBRARY_FRAGMENT(kt_kernel, m) {
  m.def("source_layout(Tensor[] parts, str source, int n, int k, bool with_zeros=False) -> str",
        kt::composite(&kt::layout_of_source));
  m.def("repack(Tensor[] parts, str source, str layout, int n, int k) -> Tensor",
        kt::composite(&kt::repack));
  m.def("repack_w13(Tensor[] gate, Tensor[] up, str source, str layout, int n, int k) -> Tensor",
        kt::composite(&kt::repack_w13));
  m.def("decode_source(Tensor[] parts, str source, int n, int k) -> Tensor",
        kt::composite(&kt::decode_source));
  m.def(
      "load_source(int layer, int[] experts, str w13_source, str w2_source, Tensor[] gate, "
      "Tensor[] up, Tensor[] down) -> ()",
      kt::composite(&kt::load_source));
}
