// One tile of words [N] x images [g] x patches [P], row after row contiguous: what the losses over
// all pairs of tokens pass over.

#pragma once

#include <algorithm>
#include <cstdint>

namespace medfast {

struct TokenTile {
  // Caption c has the rows starts[c] to starts[c + 1].
  const int64_t* starts;
  int64_t captions;
  int64_t images;
  int64_t patches;

  int64_t columns() const { return images * patches; }
  int64_t words(int64_t caption) const { return starts[caption + 1] - starts[caption]; }
  int64_t longest() const {
    int64_t most = 0;
    for (int64_t c = 0; c < captions; ++c) most = std::max(most, words(c));
    return most;
  }
};

}  // namespace medfast
