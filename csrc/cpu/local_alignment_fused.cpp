// local_alignment_loss of bf16, an image after the other: the words' products with its patches are
// used while they are in the second level of cache, a few captions at a time, and what is in between
// is never written as a whole. The memory of a tile of all of it, written and read from pass to pass,
// would cost as much as all arithmetic.

#include <algorithm>
#include <vector>

#include "instruction_set.h"
#include "local_alignment_loss.h"
#include "panels.h"
#include "threads.h"
#include "weighted_sums.h"

namespace medfast {
namespace {

// A caption with more words is taken alone.
constexpr int64_t kRowsAtATime = 160;
// So that no thread waits long for the others.
constexpr int64_t kTasksPerThread = 4;

// Captions that are taken at a time.
struct Chunk {
  int64_t first;
  int64_t last;
  int64_t row;  // its first
  int64_t rows;
  int64_t panel;  // its first, in packed words
};

std::vector<Chunk> chunks_of(const TokenTile& tile) {
  std::vector<Chunk> chunks;
  int64_t panel = 0;
  for (int64_t first = 0; first < tile.captions;) {
    const int64_t row = tile.starts[first];
    int64_t last = first + 1;
    while (last < tile.captions && tile.starts[last + 1] - row <= kRowsAtATime) ++last;
    chunks.push_back({first, last, row, tile.starts[last] - row, panel});
    panel += ceil_div(chunks.back().rows, kPanel);
    first = last;
  }
  return chunks;
}

// Panels of an operand, one behind the other: of a, `is_by_line`, or of b.
void pack_all(Lines<bf16> from, int64_t lines, int64_t depth, bool is_by_line, uint32_t* to) {
  for (int64_t i = 0; i < lines; i += kPanel, to += ceil_div(depth, kStepDepth) * kTermSize)
    pack(Lines<bf16>{from.data + i * from.next_line, from.next_line, from.next}, lines - i, depth,
         is_by_line, to);
}

// Writes a product of packed operands, or adds it, in whole panels.
void multiply_all(const uint32_t* a, const uint32_t* b, int64_t rows, int64_t columns,
                  int64_t depth, bool accumulate, float* to, int64_t stride) {
  const Multiply multiply = chosen_multiply<bf16>();
  constexpr int64_t kMostSteps = kStepsAtATime<bf16>;
  const int64_t steps = ceil_div(depth, kStepDepth);
  for (int64_t i = 0; i < rows; i += kPanel)
    for (int64_t step = 0; step < steps; step += kMostSteps)
      for (int64_t j = 0; j < columns; j += kPanel)
        multiply(a + (i / kPanel * steps + step) * kTermSize,
                 b + (j / kPanel * steps + step) * kTermSize, std::min(kMostSteps, steps - step),
                 rows - i, columns - j, accumulate || step > 0, to + i * stride + j, stride);
}

MEDFAST_KERNEL void round_rows(const float* from, int64_t rows, int64_t columns, int64_t stride,
                               bf16* to, int64_t to_stride) {
  for (int64_t i = 0; i < rows; ++i)
    store_all(from + i * stride, 1.0f, columns, to + i * to_stride);
}

// Of which only what is on the diagonal's panels or right of them is there.
MEDFAST_KERNEL void round_symmetric(const float* from, int64_t size, int64_t stride, bf16* to) {
  for (int64_t i = 0; i < size; ++i) {
    const int64_t known = i / kPanel * kPanel;
    for (int64_t j = 0; j < known; ++j) store(from[j * stride + i], to + i * stride + j);
    store_all(from + i * stride + known, 1.0f, size - known, to + i * stride + known);
  }
}

int64_t round_up(int64_t count) { return ceil_div(count, kPanel) * kPanel; }

// Of 32 words, packed either way.
int64_t panel_size(const LocalAlignmentBatch& batch) { return round_up(batch.depth) * kPanel / 2; }

int64_t packed_size(const LocalAlignmentBatch& batch, const std::vector<Chunk>& chunks) {
  return (chunks.back().panel + ceil_div(chunks.back().rows, kPanel)) * panel_size(batch);
}

void pack_words(const LocalAlignmentBatch& batch, const Chunk& chunk, uint32_t* words) {
  pack_all({batch.words + chunk.row * batch.depth, batch.depth, 1}, chunk.rows, batch.depth, true,
           words + chunk.panel * panel_size(batch));
}

// Memory in pieces that begin with a line of cache; for a start at 0 it only counts.
class Pieces {
 public:
  explicit Pieces(uint32_t* start) : start_(start) {}
  template <class T>
  T* take(int64_t count) {
    constexpr int64_t kLine = 64;
    const int64_t at = used_;
    used_ += ceil_div(count * static_cast<int64_t>(sizeof(T)), kLine) * kLine;
    return start_ == nullptr ? nullptr : reinterpret_cast<T*>(start_ + at / 4);
  }
  int64_t used() const { return used_ / 4; }

 private:
  uint32_t* start_;
  int64_t used_ = 0;
};

// One thread's work on one image.
class Image {
 public:
  Image(const LocalAlignmentBatch& batch, const std::vector<Chunk>& chunks, bool has_gradient)
      : batch_(batch), P_(batch.tile.patches), D_(batch.depth), width_(round_up(P_)) {
    for (const Chunk& chunk : chunks) rows_ = std::max(rows_, round_up(chunk.rows));
    Pieces count(nullptr);
    divide(count, has_gradient);
    Pieces pieces(memory_of_a(count.used()));
    divide(pieces, has_gradient);
  }

  // Of words that are packed as rows of a.
  void scores(int64_t image, const Chunk* first, const Chunk* last, const uint32_t* words,
              float* scores) {
    begin(image);
    for (; first != last; ++first) {
      const Chunk& chunk = *first;
      attend(chunk, words);
      for (int64_t c = chunk.first; c < chunk.last; ++c) {
        const int64_t row = batch_.tile.starts[c] - chunk.row;
        const Scratch scratch = scratch_of(row);
        run<local_alignment::score>(Rows<const float>{scratch.attention, padded(P_)},
                                    of<const float>(mixed_, row), scratch.dots,
                                    batch_.norms + batch_.tile.starts[c],
                                    Size{batch_.tile.words(c), P_}, batch_.temperatures.words,
                                    batch_.min_norm, scratch.of_words,
                                    scores + c * batch_.tile.images + image);
      }
    }
  }

  // Also of words that are packed as terms of sums.
  TemperatureGradients gradients(int64_t image, const std::vector<Chunk>& chunks,
                                 const uint32_t* words, const uint32_t* terms,
                                 const float* scores, const float* d_scores, bf16* d_similarity,
                                 bf16* d_patches, float* d_norms) {
    const TokenTile& tile = batch_.tile;
    TemperatureGradients d_temperatures{};
    begin(image);
    for (const Chunk& chunk : chunks) {
      attend(chunk, words);
      const Rows<bf16> d_rows{d_similarity + chunk.row * tile.columns() + image * P_,
                              tile.columns()};
      for (int64_t c = chunk.first; c < chunk.last; ++c) {
        const int64_t row = tile.starts[c] - chunk.row;
        const int64_t pair = c * tile.images + image;
        run<local_alignment::gradient<bf16>>(
            of<const float>(similarity_, row), of<const float>(mixed_, row),
            batch_.norms + tile.starts[c], scores[pair], d_scores[pair], Size{tile.words(c), P_}, batch_.temperatures, batch_.min_norm,
            Rows<bf16>{d_rows.of(row), d_rows.stride}, of<bf16>(weighted_, row),
            d_norms + tile.starts[c], &d_temperatures, scratch_of(row));
      }
      const bool is_first = chunk.row == 0;
      pack_all({d_rows.data, 1, d_rows.stride}, P_, chunk.rows, true, left_);
      multiply_all(left_, terms + chunk.panel * panel_size(batch_), P_, D_, chunk.rows, !is_first,
                   d_patches_, sums_stride());
      pack_all({weighted_, 1, width_}, P_, chunk.rows, true, left_);
      pack_all({attention_, 1, width_}, P_, chunk.rows, false, right_);
      // The gradient of the Gram matrix is symmetric.
      const int64_t panel = round_up(chunk.rows) * kPanel / 2;
      for (int64_t p = 0; p < P_; p += kPanel)
        multiply_all(left_ + p / kPanel * panel, right_ + p / kPanel * panel,
                     std::min(kPanel, P_ - p), P_ - p, chunk.rows, !is_first,
                     sums_ + p * (width_ + 1), width_);
    }
    run<round_symmetric>(sums_, P_, width_, rounded_);
    pack_all({rounded_, width_, 1}, P_, P_, true, left_);
    pack_all({features(image), 1, D_}, D_, P_, false, patches_);
    multiply_all(left_, patches_, P_, D_, P_, true, d_patches_, sums_stride());
    run<round_rows>(d_patches_, P_, D_, sums_stride(), d_patches + image * P_ * D_, D_);
    return d_temperatures;
  }

 private:
  void divide(Pieces& pieces, bool has_gradient) {
    patches_ = pieces.take<uint32_t>(width_ * round_up(D_) / 2);
    gram_ = pieces.take<uint32_t>(width_ * width_ / 2);
    sums_ = pieces.take<float>(width_ * width_);
    rounded_ = pieces.take<bf16>(width_ * width_);
    similarity_ = pieces.take<float>(rows_ * width_);
    mixed_ = pieces.take<float>(rows_ * width_);
    attention_ = pieces.take<bf16>(rows_ * width_);
    left_ = pieces.take<uint32_t>(std::max({rows_, round_up(D_), width_}) * width_ / 2);
    const int64_t lanes = padded(P_);
    scratch_.over_words = pieces.take<float>(rows_ * lanes);
    scratch_.attention = pieces.take<float>(rows_ * lanes);
    scratch_.dots = pieces.take<float>(rows_);
    scratch_.of_words = pieces.take<float>(rows_);
    for (float** row : {&scratch_.mask, &scratch_.highest, &scratch_.sums, &scratch_.similarity,
                        &scratch_.mixed})
      *row = pieces.take<float>(lanes);
    if (!has_gradient) return;
    scratch_.d_sharpened = pieces.take<float>(rows_ * lanes);
    weighted_ = pieces.take<bf16>(rows_ * width_);
    right_ = pieces.take<uint32_t>(rows_ * width_ / 2);
    d_patches_ = pieces.take<float>(width_ * sums_stride());
  }

  // Rows a power of two apart would share the same few places in the caches.
  int64_t sums_stride() const { return round_up(D_) + kTile; }

  const bf16* features(int64_t image) const { return batch_.patches + image * P_ * D_; }

  template <class T>
  Rows<T> of(T* rows, int64_t first) const {
    return {rows + first * width_, width_, true};
  }

  Scratch scratch_of(int64_t row) const {
    Scratch of_caption = scratch_;
    of_caption.over_words += row * padded(P_);
    of_caption.attention += row * padded(P_);
    of_caption.dots += row;
    return of_caption;
  }

  // Packs patches and their Gram matrix.
  void begin(int64_t image) {
    const float* mask = batch_.patch_mask + image * P_;
    std::fill(std::copy(mask, mask + P_, scratch_.mask), scratch_.mask + padded(P_), 0.0f);
    pack_all({features(image), D_, 1}, P_, D_, false, patches_);
    pack_all({features(image), D_, 1}, P_, D_, true, left_);
    multiply_all(left_, patches_, P_, P_, D_, false, sums_, width_);
    run<round_rows>(sums_, P_, P_, width_, rounded_, width_);
    pack_all({rounded_, 1, width_}, P_, P_, false, gram_);
  }

  // The similarity of a chunk, its attention and that times the Gram matrix.
  void attend(const Chunk& chunk, const uint32_t* words) {
    multiply_all(words + chunk.panel * panel_size(batch_), patches_, chunk.rows, P_, D_,
                 false, similarity_, width_);
    for (int64_t c = chunk.first; c < chunk.last; ++c) {
      const int64_t row = batch_.tile.starts[c] - chunk.row;
      run<local_alignment::attend<bf16>>(of<const float>(similarity_, row),
                                         Size{batch_.tile.words(c), P_},
                                         batch_.temperatures.attention, of<bf16>(attention_, row),
                                         scratch_of(row));
    }
    pack_all({attention_, width_, 1}, chunk.rows, P_, true, left_);
    multiply_all(left_, gram_, chunk.rows, P_, P_, false, mixed_, width_);
  }

  const LocalAlignmentBatch& batch_;
  const int64_t P_, D_, width_;
  int64_t rows_ = 0;
  uint32_t* patches_;   // packed: columns of the similarity, later terms of their gradient
  uint32_t* gram_;      // packed
  float* sums_;         // [width, width]: the Gram matrix, then its gradient
  bf16* rounded_;       // the same
  float* similarity_;   // [rows, width] of a chunk, as the rest
  float* mixed_;
  bf16* attention_;
  uint32_t* left_;      // what is multiplied, packed
  Scratch scratch_{};
  bf16* weighted_ = nullptr;
  uint32_t* right_ = nullptr;
  float* d_patches_ = nullptr;  // [width, sums_stride]
};

}  // namespace

void local_alignment_fused_scores(const LocalAlignmentBatch& batch, float* scores) {
  const std::vector<Chunk> chunks = chunks_of(batch.tile);
  // An image is the work of one thread, or of several with few images.
  const int64_t count = static_cast<int64_t>(chunks.size());
  const int64_t shares =
      std::clamp<int64_t>(ceil_div(kTasksPerThread * threads(), batch.tile.images), 1, count);
  uint32_t* words = memory_of_b(packed_size(batch, chunks));
#pragma omp parallel
  {
    const TileRegisters while_it_runs;
    Image image(batch, chunks, false);
#pragma omp for schedule(static)
    for (int64_t k = 0; k < count; ++k) pack_words(batch, chunks[k], words);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < batch.tile.images * shares; ++task) {
      const int64_t share = task % shares;
      image.scores(task / shares, chunks.data() + share * count / shares,
                   chunks.data() + (share + 1) * count / shares, words, scores);
    }
  }
  release_large_memory_of_b();
}

TemperatureGradients local_alignment_fused_gradients(const LocalAlignmentBatch& batch,
                                                     const float* scores, const float* d_scores,
                                                     bool accumulate, bf16* d_similarity,
                                                     float* d_words, bf16* d_patches,
                                                     float* d_norms) {
  const TokenTile& tile = batch.tile;
  const std::vector<Chunk> chunks = chunks_of(tile);
  const int64_t count = static_cast<int64_t>(chunks.size());
  const int64_t word_count = tile.starts[tile.captions];
  const int64_t size = packed_size(batch, chunks);
  uint32_t* words = memory_of_b(2 * size);
  uint32_t* terms = words + size;
  std::vector<TemperatureGradients> by_image(tile.images);
#pragma omp parallel
  {
    const TileRegisters while_it_runs;
    Image image(batch, chunks, true);
#pragma omp for schedule(static)
    for (int64_t k = 0; k < count; ++k) {
      pack_words(batch, chunks[k], words);
      pack_all({batch.words + chunks[k].row * batch.depth, 1, batch.depth}, batch.depth,
               chunks[k].rows, false, terms + chunks[k].panel * panel_size(batch));
    }
#pragma omp for schedule(dynamic)
    for (int64_t j = 0; j < tile.images; ++j)
      by_image[j] = image.gradients(j, chunks, words, terms, scores, d_scores, d_similarity,
                                    d_patches, d_norms + j * word_count);
  }
  weighted_sums(word_count, tile.columns(), batch.depth, batch.patches, 1.0f, accumulate, d_words,
                [&](int64_t row, int64_t column, int64_t steps, uint32_t* to) {
                  const Lines<bf16> from{d_similarity + row * tile.columns() + column,
                                         tile.columns(), 1};
                  pack(from, word_count - row,
                       std::min(steps * kStepDepth, tile.columns() - column), true, to);
                });
  TemperatureGradients total{};
  for (const TemperatureGradients& part : by_image) {
    total.attention += part.attention;
    total.words += part.words;
  }
  return total;
}

}  // namespace medfast
