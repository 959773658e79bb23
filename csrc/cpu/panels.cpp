#include "panels.h"

#include <cstring>
#include <memory>

#include "bits.h"
#include "instruction_set.h"

#if MEDFAST_X86
#if defined(__GNUC__) && !defined(__clang__)
// What GCC 12 says of its own header (bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#endif

namespace medfast {
namespace {

// Memory that grows, until it is released.
class Buffer {
 public:
  uint32_t* of(int64_t size) {
    if (size > size_) {
      memory_.reset(new uint32_t[size + kAlignment]);
      size_ = size;
    }
    const auto address = reinterpret_cast<uintptr_t>(memory_.get());
    return memory_.get() + (-address & (4 * kAlignment - 1)) / 4;
  }
  void release_if_larger(int64_t size) {
    if (size_ <= size) return;
    memory_.reset();
    size_ = 0;
  }

 private:
  // A line of cache.
  static constexpr int64_t kAlignment = 16;
  std::unique_ptr<uint32_t[]> memory_;
  int64_t size_ = 0;
};

MEDFAST_KERNEL void transpose(const uint32_t* from, uint32_t* to) {
  for (int64_t i = 0; i < kTile; ++i)
    for (int64_t j = 0; j < kTile; ++j) to[i * kTile + j] = from[j * kTile + i];
}

#if MEDFAST_X86
// By halves: first the entries of pairs of rows change places, then those of pairs of pairs.
MEDFAST_AVX512 void transpose_avx512(const uint32_t* from, uint32_t* to) {
  __m512i a[kTile];
  __m512i b[kTile];
  for (int i = 0; i < kTile; ++i) a[i] = _mm512_loadu_si512(from + i * kTile);
  for (int i = 0; i < kTile; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < kTile; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  for (int i = 0; i < 4; ++i)
    for (int half = 0; half < kTile; half += 8) {
      b[half + i] = _mm512_shuffle_i32x4(a[half + i], a[half + 4 + i], 0x88);
      b[half + 4 + i] = _mm512_shuffle_i32x4(a[half + i], a[half + 4 + i], 0xdd);
    }
  for (int i = 0; i < 8; ++i) {
    _mm512_storeu_si512(to + i * kTile, _mm512_shuffle_i32x4(b[i], b[8 + i], 0x88));
    _mm512_storeu_si512(to + (8 + i) * kTile, _mm512_shuffle_i32x4(b[i], b[8 + i], 0xdd));
  }
}
#endif

// Reads a tile, zero where there is nothing: [line][pair] where depth is contiguous, else
// [pair][line].
MEDFAST_KERNEL void read_tile(Lines<bf16> from, int64_t lines, int64_t depth, uint32_t* tile) {
  if (from.next == 1) {
    for (int64_t i = 0; i < kTile; ++i) {
      uint32_t* row = tile + i * kTile;
      if (i < lines && depth >= kStepDepth) {
        std::memcpy(row, from.data + i * from.next_line, 4 * kTile);
      } else {
        std::memset(row, 0, 4 * kTile);
        if (i < lines && depth > 0) std::memcpy(row, from.data + i * from.next_line, 2 * depth);
      }
    }
    return;
  }
  for (int64_t pair = 0; pair < kTile; ++pair) {
    uint32_t* row = tile + pair * kTile;
    const bf16* first = from.data + 2 * pair * from.next;
    const bf16* second = first + from.next;
    if (from.next_line == 1 && lines >= kTile && 2 * pair + 1 < depth) {
#pragma omp simd
      for (int64_t i = 0; i < kTile; ++i)
        row[i] = first[i].bits | static_cast<uint32_t>(second[i].bits) << 16;
      continue;
    }
    for (int64_t i = 0; i < kTile; ++i) {
      const bool is_line = i < lines;
      const int64_t place = i * from.next_line;
      const uint32_t low = is_line && 2 * pair < depth ? first[place].bits : 0;
      const uint32_t high = is_line && 2 * pair + 1 < depth ? second[place].bits : 0;
      row[i] = low | high << 16;
    }
  }
}

// The first term of x: in its upper half, rounded. Where x is NaN this may be anything, but the
// last term is NaN.
MEDFAST_KERNEL uint32_t first_term(uint32_t x) { return (x + 0x8000u) & 0xffff0000u; }

// The same term of two neighbours as a pair.
MEDFAST_KERNEL uint32_t pair_of(uint32_t low, uint32_t high) {
  return low >> 16 | (high & 0xffff0000u);
}

// Splits a row of a tile: pairs of low[i * next] and high[i * next].
template <int64_t next>
MEDFAST_KERNEL void split_row(const float* low, const float* high, uint32_t* to) {
#pragma omp simd
  for (int64_t i = 0; i < kTile; ++i) {
    const float x = low[i * next];
    const float y = high[i * next];
    const uint32_t x0 = first_term(bits_of(x));
    const uint32_t y0 = first_term(bits_of(y));
    to[i] = pair_of(x0, y0);
    const float x_rest = x - float_of(x0);
    const float y_rest = y - float_of(y0);
    const uint32_t x1 = first_term(bits_of(x_rest));
    const uint32_t y1 = first_term(bits_of(y_rest));
    to[kTermSize + i] = pair_of(x1, y1);
    // All that is left is in the upper half.
    to[2 * kTermSize + i] =
        pair_of(bits_of(x_rest - float_of(x1)), bits_of(y_rest - float_of(y1)));
  }
}

// Reads the tiles of all terms, kTermSize apart.
MEDFAST_KERNEL void read_tile(Lines<float> from, int64_t lines, int64_t depth, uint32_t* tile) {
  const bool is_by_line = from.next == 1;
  alignas(64) float padded[kTile * kStepDepth];
  if (lines < kTile || depth < kStepDepth || (!is_by_line && from.next_line != 1)) {
    std::fill(padded, padded + kTile * kStepDepth, 0.0f);
    const Lines<float> to{padded, is_by_line ? kStepDepth : 1, is_by_line ? 1 : kTile};
    for (int64_t i = 0; i < std::min(lines, kTile); ++i)
      for (int64_t k = 0; k < std::min(depth, kStepDepth); ++k)
        padded[i * to.next_line + k * to.next] = from.data[i * from.next_line + k * from.next];
    from = to;
  }
  for (int64_t i = 0; i < kTile; ++i) {
    uint32_t* row = tile + i * kTile;
    if (is_by_line) {
      const float* line = from.data + i * from.next_line;
      split_row<2>(line, line + 1, row);
    } else {
      const float* low = from.data + 2 * i * from.next;
      split_row<1>(low, low + from.next, row);
    }
  }
}

using Transpose = void (*)(const uint32_t*, uint32_t*);

template <class T>
MEDFAST_KERNEL void pack_panel(Lines<T> from, int64_t lines, int64_t depth, bool is_by_line,
                               Transpose transposed, uint32_t* to) {
  alignas(64) uint32_t tiles[kStepSize<T>];
  for (int64_t k = 0; k < depth; k += kStepDepth, to += kStepSize<T>)
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t first = half * kTile;
      const Lines<T> part{from.data + first * from.next_line + k * from.next, from.next_line,
                          from.next};
      uint32_t* tile = to + half * kTileSize;
      if ((from.next == 1) == is_by_line) {
        read_tile(part, lines - first, depth - k, tile);
        continue;
      }
      read_tile(part, lines - first, depth - k, tiles);
      for (int64_t term = 0; term < kTerms<T>; ++term)
        transposed(tiles + term * kTermSize, tile + term * kTermSize);
    }
}

MEDFAST_KERNEL float upper(uint32_t pair) { return float_of(pair & 0xffff0000u); }

// Like AMX, sums the products of a step before it adds them.
MEDFAST_KERNEL void add_product(const uint32_t* a, const uint32_t* b, float* to,
                                int64_t stride) {
  for (int64_t i = 0; i < kPanel; ++i)
    for (int64_t half = 0; half < 2; ++half) {
      float sums[kTile] = {};
      for (int64_t pair = 0; pair < kTile; ++pair) {
        const uint32_t x = a[i * kTile + pair];
        const uint32_t* y = b + half * kTileSize + pair * kTile;
#pragma omp simd
        for (int64_t j = 0; j < kTile; ++j)
          sums[j] += upper(x << 16) * upper(y[j] << 16) + upper(x) * upper(y[j]);
      }
      float* all = to + i * stride + half * kTile;
#pragma omp simd
      for (int64_t j = 0; j < kTile; ++j) all[j] += sums[j];
    }
}

template <class T>
MEDFAST_KERNEL void multiply_kernel(const uint32_t* a, const uint32_t* b, int64_t steps,
                                    bool accumulate, float* to, int64_t stride) {
  for (int64_t i = 0; i < kPanel && !accumulate; ++i)
    std::fill(to + i * stride, to + i * stride + kPanel, 0.0f);
  for (int64_t step = 0; step < steps; ++step, a += kStepSize<T>, b += kStepSize<T>)
    for (int64_t p = kTerms<T> - 1; p >= 0; --p)
      for (int64_t q = kTerms<T> - 1 - p; q >= 0; --q)
        add_product(a + p * kTermSize, b + q * kTermSize, to, stride);
}

template <class T>
void multiply_anywhere(const uint32_t* a, const uint32_t* b, int64_t steps, int64_t, int64_t,
                       bool accumulate, float* to, int64_t stride) {
  run<multiply_kernel<T>>(a, b, steps, accumulate, to, stride);
}

#if MEDFAST_HAS_AMX
// Four tiles of sums, two of a and two of b, or fewer where the rest is not wanted.
template <class T, bool has_second_row, bool has_second_column>
MEDFAST_AMX void multiply_tiles(const uint32_t* a, const uint32_t* b, int64_t steps,
                                bool accumulate, float* to, int64_t stride) {
  // Compilers do not see that tiles are loaded from memory, and stored there.
  asm volatile("" ::: "memory");
  constexpr int64_t kRowBytes = 4 * kTile;
  const int64_t sum_bytes = 4 * stride;
  if (accumulate) {
    _tile_loadd(0, to, sum_bytes);
    _tile_loadd(1, to + kTile, sum_bytes);
    _tile_loadd(2, to + kTile * stride, sum_bytes);
    _tile_loadd(3, to + kTile * stride + kTile, sum_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t step = 0; step < steps; ++step, a += kStepSize<T>, b += kStepSize<T>)
    for (int64_t p = kTerms<T> - 1; p >= 0; --p) {
      const uint32_t* x = a + p * kTermSize;
      _tile_loadd(4, x, kRowBytes);
      if constexpr (has_second_row) _tile_loadd(5, x + kTileSize, kRowBytes);
      for (int64_t q = kTerms<T> - 1 - p; q >= 0; --q) {
        const uint32_t* y = b + q * kTermSize;
        _tile_loadd(6, y, kRowBytes);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (has_second_column) {
          _tile_loadd(7, y + kTileSize, kRowBytes);
          _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (has_second_row) _tile_dpbf16ps(2, 5, 6);
        if constexpr (has_second_row && has_second_column) _tile_dpbf16ps(3, 5, 7);
      }
    }
  _tile_stored(0, to, sum_bytes);
  _tile_stored(1, to + kTile, sum_bytes);
  _tile_stored(2, to + kTile * stride, sum_bytes);
  _tile_stored(3, to + kTile * stride + kTile, sum_bytes);
  asm volatile("" ::: "memory");
}

template <class T>
void multiply_amx(const uint32_t* a, const uint32_t* b, int64_t steps, int64_t rows,
                  int64_t columns, bool accumulate, float* to, int64_t stride) {
  const bool has_second_row = rows > kTile;
  const auto product = columns > kTile ? (has_second_row ? multiply_tiles<T, true, true>
                                                         : multiply_tiles<T, false, true>)
                                       : (has_second_row ? multiply_tiles<T, true, false>
                                                         : multiply_tiles<T, false, false>);
  product(a, b, steps, accumulate, to, stride);
}

MEDFAST_AMX void configure() {
  struct {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } shape;
  static_assert(sizeof shape == 64);
  for (int tile = 0; tile < 8; ++tile) {
    shape.row_bytes[tile] = 4 * kTile;
    shape.rows[tile] = kTile;
  }
  // GCC sees no more than the first bytes being read.
  asm volatile("" ::"r"(&shape) : "memory");
  _tile_loadconfig(&shape);
}

MEDFAST_AMX void release() { _tile_release(); }
#endif

}  // namespace

template <class T>
void pack(Lines<T> from, int64_t lines, int64_t depth, bool is_by_line, uint32_t* to) {
  Transpose transposed = transpose;
#if MEDFAST_X86
  if (chosen >= InstructionSet::avx512) transposed = transpose_avx512;
#endif
  run<pack_panel<T>>(from, lines, depth, is_by_line, transposed, to);
}

template <class T>
Multiply chosen_multiply() {
#if MEDFAST_HAS_AMX
  if (chosen == InstructionSet::amx) return multiply_amx<T>;
#endif
  return multiply_anywhere<T>;
}

template <class T>
void pack_all(Lines<T> from, int64_t lines, int64_t depth, bool is_by_line, uint32_t* to) {
  for (int64_t i = 0; i < lines; i += kPanel, to += packed_entries<T>(kPanel, depth))
    pack(Lines<T>{from.data + i * from.next_line, from.next_line, from.next}, lines - i, depth,
         is_by_line, to);
}

template <class T>
void multiply_all(const uint32_t* a, const uint32_t* b, int64_t rows, int64_t columns,
                  int64_t depth, bool accumulate, float* to, int64_t stride) {
  const Multiply multiply = chosen_multiply<T>();
  constexpr int64_t kMostSteps = kStepsAtATime<T>;
  const int64_t steps = ceil_div(depth, kStepDepth);
  for (int64_t i = 0; i < rows; i += kPanel)
    for (int64_t step = 0; step < steps; step += kMostSteps)
      for (int64_t j = 0; j < columns; j += kPanel)
        multiply(a + (i / kPanel * steps + step) * kStepSize<T>,
                 b + (j / kPanel * steps + step) * kStepSize<T>,
                 std::min(kMostSteps, steps - step), rows - i, columns - j,
                 accumulate || step > 0, to + i * stride + j, stride);
}

template void pack(Lines<bf16>, int64_t, int64_t, bool, uint32_t*);
template void pack(Lines<float>, int64_t, int64_t, bool, uint32_t*);
template void pack_all(Lines<bf16>, int64_t, int64_t, bool, uint32_t*);
template void pack_all(Lines<float>, int64_t, int64_t, bool, uint32_t*);
template void multiply_all<bf16>(const uint32_t*, const uint32_t*, int64_t, int64_t, int64_t, bool,
                                 float*, int64_t);
template void multiply_all<float>(const uint32_t*, const uint32_t*, int64_t, int64_t, int64_t,
                                  bool, float*, int64_t);
template Multiply chosen_multiply<bf16>();
template Multiply chosen_multiply<float>();

TileRegisters::TileRegisters() {
#if MEDFAST_HAS_AMX
  if (chosen == InstructionSet::amx) configure();
#endif
}

TileRegisters::~TileRegisters() {
#if MEDFAST_HAS_AMX
  if (chosen == InstructionSet::amx) release();
#endif
}

namespace {
// 64 MiB.
constexpr int64_t kMostThatStays = int64_t{1} << 24;
thread_local Buffer of_b;
}  // namespace

uint32_t* memory_of_a(int64_t size) {
  thread_local Buffer buffer;
  return buffer.of(size);
}

uint32_t* memory_of_b(int64_t size) { return of_b.of(size); }

void release_large_memory_of_b() { of_b.release_if_larger(kMostThatStays); }

}  // namespace medfast
