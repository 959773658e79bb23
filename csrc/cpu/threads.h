// How many threads a parallel region gets.

#pragma once

#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace medfast {

inline int64_t threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

// Tasks that a thread gets where there is a choice, so that none waits long for the others.
constexpr int64_t kTasksPerThread = 4;

}  // namespace medfast
