// Crops of decoded images, normalised: what one of many threads does, sixteen values of a row.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "arithmetic/bf16.h"
#include "arithmetic/host_device.h"

namespace medfast {

// (value / 255 - mean) / std with factor = 1 / (255 std) and shift = -mean / std, rounded once.
template <class Real>
MEDFAST_HD Real normalized(uint32_t value, Real factor, Real shift) {
  using std::fma;
  return fma(static_cast<Real>(value), factor, shift);
}

// bf16.
struct UpperHalf {
  uint16_t bits;
};

MEDFAST_HD void round_to(float x, float* to) { *to = x; }

MEDFAST_HD void round_to(float x, UpperHalf* to) {
  to->bits = upper_half(x);
}

// Where in B images [B, height, width, 3] the crops [B, crop_height, crop_width, 3] are.
struct Crops {
  const uint8_t* images;
  const int32_t* offsets;  // [B, 2], y and x of the first row and column; null stands for zeros
  int64_t count;           // B
  int64_t height, width;
  int64_t crop_height, crop_width;
};

// For each channel: a value's factor and what is then added.
struct Affine {
  float factor[3];
  float shift[3];
};

// Values of a pixel, and those that a thread takes: one load of 16 bytes. Sixteen values later the
// channel is one further.
constexpr int kChannels = 3;
constexpr int kValues = 16;
static_assert(kValues % kChannels == 1);

struct alignas(16) SixteenBytes {
  uint32_t words[4];
};

MEDFAST_HD bool is_aligned(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % sizeof(SixteenBytes) == 0;
}

MEDFAST_HD SixteenBytes load_values(const uint8_t* from, int count) {
  if (count == kValues && is_aligned(from)) return *reinterpret_cast<const SixteenBytes*>(from);
  SixteenBytes found = {};
#pragma unroll
  for (int k = 0; k < kValues; ++k)
    if (k < count) found.words[k / 4] |= static_cast<uint32_t>(from[k]) << (8 * (k % 4));
  return found;
}

template <class Out>
MEDFAST_HD void store_values(const Out (&from)[kValues], int count, Out* to) {
  if (count == kValues && is_aligned(to)) {
    constexpr int kPieces = kValues * sizeof(Out) / sizeof(SixteenBytes);
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      SixteenBytes bytes;
      std::memcpy(&bytes, from + piece * (kValues / kPieces), sizeof bytes);
      reinterpret_cast<SixteenBytes*>(to)[piece] = bytes;
    }
    return;
  }
#pragma unroll
  for (int k = 0; k < kValues; ++k)
    if (k < count) to[k] = from[k];
}

MEDFAST_HD int64_t within(int64_t offset, int64_t last) {
  return offset < 0 ? 0 : offset > last ? last : offset;
}

// Threads that a crop needs: its rows in pieces of sixteen values.
inline int64_t crop_places(const Crops& crops) {
  return crops.crop_height * ((crops.crop_width * kChannels + kValues - 1) / kValues);
}

// The thread with the number `place` of each crop. It does that of the crops `begin`,
// `begin + step`, and so on. An offset that leads out of the image is moved to the nearest that
// does not.
template <class Out>
MEDFAST_HD void normalize_at(const Crops& crops, const Affine& affine, Out* out, uint32_t place,
                             int64_t begin, int64_t step) {
  const auto row_values = static_cast<uint32_t>(crops.crop_width * kChannels);
  const uint32_t row_pieces = (row_values + kValues - 1) / kValues;
  const uint32_t row = place / row_pieces, piece = place % row_pieces;
  if (row >= crops.crop_height) return;
  const uint32_t first = piece * kValues;
  const uint32_t left = row_values - first;
  const int count = left < kValues ? static_cast<int>(left) : kValues;

  // The first value's channel is that of the piece's number; then they take turns.
  float factor[kChannels], shift[kChannels];
#pragma unroll
  for (int k = 0; k < kChannels; ++k) {
    const uint32_t channel = (piece + k) % kChannels;
    factor[k] = channel == 0 ? affine.factor[0] : affine.factor[channel == 1 ? 1 : 2];
    shift[k] = channel == 0 ? affine.shift[0] : affine.shift[channel == 1 ? 1 : 2];
  }

  // Offsets into images are int64: 512 of 1,200 x 1,200 pass 2^31.
  for (int64_t b = begin; b < crops.count; b += step) {
    int64_t y = 0, x = 0;
    if (crops.offsets != nullptr) {
      y = within(crops.offsets[2 * b], crops.height - crops.crop_height);
      x = within(crops.offsets[2 * b + 1], crops.width - crops.crop_width);
    }
    const int64_t pixel = (b * crops.height + y + row) * crops.width + x;
    const SixteenBytes bytes = load_values(crops.images + pixel * kChannels + first, count);
    Out found[kValues];
#pragma unroll
    for (int k = 0; k < kValues; ++k) {
      const uint32_t value = bytes.words[k / 4] >> (8 * (k % 4)) & 0xff;
      round_to(normalized<float>(value, factor[k % kChannels], shift[k % kChannels]), found + k);
    }
    store_values(found, count, out + (b * crops.crop_height + row) * row_values + first);
  }
}

}  // namespace medfast
