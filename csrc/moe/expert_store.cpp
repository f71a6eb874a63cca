#include "moe/expert_store.h"

#include <algorithm>
#include <cstring>

#include "base/check.h"
#include "format/panel_error.h"

namespace kt {
namespace {

// Matrices start on their own page, so that pages of two experts are never mixed when one is
// replaced.
constexpr int64_t kMatrixAlignment = 4096;

// Re-throws an error of packing with the place it happened: the row of gate, up or down.
template <typename F>
void with_place(int layer_idx, int expert, Projection projection, int64_t panel, F&& body) {
  try {
    with_matrix_rows(projection == Projection::kW13 ? nullptr : "down", panel, body);
  } catch (const Error& error) {
    KT_CHECK(false, "layer " << layer_idx << ", expert " << expert << ": " << error.what());
  }
}

}  // namespace

ExpertStore::ExpertStore(const MoeConfig& config, WorkerPool& pool) : config_(config), pool_(pool) {
  check_moe_config(config);
  slot_.assign(config.num_experts, -1);
  int num_slots = 0;
  for (const int expert : config.expert_ids) slot_[expert] = num_slots++;
  for (const int expert : config.reserved_ids) slot_[expert] = num_slots++;
  loaded_ = std::vector<std::atomic<bool>>(num_slots);

  for (const Projection projection : {Projection::kW13, Projection::kW2}) {
    const int64_t panels = num_panels(projection);
    std::vector<uint8_t*>& panel0 = panel0_[static_cast<int>(projection)];
    std::vector<int64_t>& stride = slot_stride_[static_cast<int>(projection)];
    panel0.assign(panels, nullptr);
    stride.assign(panels, 0);
    for (int node = 0; node < pool.num_nodes(); ++node) {
      const IndexRange range = node_panels(projection, node);
      const int64_t slot_bytes = round_up(range.size() * panel_bytes(projection), kMatrixAlignment);
      const PoolPlan::Node& plan = pool.plan().nodes[node];
      const int64_t arena_bytes = slot_bytes * num_slots;
      if (arena_bytes == 0) continue;
      NumaArena arena(arena_bytes, plan.bind_memory ? plan.id : -1);
      for (int64_t p = range.begin; p < range.end; ++p) {
        panel0[p] = arena.data() + (p - range.begin) * panel_bytes(projection);
        stride[p] = slot_bytes;
      }
      arenas_.push_back(std::move(arena));
    }
  }
}

bool ExpertStore::all_loaded() const {
  return std::all_of(loaded_.begin(), loaded_.begin() + config_.expert_ids.size(),
                     [](const std::atomic<bool>& loaded) { return loaded.load(); });
}

int64_t ExpertStore::num_panels(Projection projection) const {
  return projection == Projection::kW13
             ? num_w13_panels(config_.intermediate_size)
             : config_.layout(projection).num_panels(config_.hidden_size);
}

int64_t ExpertStore::padded_k(Projection projection) const {
  return config_.layout(projection).padded_k(config_.depth(projection));
}

int64_t ExpertStore::panel_bytes(Projection projection) const {
  return config_.layout(projection).panel_bytes(config_.depth(projection));
}

IndexRange ExpertStore::node_panels(Projection projection, int node) const {
  const auto& nodes = pool_.plan().nodes;
  int64_t first_thread = 0;
  for (int i = 0; i < node; ++i) first_thread += static_cast<int64_t>(nodes[i].cpus.size());
  const int64_t last_thread = first_thread + static_cast<int64_t>(nodes[node].cpus.size()) - 1;
  const int64_t panels = num_panels(projection);
  return {even_part(panels, first_thread, pool_.num_threads()).begin,
          even_part(panels, last_thread, pool_.num_threads()).end};
}

const uint8_t* ExpertStore::panel(Projection projection, int expert, int64_t p) const {
  return mutable_panel(projection, slot_[expert], p);
}

uint8_t* ExpertStore::mutable_panel(Projection projection, int slot, int64_t p) const {
  const int i = static_cast<int>(projection);
  return panel0_[i][p] + slot * slot_stride_[i][p];
}

void ExpertStore::check_expert(int expert) const {
  KT_CHECK(expert >= 0 && expert < config_.num_experts && slot_[expert] >= 0,
           "layer " << config_.layer_idx << ": expert " << expert << " has no place on the CPU; "
                    << loaded_.size() << " of " << config_.num_experts
                    << " experts were given one when the layer was made.");
}

// Calls fill(source index, projection, panel, destination) once for every panel of every source, on
// a worker of the node that owns the panel, so that first touch is local.
template <typename Fill>
void ExpertStore::fill_panels(const std::vector<int>& experts, Fill&& fill) {
  std::vector<char> given(slot_.size(), 0);
  for (const int expert : experts) {
    check_expert(expert);
    KT_CHECK(
        !given[expert],
        "layer " << config_.layer_idx << ": expert " << expert
                 << " is given twice in one load; its panels would be written by two threads.");
    given[expert] = 1;
  }
  // an expert whose load fails half-way must not count as loaded, even if it was before
  for (const int expert : experts) loaded_[slot_[expert]] = false;
  const auto body = [&](const Worker& worker) {
    for (const Projection projection : {Projection::kW13, Projection::kW2}) {
      const IndexRange panels = node_panels(projection, worker.node);
      const IndexRange units = even_part(panels.size() * static_cast<int64_t>(experts.size()),
                                         worker.index_in_node, worker.node_threads);
      for (int64_t unit = units.begin; unit < units.end; ++unit) {
        const int64_t source = unit / panels.size();
        const int64_t p = panels.begin + unit % panels.size();
        with_place(config_.layer_idx, experts[source], projection, p, [&] {
          fill(source, projection, p, mutable_panel(projection, slot_[experts[source]], p));
        });
      }
    }
  };
  pool_.run({body});
  for (const int expert : experts) loaded_[slot_[expert]] = true;
}

void ExpertStore::load(const std::vector<Source>& sources) {
  for (const PackedLayout& layout : config_.layouts) check_quantizes(layout);
  std::vector<int> experts;
  for (const Source& source : sources) experts.push_back(source.expert);
  fill_panels(experts, [&](int64_t i, Projection projection, int64_t p, uint8_t* dst) {
    const Source& source = sources[i];
    const PanelRows rows = projection == Projection::kW13
                               ? w13_panel_rows(source.gate, source.up, source.dtype,
                                                config_.intermediate_size, config_.hidden_size, p)
                               : matrix_panel_rows(source.down, source.dtype, config_.hidden_size,
                                                   config_.intermediate_size, p);
    quantize_panel(config_.layout(projection), rows, dst, nullptr);
  });
}

void ExpertStore::load_sources(const std::vector<Encoded>& sources) {
  std::vector<int> experts;
  for (const Encoded& source : sources) {
    experts.push_back(source.expert);
    for (const auto* matrix : {&source.gate, &source.up, &source.down}) {
      const bool is_down = matrix == &source.down;
      const int64_t n = is_down ? config_.hidden_size : config_.intermediate_size;
      const int64_t k = is_down ? config_.intermediate_size : config_.hidden_size;
      KT_CHECK(matrix->n == n && matrix->k == k,
               "layer " << config_.layer_idx << ", expert " << source.expert << ": a matrix is ["
                        << matrix->n << ", " << matrix->k << "]; it must be [" << n << ", " << k
                        << "].");
      check_source_layout(*matrix, config_.layout(is_down ? Projection::kW2 : Projection::kW13));
    }
  }
  fill_panels(experts, [&](int64_t i, Projection projection, int64_t p, uint8_t* dst) {
    const Encoded& source = sources[i];
    pack_source_panel(config_.layout(projection),
                      projection == Projection::kW13 ? w13_source_rows(source.gate, source.up, p)
                                                     : matrix_source_rows(source.down, p),
                      dst);
  });
}

void ExpertStore::load_packed(const std::vector<Packed>& sources) {
  std::vector<int> experts;
  for (const Packed& source : sources) experts.push_back(source.expert);
  fill_panels(experts, [&](int64_t i, Projection projection, int64_t p, uint8_t* dst) {
    const uint8_t* matrix = projection == Projection::kW13 ? sources[i].w13 : sources[i].w2;
    std::memcpy(dst, matrix + p * panel_bytes(projection), panel_bytes(projection));
  });
}

void ExpertStore::export_packed(int expert, uint8_t* w13, uint8_t* w2) const {
  check_expert(expert);
  KT_CHECK(loaded(expert),
           "layer " << config_.layer_idx << ": expert " << expert << " has not been loaded yet.");
  for (const Projection projection : {Projection::kW13, Projection::kW2}) {
    uint8_t* matrix = projection == Projection::kW13 ? w13 : w2;
    for (int64_t p = 0; p < num_panels(projection); ++p) {
      std::memcpy(matrix + p * panel_bytes(projection), panel(projection, expert, p),
                  panel_bytes(projection));
    }
  }
}

void ExpertStore::load_biases(const std::vector<Biases>& sources) {
  for (const Biases& source : sources) check_expert(source.expert);
  constexpr int kHalf = kPackedColumns / 2;  // columns of a w13 panel: gate, then up
  for (const Biases& source : sources) {
    const int slot = slot_[source.expert];
    for (auto& of_slots : biases_) of_slots.resize(loaded_.size());
    std::vector<float>& w13 = biases_[static_cast<int>(Projection::kW13)][slot];
    w13.assign(num_panels(Projection::kW13) * kPackedColumns, 0.0f);
    for (int i = 0; i < config_.intermediate_size; ++i) {
      float* const panel = w13.data() + i / kHalf * kPackedColumns;
      panel[i % kHalf] = source.gate[i];
      panel[kHalf + i % kHalf] = source.up[i];
    }
    std::vector<float>& w2 = biases_[static_cast<int>(Projection::kW2)][slot];
    w2.assign(num_panels(Projection::kW2) * kPackedColumns, 0.0f);
    std::copy_n(source.down, config_.hidden_size, w2.begin());
  }
}

const float* ExpertStore::bias(Projection projection, int expert, int64_t p) const {
  const auto& of_slots = biases_[static_cast<int>(projection)];
  if (of_slots.empty() || of_slots[slot_[expert]].empty()) return nullptr;
  return of_slots[slot_[expert]].data() + p * kPackedColumns;
}

uint64_t ExpertStore::bytes() const {
  if (loaded_.empty()) return 0;
  uint64_t total = 0;
  for (const NumaArena& arena : arenas_) total += arena.size();
  const auto first_reserved = loaded_.begin() + config_.expert_ids.size();
  const auto num_late = std::count(first_reserved, loaded_.end(), true);
  // every arena has one place of equal size for each expert
  return total / loaded_.size() * (config_.expert_ids.size() + num_late);
}

PageReport ExpertStore::pages() const {
  PageReport total;
  for (const NumaArena& arena : arenas_) {
    const PageReport report = arena.report();
    total.bytes += report.bytes;
    total.resident_bytes += report.resident_bytes;
    total.huge_bytes += report.huge_bytes;
    total.local_bytes += report.local_bytes;
  }
  return total;
}

}  // namespace kt
