// The module medfast._C: kernels on raw pointers and sizes. No torch header, so that one build
// serves every torch version; the Python side owns and checks the tensors.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <tuple>

#include "cpu/bf16.h"
#include "cpu/clip_loss.h"
#include "cpu/instruction_set.h"
#include "cpu/retrieval_rank.h"
#include "cpu/siglip_loss.h"

namespace py = pybind11;

namespace {

// An address of 0 stands for none.
template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels of medfast. Pointers are integers; tensors are contiguous.";
  const auto no_gil = py::call_guard<py::gil_scoped_release>();

  m.def("instruction_sets", &medfast::instruction_sets,
        "Instruction sets that this build and this processor share, the widest last.");
  m.def("instruction_set",
        [] { return medfast::instruction_sets()[static_cast<size_t>(medfast::chosen)]; },
        "The instruction set in use.");
  m.def("use_instruction_set", &medfast::use_instruction_set, py::arg("name"),
        "Use another of the instruction sets, for tests.");
#ifdef _OPENMP
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif

  m.def(
      "clip_loss_sums",
      [](uintptr_t logits, int64_t stride, int64_t rows, int64_t columns, float shift,
         uintptr_t row_sums, uintptr_t column_sums) {
        medfast::clip_loss_sums(at<float>(logits), stride, rows, columns, shift,
                                at<float>(row_sums), at<float>(column_sums));
      },
      py::arg("logits"), py::arg("stride"), py::arg("rows"), py::arg("columns"), py::arg("shift"),
      py::arg("row_sums"), py::arg("column_sums"), no_gil);
  m.def(
      "clip_loss_gradient",
      [](uintptr_t logits, int64_t stride, int64_t rows, int64_t columns, float shift,
         uintptr_t row_weights, uintptr_t column_weights, uintptr_t gradient, bool is_bf16) {
        const auto pass = [&](auto* out) {
          return medfast::clip_loss_gradient(at<float>(logits), stride, rows, columns, shift,
                                             at<float>(row_weights), at<float>(column_weights),
                                             out);
        };
        return is_bf16 ? pass(at<medfast::bf16>(gradient)) : pass(at<float>(gradient));
      },
      py::arg("logits"), py::arg("stride"), py::arg("rows"), py::arg("columns"), py::arg("shift"),
      py::arg("row_weights"), py::arg("column_weights"), py::arg("gradient"), py::arg("is_bf16"),
      no_gil);
  m.def(
      "siglip_loss_pass",
      [](uintptr_t logits, int64_t stride, int64_t rows, int64_t columns, float bias,
         uintptr_t gradient, bool is_bf16) {
        const auto pass = [&](auto* out) {
          return medfast::siglip_loss_pass(at<float>(logits), stride, rows, columns, bias, out);
        };
        const medfast::SiglipSums sums =
            is_bf16 ? pass(at<medfast::bf16>(gradient)) : pass(at<float>(gradient));
        return std::tuple(sums.loss, sums.d_bias, sums.d_log_scale);
      },
      py::arg("logits"), py::arg("stride"), py::arg("rows"), py::arg("columns"), py::arg("bias"),
      py::arg("gradient"), py::arg("is_bf16"), no_gil);
  m.def(
      "retrieval_rank_counts",
      [](uintptr_t scores, int64_t stride, int64_t rows, int64_t columns,
         uintptr_t row_thresholds, uintptr_t column_thresholds, uintptr_t row_counts,
         uintptr_t column_counts) {
        medfast::retrieval_rank_counts(at<float>(scores), stride, rows, columns,
                                       at<float>(row_thresholds), at<float>(column_thresholds),
                                       at<int64_t>(row_counts), at<int64_t>(column_counts));
      },
      py::arg("scores"), py::arg("stride"), py::arg("rows"), py::arg("columns"),
      py::arg("row_thresholds"), py::arg("column_thresholds"), py::arg("row_counts"),
      py::arg("column_counts"), no_gil);
}
