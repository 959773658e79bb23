// The kernel of rank_merge on a CPU: its threads one after the other.

#include "arithmetic/rank_merge.h"

using namespace medfast;

namespace {

Vectors vectors(const uintptr_t* addresses, int count) {
  Vectors found{};
  for (; found.count < count; ++found.count)
    found.of[found.count] = reinterpret_cast<float*>(addresses[found.count]);
  return found;
}

template <class Merge>
void run(const Vectors& sources, const Vectors& targets, int64_t length, int64_t more) {
  const bool is_aligned = are_aligned(sources) && are_aligned(targets);
  // Blocks are whole: there are threads beyond the last entry.
  for (int64_t place = 0; place < merge_places(length, is_aligned) + more; ++place)
    merge_at<Merge>(sources, targets, length, is_aligned, place);
}

}  // namespace

extern "C" {

void rank_merge(const uintptr_t* sources, int source_count, const uintptr_t* targets,
                int target_count, int64_t length, bool is_log_sum_exp) {
  const auto pass = is_log_sum_exp ? run<LogSumExp<float>> : run<Sum<float>>;
  pass(vectors(sources, source_count), vectors(targets, target_count), length, 7);
}

int most_ranks() { return kMostRanks; }

// The log-sum-exp of parts in fp64.
double log_sum_exp(const double* parts, int count) {
  LogSumExp<double> all;
  for (int i = 0; i < count; ++i) all.add(parts[i]);
  return all.value();
}
}
