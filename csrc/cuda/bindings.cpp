// The module medfast._CUDA: launchers of CUDA kernels on raw pointers, sizes and a stream. No torch
// header, and CUDA's runtime linked in, so that one build serves every torch version; the Python
// side owns and checks the tensors and makes their device current.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "cuda/clip_loss.h"
#include "cuda/launch.h"
#include "cuda/normalize_crops.h"
#include "cuda/rank_merge.h"

namespace py = pybind11;

namespace {

// An address of 0 stands for none.
template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// As cudaStream_t.
CUstream_st* on(uintptr_t stream) { return at<CUstream_st>(stream); }

medfast::cuda::ClipLossFeatures clip_loss_features(uintptr_t rows, uintptr_t columns, int dtype,
                                                   uintptr_t scale, int64_t M, int64_t N,
                                                   int64_t D, int64_t offset) {
  return {at<void>(rows),   at<void>(columns), static_cast<medfast::cuda::Dtype>(dtype),
          at<float>(scale), M,                 N,
          D,                offset};
}

medfast::Vectors vectors(const std::vector<uintptr_t>& addresses) {
  medfast::Vectors found{};
  if (addresses.size() > medfast::kMostRanks)
    throw std::invalid_argument("rank_merge: there are more vectors than it takes");
  for (const uintptr_t address : addresses) found.of[found.count++] = at<float>(address);
  return found;
}

}  // namespace

PYBIND11_MODULE(_CUDA, m) {
  m.doc() = "CUDA kernels of medfast. Pointers and streams are integers; tensors are contiguous.";
  const auto no_gil = py::call_guard<py::gil_scoped_release>();

  using medfast::cuda::ClipLossFeatures;
  using medfast::cuda::ClipLossSpan;
  using medfast::cuda::ClipLossUpstream;
  py::class_<ClipLossFeatures>(m, "ClipLossFeatures")
      .def(py::init(&clip_loss_features), py::arg("rows"), py::arg("columns"), py::arg("dtype"),
           py::arg("scale"), py::arg("M"), py::arg("N"), py::arg("D"), py::arg("offset"));
  py::class_<ClipLossSpan>(m, "ClipLossSpan")
      .def(py::init([](int64_t row_start, int64_t row_stop, int64_t column_start,
                       int64_t column_stop, int64_t parts) {
             return ClipLossSpan{row_start, row_stop, column_start, column_stop, parts};
           }),
           py::arg("row_start"), py::arg("row_stop"), py::arg("column_start"),
           py::arg("column_stop"), py::arg("parts"));
  py::class_<ClipLossUpstream>(m, "ClipLossUpstream")
      .def(py::init([](uintptr_t row_lse, uintptr_t column_lse, uintptr_t d_own, uintptr_t d_rows,
                       uintptr_t d_columns) {
             return ClipLossUpstream{at<float>(row_lse), at<float>(column_lse), at<float>(d_own),
                                     at<float>(d_rows), at<float>(d_columns)};
           }),
           py::arg("row_lse"), py::arg("column_lse"), py::arg("d_own"), py::arg("d_rows"),
           py::arg("d_columns"));
  m.def("clip_loss_blocks_at_a_time", &medfast::cuda::clip_loss_blocks_at_a_time,
        "How many blocks of the kernels that multiply run on one multiprocessor.");
  m.def(
      "clip_loss_sums",
      [](const ClipLossFeatures& features, const ClipLossSpan& span, uintptr_t row_partials,
         int64_t row_stride, uintptr_t column_partials, uintptr_t stream) {
        medfast::cuda::clip_loss_sums(features, span, at<float>(row_partials), row_stride,
                                      at<float>(column_partials), on(stream));
      },
      py::arg("features"), py::arg("span"), py::arg("row_partials"), py::arg("row_stride"),
      py::arg("column_partials"), py::arg("stream"), no_gil);
  m.def(
      "clip_loss_ends",
      [](const ClipLossFeatures& features, const ClipLossSpan& span, uintptr_t row_partials,
         int64_t row_stride, uintptr_t column_partials, uintptr_t own, uintptr_t row_lse,
         uintptr_t column_lse, uintptr_t flags, uintptr_t stream) {
        medfast::cuda::clip_loss_ends(features, span, at<float>(row_partials), row_stride,
                                      at<float>(column_partials), at<float>(own),
                                      at<float>(row_lse), at<float>(column_lse), at<int>(flags),
                                      on(stream));
      },
      py::arg("features"), py::arg("span"), py::arg("row_partials"), py::arg("row_stride"),
      py::arg("column_partials"), py::arg("own"), py::arg("row_lse"), py::arg("column_lse"),
      py::arg("flags"), py::arg("stream"), no_gil);
  m.def(
      "clip_loss_online",
      [](const ClipLossFeatures& features, uintptr_t flags, uintptr_t row_lse,
         uintptr_t column_lse, uintptr_t stream) {
        medfast::cuda::clip_loss_online(features, at<int>(flags), at<float>(row_lse),
                                        at<float>(column_lse), on(stream));
      },
      py::arg("features"), py::arg("flags"), py::arg("row_lse"), py::arg("column_lse"),
      py::arg("stream"), no_gil);
  m.def(
      "clip_loss_range",
      [](const ClipLossFeatures& features, const ClipLossUpstream& upstream, float boost,
         uintptr_t normalisers, uintptr_t stream) {
        medfast::cuda::clip_loss_range(features, upstream, boost, at<float>(normalisers),
                                       on(stream));
      },
      py::arg("features"), py::arg("upstream"), py::arg("boost"), py::arg("normalisers"),
      py::arg("stream"), no_gil);
  m.def(
      "clip_loss_gradient",
      [](const ClipLossFeatures& features, const ClipLossSpan& span,
         const ClipLossUpstream& upstream, uintptr_t normalisers, uintptr_t gradient,
         int64_t stride, uintptr_t sums, uintptr_t stream) {
        medfast::cuda::clip_loss_gradient(features, span, upstream, at<float>(normalisers),
                                          at<void>(gradient), stride, at<double>(sums),
                                          on(stream));
      },
      py::arg("features"), py::arg("span"), py::arg("upstream"), py::arg("normalisers"),
      py::arg("gradient"), py::arg("stride"), py::arg("sums"), py::arg("stream"), no_gil);
  m.def(
      "rank_merge",
      [](const std::vector<uintptr_t>& sources, const std::vector<uintptr_t>& targets,
         int64_t length, bool is_log_sum_exp, uintptr_t stream) {
        medfast::cuda::rank_merge(vectors(sources), vectors(targets), length, is_log_sum_exp,
                                  on(stream));
      },
      py::arg("sources"), py::arg("targets"), py::arg("length"), py::arg("is_log_sum_exp"),
      py::arg("stream"), no_gil);
  m.def(
      "normalize_crops",
      [](uintptr_t images, uintptr_t offsets, int64_t count, int64_t height, int64_t width,
         int64_t crop_height, int64_t crop_width, std::array<float, 3> factor,
         std::array<float, 3> shift, uintptr_t out, int dtype, uintptr_t stream) {
        medfast::cuda::normalize_crops(
            {at<uint8_t>(images), at<int32_t>(offsets), count, height, width, crop_height,
             crop_width},
            {{factor[0], factor[1], factor[2]}, {shift[0], shift[1], shift[2]}}, at<void>(out),
            static_cast<medfast::cuda::Dtype>(dtype), on(stream));
      },
      py::arg("images"), py::arg("offsets"), py::arg("count"), py::arg("height"),
      py::arg("width"), py::arg("crop_height"), py::arg("crop_width"), py::arg("factor"),
      py::arg("shift"), py::arg("out"), py::arg("dtype"), py::arg("stream"), no_gil);
}
