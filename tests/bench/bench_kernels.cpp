// Measures every GEMM row of kernels.inc on one thread, against what the same machine reads and
// computes at most.
//
//   bench_kernels [--filter=text] [--k=2048] [--group=32] [--m=1,2,4,8,16,64]
//                 [--rounds=15] [--buffer_mb=768]
//
// Each line is one kernel and one m (rows of activations). "stream" walks the panels of a buffer
// far larger than the L3, in order; "hot" repeats one panel. Times are thread CPU time, so other
// processes cost bandwidth but not turns.
//
//   GB/s   bytes of packed weights / time     read%  of the raw read of the same buffer
//   GOPS   2 * m * k * 64 / time              peak%  of the peak probe of the kernel's features
//
// The probes of int4 are those of int8; without VNNI an int4 kernel may pass them, for it sums
// pairs in int16 first.
//
// "med" is the median over rounds of the column to its left. Each round measures raw read and every
// kernel once, so a slow moment hits all. A result that differs from the reference row ends the run
// with status 1.
#include <immintrin.h>
#include <sys/mman.h>
#include <time.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "base/cpu_features.h"
#include "base/dtype.h"
#include "base/span.h"
#include "format/packed_layout.h"
#include "kernels/registry.h"

namespace kt {
namespace {

struct Options {
  std::string filter;
  int k = 2048;
  int group_size = 32;
  int rounds = 15;
  int64_t buffer_mb = 768;
  std::vector<int> rows = {1, 2, 4, 8, 16, 64};
};

double thread_seconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

volatile int64_t sink;  // keeps what was read alive

struct Random {
  uint64_t state = 0x9e3779b97f4a7c15u;
  uint64_t next() {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
  }
};

// 2 MB-aligned anonymous memory, asked to be huge pages; lives until exit.
uint8_t* allocate(int64_t bytes) {
  constexpr int64_t kHuge = int64_t{2} << 20;
  void* memory = mmap(nullptr, static_cast<size_t>(bytes + kHuge), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) {
    std::perror("bench_kernels: mmap");
    std::exit(1);
  }
  const auto address = round_up(reinterpret_cast<intptr_t>(memory), kHuge);
  auto* aligned = reinterpret_cast<uint8_t*>(address);
  madvise(aligned, static_cast<size_t>(bytes), MADV_HUGEPAGE);
  return aligned;
}

// Operations per second on registers only, as the kernels of this dtype and these features compute.
double measure_peak(const Probes& probes) {
  constexpr int64_t kIterations = 50000;
  const double start = thread_seconds();
  sink = sink + static_cast<int64_t>(probes.peak(kIterations));
  const double seconds = thread_seconds() - start;
  return static_cast<double>(kIterations * probes.operations_per_iteration) / seconds;
}

// Reads all of the data with plain 16-byte loads and does next to nothing with it. The caches' own
// prefetch is faster here than any prefetch instruction.
double read_seconds(const uint8_t* data, int64_t bytes) {
  const double start = thread_seconds();
  __m128i seen[4] = {};
  for (int64_t at = 0; at < bytes; at += 64) {
    for (int i = 0; i < 4; ++i) {
      seen[i] = _mm_xor_si128(seen[i],
                              _mm_load_si128(reinterpret_cast<const __m128i*>(data + at + 16 * i)));
    }
  }
  sink = sink + _mm_cvtsi128_si64(_mm_xor_si128(_mm_xor_si128(seen[0], seen[1]),
                                                _mm_xor_si128(seen[2], seen[3])));
  return thread_seconds() - start;
}

// ---- operands ----

// Packed panels of one dtype, one behind the other, with finite scales and right compensation.
struct Weights {
  PackedLayout layout;
  int64_t panel_bytes = 0;
  int64_t num_panels = 0;
  uint8_t* data = nullptr;
  const uint8_t* panel(int64_t index) const { return data + (index % num_panels) * panel_bytes; }
};

void finish_int8_panel(uint8_t* panel, int k, Random& random) {
  int32_t compensation[kPanelColumns] = {};
  for (int64_t i = 0; i < int64_t{kPanelColumns} * k; ++i) {
    auto* code = reinterpret_cast<int8_t*>(panel) + i;
    if (*code == -128) *code = -127;
    compensation[i / 4 % kPanelColumns] -= 128 * *code;
  }
  uint8_t* tail = panel + int64_t{kPanelColumns} * k;
  std::memcpy(tail, compensation, sizeof compensation);
  for (int j = 0; j < kPanelColumns; ++j) {
    const float scale = 0.001f + 1e-6f * static_cast<float>(random.next() % 1000);
    std::memcpy(tail + 256 + 4 * j, &scale, sizeof scale);
  }
}

// Keeps sign, mantissa and three exponent bits: magnitudes from 2^-7 to 2.
uint16_t finite_bf16(uint16_t bits) { return static_cast<uint16_t>((bits & 0x83ffu) | 0x3c00u); }

void finish_bf16_values(uint8_t* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    uint16_t bits;
    std::memcpy(&bits, values + 2 * i, sizeof bits);
    bits = finite_bf16(bits);
    std::memcpy(values + 2 * i, &bits, sizeof bits);
  }
}

void finish_int4_panel(uint8_t* panel, int k, int group_size) {
  for (int begin = 0; begin < k; begin += group_size) {
    panel += int64_t{kPanelColumns} / 2 * std::min(group_size, k - begin);
    finish_bf16_values(panel, kPanelColumns);
    panel += 2 * kPanelColumns;
  }
}

Weights make_weights(DType dtype, const Options& options, uint8_t* buffer) {
  Weights weights;
  weights.layout = {dtype, dtype == DType::kInt4 ? options.group_size : 0, 0};
  weights.panel_bytes = weights.layout.panel_bytes(options.k);
  weights.num_panels = (options.buffer_mb << 20) / weights.panel_bytes;
  weights.data = buffer;
  Random random;
  for (int64_t at = 0; at < weights.num_panels * weights.panel_bytes; at += 8) {
    const uint64_t word = random.next();
    std::memcpy(buffer + at, &word, sizeof word);
  }
  for (int64_t i = 0; i < weights.num_panels; ++i) {
    uint8_t* panel = buffer + i * weights.panel_bytes;
    if (dtype == DType::kInt8) finish_int8_panel(panel, options.k, random);
    if (dtype == DType::kInt4)
      finish_int4_panel(panel, options.k, weights.layout.effective_group_size(options.k));
    if (dtype == DType::kBFloat16) finish_bf16_values(panel, weights.panel_bytes / 2);
  }
  return weights;
}

// Activations of up to `rows` rows in every a_dtype, taken in reverse order through row_idx.
struct Activations {
  int64_t int8_stride = 0;
  uint8_t* int8 = nullptr;
  uint8_t* uint8 = nullptr;
  uint8_t* bf16 = nullptr;
  std::vector<float> scale;
  std::vector<int32_t> group_sum;
  std::vector<int32_t> row_idx;
  int groups = 0;
};

Activations make_activations(int rows, int k, int group_size) {
  Activations a;
  Random random;
  // 64 bytes beyond k keep rows of a power of two out of the same cache sets.
  a.int8_stride = k + 64;
  a.int8 = allocate(rows * a.int8_stride);
  a.uint8 = allocate(rows * a.int8_stride);
  a.bf16 = allocate(2 * rows * a.int8_stride);
  a.groups = static_cast<int>(ceil_div(k, group_size));
  a.group_sum.assign(static_cast<size_t>(rows) * static_cast<size_t>(a.groups), 0);
  for (int i = 0; i < rows; ++i) {
    a.row_idx.push_back(rows - 1 - i);
    a.scale.push_back(0.01f + 0.001f * static_cast<float>(i));
    for (int j = 0; j < k; ++j) {
      const auto code = static_cast<int8_t>(static_cast<int>(random.next() % 255) - 127);
      const uint16_t bits = finite_bf16(static_cast<uint16_t>(random.next()));
      a.int8[i * a.int8_stride + j] = static_cast<uint8_t>(code);
      a.uint8[i * a.int8_stride + j] = static_cast<uint8_t>(code + 128);
      std::memcpy(a.bf16 + 2 * (i * a.int8_stride + j), &bits, sizeof bits);
      a.group_sum[static_cast<size_t>(i * a.groups + j / group_size)] += code;
    }
  }
  return a;
}

GemmArgs make_args(const GemmKernel& kernel, const Activations& a, int m, int k, int group_size,
                   float* c) {
  GemmArgs args = {};
  const bool is_bf16 = kernel.a_dtype == DType::kBFloat16;
  args.a = is_bf16 ? a.bf16 : kernel.a_dtype == DType::kUint8 ? a.uint8 : a.int8;
  args.a_stride_bytes = is_bf16 ? 2 * a.int8_stride : a.int8_stride;
  args.row_idx = a.row_idx.data();
  args.a_scale = is_bf16 ? nullptr : a.scale.data();
  args.a_group_sum = kernel.weight_dtype == DType::kInt4 ? a.group_sum.data() : nullptr;
  args.a_group_sum_stride = a.groups;
  args.c = c;
  args.c_stride = kPanelColumns;
  args.m = m;
  args.k = k;
  args.group_size = group_size;
  return args;
}

// ---- one kernel at one m ----

struct Case {
  const GemmKernel* kernel;
  int m;
  Probes probes;
  int64_t next_panel = 0;  // where its walk through the buffer stands
  std::vector<double> bandwidth, read_share, hot_rate;
};

struct Bench {
  const Options& options;
  const Weights& weights;
  const Activations& a;
  uint8_t* scratch;
  std::vector<float> c, expected;

  int group_size() const { return weights.layout.effective_group_size(options.k); }

  void call(const GemmKernel& kernel, GemmArgs args, const uint8_t* panel, const uint8_t* next) {
    args.panel = panel;
    args.next_panel = next;
    if (kernel.expand != nullptr) {
      kernel.expand(panel, args.k, args.group_size, scratch);
      args.panel = scratch;
    }
    kernel.gemm(args);
  }

  double stream_seconds(Case& run, int64_t panels) {
    const GemmArgs args = make_args(*run.kernel, a, run.m, options.k, group_size(), c.data());
    const double start = thread_seconds();
    for (int64_t i = 0; i < panels; ++i, ++run.next_panel) {
      call(*run.kernel, args, weights.panel(run.next_panel), weights.panel(run.next_panel + 1));
    }
    return thread_seconds() - start;
  }

  double hot_seconds(const Case& run, int repeats) {
    const GemmArgs args = make_args(*run.kernel, a, run.m, options.k, group_size(), c.data());
    call(*run.kernel, args, weights.panel(0), nullptr);
    const double start = thread_seconds();
    for (int i = 0; i < repeats; ++i) call(*run.kernel, args, weights.panel(0), nullptr);
    return thread_seconds() - start;
  }

  // Largest |c - reference| over the rounding bound; integer kernels must have the same bits.
  bool matches(const Case& run, const GemmKernel& reference) {
    const uint8_t* panel = weights.panel(3);
    GemmArgs args = make_args(*run.kernel, a, run.m, options.k, group_size(), c.data());
    call(*run.kernel, args, panel, nullptr);
    args = make_args(reference, a, run.m, options.k, group_size(), expected.data());
    call(reference, args, panel, nullptr);
    const size_t count = static_cast<size_t>(run.m) * kPanelColumns;
    if (run.kernel->weight_dtype != DType::kBFloat16) {
      return std::memcmp(c.data(), expected.data(), count * sizeof(float)) == 0;
    }
    // Two sums of k products of at most 4, each rounded k times to half a unit in the last place of
    // at most 4k.
    const double bound = 2.0 * options.k * (4.0 * options.k) * std::ldexp(1.0, -24);
    for (size_t i = 0; i < count; ++i) {
      if (!(std::abs(double{c[i]} - double{expected[i]}) <= bound)) return false;
    }
    return true;
  }
};

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
  return values[values.size() / 2];
}

double largest(const std::vector<double>& values) {
  return *std::max_element(values.begin(), values.end());
}

// Runs all kernels of one weight dtype; false if a result is wrong.
bool bench_dtype(DType dtype, const Options& options, uint8_t* buffer) {
  std::vector<Case> cases;
  const GemmKernel* reference = nullptr;
  for (const GemmKernel& kernel : list_gemm_kernels()) {
    if (kernel.weight_dtype != dtype || (kernel.isa & ~cpu_features().chosen) != 0) continue;
    if (kernel.isa == kIsaReference && reference == nullptr) reference = &kernel;
    if (kernel.isa == kIsaReference ||
        std::string(kernel.name).find(options.filter) == std::string::npos)
      continue;
    const Probes probes = select_probes(dtype, kernel.isa);
    for (int m : options.rows) cases.push_back({&kernel, m, probes, 0, {}, {}, {}});
  }
  if (cases.empty()) return true;

  const Weights weights = make_weights(dtype, options, buffer);
  const int max_rows = *std::max_element(options.rows.begin(), options.rows.end());
  const int group_size = weights.layout.effective_group_size(options.k);
  const Activations a = make_activations(max_rows, options.k, group_size);
  const size_t outputs = static_cast<size_t>(max_rows) * kPanelColumns;
  Bench bench = {options,
                 weights,
                 a,
                 allocate(int64_t{options.k} * kPanelColumns + a.groups * 256),
                 std::vector<float>(outputs),
                 std::vector<float>(outputs)};

  bool all_match = true;
  for (Case& run : cases) {
    if (bench.matches(run, *reference)) continue;
    std::printf("WRONG RESULT: %s at m = %d\n", run.kernel->name, run.m);
    all_match = false;
  }

  const int64_t panels_per_round = std::max<int64_t>(1, (int64_t{12} << 20) / weights.panel_bytes);
  const double round_bytes = static_cast<double>(panels_per_round * weights.panel_bytes);
  const double macs = 2.0 * kPanelColumns * options.k;
  std::vector<double> reads;
  std::map<std::string, double> peaks;  // best of each probe, by its name
  int64_t read_at = 0;
  for (int round = 0; round < options.rounds; ++round) {
    for (Case& run : cases) {
      double& peak = peaks[run.probes.peak_name];
      peak = std::max(peak, measure_peak(run.probes));
      // Each walk stands elsewhere, so nothing it reads is still in the L3.
      run.next_panel = (read_at + panels_per_round) % weights.num_panels;
      const double read =
          round_bytes / read_seconds(weights.panel(0) + read_at * weights.panel_bytes,
                                     static_cast<int64_t>(round_bytes));
      read_at = (read_at + 2 * panels_per_round) % (weights.num_panels - panels_per_round);
      const double bandwidth = round_bytes / bench.stream_seconds(run, panels_per_round);
      const int repeats = std::max(4, 512 / run.m);
      reads.push_back(read);
      run.bandwidth.push_back(bandwidth);
      run.read_share.push_back(bandwidth / read);
      run.hot_rate.push_back(macs * run.m * repeats / bench.hot_seconds(run, repeats));
    }
  }

  std::printf("\n%s, k %d, group %d: raw read %.1f GB/s best, %.1f median\n", dtype_name(dtype),
              options.k, group_size, 1e-9 * largest(reads), 1e-9 * median(reads));
  std::printf("%-40s %4s | %6s %6s %6s %6s | %6s %6s %6s | %6s %6s\n", "stream", "m", "GB/s", "med",
              "read%", "med", "GOPS", "med", "peak%", "hot", "peak%");
  for (const Case& run : cases) {
    const double top = peaks[run.probes.peak_name];
    const double per_byte = macs * run.m / static_cast<double>(weights.panel_bytes);
    const double best = largest(run.bandwidth);
    std::printf("%-40s %4d | %6.1f %6.1f %6.1f %6.1f | %6.0f %6.0f %6.1f | %6.0f %6.1f\n",
                run.kernel->name, run.m, 1e-9 * best, 1e-9 * median(run.bandwidth),
                100.0 * best / largest(reads), 100.0 * median(run.read_share),
                1e-9 * best * per_byte, 1e-9 * median(run.bandwidth) * per_byte,
                100.0 * best * per_byte / top, 1e-9 * largest(run.hot_rate),
                100.0 * largest(run.hot_rate) / top);
  }
  for (const auto& [name, peak] : peaks)
    std::printf("%-35s %.0f GOPS\n", name.c_str(), 1e-9 * peak);
  return all_match;
}

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    const size_t equals = argument.find('=');
    const std::string name = argument.substr(0, equals);
    const std::string value = equals == std::string::npos ? "" : argument.substr(equals + 1);
    if (name == "--filter") {
      options.filter = value;
    } else if (name == "--k") {
      options.k = std::atoi(value.c_str());
    } else if (name == "--group") {
      options.group_size = std::atoi(value.c_str());
    } else if (name == "--rounds") {
      options.rounds = std::atoi(value.c_str());
    } else if (name == "--buffer_mb") {
      options.buffer_mb = std::atoi(value.c_str());
    } else if (name == "--m") {
      options.rows.clear();
      std::istringstream list(value);
      for (std::string m; std::getline(list, m, ',');) options.rows.push_back(std::atoi(m.c_str()));
    } else {
      std::fprintf(stderr, "bench_kernels: unknown option %s; see the head of its source.\n",
                   argument.c_str());
      std::exit(2);
    }
  }
  const bool usable = options.k > 0 && options.k % 64 == 0 && options.group_size >= 0 &&
                      options.group_size % 32 == 0 && options.rounds > 0 &&
                      options.buffer_mb >= 64 && !options.rows.empty() &&
                      *std::min_element(options.rows.begin(), options.rows.end()) > 0;
  if (!usable) {
    std::fprintf(stderr,
                 "bench_kernels: k must be a multiple of 64, group of 32, buffer_mb >= 64, m and "
                 "rounds >= 1.\n");
    std::exit(2);
  }
  return options;
}

}  // namespace
}  // namespace kt

int main(int argc, char** argv) {
  const kt::Options options = kt::parse(argc, argv);
  std::printf("%s: %s\n", kt::cpu_features().cpu_name.c_str(), kt::cpu_features().reason.c_str());
  uint8_t* buffer = kt::allocate(options.buffer_mb << 20);
  bool all_match = true;
  for (kt::DType dtype : {kt::DType::kInt8, kt::DType::kInt4, kt::DType::kBFloat16}) {
    all_match = kt::bench_dtype(dtype, options, buffer) && all_match;
  }
  return all_match ? 0 : 1;
}
