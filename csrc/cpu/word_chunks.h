// The words of a batch, a few captions at a time: as many as stay in the second level of cache with
// their products with an image's patches, so that these are used there and never written as a
// whole. Memory for a tile of all of them, written and read from pass to pass, costs as much as
// what is done with it.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "panels.h"
#include "threads.h"
#include "token_tile.h"

namespace medfast {

struct Chunk {
  int64_t first;  // caption
  int64_t last;
  int64_t row;  // its first
  int64_t rows;
};

// Of features of type T.
template <class T>
class WordChunks {
 public:
  WordChunks(const TokenTile& words, int64_t depth) : depth_(depth) {
    // A caption with more words is taken alone.
    constexpr int64_t kRowsAtATime = 160;
    for (int64_t first = 0; first < words.captions;) {
      const int64_t row = words.starts[first];
      int64_t last = first + 1;
      while (last < words.captions && words.starts[last + 1] - row <= kRowsAtATime) ++last;
      const int64_t rows = words.starts[last] - row;
      chunks_.push_back({first, last, row, rows});
      rows_ = std::max(rows_, whole_panels(rows));
      first = last;
    }
  }

  int64_t count() const { return static_cast<int64_t>(chunks_.size()); }
  const Chunk& operator[](int64_t k) const { return chunks_[k]; }
  // Of the largest, in whole panels.
  int64_t rows() const { return rows_; }

  // So many entries has the memory of a chunk, packed either way.
  int64_t packed_size() const { return packed_entries<T>(rows_, depth_); }
  // As rows of a product.
  void pack_rows(int64_t k, const T* features, uint32_t* to) const {
    pack_all(Lines<T>{features + chunks_[k].row * depth_, depth_, 1}, chunks_[k].rows, depth_, true,
             to);
  }
  // As what weights of words are multiplied with.
  void pack_terms(int64_t k, const T* features, uint32_t* to) const {
    pack_all(Lines<T>{features + chunks_[k].row * depth_, 1, depth_}, depth_, chunks_[k].rows,
             false, to);
  }

  // Into so many parts `count` chunks are divided where there are so few tasks for each.
  static int64_t shares(int64_t count, int64_t tasks) {
    return std::clamp<int64_t>(ceil_div(kTasksPerThread * threads(), tasks), 1, count);
  }

 private:
  int64_t depth_;
  std::vector<Chunk> chunks_;
  int64_t rows_ = 0;
};

}  // namespace medfast
