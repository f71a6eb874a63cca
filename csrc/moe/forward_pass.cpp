#include "moe/forward_pass.h"

#include <algorithm>
#include <cstring>

#include "kernels/tiles.h"

namespace kt {
namespace {

// Rows multiplied before the tile is consumed: 48 x 64 x 4 bytes = 12 KB stay in L1, and 48 is
// whole blocks of mr = 6.
constexpr int kRowBlock = 48;

// A panel is read from memory whatever its rows, so below this many rows its cost is that of the
// read.
constexpr int64_t kMemoryBoundRows = 4;

// Sums that a worker keeps while it walks through the experts: those of as many w2 panels as fit
// this. Each walk reads the rows of all experts anew, from the L3 where they are many, and more
// panels a walk make longer streams of an expert's weights. Four panels of 1,024 tokens and not one
// are 5 % faster on AVX2 in a Qwen3-30B layer of int8 or int4, 2 % on AVX-512 with int8, 1 % with
// bf16; eight are no faster, and with 4,096 tokens four panels gain 2 % on AVX2, nothing elsewhere.
// (Zen 4, an L2 of 1 MB; with 16 to 256 tokens 0.98 to 1.03 of the speed, the noise. Not measured
// on a smaller L2.)
constexpr int64_t kSumsBytes = 1 << 20;

constexpr int64_t kLine = 64;

int64_t line_up(int64_t bytes) { return round_up(bytes, kLine); }

// Rounds n values to the output's type and stores them from element `at` on.
void store_values(const RowwiseOps& ops, const MoeInput& input, const float* values, int64_t at,
                  int32_t n) {
  if (input.fp32_output != nullptr) {
    std::memcpy(input.fp32_output + at, values, n * sizeof(float));
    return;
  }
  switch (input.dtype) {
    case DType::kBFloat16:
      ops.store_bf16(values, static_cast<uint16_t*>(input.output) + at, n);
      break;
    case DType::kFloat16:
      ops.store_fp16(values, static_cast<uint16_t*>(input.output) + at, n);
      break;
    default: std::memcpy(static_cast<float*>(input.output) + at, values, n * sizeof(float));
  }
}

}  // namespace

void store_addend(const RowwiseOps& ops, const MoeInput& input, int64_t hidden_size) {
  if (input.addend == nullptr) {
    const int64_t values = input.num_tokens * hidden_size;
    if (input.fp32_output != nullptr) {
      std::memset(input.fp32_output, 0, values * sizeof(float));
    } else {
      std::memset(input.output, 0, values * (dtype_bits(input.dtype) / 8));
    }
    return;
  }
  for (int64_t t = 0; t < input.num_tokens; ++t) {
    store_values(ops, input, input.addend + t * hidden_size, t * hidden_size,
                 static_cast<int32_t>(hidden_size));
  }
}

ForwardPass::ForwardPass(const ExpertStore& store, WorkerPool& pool, const LayerKernels& kernels,
                         const Routing& routing, MoeScratch& scratch, const MoeInput& input,
                         std::vector<PanelReads>& reads)
    : store_(store),
      pool_(pool),
      kernels_(kernels),
      routing_(routing),
      scratch_(scratch),
      input_(input),
      reads_(reads),
      few_rows_(int64_t{input.num_tokens} * store.config().hidden_size <= kRedundantValues &&
                int64_t{routing.num_rows()} * store.config().intermediate_size <=
                    kRedundantValues) {
  const int64_t num_rows = routing.num_rows();
  intermediate_stride_ = round_up(store.config().intermediate_size, kPanelColumns);
  intermediate_ = reinterpret_cast<float*>(scratch.intermediate.reserve(
      num_rows * intermediate_stride_ * static_cast<int64_t>(sizeof(float))));
  if (!few_rows_) {
    shared_tokens_ = rows_at(scratch.tokens.reserve(rows_bytes(input.num_tokens, Projection::kW13)),
                             input.num_tokens, Projection::kW13);
    shared_rows_ = rows_at(scratch.rows.reserve(rows_bytes(num_rows, Projection::kW2)), num_rows,
                           Projection::kW2);
  }
  scratch.workers.resize(std::max<size_t>(scratch.workers.size(), pool.num_threads()));

  std::vector<int64_t>& costs = scratch.w13_costs;
  costs.clear();
  for (size_t i = 0; i < routing.experts.size(); ++i) {
    costs.push_back(
        std::max<int64_t>(routing.offsets[i + 1] - routing.offsets[i], kMemoryBoundRows));
  }
  scratch.prepare_splits(pool.num_nodes());
  for (int node = 0; node < pool.num_nodes(); ++node) {
    const int workers = static_cast<int>(pool.plan().nodes[node].cpus.size());
    scratch.w13_splits[node]->reset(costs, store.node_panels(Projection::kW13, node).size(),
                                    workers);
    scratch.w2_splits[node]->reset(scratch.w2_costs,
                                   store.node_panels(Projection::kW2, node).size(), workers);
  }
  find_whole_experts();
  place_packed_rows();
}

void ForwardPass::run() {
  if (few_rows_) {
    const auto first = [&](const Worker& worker) {
      const WorkerBuffers mine = buffers(worker);
      for (int64_t t = 0; t < input_.num_tokens; ++t) quantize_token(t, mine.row, mine.tokens);
      compute_w13(worker, mine, mine.tokens);
    };
    const auto second = [&](const Worker& worker) {
      const WorkerBuffers mine = buffers(worker);
      for (int64_t r = 0; r < routing_.num_rows(); ++r)
        quantize_intermediate(r, r, mine.row, mine.rows);
      compute_w2(worker, mine, mine.rows);
    };
    pool_.run({first, second});
    return;
  }
  const auto quantize_tokens = [&](const Worker& worker) {
    const WorkerBuffers mine = buffers(worker);
    const IndexRange part = even_part(input_.num_tokens, worker.index, pool_.num_threads());
    for (int64_t t = part.begin; t < part.end; ++t) quantize_token(t, mine.row, shared_tokens_);
    pack_tokens(part);
  };
  const auto w13 = [&](const Worker& worker) {
    compute_w13(worker, buffers(worker), shared_tokens_);
  };
  const auto quantize_rows = [&](const Worker& worker) {
    quantize_rows_left(worker, buffers(worker));
  };
  const auto w2 = [&](const Worker& worker) { compute_w2(worker, buffers(worker), shared_rows_); };
  pool_.run({quantize_tokens, w13, quantize_rows, w2});
}

int64_t ForwardPass::panel_sums() const { return int64_t{input_.num_tokens} * kPanelColumns; }

int64_t ForwardPass::panels_together() const {
  const int64_t fitting = kSumsBytes / (panel_sums() * static_cast<int64_t>(sizeof(float)));
  const int64_t panels = ceil_div(store_.config().hidden_size, kPanelColumns);
  return std::clamp<int64_t>(fitting, 1, panels);
}

ForwardPass::WorkerBuffers ForwardPass::buffers(const Worker& worker) const {
  const int64_t k = std::max(store_.padded_k(Projection::kW13), store_.padded_k(Projection::kW2));
  const int64_t tile_bytes =
      int64_t{kRowBlock} * kPanelColumns * static_cast<int64_t>(sizeof(float));
  const int64_t row_bytes = line_up(k * static_cast<int64_t>(sizeof(float)));
  const int64_t expanded_bytes =
      std::max(expanded_panel_bytes(Projection::kW13), expanded_panel_bytes(Projection::kW2));
  const int64_t column_bytes =
      panels_together() * panel_sums() * static_cast<int64_t>(sizeof(float));
  const int64_t token_bytes = few_rows_ ? rows_bytes(input_.num_tokens, Projection::kW13) : 0;
  const int64_t code_bytes = few_rows_ ? rows_bytes(routing_.num_rows(), Projection::kW2) : 0;

  const PoolPlan::Node& node = pool_.plan().nodes[worker.node];
  uint8_t* base = scratch_.workers[worker.index].reserve(
      tile_bytes + row_bytes + expanded_bytes + column_bytes + token_bytes + code_bytes,
      node.bind_memory ? node.id : -1);
  WorkerBuffers mine;
  mine.reads = &reads_[worker.index];
  mine.tile = reinterpret_cast<float*>(base);
  base += tile_bytes;
  mine.row = reinterpret_cast<float*>(base);
  base += row_bytes;
  mine.expanded = base;
  base += expanded_bytes;
  mine.columns = reinterpret_cast<float*>(base);
  base += column_bytes;
  if (few_rows_) {
    mine.tokens = rows_at(base, input_.num_tokens, Projection::kW13);
    mine.rows = rows_at(base + token_bytes, routing_.num_rows(), Projection::kW2);
  }
  return mine;
}

const GemmKernel& ForwardPass::kernel_of(Projection projection, int64_t expert_pos) const {
  const int rows = routing_.offsets[expert_pos + 1] - routing_.offsets[expert_pos];
  const KernelSet& kernels = kernels_.of(projection);
  return few_rows_ ? kernels.for_plain_rows(rows) : kernels.for_rows(rows);
}

int64_t ForwardPass::expanded_panel_bytes(Projection projection) const {
  const PackedLayout& layout = store_.config().layout(projection);
  if (!has_groups(layout.format)) return 0;
  const int64_t k = store_.padded_k(projection);
  return expanded_bytes(k, layout.num_groups(k));
}

int64_t ForwardPass::rows_bytes(int64_t rows, Projection projection) const {
  return activation_bytes(store_.config().layout(projection), store_.padded_k(projection), rows);
}

ActivationRows ForwardPass::rows_at(uint8_t* base, int64_t rows, Projection projection) const {
  return activations_at(store_.config().layout(projection), store_.padded_k(projection), rows,
                        base);
}

void ForwardPass::place_packed_rows() {
  if (few_rows_) return;
  const int64_t rows = routing_.num_rows();
  // as much as any routing of so many rows can take: else a batch of the same size might grow it
  const int64_t experts = std::min<int64_t>(store_.config().num_experts, rows);
  const int64_t most = rows / kTileRows + experts;
  GrowingBuffer* const buffers[] = {&scratch_.packed_tokens, &scratch_.packed_rows};
  for (const Projection projection : {Projection::kW13, Projection::kW2}) {
    const int64_t value_bytes = kernels_.of(projection).packed_value_bytes();
    if (value_bytes == 0) continue;
    const int at = static_cast<int>(projection);
    std::vector<int64_t>& first_tile = scratch_.first_tile[at];
    first_tile.assign(routing_.experts.size(), 0);
    int64_t tiles = 0;
    for (size_t i = 0; i < first_tile.size(); ++i) {
      first_tile[i] = tiles;
      if (kernel_of(projection, i).packing == nullptr) continue;
      tiles += ceil_div(routing_.offsets[i + 1] - routing_.offsets[i], kTileRows);
    }
    if (tiles == 0) continue;
    packed_[at] =
        buffers[at]->reserve(most * kTileRows * store_.padded_k(projection) * value_bytes);
  }
}

uint8_t* ForwardPass::packed_row(Projection projection, int64_t expert_pos, int64_t r) const {
  const int64_t row_bytes =
      store_.padded_k(projection) * kernel_of(projection, expert_pos).packing->value_bytes;
  const int64_t first = scratch_.first_tile[static_cast<int>(projection)][expert_pos] * kTileRows;
  return packed_[static_cast<int>(projection)] +
         packed_row_offset(first + r - routing_.offsets[expert_pos], row_bytes);
}

void ForwardPass::pack_row(Projection projection, int64_t expert_pos, int64_t r, int64_t source,
                           const ActivationRows& rows) const {
  const RowPacking* const packing = kernel_of(projection, expert_pos).packing;
  if (packing == nullptr) return;
  const int64_t k = store_.padded_k(projection);
  const int64_t block = store_.config().layout(projection).activation_block(k);
  packing->pack_row(rows.codes + source * rows.stride_bytes, static_cast<int32_t>(k),
                    rows.scale + source * rows.scale_stride, static_cast<int32_t>(block),
                    packed_row(projection, expert_pos, r));
}

void ForwardPass::pack_tokens(IndexRange part) const {
  if (packed_[static_cast<int>(Projection::kW13)] == nullptr) return;
  for (size_t i = 0; i < routing_.experts.size(); ++i) {
    for (int64_t r = routing_.offsets[i]; r < routing_.offsets[i + 1]; ++r) {
      const int64_t token = routing_.token[r];
      if (token < part.begin || token >= part.end) continue;
      pack_row(Projection::kW13, i, r, token, shared_tokens_);
    }
  }
}

void ForwardPass::quantize_expert_row(int64_t expert_pos, int64_t r, int64_t source,
                                      float* row) const {
  quantize_intermediate(r, source, row, shared_rows_);
  if (packed_[static_cast<int>(Projection::kW2)] == nullptr) return;
  pack_row(Projection::kW2, expert_pos, r, r, shared_rows_);
}

void ForwardPass::quantize_token(int64_t token, float* row, const ActivationRows& out) const {
  const int32_t n = store_.config().hidden_size;
  const int32_t padded = static_cast<int32_t>(store_.padded_k(Projection::kW13));
  const RowwiseOps& ops = kernels_.rowwise();
  const uint8_t* src = static_cast<const uint8_t*>(input_.hidden_states) +
                       token * n * (dtype_bits(input_.dtype) / 8);
  switch (input_.dtype) {
    case DType::kBFloat16:
      ops.load_bf16(reinterpret_cast<const uint16_t*>(src), row, n, padded);
      break;
    case DType::kFloat16:
      ops.load_fp16(reinterpret_cast<const uint16_t*>(src), row, n, padded);
      break;
    default: std::memcpy(row, src, n * sizeof(float)); std::fill(row + n, row + padded, 0.0f);
  }
  quantize(row, token, Projection::kW13, out);
}

void ForwardPass::quantize_intermediate(int64_t row_idx, int64_t source, float* row,
                                        const ActivationRows& out) const {
  const int64_t n = store_.config().intermediate_size;
  std::memcpy(row, intermediate_ + source * intermediate_stride_, n * sizeof(float));
  std::fill(row + n, row + store_.padded_k(Projection::kW2), 0.0f);
  quantize(row, row_idx, Projection::kW2, out);
}

void ForwardPass::quantize(float* row, int64_t row_idx, Projection projection,
                           const ActivationRows& out) const {
  const int32_t offset = kernels_.of(projection).a_dtype == DType::kUint8 ? 128 : 0;
  quantize_row(kernels_.rowwise(), store_.config().layout(projection),
               store_.config().depth(projection), offset, row, row_idx, out);
}

// Multiplies all rows of one expert by one panel and adds its bias, a block of rows at a time:
// consume(first row of the block, rows, tile). `rows` are indexed by token for w13 and by routing
// row for w2.
template <typename Consume>
void ForwardPass::multiply_panel(Projection projection, int64_t expert_pos, int64_t p,
                                 const uint8_t* next_panel, const ActivationRows& rows,
                                 const WorkerBuffers& mine, Consume&& consume) const {
  const int32_t begin = routing_.offsets[expert_pos];
  const int32_t count = routing_.offsets[expert_pos + 1] - begin;
  const GemmKernel& kernel = kernel_of(projection, expert_pos);
  const PackedLayout& layout = store_.config().layout(projection);
  if (kernel.packing != nullptr) require_tiles();
  GemmArgs args{};
  args.k = static_cast<int32_t>(store_.padded_k(projection));
  args.group_size = layout.effective_group_size(args.k);
  args.a_block = static_cast<int32_t>(layout.activation_block(args.k));
  args.code_offset = format_info(layout.format).code_offset;
  args.panel = store_.panel(projection, routing_.experts[expert_pos], p);
  // the worker's own counter: no locked instruction
  std::atomic<uint64_t>& panels = mine.reads->panels[static_cast<int>(projection)];
  panels.store(panels.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
  if (kernel.expand != nullptr) {
    kernel.expand(args.panel, args.k, args.group_size, mine.expanded);
    args.panel = mine.expanded;
  }
  args.a_stride_bytes = rows.stride_bytes;
  args.a_group_sum_stride = rows.group_sum_stride;
  args.a_scale_stride = rows.scale_stride;
  args.c = mine.tile;
  args.c_stride = kPanelColumns;
  args.next_panel = next_panel;
  const float* const bias = store_.bias(projection, routing_.experts[expert_pos], p);
  const int32_t block = kRowBlock / kernel.mr * kernel.mr;
  for (int32_t done = 0; done < count; done += block) {
    const int32_t first = begin + done;
    args.m = std::min(block, count - done);
    if (projection == Projection::kW13) {
      args.row_idx = routing_.token.data() + first;
      args.a = rows.codes;
      args.a_scale = rows.scale;
      args.a_group_sum = rows.group_sum;
    } else {
      args.a = rows.codes + first * rows.stride_bytes;
      args.a_scale = rows.scale + first * rows.scale_stride;
      args.a_group_sum =
          rows.group_sum == nullptr ? nullptr : rows.group_sum + first * rows.group_sum_stride;
    }
    if (kernel.packing != nullptr) args.a = packed_row(projection, expert_pos, first);
    kernel.gemm(args);
    args.next_panel = nullptr;
    if (bias != nullptr) {
      for (int32_t r = 0; r < args.m; ++r) {
        kernels_.rowwise().add_scaled(bias, 1.0f, mine.tile + r * kPanelColumns, kPanelColumns);
      }
    }
    consume(first, args.m, mine.tile);
  }
}

void ForwardPass::find_whole_experts() {
  scratch_.whole_experts.assign(pool_.num_threads(), IndexRange{0, 0});
  rows_left_ = routing_.num_rows();
  if (few_rows_ || pool_.num_nodes() > 1) return;
  const int64_t panels = store_.node_panels(Projection::kW13, 0).size();
  for (int w = 0; w < pool_.num_threads(); ++w) {
    const IndexRange units = scratch_.w13_splits[0]->static_units(w);
    const int64_t begin = ceil_div(units.begin, panels);
    scratch_.whole_experts[w] = {begin, std::max(begin, units.end / panels)};
    rows_left_ -= rows_of(scratch_.whole_experts[w]).size();
  }
}

IndexRange ForwardPass::rows_of(IndexRange experts) const {
  return {routing_.offsets[experts.begin], routing_.offsets[experts.end]};
}

void ForwardPass::compute_w13(const Worker& worker, const WorkerBuffers& mine,
                              const ActivationRows& tokens) {
  const IndexRange panels = store_.node_panels(Projection::kW13, worker.node);
  const IndexRange whole = scratch_.whole_experts[worker.index];
  WorkSplit& split = *scratch_.w13_splits[worker.node];
  const Activation& activation = store_.config().activation;
  const ActivateFn activate = kernels_.rowwise().activate[static_cast<int>(activation.kind)];
  const auto compute = [&](int64_t unit, bool has_next) {
    const int64_t item = split.item(unit);
    const int64_t p = panels.begin + split.panel(unit);
    const uint8_t* next = nullptr;
    if (has_next) {
      next = store_.panel(Projection::kW13, routing_.experts[split.item(unit + 1)],
                          panels.begin + split.panel(unit + 1));
    }
    const bool is_whole = whole.begin <= item && item < whole.end;
    const int64_t rows_begin = routing_.offsets[item];
    const int64_t shift = is_whole ? routing_.offsets[whole.begin] - rows_begin : 0;
    multiply_panel(Projection::kW13, item, p, next, tokens, mine,
                   [&](int32_t first, int32_t count, const float* tile) {
                     float* out = intermediate_ + (first + shift) * intermediate_stride_ +
                                  p * (kPanelColumns / 2);
                     for (int32_t r = 0; r < count; ++r) {
                       const float* gate = tile + r * kPanelColumns;
                       activate(gate, gate + kPanelColumns / 2, out + r * intermediate_stride_,
                                kPanelColumns / 2, activation.limit, activation.alpha);
                     }
                   });
    if (!is_whole || p + 1 < panels.end) return;
    for (int64_t r = rows_begin; r < routing_.offsets[item + 1]; ++r)
      quantize_expert_row(item, r, r + shift, mine.row);
  };
  const IndexRange mine_first = split.static_units(worker.index_in_node);
  for (int64_t unit = mine_first.begin; unit < mine_first.end; ++unit)
    compute(unit, unit + 1 < mine_first.end);
  for (int64_t unit = split.next_tail_unit(); unit >= 0; unit = split.next_tail_unit())
    compute(unit, false);
  release_tiles();
}

void ForwardPass::quantize_rows_left(const Worker& worker, const WorkerBuffers& mine) {
  const IndexRange part = even_part(rows_left_, worker.index, pool_.num_threads());
  int64_t seen = 0;  // rows left, up to `begin`
  const auto quantize = [&](int64_t begin, int64_t end) {
    const int64_t first = std::max(part.begin - seen, int64_t{0});
    const int64_t last = std::min(part.end - seen, end - begin);
    if (packed_[static_cast<int>(Projection::kW2)] == nullptr) {
      for (int64_t r = begin + first; r < begin + last; ++r)
        quantize_intermediate(r, r, mine.row, shared_rows_);
      seen += end - begin;
      return;
    }
    for (int64_t r = begin + first; r < begin + last; ++r) {
      const auto after = std::upper_bound(routing_.offsets.begin(), routing_.offsets.end(), r);
      quantize_expert_row(after - routing_.offsets.begin() - 1, r, r, mine.row);
    }
    seen += end - begin;
  };
  int64_t row = 0;
  for (const IndexRange& experts : scratch_.whole_experts) {
    const IndexRange whole = rows_of(experts);
    if (whole.size() == 0) continue;
    quantize(row, whole.begin);
    row = whole.end;
  }
  quantize(row, routing_.num_rows());
}

void ForwardPass::compute_w2(const Worker& worker, const WorkerBuffers& mine,
                             const ActivationRows& rows) {
  const int64_t first = store_.node_panels(Projection::kW2, worker.node).begin;
  WorkSplit& split = *scratch_.w2_splits[worker.node];
  const IndexRange units = split.static_units(worker.index_in_node);
  const int64_t together = panels_together();
  for (int64_t unit = units.begin; unit < units.end; unit += together)
    compute_w2_panels({first + unit, first + std::min(unit + together, units.end)}, mine, rows);
  for (int64_t unit = split.next_tail_unit(); unit >= 0; unit = split.next_tail_unit())
    compute_w2_panels({first + unit, first + unit + 1}, mine, rows);
  release_tiles();
}

void ForwardPass::compute_w2_panels(IndexRange panels, const WorkerBuffers& mine,
                                    const ActivationRows& rows) const {
  const int64_t sums = panel_sums();
  std::memset(mine.columns, 0, panels.size() * sums * sizeof(float));
  const int64_t num_experts = static_cast<int64_t>(routing_.experts.size());
  for (int64_t i = 0; i < num_experts; ++i) {
    for (int64_t p = panels.begin; p < panels.end; ++p) {
      const uint8_t* next = nullptr;
      if (p + 1 < panels.end) {
        next = store_.panel(Projection::kW2, routing_.experts[i], p + 1);
      } else if (i + 1 < num_experts) {
        next = store_.panel(Projection::kW2, routing_.experts[i + 1], panels.begin);
      }
      float* const columns = mine.columns + (p - panels.begin) * sums;
      multiply_panel(Projection::kW2, i, p, next, rows, mine,
                     [&](int32_t first, int32_t count, const float* tile) {
                       for (int32_t r = 0; r < count; ++r) {
                         kernels_.rowwise().add_scaled(
                             tile + r * kPanelColumns, routing_.weight[first + r],
                             columns + int64_t{routing_.token[first + r]} * kPanelColumns,
                             kPanelColumns);
                       }
                     });
    }
  }
  for (int64_t p = panels.begin; p < panels.end; ++p)
    store_columns(mine.columns + (p - panels.begin) * sums, p);
}

void ForwardPass::store_columns(float* columns, int64_t p) const {
  const int64_t hidden_size = store_.config().hidden_size;
  const int32_t n =
      static_cast<int32_t>(std::min<int64_t>(kPanelColumns, hidden_size - p * kPanelColumns));
  for (int64_t t = 0; t < input_.num_tokens; ++t) {
    float* sum = columns + t * kPanelColumns;
    const int64_t at = t * hidden_size + p * kPanelColumns;
    if (input_.addend != nullptr) {
      for (int32_t j = 0; j < n; ++j) sum[j] += input_.addend[at + j];
    }
    store_values(kernels_.rowwise(), input_, sum, at, n);
  }
}

}  // namespace kt
