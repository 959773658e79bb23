// The module medfast._C: kernels on raw pointers and sizes. No torch header, so that one build
// serves every torch version; the Python side owns and checks the tensors.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>

#include "cpu/clip_loss.h"
#include "cpu/instruction_set.h"

namespace py = pybind11;

namespace {

float* floats(uintptr_t address) { return reinterpret_cast<float*>(address); }

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
      [](uintptr_t logits, int64_t rows, int64_t columns, float shift, uintptr_t row_sums,
         uintptr_t column_sums) {
        medfast::clip_loss_sums(floats(logits), rows, columns, shift, floats(row_sums),
                                floats(column_sums));
      },
      py::arg("logits"), py::arg("rows"), py::arg("columns"), py::arg("shift"),
      py::arg("row_sums"), py::arg("column_sums"), no_gil);
  m.def(
      "clip_loss_softmaxes",
      [](uintptr_t logits, int64_t rows, int64_t columns, float shift, uintptr_t row_weights,
         uintptr_t column_weights) {
        medfast::clip_loss_softmaxes(floats(logits), rows, columns, shift, floats(row_weights),
                                     floats(column_weights));
      },
      py::arg("logits"), py::arg("rows"), py::arg("columns"), py::arg("shift"),
      py::arg("row_weights"), py::arg("column_weights"), no_gil);
}
