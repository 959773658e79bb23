// The kernel of normalize_crops on a CPU: its threads one after the other.

#include "arithmetic/normalize_crops.h"

using namespace medfast;

namespace {

template <class Out>
void run(const Crops& crops, const Affine& affine, Out* out) {
  // Some crops each, and whole blocks: there are threads beyond the last value.
  const int64_t rows_of_blocks = crops.count < 3 ? crops.count : 3;
  for (int64_t begin = 0; begin < rows_of_blocks; ++begin)
    for (uint32_t place = 0; place < crop_places(crops) + 7; ++place)
      normalize_at(crops, affine, out, place, begin, rows_of_blocks);
}

}  // namespace

extern "C" {

void normalize_crops(const uint8_t* images, const int32_t* offsets, const int64_t* sizes,
                     const Affine* affine, void* out, bool is_bf16) {
  const Crops crops{images, offsets, sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
  if (is_bf16) return run(crops, *affine, static_cast<UpperHalf*>(out));
  run(crops, *affine, static_cast<float*>(out));
}

double normalized_in_fp64(unsigned value, double factor, double shift) {
  return normalized<double>(value, factor, shift);
}

void round_to_bf16(const float* from, int64_t count, UpperHalf* to) {
  for (int64_t i = 0; i < count; ++i) round_to(from[i], to + i);
}
}
