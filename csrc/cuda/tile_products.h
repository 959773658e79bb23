// The products of all tiles of a block, in two ways: with the instructions of sm_80, which all later
// GPUs have, and with those of sm_90a. Either hands each tile's accumulators to a pass.

#pragma once

#include "cuda/tile.h"

namespace medfast::cuda {

template <class Pass>
struct BlockShared {
  // The slab that is multiplied and the next one, of rows and of columns.
  static constexpr int kStages = 2;
  alignas(128) unsigned char slabs[kStages][2][kSlabBytes];
  typename Pass::Scratch scratch;
  typename Pass::Last last;
};

// Starts the copies of one slab by a block of 256 threads; zeros beyond the matrix.
template <class Feature>
MEDFAST_DEVICE void copy_slab(uint32_t to, const Feature* matrix, int64_t first, int64_t length,
                              int64_t D, int slab, int thread) {
  const int chunk = thread % 8;
  const int64_t k = static_cast<int64_t>(slab) * kSlab + chunk * kChunk;
#pragma unroll 1
  for (int i = 0; i < 4; ++i) {
    const int local = thread / 8 + 32 * i;
    const int64_t row = first + local;
    const bool exists = row < length && k < D;
    // int64: M * D passes 2^31 at four million rows of 512.
    copy_async(to + swizzled(local, chunk), matrix + (exists ? row * D + k : 0), exists);
  }
}

// 256 threads; two such blocks fit on a multiprocessor, so that one multiplies while the other is
// at its exponentials.
template <class Feature, class Pass>
MEDFAST_DEVICE void block_tiles(const Feature* rows, const Feature* columns, const Rectangle& r,
                                const typename Pass::Arguments& arguments,
                                BlockShared<Pass>& shared) {
  using Place = BlockLayout;
  const Place place(thread_index());
  const Unit unit(r, block_index());
  const int64_t row = unit.row(r);
  const int slabs = r.slabs();
  Pass pass(arguments, r, unit, place, shared.scratch);

  const auto copy = [&](int stage, int64_t block, int slab) {
    copy_slab(shared_address(shared.slabs[stage][0]), rows, row, r.M, r.D, slab, place.thread);
    copy_slab(shared_address(shared.slabs[stage][1]), columns, r.column_start + block * kTile, r.N,
              r.D, slab, place.thread);
    close_copies();
  };
  // Lane l's part of the addresses for `load_matrices`: of rows, pieces of 16 x 16 with the second
  // half of the features last; of columns, two pieces of 8 x 16, each with its second half.
  const int row_of_a = place.first_row + place.lane % 16;
  const int row_of_b = place.first_column + place.lane % 8 + place.lane / 16 * 8;
  const int chunk_of_a = place.lane / 16;
  const int chunk_of_b = place.lane / 8 % 2;

  int stage = 0;
  copy(stage, unit.first, 0);
  for (int64_t block = unit.first; block < unit.last; ++block) {
    const int64_t column = r.column_start + block * kTile;
    pass.prepare(column);
    typename Place::Accumulators products = {};
    for (int slab = 0; slab < slabs; ++slab) {
      wait_for_copies<0>();
      // Everyone's copies are there, and everyone is done with the other stage.
      sync_block();
      if (slab + 1 < slabs)
        copy(stage ^ 1, block, slab + 1);
      else if (block + 1 < unit.last)
        copy(stage ^ 1, block + 1, 0);
      const uint32_t a_slab = shared_address(shared.slabs[stage][0]);
      const uint32_t b_slab = shared_address(shared.slabs[stage][1]);
#pragma unroll
      for (int k = 0; k < kSlab / 16; ++k) {
        uint32_t b[Place::kN / 2][4];
#pragma unroll
        for (int n = 0; n < Place::kN / 2; ++n)
          load_matrices(b[n], b_slab + swizzled(row_of_b + 16 * n, 2 * k + chunk_of_b));
#pragma unroll
        for (int m = 0; m < Place::kM; ++m) {
          uint32_t a[4];
          load_matrices(a, a_slab + swizzled(row_of_a + 16 * m, 2 * k + chunk_of_a));
#pragma unroll
          for (int n = 0; n < Place::kN; ++n)
            multiply<Feature>(products[m][n], a, b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
        }
      }
      stage ^= 1;
    }
    pass.take(products, row, column, [] { sync_block(); });
  }
  pass.finish(shared.last, place.thread, [] { sync_block(); });
}

// Two groups of four warps multiply, each a tile at a time; one thread of a third copies. Two blocks
// with different rows and the same columns copy half of these each, for both.
constexpr int kConsumers = 256;
constexpr int kGroupThreads = kConsumers + 128;
constexpr int kPair = 2;
// Of each thread: the third group gives up what it does not need. All comes out of what a block is
// launched with, in eights; whoever wanted more would wait for ever.
constexpr int kCopierRegisters = 40, kConsumerRegisters = 232;
constexpr int kGroupRegisters = 128 * kCopierRegisters + kConsumers * kConsumerRegisters;
static_assert(kGroupRegisters <= 65536 / kGroupThreads / 8 * 8 * kGroupThreads);

template <class Pass>
struct GroupShared {
  // With at most so many slabs those of the rows stay here and only columns stream; else both do.
  static constexpr int kResident = 8;
  static constexpr int kSlabs = 13;
  static constexpr int kStages = 6;
  alignas(1024) unsigned char slabs[kSlabs][kSlabBytes];
  typename Pass::Scratch scratch[2];
  typename Pass::Last last;
  alignas(8) uint64_t full[kStages], empty[kStages], rows_full;
};

// Where slabs are, and the stages through which they stream.
struct Stream {
  bool is_resident;
  int slabs, stages;
  uint32_t base;

  template <class Shared>
  MEDFAST_DEVICE Stream(const Rectangle& r, const Shared& shared)
      : is_resident(r.slabs() <= Shared::kResident),
        slabs(r.slabs()),
        stages(is_resident ? Shared::kSlabs - Shared::kResident : Shared::kStages),
        base(shared_address(shared.slabs[0])) {}

  MEDFAST_DEVICE uint32_t rows(int stage, int slab) const {
    return base + kSlabBytes * (is_resident ? slab : 2 * stage);
  }
  MEDFAST_DEVICE uint32_t columns(int stage) const {
    return base + kSlabBytes * (is_resident ? slabs + stage : 2 * stage + 1);
  }
};

// A place in the stream, and whether its stage is used for an odd or an even time.
struct Turn {
  int stage = 0;
  uint32_t parity = 0;

  MEDFAST_DEVICE void advance(int steps, int stages) {
    const int to = stage + steps;
    parity ^= static_cast<uint32_t>(to / stages) & 1u;
    stage = to % stages;
  }
  MEDFAST_DEVICE void advance(int stages) {
    const bool wraps = ++stage == stages;
    stage = wraps ? 0 : stage;
    parity ^= wraps ? 1u : 0u;
  }
};

#if !defined(__CUDACC__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Names of barriers that the hardware counts; 0 is the block's own.
enum Named { kOrder = 1, kGroup = 3, kAllConsumers = 5 };

template <class Shared>
MEDFAST_DEVICE void copy_tiles(const TensorMap* rows, const TensorMap* columns, const Rectangle& r,
                               const Unit& unit, Shared& shared) {
  const Stream stream(r, shared);
  const int row = static_cast<int>(unit.row(r));
  const int half = pair_rank();
  if (stream.is_resident) {
    const uint32_t barrier = shared_address(&shared.rows_full);
    barrier_expect(barrier, stream.slabs * kSlabBytes);
    for (int slab = 0; slab < stream.slabs; ++slab)
      copy_box(stream.rows(0, slab), rows, slab * kSlab, row, barrier);
  }
  Turn turn;
  for (int64_t block = unit.first; block < unit.last; ++block) {
    const int column = static_cast<int>(r.column_start + block * kTile);
    for (int slab = 0; slab < stream.slabs; ++slab) {
      barrier_wait(shared_address(&shared.empty[turn.stage]), turn.parity ^ 1);
      const uint32_t barrier = shared_address(&shared.full[turn.stage]);
      barrier_expect(barrier, stream.is_resident ? kSlabBytes : 2 * kSlabBytes);
      if (!stream.is_resident)
        copy_box(stream.rows(turn.stage, slab), rows, slab * kSlab, row, barrier);
      copy_box_to_pair(stream.columns(turn.stage) + half * (kSlabBytes / kPair), columns,
                       slab * kSlab, column + half * (kTile / kPair), barrier);
      turn.advance(stream.stages);
    }
  }
}

template <class Feature, class Pass>
MEDFAST_DEVICE void multiply_tiles(const Rectangle& r, const Unit& unit,
                                   const typename Pass::Arguments& arguments,
                                   GroupShared<Pass>& shared) {
  using Place = GroupLayout;
  const Place place(thread_index());
  const int group = place.row_layer;
  const Stream stream(r, shared);
  const int64_t row = unit.row(r);
  Pass pass(arguments, r, unit, place, shared.scratch[group]);
  // The groups multiply in turn: one's exponentials are hidden behind the other's products.
  const auto wait_for_turn = [&] { sync_named(kOrder + group, kConsumers); };
  const auto give_turn = [&] { report_named(kOrder + (group ^ 1), kConsumers); };
  // Both blocks of the pair fill a stage, so both want to know that it is free.
  const auto release = [&](int stage) {
    if (place.lane < kPair) barrier_arrive(shared_address(&shared.empty[stage]), place.lane);
  };

  Turn turn;
  if (group == 1) {
    give_turn();
    turn.advance(stream.slabs, stream.stages);
  }
  if (stream.is_resident) barrier_wait(shared_address(&shared.rows_full), 0);
  for (int64_t block = unit.first + group; block < unit.last; block += 2) {
    const int64_t column = r.column_start + block * kTile;
    pass.prepare(column);
    typename Place::Accumulators products = {};
    wait_for_turn();
    int before = 0;
    for (int slab = 0; slab < stream.slabs; ++slab) {
      barrier_wait(shared_address(&shared.full[turn.stage]), turn.parity);
      const uint32_t a = stream.rows(turn.stage, slab);
      const uint32_t b = stream.columns(turn.stage);
      for (auto& part : products) hold(part);
      open_products();
#pragma unroll
      for (int k = 0; k < kSlab / 16; ++k)
#pragma unroll
        for (int m = 0; m < Place::kM; ++m)
          multiply_group<Feature>(products[m], descriptor(a + m * (kSlabBytes / 2), k),
                                  descriptor(b, k));
      close_products();
      for (auto& part : products) hold(part);
      // The products of the slab before are done: its stage may be filled anew.
      wait_for_products<1>();
      if (slab > 0) release(before);
      before = turn.stage;
      turn.advance(stream.stages);
    }
    give_turn();
    wait_for_products<0>();
    for (auto& part : products) hold(part);
    release(before);
    turn.advance(stream.slabs, stream.stages);
    if (unit.exists)
      pass.take(products, row, column, [&] { sync_named(kGroup + group, Place::kThreads); });
  }
  if (unit.exists)
    pass.finish(shared.last, thread_index(), [] { sync_named(kAllConsumers, kConsumers); });
}

template <class Feature, class Pass>
MEDFAST_DEVICE void group_tiles(const TensorMap* rows, const TensorMap* columns,
                                const Rectangle& r, const typename Pass::Arguments& arguments,
                                GroupShared<Pass>& shared) {
  const Unit unit(r, block_index(), kPair);
  if (thread_index() == 0) {
    for (int stage = 0; stage < GroupShared<Pass>::kStages; ++stage) {
      barrier_init(shared_address(&shared.full[stage]), 1);
      // Each warp of a group of either block reports that it is done.
      barrier_init(shared_address(&shared.empty[stage]), 4 * kPair);
    }
    barrier_init(shared_address(&shared.rows_full), 1);
    barriers_ready();
  }
  sync_pair();
  if (thread_index() >= kConsumers) {
    fewer_registers<kCopierRegisters>();
    if (thread_index() == kConsumers) copy_tiles(rows, columns, r, unit, shared);
  } else {
    more_registers<kConsumerRegisters>();
    multiply_tiles<Feature>(r, unit, arguments, shared);
  }
  // The other block may still report to this one's barriers.
  sync_pair();
}

#endif

}  // namespace medfast::cuda
