// The CUDA kernels of clip_loss on a CPU, through the stand-in for their instructions beside this
// file: the same launches as csrc/cuda/clip_loss.cu, for features in bf16.

#include "cuda/clip_loss_passes.h"
#include "cuda/clip_loss_sums.h"
#include "cuda/tile_products.h"

using namespace medfast;
using namespace medfast::cuda;

namespace {

std::string what_failed;

// Returns null, or what went wrong.
template <class Work>
const char* answer(const Work& work) {
  try {
    work();
  } catch (const std::exception& error) {
    what_failed = error.what();
    return what_failed.c_str();
  }
  return nullptr;
}

// As the classes of medfast._CUDA.
struct Features {
  const bf16* rows;
  const bf16* columns;
  int64_t dtype;
  const float* scale;
  int64_t M, N, D, offset;
};

struct Span {
  int64_t row_start, row_stop, column_start, column_stop, parts;
};

struct Upstream {
  const float *row_lse, *column_lse, *d_own, *d_rows, *d_columns;
};

Rectangle rectangle(const Features& f, const Span& s) {
  return {f.M,        f.N,        f.D,           f.offset,     s.row_start,
          s.row_stop, s.column_start, s.column_stop, s.parts};
}

template <class Pass>
void run_blocks(const Features& f, const Rectangle& r, const typename Pass::Arguments& arguments) {
  auto& m = emulated::machine();
  m.run(r.row_blocks() * r.parts, BlockLayout::kThreads, sizeof(BlockShared<Pass>), [&] {
    block_tiles<bf16, Pass>(f.rows, f.columns, r, arguments,
                            *reinterpret_cast<BlockShared<Pass>*>(m.mine().shared));
  });
}

template <class OfGroups, class OfBlocks>
void run_pass(bool by_groups, const Features& f, const Rectangle& r,
              const typename OfBlocks::Arguments& arguments) {
  if (!by_groups) return run_blocks<OfBlocks>(f, r, arguments);
  auto& m = emulated::machine();
  const TensorMap rows{f.rows, f.M, f.D, kTile}, columns{f.columns, f.N, f.D, kTile / kPair};
  m.run(
      Unit::height(r, kPair) * r.parts, kGroupThreads, sizeof(GroupShared<OfGroups>),
      [&] {
        group_tiles<bf16, OfGroups>(&rows, &columns, r, arguments,
                                    *reinterpret_cast<GroupShared<OfGroups>*>(m.mine().shared));
      },
      kPair);
}

}  // namespace

extern "C" {

// When hardware that is free to choose does its work, and in which order threads run.
void choose(bool is_lazy, unsigned seed) {
  emulated::machine().is_lazy = is_lazy;
  emulated::machine().random.seed(seed);
}

const char* clip_loss_sums(bool by_groups, const Features* f, const Span* span,
                           float* row_partials, int64_t row_stride, float* column_partials) {
  return answer([&] {
    run_pass<ClipLossSums<GroupLayout>, ClipLossSums<BlockLayout>>(
        by_groups, *f, rectangle(*f, *span),
        {f->scale, row_partials, column_partials, row_stride});
  });
}

const char* clip_loss_ends(const Features* f, const Span* span, const float* row_partials,
                           int64_t row_stride, const float* column_partials, float* own,
                           float* row_lse, float* column_lse, int* flags) {
  return answer([&] {
    const Rectangle r = rectangle(*f, *span);
    const ClipLossEnds<bf16> ends{f->rows,    f->columns, f->scale,   row_partials,
                                  column_partials, row_stride, own,  row_lse,
                                  column_lse, flags};
    emulated::machine().run(r.row_blocks() + (r.N + kTile - 1) / kTile, kSumThreads, 0,
                            [&] { clip_loss_end(r, ends); });
  });
}

const char* clip_loss_online(const Features* f, const int* flags, float* row_lse,
                             float* column_lse) {
  using Pass = ClipLossOnline<BlockLayout>;
  return answer([&] {
    const int64_t count = (f->M + kTile - 1) / kTile + (f->N + kTile - 1) / kTile;
    const auto along = [&](const Features& g, float* lse) {
      const Rectangle r{g.M, g.N, g.D, g.offset, 0, g.M, 0, g.N, 1};
      const Pass::Arguments arguments{g.scale, lse, flags, count};
      auto& m = emulated::machine();
      m.run(r.row_blocks(), BlockLayout::kThreads, sizeof(BlockShared<Pass>), [&] {
        if (clip_loss_any(flags, count, BlockLayout::kThreads))
          block_tiles<bf16, Pass>(g.rows, g.columns, r, arguments,
                                  *reinterpret_cast<BlockShared<Pass>*>(m.mine().shared));
      });
    };
    along(*f, row_lse);
    along({f->columns, f->rows, f->dtype, f->scale, f->N, f->M, f->D, -f->offset}, column_lse);
  });
}

const char* clip_loss_range(const Features* f, const Upstream* u, float boost,
                            ClipLossNormalisers* normalisers) {
  return answer([&] {
    const ClipLossRange range{f->scale,   u->row_lse, u->column_lse, u->d_own, u->d_rows,
                              u->d_columns, normalisers, f->M,       f->N,     boost};
    auto& m = emulated::machine();
    m.run(1, kRangeThreads, 32 * sizeof(float), [&] {
      clip_loss_range(range, *reinterpret_cast<float(*)[32]>(m.mine().shared));
    });
  });
}

const char* clip_loss_gradient(bool by_groups, const Features* f, const Span* span,
                               const Upstream* u, const ClipLossNormalisers* normalisers,
                               bf16* gradient, int64_t stride, double* sums) {
  return answer([&] {
    run_pass<ClipLossGradient<GroupLayout, bf16>, ClipLossGradient<BlockLayout, bf16>>(
        by_groups, *f, rectangle(*f, *span),
        {f->scale, u->row_lse, u->column_lse, u->d_own, u->d_rows, u->d_columns, normalisers,
         gradient, sums, stride});
  });
}

// Which entry of a tile each number of each thread's is: [threads][kM][kN][4][2].
void places(bool by_groups, int* out) {
  const auto write = [&](const auto& place) {
    for (int m = 0; m < place.kM; ++m)
      for (int n = 0; n < place.kN; ++n)
        for (int entry = 0; entry < 4; ++entry) {
          *out++ = place.row(m, entry / 2);
          *out++ = place.column(n, entry % 2);
        }
  };
  for (int thread = 0; thread < 256; ++thread)
    by_groups ? write(GroupLayout(thread)) : write(BlockLayout(thread));
}

int64_t swizzle(int row, int chunk) { return swizzled(row, chunk); }

// The first and the last tile of each block of a launch, and its row of tiles.
void units(const Span* span, int64_t* out) {
  const Rectangle r{span->row_stop,    span->column_stop, 8, 0, span->row_start, span->row_stop,
                    span->column_start, span->column_stop, span->parts};
  for (int64_t block = 0; block < r.row_blocks() * r.parts; ++block) {
    const Unit unit(r, block);
    *out++ = unit.row_block;
    *out++ = unit.first;
    *out++ = unit.last;
  }
}

// 0 for what does not exist, 1 for own entries and 2 for others of a tile; whether it is plain.
bool mask(int64_t M, int64_t N, int64_t offset, int64_t row, int64_t column, int* out) {
  const Mask found = Rectangle{M, N, 8, offset, 0, M, 0, N, 1}.mask(row, column);
  for (int i = 0; i < kTile; ++i)
    for (int j = 0; j < kTile; ++j)
      *out++ = !found.exists(i, j) ? 0 : found.is_own(i, j) ? 1 : 2;
  return found.is_plain();
}

// Registers that the kernels by groups deal out among the threads of a block.
int group_registers() { return kGroupRegisters; }

// Bytes of shared memory of the kernels: sums, online and gradient by blocks, then by groups.
void shared_bytes(int64_t* out) {
  *out++ = sizeof(BlockShared<ClipLossSums<BlockLayout>>);
  *out++ = sizeof(BlockShared<ClipLossOnline<BlockLayout>>);
  *out++ = sizeof(BlockShared<ClipLossGradient<BlockLayout, bf16>>);
  *out++ = sizeof(GroupShared<ClipLossSums<GroupLayout>>);
  *out++ = sizeof(GroupShared<ClipLossGradient<GroupLayout, bf16>>);
}

}
