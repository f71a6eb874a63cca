// kt_kernel._ext: the objects that are not tensors. No Torch headers here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "base/check.h"
#include "base/cpu_features.h"
#include "engine/engine.h"
#include "engine/kernel_bench.h"
#include "engine/probe.h"
#include "kernels/registry.h"
#include "moe/layer_kernels.h"
#include "moe/moe_scratch.h"

namespace py = pybind11;

namespace kt {
namespace {

py::dict dict_of(const CpuFeatures& features) {
  py::dict out;
  out["found"] = isa_name(features.found);
  out["chosen"] = isa_name(features.chosen);
  out["tier"] = features.tier;
  out["reason"] = features.reason;
  out["cpu_name"] = features.cpu_name;
  return out;
}

py::dict readings_dict() {
  const CpuReadings& readings = cpu_readings();
  py::dict out;
  out["vendor"] = readings.vendor;
  out["brand"] = readings.brand;
  out["max_leaf"] = readings.max_leaf;
  out["leaf1_ecx"] = readings.leaf1_ecx;
  out["leaf7_ebx"] = readings.leaf7_ebx;
  out["leaf7_ecx"] = readings.leaf7_ecx;
  out["leaf7_edx"] = readings.leaf7_edx;
  out["leaf7_1_eax"] = readings.leaf7_1_eax;
  out["xcr0"] = readings.xcr0;
  out["tile_errno"] = readings.tile_errno;
  return out;
}

// Layouts of AMXINT8, AMXINT4 and BF16 (kt_kernel/methods.py).
constexpr const char* kShownLayouts[] = {"int8_n64k4_r512_v1", "int4g32_n64k8_r512_v1",
                                         "bf16_n64k2_v1"};

// What cpu_features() and explain_kernels() would say on the CPU of the readings, without
// KT_FORCE_ISA and KT_GEMM: `in` has the keys of readings_dict().
py::dict detected_dict(const py::dict& in) {
  CpuReadings readings;
  readings.vendor = in["vendor"].cast<std::string>();
  readings.brand = in["brand"].cast<std::string>();
  readings.max_leaf = in["max_leaf"].cast<uint32_t>();
  readings.leaf1_ecx = in["leaf1_ecx"].cast<uint32_t>();
  readings.leaf7_ebx = in["leaf7_ebx"].cast<uint32_t>();
  readings.leaf7_ecx = in["leaf7_ecx"].cast<uint32_t>();
  readings.leaf7_edx = in["leaf7_edx"].cast<uint32_t>();
  readings.leaf7_1_eax = in["leaf7_1_eax"].cast<uint32_t>();
  readings.xcr0 = in["xcr0"].cast<uint64_t>();
  readings.tile_errno = in["tile_errno"].cast<std::optional<int>>();
  const CpuFeatures features = choose_features(readings, nullptr);
  py::dict kernels;
  for (const char* layout : kShownLayouts) {
    KernelRequest request = request_for(PackedLayout::parse(layout), features.chosen);
    request.choice = GemmChoice::kNative;
    request.deterministic = false;
    kernels[format_name(request.weights)] = explain_kernels(request);
  }
  py::dict out = dict_of(features);
  out["kernels"] = kernels;
  return out;
}

py::list kernel_list() {
  const IsaSet found = cpu_features().found;
  py::list out;
  for (const GemmKernel& kernel : list_gemm_kernels()) {
    py::dict row;
    row["name"] = kernel.name;
    row["op"] = "gemm";
    row["source"] = kernel.source == GemmSource::kNative ? "native" : "onednn";
    row["weight"] = format_name(kernel.weights);
    row["a"] = dtype_name(kernel.a_dtype);
    row["tier"] = isa_tier(kernel.isa);
    row["isa"] = isa_name(kernel.isa);
    row["supported"] = (kernel.isa & ~found) == 0;
    row["mr"] = kernel.mr;
    row["m_from"] = kernel.m_from;
    out.append(row);
  }
  for (const RowwiseKernel& kernel : list_rowwise_kernels()) {
    py::dict row;
    row["name"] = kernel.ops->name;
    row["op"] = "rowwise";
    row["tier"] = isa_tier(kernel.isa);
    row["isa"] = isa_name(kernel.isa);
    row["supported"] = (kernel.isa & ~found) == 0;
    out.append(row);
  }
  return out;
}

KernelSet kernels_of(const std::string& layout) {
  return select_kernels(request_for(PackedLayout::parse(layout), cpu_features().chosen));
}

int packed_value_bytes_of(const std::string& layout) {
  return kernels_of(layout).packed_value_bytes();
}

// What one panel takes expanded; 0: the layout's panels are never expanded.
int64_t expanded_bytes_of(const std::string& name, int64_t k) {
  const PackedLayout layout = PackedLayout::parse(name);
  if (!has_groups(layout.format)) return 0;
  return expanded_bytes(layout.padded_k(k), layout.num_groups(k));
}

std::string explain_for(const std::string& layout) {
  return explain_kernels(request_for(PackedLayout::parse(layout), cpu_features().chosen));
}

py::list format_list() {
  py::list out;
  for (const WeightFormatInfo& info : list_weight_formats()) {
    py::dict row;
    row["name"] = info.name;
    row["bits"] = dtype_bits(info.code);
    row["groups"] = has_groups(info.format);
    out.append(row);
  }
  return out;
}

py::dict topology_dict() {
  const Topology topology = detect_topology();
  py::list nodes;
  for (const NumaNode& node : topology.nodes) {
    py::dict out;
    out["id"] = node.id;
    out["cpus"] = node.cpus;
    out["num_cores"] = node.num_cores;
    out["has_memory"] = node.has_memory;
    out["memory_bytes"] = node.memory_bytes;
    nodes.append(out);
  }
  py::dict out;
  out["nodes"] = nodes;
  out["num_cores"] = topology.num_cores();
  out["cpu_quota"] = topology.cpu_quota;
  out["memory_limit_bytes"] = topology.memory_limit_bytes;
  out["memory_available_bytes"] = topology.memory_available_bytes;
  out["can_bind"] = topology.can_bind;
  out["warnings"] = topology.warnings;
  return out;
}

py::dict layout_dict(const std::string& name, int64_t n, int64_t k) {
  const PackedLayout layout = PackedLayout::parse(name);
  py::dict out;
  out["padded_k"] = layout.padded_k(k);
  out["num_panels"] = layout.num_panels(n);
  out["panel_bytes"] = layout.panel_bytes(k);
  out["matrix_bytes"] = layout.matrix_bytes(n, k);
  out["num_groups"] = layout.num_groups(k);
  out["group_size"] = layout.effective_group_size(k);
  out["rotation_block"] = layout.rotation_block(k);
  out["num_activation_blocks"] = layout.num_activation_blocks(k);
  out["bf16_rows"] = takes_bf16_rows(layout.format);
  return out;
}

// A layer under its handle: closed when the Python object goes. The pointer is read and changed
// under the GIL only; who works on the layer without the GIL holds a pointer of its own.
class LayerHandle {
 public:
  LayerHandle(const std::shared_ptr<Engine>& engine, const MoeConfig& config)
      : layer_(make_engine_layer(engine, config)), handle_(register_layer(layer_)) {}
  ~LayerHandle() { close(); }
  LayerHandle(const LayerHandle&) = delete;
  LayerHandle& operator=(const LayerHandle&) = delete;

  void close() {
    std::shared_ptr<EngineLayer> last = std::move(layer_);
    // its jobs are waited for, and its engine may go with it; closures of theirs may want the GIL
    const py::gil_scoped_release release;
    close_layer(handle_);
    last.reset();
  }
  int64_t handle() const { return handle_; }
  const std::shared_ptr<EngineLayer>& engine_layer() const {
    KT_CHECK(layer_ != nullptr, "this layer is closed.");
    return layer_;
  }
  MoeLayer& layer() const { return engine_layer()->layer; }

 private:
  static std::shared_ptr<EngineLayer> make_engine_layer(const std::shared_ptr<Engine>& engine,
                                                        const MoeConfig& config) {
    const py::gil_scoped_release release;  // kernels are compiled behind jobs that may want the GIL
    return std::make_shared<EngineLayer>(engine, config);
  }

  std::shared_ptr<EngineLayer> layer_;
  int64_t handle_;
};

std::unique_ptr<LayerHandle> make_layer(const std::shared_ptr<Engine>& engine, int layer_idx,
                                        int num_experts, int top_k, int hidden_size,
                                        int intermediate_size, const std::string& w13_layout,
                                        const std::string& w2_layout,
                                        const std::vector<int>& expert_ids,
                                        const std::vector<int>& reserved_ids,
                                        const std::string& activation, float swiglu_limit,
                                        float swiglu_alpha) {
  MoeConfig config;
  config.layer_idx = layer_idx;
  config.num_experts = num_experts;
  config.top_k = top_k;
  config.hidden_size = hidden_size;
  config.intermediate_size = intermediate_size;
  config.layouts[0] = PackedLayout::parse(w13_layout);
  config.layouts[1] = PackedLayout::parse(w2_layout);
  config.expert_ids = expert_ids;
  config.reserved_ids = reserved_ids;
  config.activation = activation_of(activation, swiglu_limit, swiglu_alpha);
  check_moe_config(config);
  return std::make_unique<LayerHandle>(engine, config);
}

// Forwards that streams asked for; overlap is None where none was measured (see DeviceTimes).
void add_device_counters(EngineLayer& layer, py::dict& out) {
  uint64_t jobs = 0;
  uint64_t cpu_ns = 0;
  uint64_t measured_ns = 0;
  uint64_t hidden_ns = 0;
  layer.engine->for_each_device([&](DeviceSync& device) {
    const DeviceTimes& times = device.times(&layer);
    jobs += times.jobs.load();
    cpu_ns += times.cpu_ns.load();
    measured_ns += times.measured_ns.load();
    hidden_ns += times.hidden_ns.load();
  });
  out["device_jobs"] = jobs;
  out["device_cpu_ns"] = cpu_ns;
  out["device_measured_ns"] = measured_ns;
  out["device_hidden_ns"] = hidden_ns;
  const py::object none = py::none();
  const double measured = static_cast<double>(measured_ns);
  out["overlap"] = measured_ns == 0 ? none : py::float_(static_cast<double>(hidden_ns) / measured);
}

py::dict counters_dict(const LayerHandle& handle) {
  const MoeCounters counters = handle.layer().counters();
  py::dict out;
  out["forwards"] = counters.forwards;
  out["tokens"] = counters.tokens;
  out["rows"] = counters.rows;
  out["weight_bytes"] = counters.weight_bytes;
  out["read_bytes"] = counters.read_bytes;
  out["barriers"] = counters.barriers;
  out["busy_ns"] = counters.busy_ns;
  out["deferred_rows"] = counters.deferred_rows;
  out["dropped_shares"] = counters.dropped_shares;
  out["expert_counts"] = counters.expert_counts;
  add_device_counters(*handle.engine_layer(), out);
  return out;
}

py::dict device_driver_dict() {
  py::dict out;
  out["reason"] = device_driver_reason();
  out["is_double"] = device_driver_reason().empty() && device_driver_is_double();
  return out;
}

// Whoever drops the last reference waits for the engine's devices and threads, seconds maybe, and
// these may want the GIL. Not where the interpreter ends: a thread that asks for the GIL then is
// ended in the middle of what it does.
void delete_engine(Engine* engine) {
#if PY_VERSION_HEX >= 0x030D0000
  const bool ends = !Py_IsInitialized() || Py_IsFinalizing();
#else
  const bool ends = !Py_IsInitialized() || _Py_IsFinalizing();
#endif
  if (ends || !PyGILState_Check()) {
    delete engine;
    return;
  }
  const py::gil_scoped_release release;
  delete engine;
}

std::shared_ptr<Engine> make_engine(int num_threads, int num_nodes,
                                    const std::vector<int>& node_ids) {
  const py::gil_scoped_release release;
  return {new Engine(num_threads, num_nodes, node_ids), &delete_engine};
}

void check_devices(Engine& engine) {
  engine.for_each_device([](DeviceSync& device) { device.check(); });
}

void clear_device_buffers(Engine& engine) {
  engine.for_each_device([](DeviceSync& device) { device.clear(); });
}

void link_handles(const std::vector<const LayerHandle*>& handles,
                  const std::vector<int>& max_deferred) {
  std::vector<std::shared_ptr<EngineLayer>> layers;
  for (const LayerHandle* handle : handles) layers.push_back(handle->engine_layer());
  const py::gil_scoped_release release;
  link_layers(layers, max_deferred);
  layers.clear();  // without the GIL: a layer that was closed meanwhile waits for its jobs
}

double probe_read_of(const LayerHandle& handle) {
  const std::shared_ptr<EngineLayer> layer = handle.engine_layer();
  const py::gil_scoped_release release;
  return probe_read(*layer);
}

double probe_peak_of(const LayerHandle& handle, int milliseconds) {
  const std::shared_ptr<EngineLayer> layer = handle.engine_layer();
  const py::gil_scoped_release release;
  return probe_peak(*layer, milliseconds);
}

py::dict pages_dict(const LayerHandle& handle) {
  PageReport report;
  {
    std::shared_ptr<EngineLayer> layer = handle.engine_layer();
    const py::gil_scoped_release release;  // /proc is read line by line
    report = layer->layer.store().pages();
    layer.reset();  // without the GIL: a layer that was closed meanwhile waits for its jobs
  }
  py::dict out;
  out["bytes"] = report.bytes;
  out["resident_bytes"] = report.resident_bytes;
  out["huge_bytes"] = report.huge_bytes;
  out["local_bytes"] = report.local_bytes;
  return out;
}

// What was found, and whether it is right.
std::pair<std::string, bool> check_tiles_of(const LayerHandle& handle) {
  TileReport report;
  {
    std::shared_ptr<EngineLayer> layer = handle.engine_layer();
    const py::gil_scoped_release release;
    report = layer->check_tiles();
    layer.reset();  // without the GIL: a layer that was closed meanwhile waits for its jobs
  }
  return {report.text, report.verdict != TileVerdict::kWrong};
}

void bind_engine(py::module_& m) {
  py::class_<Engine, std::shared_ptr<Engine>>(
      m, "Engine", "A worker pool and the in-order stream that feeds it.")
      .def(py::init(&make_engine), py::arg("num_threads") = 0, py::arg("num_nodes") = 0,
           py::arg("node_ids") = std::vector<int>{})
      .def_property_readonly("num_threads",
                             [](Engine& engine) { return engine.pool().num_threads(); })
      .def_property_readonly("num_nodes", [](Engine& engine) { return engine.pool().num_nodes(); })
      .def_property_readonly("node_ids",
                             [](Engine& engine) {
                               std::vector<int> ids;
                               for (const auto& node : engine.pool().plan().nodes)
                                 ids.push_back(node.id);
                               return ids;
                             })
      .def_property_readonly("cpus",
                             [](Engine& engine) {
                               std::vector<int> cpus;
                               for (const auto& node : engine.pool().plan().nodes) {
                                 cpus.insert(cpus.end(), node.cpus.begin(), node.cpus.end());
                               }
                               return cpus;
                             })
      .def("probe_dispatch", &probe_dispatch, py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("scratch_bytes",
                             [](Engine& engine) {
                               const py::gil_scoped_release release;
                               uint64_t bytes = 0;
                               // forwards make the buffers larger
                               engine.run([&] { bytes = engine.scratch()->bytes(); });
                               return bytes;
                             })
      .def("check_devices", &check_devices, py::call_guard<py::gil_scoped_release>())
      .def("clear_device_buffers", &clear_device_buffers, py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("warnings", &Engine::warnings);
  m.def("device_driver", &device_driver_dict);
  m.def("probe_doorbells", &probe_doorbells, py::arg("device"),
        py::call_guard<py::gil_scoped_release>());
  m.def("expect_batch", &expect_batch, py::arg("num_tokens"));
}

void bind_layer(py::module_& m) {
  py::class_<LayerHandle>(m, "Layer",
                          "One MoE layer: packed experts and the kernels chosen for them.")
      .def(py::init(&make_layer), py::arg("engine"), py::arg("layer_idx"), py::arg("num_experts"),
           py::arg("top_k"), py::arg("hidden_size"), py::arg("intermediate_size"),
           py::arg("w13_layout"), py::arg("w2_layout"), py::arg("expert_ids"),
           py::arg("reserved_ids") = std::vector<int>{}, py::arg("activation") = "silu",
           py::arg("swiglu_limit") = 0.0f, py::arg("swiglu_alpha") = 0.0f)
      .def_property_readonly("handle", &LayerHandle::handle)
      .def_property_readonly("bytes",
                             [](const LayerHandle& layer) { return layer.layer().store().bytes(); })
      .def_property_readonly(
          "loaded", [](const LayerHandle& layer) { return layer.layer().store().all_loaded(); })
      .def_property_readonly("explain",
                             [](const LayerHandle& layer) { return layer.layer().explain(); })
      .def_property_readonly(
          "chain_position",
          [](const LayerHandle& layer) { return layer.engine_layer()->chain_position(); })
      .def_property_readonly(
          "max_deferred",
          [](const LayerHandle& layer) { return layer.engine_layer()->max_deferred(); })
      .def("counters", &counters_dict)
      .def("pages", &pages_dict)
      .def("check_tiles", &check_tiles_of)
      .def("probe_read", &probe_read_of)
      .def("probe_peak", &probe_peak_of, py::arg("milliseconds") = 20)
      .def("close", &LayerHandle::close);
  m.def("link_layers", &link_handles, py::arg("layers"), py::arg("max_deferred"));
}

void bind_kernel_bench(py::module_& m) {
  using Release = py::call_guard<py::gil_scoped_release>;
  const auto make = [](const std::string& layout, int64_t k, int max_rows, int64_t buffer_bytes) {
    return std::make_unique<KernelBench>(PackedLayout::parse(layout), k, max_rows, buffer_bytes);
  };
  py::class_<KernelBench>(m, "KernelBench",
                          "Rows of the kernel table for one layout, timed one by one.")
      .def(py::init(make), py::arg("layout"), py::arg("k"), py::arg("max_rows"),
           py::arg("buffer_bytes"), Release())
      .def_property_readonly("kernels", &KernelBench::kernels)
      .def_property_readonly("panel_bytes", &KernelBench::panel_bytes)
      .def("matches", &KernelBench::matches, py::arg("kernel"), py::arg("m"), Release())
      .def("stream_rate", &KernelBench::stream_rate, py::arg("kernel"), py::arg("m"), Release())
      .def("hot_rate", &KernelBench::hot_rate, py::arg("kernel"), py::arg("m"), Release())
      .def("read_rate", &KernelBench::read_rate, py::arg("kernel"), Release())
      .def("peak_rate", &KernelBench::peak_rate, py::arg("kernel"), Release());
}

}  // namespace
}  // namespace kt

PYBIND11_MODULE(_ext, m) {
  m.doc() = "Native part of kt_kernel; tensors go through torch.ops.kt_kernel.";
  m.attr("built_torch_version") = KT_BUILT_TORCH_VERSION;
  m.def("cpu_features", [] { return kt::dict_of(kt::cpu_features()); });
  m.def("cpu_readings", &kt::readings_dict);
  m.def("detect_features", &kt::detected_dict, py::arg("readings"));
  m.def("list_kernels", &kt::kernel_list);
  m.def("explain_kernels", &kt::explain_for, py::arg("layout"));
  m.def("list_formats", &kt::format_list);
  m.def("expanded_bytes", &kt::expanded_bytes_of, py::arg("layout"), py::arg("k"));
  m.def("packed_value_bytes", &kt::packed_value_bytes_of, py::arg("layout"));
  m.def("topology", &kt::topology_dict);
  m.def("layout_info", &kt::layout_dict, py::arg("layout"), py::arg("n"), py::arg("k"));
  kt::bind_engine(m);
  kt::bind_layer(m);
  kt::bind_kernel_bench(m);
}
