// How what every rank has of a vector becomes one: log-sum-exps of parts of the terms, or sums.

#pragma once

#include <cmath>
#include <cstdint>

#include "arithmetic/host_device.h"

namespace medfast {

// A sum of exponentials, e^most * sum, that neither overflows nor underflows; nothing is e^-inf * 0.
template <class Real>
struct ExponentialSum {
  Real most = -INFINITY;
  Real sum = 0;
};

// e^(x - most), and 1 where both are the same infinity.
template <class Real>
MEDFAST_HD Real relative_to(Real most, Real x) {
  using std::exp;
  return x == most ? Real(1) : exp(x - most);
}

// NaN on either side makes the sum NaN.
template <class Real>
MEDFAST_HD ExponentialSum<Real> merged(ExponentialSum<Real> a, ExponentialSum<Real> b) {
  const Real most = a.most < b.most ? b.most : a.most;
  return {most, a.sum * relative_to(most, a.most) + b.sum * relative_to(most, b.most)};
}

// Of log-sum-exps of parts, that of all. A part is the pair of its log-sum-exp and 1.
template <class Real>
class LogSumExp {
 public:
  MEDFAST_HD void add(Real part) { all_ = merged(all_, {part, Real(1)}); }
  MEDFAST_HD Real value() const {
    using std::log;
    return all_.most + log(all_.sum);
  }

 private:
  ExponentialSum<Real> all_;
};

// Of sums of parts, such as those of exponentials minus one constant, that of all.
template <class Real>
class Sum {
 public:
  MEDFAST_HD void add(Real part) { all_ += part; }
  MEDFAST_HD Real value() const { return all_; }

 private:
  Real all_ = 0;
};

constexpr int kMostRanks = 128;

// Vectors by address, each on any device that the current one can reach.
struct Vectors {
  float* of[kMostRanks];
  int count;
};

// Entries that are loaded and stored at once, where all vectors are aligned to their 16 bytes.
constexpr int kMergedAtOnce = 4;

struct alignas(16) FourFloats {
  float of[kMergedAtOnce];
};

// Each target's [i] = what all sources' [i] are together, in the order of the sources, for the
// `entries` i from `first` on: 1 or kMergedAtOnce.
template <class Merge, int entries>
MEDFAST_HD void merge_entries(const Vectors& sources, const Vectors& targets, int64_t first) {
  // Sources whose loads are under way at once. A load from a peer takes a microsecond or two, an
  // exponential some nanoseconds: one source after the other would wait for each.
  constexpr int kBatch = 8;
  Merge merge[entries];
  for (int begin = 0; begin < sources.count; begin += kBatch) {
    FourFloats parts[kBatch];
#pragma unroll
    for (int s = 0; s < kBatch; ++s) {
      if (begin + s >= sources.count) continue;
      const float* from = sources.of[begin + s] + first;
      if constexpr (entries == kMergedAtOnce)
        parts[s] = *reinterpret_cast<const FourFloats*>(from);
      else
        parts[s].of[0] = *from;
    }
#pragma unroll
    for (int s = 0; s < kBatch; ++s)
      if (begin + s < sources.count)
        for (int k = 0; k < entries; ++k) merge[k].add(parts[s].of[k]);
  }
  FourFloats all;
  for (int k = 0; k < entries; ++k) all.of[k] = merge[k].value();
  for (int t = 0; t < targets.count; ++t) {
    float* to = targets.of[t] + first;
    if constexpr (entries == kMergedAtOnce)
      *reinterpret_cast<FourFloats*>(to) = all;
    else
      *to = all.of[0];
  }
}

// The entries of one of many threads, whose number is `place`.
template <class Merge>
MEDFAST_HD void merge_at(const Vectors& sources, const Vectors& targets, int64_t length,
                         bool is_aligned, int64_t place) {
  if (!is_aligned) {
    if (place < length) merge_entries<Merge, 1>(sources, targets, place);
    return;
  }
  const int64_t first = place * kMergedAtOnce;
  if (first + kMergedAtOnce <= length)
    return merge_entries<Merge, kMergedAtOnce>(sources, targets, first);
  for (int64_t i = first; i < length; ++i) merge_entries<Merge, 1>(sources, targets, i);
}

// Threads that are needed.
inline int64_t merge_places(int64_t length, bool is_aligned) {
  return is_aligned ? (length + kMergedAtOnce - 1) / kMergedAtOnce : length;
}

inline bool are_aligned(const Vectors& vectors) {
  for (int v = 0; v < vectors.count; ++v)
    if (reinterpret_cast<uintptr_t>(vectors.of[v]) % sizeof(FourFloats) != 0) return false;
  return true;
}

}  // namespace medfast
