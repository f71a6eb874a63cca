#include "engine/kernel_bench.h"

#include <time.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <random>

#include "base/check.h"
#include "base/cpu_features.h"
#include "base/span.h"
#include "format/coded_panel.h"
#include "format/quantize.h"
#include "kernels/tiles.h"

namespace kt {
namespace {

// A measurement takes about so long, or reads so much: long against the clock (1 us), short against
// the moods of a shared machine.
constexpr double kStretchSeconds = 0.004;
constexpr int64_t kStretchBytes = int64_t{12} << 20;

// Different panels in the buffer: kernels do not look at values.
constexpr int64_t kDistinctPanels = 8;

std::atomic<uint64_t> sink{0};  // else a compiler may leave the probes out

double thread_seconds() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// Magnitudes from 2^-7 to 2: sign, mantissa and three bits of the exponent are kept.
uint16_t random_bf16(std::mt19937& random) {
  return static_cast<uint16_t>((random() & 0x83ffu) | 0x3c00u);
}

// Gives back the tiles of a caller who is no thread of ours.
struct ReleasedTiles {
  ReleasedTiles() = default;
  ReleasedTiles(const ReleasedTiles&) = delete;
  ReleasedTiles& operator=(const ReleasedTiles&) = delete;
  ~ReleasedTiles() { release_tiles(); }
};

// All codes but fp8's NaN and the -128 that int8 with a scale a row does not have; scales from
// 2^-10 to 2^-9, of eight bits, which every form of them holds.
void fill_codes(std::mt19937& random, CodedPanel* panel) {
  const WeightFormatInfo& info = format_info(panel->layout.format);
  const uint32_t mask = (1u << dtype_bits(info.code)) - 1;
  for (uint8_t& code : panel->codes) {
    code = static_cast<uint8_t>(random() & mask);
    if (info.scales == ScaleForm::kRow) code = std::max<uint8_t>(code, 1);
    if (info.code == DType::kFp8 && (code & 0x7f) == 0x7f) --code;
  }
  const auto scale = [&] { return std::ldexp(static_cast<float>(128 + random() % 128), -17); };
  for (float& value : panel->scale) value = scale();
  for (float& value : panel->minimum) value = -8 * scale();
  for (uint8_t& value : panel->zero) value = static_cast<uint8_t>(random() & mask);
  for (uint8_t& value : panel->sub_scale) value = static_cast<uint8_t>(random() % 64);
  for (uint8_t& value : panel->sub_minimum) value = static_cast<uint8_t>(random() % 64);
  for (float& value : panel->block_scale) value = scale() / 32;
  for (float& value : panel->block_minimum) value = scale() / 4;
  for (float& value : panel->column_scale) value = 1024 * scale();
}

double rms_of(const std::vector<float>& values) {
  double squares = 0;
  for (const float value : values) squares += double{value} * value;
  return std::sqrt(squares / static_cast<double>(values.size()));
}

}  // namespace

KernelBench::KernelBench(const PackedLayout& layout, int64_t k, int max_rows, int64_t buffer_bytes)
    : layout_(layout),
      k_(k),
      max_rows_(max_rows),
      panel_bytes_(layout.panel_bytes(k)),
      num_panels_(buffer_bytes / panel_bytes_),
      group_size_(static_cast<int>(std::min<int64_t>(layout.effective_group_size(k), k))),
      a_block_(static_cast<int>(layout.activation_block(k))),
      num_blocks_(layout.num_activation_blocks(k)) {
  KT_CHECK(k % 64 == 0 && k <= kMaxIntegerK,
           "k is " << k << "; it must be a multiple of 64 up to " << kMaxIntegerK << ".");
  KT_CHECK(max_rows >= 1, "the kernels are to be given " << max_rows << " rows; give at least 1.");
  KT_CHECK(num_panels_ >= 2, "a buffer of " << buffer_bytes << " bytes holds no two panels of "
                                            << panel_bytes_ << "; give more.");
  for (const GemmKernel& kernel : list_gemm_kernels()) {
    if (kernel.weights != layout.format ||
        !kernel.fits_groups(layout.group_size, layout.has_row_scales()))
      continue;
    if ((kernel.isa & ~cpu_features().chosen) != 0) continue;
    if (kernel.isa == kIsaReference && kernel.expand == nullptr) reference_ = &kernel;
    kernels_.push_back(&kernel);
  }
  KT_CHECK(reference_ != nullptr,
           "kernels.inc has no reference row for " << format_name(layout.format) << ".");
  const size_t outputs = static_cast<size_t>(max_rows) * kPanelColumns;
  c_arena_ = NumaArena(outputs * sizeof(float), -1);
  c_ = reinterpret_cast<float*>(c_arena_.data());
  expected_.resize(outputs);
  panels_ = NumaArena(static_cast<size_t>(num_panels_ * panel_bytes_), -1);
  expanded_ = NumaArena(static_cast<size_t>(expanded_bytes(k, layout.num_groups(k))), -1);
  fill_panels();
  fill_activations();
}

void KernelBench::fill_panels() {
  std::mt19937 random(1);
  CodedPanel codes;
  std::vector<uint16_t> bf16(static_cast<size_t>(kPanelColumns * k_));
  std::vector<float> weights(static_cast<size_t>(k_));
  for (int64_t p = 0; p < std::min(kDistinctPanels, num_panels_); ++p) {
    uint8_t* const target = panels_.data() + p * panel_bytes_;
    if (layout_.format == WeightFormat::kBFloat16) {
      for (uint16_t& value : bf16) value = random_bf16(random);
      pack_panel(layout_, k_, bf16.data(), nullptr, target);
      for (int column = 0; column < kPanelColumns; ++column) {
        for (int64_t j = 0; j < k_; ++j) weights[j] = bf16_to_float(bf16[column * k_ + j]);
        largest_rms_ = std::max(largest_rms_, rms_of(weights));
      }
      continue;
    }
    codes.reset(layout_, k_);
    fill_codes(random, &codes);
    pack_panel(codes, target);
    for (int column = 0; column < kPanelColumns; ++column) {
      coded_values(codes, column, weights.data());
      largest_rms_ = std::max(largest_rms_, rms_of(weights));
    }
  }
  for (int64_t p = kDistinctPanels; p < num_panels_; ++p) {
    std::memcpy(panels_.data() + p * panel_bytes_, panel(p % kDistinctPanels), panel_bytes_);
  }
}

void KernelBench::fill_activations() {
  std::mt19937 random(2);
  // 64 values beyond k keep rows of a power of two out of the same cache sets
  a_.stride = k_ + 64;
  const size_t values = static_cast<size_t>(max_rows_ * a_.stride);
  a_.int8 = NumaArena(values, -1);
  a_.uint8 = NumaArena(values, -1);
  a_.bf16 = NumaArena(2 * values, -1);
  const int num_groups = layout_.num_groups(k_);
  a_.group_sum.assign(static_cast<size_t>(max_rows_) * num_groups, 0);
  for (int i = 0; i < max_rows_; ++i) {
    a_.row_idx.push_back(max_rows_ - 1 - i);
    for (int b = 0; b < num_blocks_; ++b)
      a_.scale.push_back(0.01f + 0.001f * static_cast<float>(i + b % 3));
    for (int64_t j = 0; j < k_; ++j) {
      const auto code = static_cast<int8_t>(static_cast<int>(random() % 255) - 127);
      const uint16_t bits = random_bf16(random);
      const int64_t at = i * a_.stride + j;
      a_.int8.data()[at] = static_cast<uint8_t>(code);
      a_.uint8.data()[at] = static_cast<uint8_t>(code + 128);
      std::memcpy(a_.bf16.data() + 2 * at, &bits, sizeof bits);
      a_.group_sum[static_cast<size_t>(i * num_groups + j / group_size_)] += code;
    }
  }
}

const GemmKernel& KernelBench::find(const std::string& name) const {
  for (const GemmKernel* kernel : kernels_) {
    if (kernel->name == name) return *kernel;
  }
  KT_CHECK(false, name << " is no row of the kernel table for " << format_name(layout_.format)
                       << " that may run here.");
}

const GemmKernel& KernelBench::find(const std::string& name, int m) const {
  KT_CHECK(m >= 1 && m <= max_rows_,
           "m is " << m << "; this bench was made for 1 to " << max_rows_ << " rows.");
  return find(name);
}

std::vector<std::string> KernelBench::kernels() const {
  std::vector<std::string> names;
  for (const GemmKernel* kernel : kernels_) names.push_back(kernel->name);
  return names;
}

void KernelBench::multiply(const GemmKernel& kernel, int m, int64_t index, float* c) {
  GemmArgs args{};
  const bool is_bf16 = kernel.a_dtype == DType::kBFloat16;
  args.a = activations_of(kernel.a_dtype);
  args.a_stride_bytes = is_bf16 ? 2 * a_.stride : a_.stride;
  args.row_idx = a_.row_idx.data();
  if (!is_bf16) args.a_scale = a_.scale.data();
  if (has_groups(layout_.format) && !is_bf16) args.a_group_sum = a_.group_sum.data();
  args.a_scale_stride = num_blocks_;
  args.a_block = a_block_;
  args.code_offset = format_info(layout_.format).code_offset;
  args.a_group_sum_stride = layout_.num_groups(k_);
  args.panel = panel(index);
  args.next_panel = index + 1 < num_panels_ ? panel(index + 1) : nullptr;
  args.c = c;
  args.c_stride = kPanelColumns;
  args.m = m;
  args.k = static_cast<int32_t>(k_);
  args.group_size = group_size_;
  if (kernel.expand != nullptr) {
    kernel.expand(args.panel, args.k, args.group_size, expanded_.data());
    args.panel = expanded_.data();
  }
  if (kernel.packing != nullptr) {
    args.a = packed_of(kernel).data();
    require_tiles();
  }
  kernel.gemm(args);
}

const NumaArena& KernelBench::packed_of(const GemmKernel& kernel) {
  for (const Packed& packed : packed_) {
    if (packed.kernel == &kernel) return packed.rows;
  }
  const RowPacking& packing = *kernel.packing;
  const auto* const codes = static_cast<const uint8_t*>(activations_of(kernel.a_dtype));
  const int64_t code_bytes = kernel.a_dtype == DType::kBFloat16 ? 2 : 1;
  const int64_t row_bytes = k_ * packing.value_bytes;
  const int64_t tiles = ceil_div(max_rows_, kTileRows);
  Packed& packed = packed_.emplace_back();
  packed.kernel = &kernel;
  packed.rows = NumaArena(static_cast<size_t>(tiles * kTileRows * row_bytes), -1);
  for (int i = 0; i < max_rows_; ++i) {
    packing.pack_row(codes + a_.row_idx[i] * a_.stride * code_bytes, static_cast<int32_t>(k_),
                     a_.scale.data() + a_.row_idx[i] * num_blocks_, a_block_,
                     packed.rows.data() + packed_row_offset(i, row_bytes));
  }
  return packed.rows;
}

const void* KernelBench::activations_of(DType dtype) const {
  if (dtype == DType::kBFloat16) return a_.bf16.data();
  return dtype == DType::kUint8 ? a_.uint8.data() : a_.int8.data();
}

bool KernelBench::matches(const std::string& name, int m) {
  const ReleasedTiles released;
  const GemmKernel& kernel = find(name, m);
  const int64_t index = std::min<int64_t>(3, num_panels_ - 1);
  std::fill_n(c_, expected_.size(), NAN);
  multiply(kernel, m, index, c_);
  multiply(*reference_, m, index, expected_.data());
  const size_t count = static_cast<size_t>(m) * kPanelColumns;
  if (!kernel.rounds()) {
    return std::memcmp(c_, expected_.data(), count * sizeof(float)) == 0;
  }
  const double bound = rounding_bound(kernel);
  for (size_t i = 0; i < count; ++i) {
    if (!(std::abs(double{c_[i]} - double{expected_[i]}) <= bound)) return false;
  }
  return true;
}

// Of a sum of k products a w, where a has mean 0 and the roots of mean squares are A and W (of the
// column with the largest). Errors of independent roundings add in squares:
//
//   values rounded to bf16   off by up to 2^-9 of themselves, 2^-9 / 3^0.5 on average: of k
//                            products 2^-9 / 3^0.5 A W k^0.5. Weights where they are expanded;
//                            activations as well where a row of codes has many scales
//   sums in fp32             each of k additions by up to 2^-24 of a sum of up to k products, which
//                            is A W i^0.5 after i of them: 2^-24 / 3^0.5 A W k / 2^0.5. Twice,
//                            since the reference rounds as well
//
// Eight times the whole is beyond every result of a right kernel. A lost tile of 32 k is off by
// A W 32^0.5 in the mean: over 6 times the bound up to k = 4096, 1.7 times at 65536, where the
// largest of 64 columns is off by twice as much.
double KernelBench::rounding_bound(const GemmKernel& kernel) const {
  const double k = static_cast<double>(k_);
  const bool is_bf16 = takes_bf16_rows(layout_.format);
  double roundings = kernel.expand == nullptr ? 0 : 1;
  if (!is_bf16 && num_blocks_ > 1) roundings += 1;
  const double of_values = roundings * k * std::ldexp(1.0, -18);
  const double of_sums = 2 * (k * k / 2) * std::ldexp(1.0, -48);
  return 8 * std::sqrt((of_values + of_sums) / 3) * activation_rms(is_bf16) * largest_rms_;
}

// Of the row with the largest.
double KernelBench::activation_rms(bool is_bf16) const {
  double largest = 0;
  std::vector<float> row(static_cast<size_t>(k_));
  for (int i = 0; i < max_rows_; ++i) {
    for (int64_t j = 0; j < k_; ++j) {
      const int64_t at = i * a_.stride + j;
      uint16_t bits = 0;
      std::memcpy(&bits, a_.bf16.data() + 2 * at, sizeof bits);
      const float scale = a_.scale[static_cast<size_t>(i * num_blocks_ + j / a_block_)];
      row[j] = is_bf16 ? bf16_to_float(bits) : scale * static_cast<int8_t>(a_.int8.data()[at]);
    }
    largest = std::max(largest, rms_of(row));
  }
  return largest;
}

int64_t KernelBench::panels_of_a_stretch(const GemmKernel& kernel, int m) {
  multiply(kernel, m, 0, c_);
  const double start = thread_seconds();
  multiply(kernel, m, 0, c_);
  const double seconds = std::max(thread_seconds() - start, 1e-7);
  const int64_t most = std::min(num_panels_, ceil_div(kStretchBytes, panel_bytes_));
  return std::clamp<int64_t>(static_cast<int64_t>(kStretchSeconds / seconds), 1, most);
}

// Where to walk next: on from the last walk, so that what is read was not read for a whole round of
// the buffer.
int64_t KernelBench::next_stretch(int64_t panels) {
  const int64_t begin = cursor_ + panels <= num_panels_ ? cursor_ : 0;
  cursor_ = begin + panels;
  return begin;
}

double KernelBench::stream_rate(const std::string& name, int m) {
  const ReleasedTiles released;
  const GemmKernel& kernel = find(name, m);
  const int64_t panels = panels_of_a_stretch(kernel, m);
  const int64_t begin = next_stretch(panels);
  const double start = thread_seconds();
  for (int64_t i = 0; i < panels; ++i) multiply(kernel, m, begin + i, c_);
  return static_cast<double>(panels * panel_bytes_) / (thread_seconds() - start);
}

double KernelBench::hot_rate(const std::string& name, int m) {
  const ReleasedTiles released;
  const GemmKernel& kernel = find(name, m);
  const int64_t repeats = panels_of_a_stretch(kernel, m);
  const double start = thread_seconds();
  for (int64_t i = 0; i < repeats; ++i) multiply(kernel, m, 0, c_);
  const double seconds = thread_seconds() - start;
  return static_cast<double>(repeats * 2 * kPanelColumns * k_ * m) / seconds;
}

double KernelBench::read_rate(const std::string& name) {
  const Probes probes = select_probes(find(name).multiplied(), find(name).isa);
  const int64_t panels = std::min(num_panels_, ceil_div(kStretchBytes, panel_bytes_));
  const int64_t begin = next_stretch(panels);
  const double start = thread_seconds();
  sink.fetch_xor(probes.read(panel(begin), panels * panel_bytes_), std::memory_order_relaxed);
  return static_cast<double>(panels * panel_bytes_) / (thread_seconds() - start);
}

double KernelBench::peak_rate(const std::string& name) const {
  constexpr int64_t kIterations = 50'000;  // 0.2 ms or more
  const Probes probes = select_probes(find(name).multiplied(), find(name).isa);
  const double start = thread_seconds();
  sink.fetch_xor(probes.run_peak(kIterations), std::memory_order_relaxed);
  return static_cast<double>(kIterations * probes.operations_per_iteration) /
         (thread_seconds() - start);
}

}  // namespace kt
