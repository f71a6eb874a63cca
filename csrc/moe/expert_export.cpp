#include "moe/expert_export.h"

#include <algorithm>
#include <memory>
#include <utility>

#include "base/check.h"
#include "base/dtype.h"
#include "base/span.h"
#include "format/packed_layout.h"
#include "format/quantize.h"

namespace kt {
namespace {

constexpr int kHalf = kPackedColumns / 2;  // columns of a w13 panel: gate, then up

void round_row(const float* src, int64_t count, uint16_t* dst) {
  for (int64_t i = 0; i < count; ++i) dst[i] = float_to_bf16(src[i]);
}

// rows [64, hidden_size]: what w13 panel p stands for.
void write_w13_rows(const MoeConfig& config, const ExpertExport& request, int64_t p,
                    const float* rows) {
  const int64_t hidden = config.hidden_size;
  const int64_t rank_rows = config.intermediate_size / static_cast<int64_t>(request.w13.size());
  for (int column = 0; column < kPackedColumns; ++column) {
    const int64_t feature = p * kHalf + column % kHalf;
    if (feature >= config.intermediate_size) continue;
    const int64_t row = feature % rank_rows + (column < kHalf ? 0 : rank_rows);
    round_row(rows + column * hidden, hidden, request.w13[feature / rank_rows] + row * hidden);
  }
}

// rows [64, intermediate_size]: what w2 panel p stands for.
void write_w2_rows(const MoeConfig& config, const ExpertExport& request, int64_t p,
                   const float* rows) {
  const int64_t rank_columns = config.intermediate_size / static_cast<int64_t>(request.w2.size());
  const int64_t first = p * kPackedColumns;
  const int64_t count = std::min<int64_t>(kPackedColumns, config.hidden_size - first);
  for (int64_t i = 0; i < count; ++i) {
    const float* row = rows + i * config.intermediate_size;
    for (uint16_t* const rank : request.w2) {
      round_row(row, rank_columns, rank + (first + i) * rank_columns);
      row += rank_columns;
    }
  }
}

}  // namespace

void check_export(const ExpertStore& store, const ExpertExport& request) {
  const MoeConfig& config = store.config();
  const int expert = request.expert;
  KT_CHECK(expert >= 0 && expert < config.num_experts,
           "layer " << config.layer_idx << " has experts 0 to " << config.num_experts - 1
                    << "; expert " << expert << " cannot be written.");
  KT_CHECK(store.has(expert), "layer " << config.layer_idx << ": expert " << expert
                                       << " is not on the CPU and cannot be written.");
  const size_t ranks = request.w13.size();
  KT_CHECK(ranks > 0 && request.w2.size() == ranks,
           "got " << ranks << " buffers for w13 and " << request.w2.size()
                  << " for w2; give one of each for every rank.");
  KT_CHECK(config.intermediate_size % static_cast<int64_t>(ranks) == 0,
           "the intermediate size " << config.intermediate_size << " cannot be cut into " << ranks
                                    << " equal ranks.");
  const uintptr_t w2_bytes =
      sizeof(uint16_t) * config.hidden_size * (config.intermediate_size / ranks);
  std::vector<std::pair<uintptr_t, uintptr_t>> ranges;
  for (const auto* buffers : {&request.w13, &request.w2}) {
    const char* const name = buffers == &request.w13 ? "w13" : "w2";
    for (const uint16_t* buffer : *buffers) {
      const auto begin = reinterpret_cast<uintptr_t>(buffer);
      KT_CHECK(begin != 0 && begin % sizeof(uint16_t) == 0,
               "a " << name << " buffer is at address " << begin
                    << "; give the address of bf16 values in host memory.");
      ranges.emplace_back(begin, begin + (buffers == &request.w13 ? 2 : 1) * w2_bytes);
    }
  }
  std::sort(ranges.begin(), ranges.end());
  for (size_t i = 1; i < ranges.size(); ++i) {
    KT_CHECK(ranges[i].first >= ranges[i - 1].second,
             "two buffers of expert " << expert << " overlap; give every rank memory of its own.");
  }
}

void write_expert(const ExpertStore& store, WorkerPool& pool, const ExpertExport& request) {
  const MoeConfig& config = store.config();
  KT_CHECK(store.loaded(request.expert), "layer " << config.layer_idx << ": expert "
                                                  << request.expert
                                                  << " was not loaded; call load_weights first.");
  const auto body = [&](const Worker& worker) {
    const int64_t widest = std::max(config.hidden_size, config.intermediate_size);
    const auto rows =
        std::make_unique_for_overwrite<float[]>(static_cast<size_t>(kPackedColumns * widest));
    for (const Projection projection : {Projection::kW13, Projection::kW2}) {
      const bool is_w13 = projection == Projection::kW13;
      const IndexRange panels = store.node_panels(projection, worker.node);
      const IndexRange own = even_part(panels.size(), worker.index_in_node, worker.node_threads);
      for (int64_t p = panels.begin + own.begin; p < panels.begin + own.end; ++p) {
        dequantize_panel(config.layout(projection), config.depth(projection),
                         store.panel(projection, request.expert, p), rows.get());
        (is_w13 ? write_w13_rows : write_w2_rows)(config, request, p, rows.get());
      }
    }
  };
  pool.run({body});
}

}  // namespace kt
