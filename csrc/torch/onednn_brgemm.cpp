// oneDNN's micro-kernel, which libtorch_cpu exports, as rows of the kernel table: it reads our
// panels as they are (64 columns are its N and its ldb, pairs or quadruples of k its VNNI layout).
//
// Compiling  oneDNN compiles a kernel for each (rows, k), ATen keeps it for each thread. So a
//            product is cut into blocks of 32, 16, 8, 4, 2 and 1 rows, and prepare(k) compiles
//            these six on the thread that calls it: 1 ms, once.
// Memory     a thread keeps 32 rows of the largest k it saw; ATen allocates one closure a call (a
//            std::function), which is the one allocation in a forward that these rows bring with
//            them.
// Bits       int8: those of every row. bf16: the same for every m, for each output is one sum over
//            ascending k whatever the block; not those of our rows on every CPU.
// Tiles      where oneDNN uses AMX, it configures the tiles of the thread. They are released at the
//            end of every product: a parked thread holds none, and kernels of ours configure them
//            otherwise, so theirs count as lost. oneDNN chooses by ONEDNN_MAX_CPU_ISA and does not
//            know KT_FORCE_ISA, so a row on a host with AMX needs AMX to be in use.
// Choice     on request (KT_GEMM), and where ours in tiles was slower (moe/tile_check.h). On Zen 4
//            our tiles reach 99 % of the register peak and these 86 to 97 %, less from memory.
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <vector>

#include "base/check.h"
#include "base/cpu_features.h"
#include "kernels/registry.h"
#include "kernels/tiles.h"

#if defined(CPUBLAS_BRGEMM_U8I8I32) && defined(CPUBLAS_BRGEMM_BF16BF16F32)

namespace kt {
namespace {

namespace blas = at::native::cpublas;

constexpr int kMaxRows = 32;  // halved until it fits

// Whether oneDNN may configure tiles. Written before the rows are registered.
bool uses_tiles = false;

struct alignas(64) Line {
  uint8_t bytes[64];
};

struct Buffers {
  std::vector<Line> rows;  // [kMaxRows, k], gathered
  std::vector<Line> sums = std::vector<Line>(kMaxRows * kPanelColumns / 16);

  template <typename Sum>
  Sum* sums_of() {
    static_assert(sizeof(Sum) == 4);
    return reinterpret_cast<Sum*>(sums.data());
  }
  template <typename Code>
  Code* rows_of(int64_t k) {
    const size_t lines = static_cast<size_t>(kMaxRows * k) * sizeof(Code) / sizeof(Line);
    if (rows.size() < lines) rows.resize(lines);
    return reinterpret_cast<Code*>(rows.data());
  }
};

Buffers& thread_buffers() {
  thread_local Buffers buffers;
  return buffers;
}

int64_t source_row(const GemmArgs& args, int32_t i) {
  return args.row_idx == nullptr ? i : args.row_idx[i];
}

// Rows [first, first + count) of a as [count, k].
template <typename Code>
const Code* consecutive_rows(const GemmArgs& args, int32_t first, int32_t count, Buffers& buffers) {
  const auto* const a = static_cast<const uint8_t*>(args.a);
  const int64_t row_bytes = args.k * static_cast<int64_t>(sizeof(Code));
  if (args.row_idx == nullptr && args.a_stride_bytes == row_bytes) {
    return reinterpret_cast<const Code*>(a + first * row_bytes);
  }
  Code* const rows = buffers.rows_of<Code>(args.k);
  for (int32_t i = 0; i < count; ++i) {
    std::memcpy(rows + int64_t{i} * args.k, a + source_row(args, first + i) * args.a_stride_bytes,
                static_cast<size_t>(row_bytes));
  }
  return rows;
}

// sums[i, j] = sum_k rows[i, k] * panel[k, j], with sums [count, 64]
template <typename Weight, typename Code, typename Sum>
void multiply_block(int32_t count, int32_t k, const Code* rows, const uint8_t* panel, Sum* sums) {
  blas::brgemm(count, kPanelColumns, k, k, kPanelColumns, kPanelColumns, /*add_C=*/false, rows,
               reinterpret_cast<const Weight*>(panel), sums, /*is_vnni=*/true);
}

// Gives back what oneDNN configured; a refused product may have left it.
void release_onednn_tiles() {
  if (!uses_tiles) return;
  blas::brgemm_release();
  forget_tiles();
}

// Calls block(first row, rows) until all m rows are done.
template <typename Block>
void for_each_block(int32_t m, Block&& block) {
  try {
    for (int32_t first = 0, count = kMaxRows; first < m; first += count) {
      while (count > m - first) count /= 2;
      block(first, count);
    }
  } catch (const c10::Error& error) {
    release_onednn_tiles();
    KT_CHECK(false, "oneDNN refused a product (" << error.what_without_backtrace()
                                                 << "); leave torch.backends.mkldnn enabled, or "
                                                    "set KT_GEMM=native.");
  }
  release_onednn_tiles();
}

void gemm_u8_int8_fp32_32x64x4_onednn(const GemmArgs& args) {
  Buffers& buffers = thread_buffers();
  int32_t* const sums = buffers.sums_of<int32_t>();
  const uint8_t* const tail = args.panel + int64_t{args.k} * kPanelColumns;
  const auto* const compensation = reinterpret_cast<const int32_t*>(tail);
  const auto* const w_scale = reinterpret_cast<const float*>(compensation + kPanelColumns);
  for_each_block(args.m, [&](int32_t first, int32_t count) {
    multiply_block<int8_t>(count, args.k, consecutive_rows<uint8_t>(args, first, count, buffers),
                           args.panel, sums);
    for (int32_t i = 0; i < count; ++i) {
      const float a_scale = args.a_scale[source_row(args, first + i)];
      float* const c = args.c + (first + i) * args.c_stride;
      for (int j = 0; j < kPanelColumns; ++j) {
        const int32_t sum = sums[i * kPanelColumns + j] + compensation[j];
        c[j] = (static_cast<float>(sum) * w_scale[j]) * a_scale;
      }
    }
  });
}

void gemm_bf16_bf16_fp32_32x64x2_onednn(const GemmArgs& args) {
  Buffers& buffers = thread_buffers();
  float* const sums = buffers.sums_of<float>();
  for_each_block(args.m, [&](int32_t first, int32_t count) {
    multiply_block<at::BFloat16>(count, args.k,
                                 consecutive_rows<at::BFloat16>(args, first, count, buffers),
                                 args.panel, sums);
    for (int32_t i = 0; i < count; ++i) {
      std::copy_n(sums + i * kPanelColumns, kPanelColumns, args.c + (first + i) * args.c_stride);
    }
  });
}

// Every block on rows and a panel of zeros.
template <typename Code, typename Weight, typename Sum>
void prepare(int32_t k) {
  Buffers& buffers = thread_buffers();
  Code* const rows = buffers.rows_of<Code>(k);
  std::fill_n(rows, int64_t{kMaxRows} * k, Code{});
  const std::vector<Line> panel(static_cast<size_t>(k) * kPanelColumns * sizeof(Weight) /
                                sizeof(Line));
  // 2 * kMaxRows - 1 rows take each block once
  for_each_block(2 * kMaxRows - 1, [&](int32_t, int32_t count) {
    multiply_block<Weight>(count, k, rows, panel.data()->bytes, buffers.sums_of<Sum>());
  });
}

// A row is there where this CPU has its features and oneDNN accepts a product, which
// ONEDNN_MAX_CPU_ISA or a torch without it prevents.
void register_if_accepted(GemmKernel kernel, IsaSet found, IsaSet amx) {
  if ((kernel.isa & ~found) != 0) return;
  kernel.isa |= found & amx;
  try {
    kernel.prepare(64);
  } catch (const std::exception&) {
    return;
  }
  register_gemm(kernel);
}

bool register_rows() {
  IsaSet found = kIsaReference;
  try {
    found = cpu_features().found;
  } catch (const Error&) {
    return false;  // KT_FORCE_ISA is wrong, which the first layer says
  }
  constexpr IsaSet kAvx512 = kIsaAvx2 | kIsaAvx512;
  uses_tiles = (found & (kIsaAmxInt8 | kIsaAmxBf16)) != 0;
  register_if_accepted(
      {"gemm_u8_int8_fp32_32x64x4_onednn", kAvx512 | kIsaAvx512Vnni, WeightFormat::kInt8,
       DType::kUint8, kMaxRows, /*m_from=*/0, gemm_u8_int8_fp32_32x64x4_onednn, nullptr,
       GemmSource::kOneDnn, prepare<uint8_t, int8_t, int32_t>},
      found, kIsaAmxInt8);
  register_if_accepted(
      {"gemm_bf16_bf16_fp32_32x64x2_onednn", kAvx512 | kIsaAvx512Bf16, WeightFormat::kBFloat16,
       DType::kBFloat16, kMaxRows, /*m_from=*/0, gemm_bf16_bf16_fp32_32x64x2_onednn, nullptr,
       GemmSource::kOneDnn, prepare<at::BFloat16, at::BFloat16, float>},
      found, kIsaAmxBf16);
  return true;
}

[[maybe_unused]] const bool registered = register_rows();

}  // namespace
}  // namespace kt

#endif
