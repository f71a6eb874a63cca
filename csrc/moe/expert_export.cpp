#include "moe/expert_export.h"

#include <algorithm>
#include <memory>
#include <optional>
#include <utility>

#include "base/check.h"
#include "base/dtype.h"
#include "base/span.h"
#include "format/packed_layout.h"
#include "format/quantize.h"
#include "moe/native_export.h"

namespace kt {
namespace {

constexpr int kHalf = kPackedColumns / 2;  // columns of a w13 panel: gate, then up

void round_row(const float* src, int64_t count, uint16_t* dst) {
  for (int64_t i = 0; i < count; ++i) dst[i] = float_to_bf16(src[i]);
}

// What one worker writes panels through.
class PanelWriter {
 public:
  PanelWriter(const MoeConfig& config, const ExpertExport& request)
      : config_(config),
        request_(request),
        ranks_(static_cast<int64_t>(request.w13.size())),
        rank_columns_(config.intermediate_size / ranks_) {
    if (request.is_native()) {
      form_.emplace(config, ranks_);
      return;
    }
    const size_t widest = std::max(config.hidden_size, config.intermediate_size);
    values_ = std::make_unique_for_overwrite<float[]>(kPackedColumns * widest);
  }

  void write(Projection projection, const uint8_t* panel, int64_t p) {
    depth_ = config_.depth(projection);
    if (form_.has_value()) {
      unpack_panel(config_.layout(projection), depth_, panel, &codes_);
    } else {
      dequantize_panel(config_.layout(projection), depth_, panel, values_.get());
    }
    for (int column = 0; column < kPackedColumns; ++column) {
      if (projection == Projection::kW13) {
        write_w13(p, column);
      } else {
        write_w2(p, column);
      }
    }
  }

 private:
  void write_w13(int64_t p, int column) {
    const int64_t feature = p * kHalf + column % kHalf;
    if (feature >= config_.intermediate_size) return;
    const int64_t rank = feature / rank_columns_;
    const int64_t row = feature % rank_columns_ + (column < kHalf ? 0 : rank_columns_);
    write_row(column, 0, config_.hidden_size, row, request_.w13[rank],
              form_ ? request_.w13_scales[rank] : nullptr);
  }

  void write_w2(int64_t p, int column) {
    const int64_t row = p * kPackedColumns + column;
    if (row >= config_.hidden_size) return;
    for (int64_t rank = 0; rank < ranks_; ++rank) {
      write_row(column, rank * rank_columns_, rank_columns_, row, request_.w2[rank],
                form_ ? request_.w2_scales[rank] : nullptr);
    }
  }

  void write_row(int column, int64_t begin, int64_t count, int64_t row, uint8_t* weights,
                 uint8_t* scales) {
    if (form_.has_value()) {
      form_->write_row(codes_, column, begin, count, row, weights, scales);
      return;
    }
    round_row(values_.get() + column * depth_ + begin, count,
              reinterpret_cast<uint16_t*>(weights) + row * count);
  }

  const MoeConfig& config_;
  const ExpertExport& request_;
  const int64_t ranks_;
  const int64_t rank_columns_;  // of the intermediate size
  int64_t depth_ = 0;           // columns of the panel at hand
  std::optional<NativeForm> form_;
  CodedPanel codes_;
  std::unique_ptr<float[]> values_;
};

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
  const int64_t rank_columns = config.intermediate_size / static_cast<int64_t>(ranks);
  const int64_t w13_rows = 2 * rank_columns;
  std::vector<std::pair<uintptr_t, uintptr_t>> ranges;
  const auto add = [&](const char* name, const std::vector<uint8_t*>& buffers, int64_t bytes,
                       uintptr_t alignment) {
    for (const uint8_t* buffer : buffers) {
      const auto begin = reinterpret_cast<uintptr_t>(buffer);
      KT_CHECK(begin != 0 && begin % alignment == 0,
               "a " << name << " buffer is at address " << begin
                    << "; give the address of values in host memory, at a multiple of " << alignment
                    << ".");
      ranges.emplace_back(begin, begin + static_cast<uintptr_t>(bytes));
    }
  };
  if (request.is_native()) {
    KT_CHECK(request.w13_scales.size() == ranks && request.w2_scales.size() == ranks,
             "got " << request.w13_scales.size() << " scale buffers for w13 and "
                    << request.w2_scales.size() << " for w2; give one of each for every rank.");
    const NativeForm form(config, static_cast<int64_t>(ranks));
    const int64_t hidden = config.hidden_size;
    add("w13", request.w13, form.weight_bytes(w13_rows, hidden), 1);
    add("w2", request.w2, form.weight_bytes(hidden, rank_columns), 1);
    add("w13 scale", request.w13_scales, form.scale_bytes(w13_rows, hidden), sizeof(float));
    add("w2 scale", request.w2_scales, form.scale_bytes(hidden, rank_columns), sizeof(float));
  } else {
    const int64_t bytes = int64_t{sizeof(uint16_t)} * config.hidden_size;
    add("w13", request.w13, bytes * w13_rows, sizeof(uint16_t));
    add("w2", request.w2, bytes * rank_columns, sizeof(uint16_t));
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
  if (request.is_native())
    NativeForm(config, static_cast<int64_t>(request.w13.size()))
        .check_blocks(store, request.expert);
  const auto body = [&](const Worker& worker) {
    PanelWriter writer(config, request);
    for (const Projection projection : {Projection::kW13, Projection::kW2}) {
      const IndexRange panels = store.node_panels(projection, worker.node);
      const IndexRange own = even_part(panels.size(), worker.index_in_node, worker.node_threads);
      for (int64_t p = panels.begin + own.begin; p < panels.begin + own.end; ++p)
        writer.write(projection, store.panel(projection, request.expert, p), p);
    }
  };
  pool.run({body});
}

}  // namespace kt
