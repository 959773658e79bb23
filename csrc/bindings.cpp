// The module medfast._C: kernels on raw pointers and sizes. No torch header, so that one build
// serves every torch version; the Python side owns and checks the tensors.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <string>
#include <tuple>
#include <type_traits>

#include "cpu/bf16.h"
#include "cpu/clip_loss.h"
#include "cpu/filip_loss.h"
#include "cpu/instruction_set.h"
#include "cpu/local_alignment_loss.h"
#include "cpu/product.h"
#include "cpu/retrieval_rank.h"
#include "cpu/siglip_loss.h"
#include "cpu/sparc_loss.h"

namespace py = pybind11;

namespace {

// An address of 0 stands for none.
template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Calls `pass` with the two addresses as pointers to integers of so many bytes.
template <class Pass>
void with_index(int bytes, uintptr_t a, uintptr_t b, const Pass& pass) {
  if (bytes == 1) return pass(at<uint8_t>(a), at<uint8_t>(b));
  if (bytes == 2) return pass(at<int16_t>(a), at<int16_t>(b));
  pass(at<int32_t>(a), at<int32_t>(b));
}

std::tuple<double, double> as_tuple(const medfast::TemperatureGradients& found) {
  return {found.attention, found.words};
}

medfast::FilipFeatures filip_features(uintptr_t starts, uintptr_t ids, int64_t captions,
                                      int64_t images, int64_t patches, int64_t all_words,
                                      int64_t width) {
  return {at<int64_t>(starts), at<int64_t>(ids), captions, images, patches, all_words, width};
}

medfast::TokenTile token_tile(uintptr_t starts, int64_t captions, int64_t images,
                              int64_t patches) {
  return {at<int64_t>(starts), captions, images, patches};
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

  m.def("multiplies_bf16",
        [] { return medfast::chosen == medfast::InstructionSet::amx; },
        "Whether the instruction set in use multiplies bf16 faster than fp32.");
  m.def(
      "product",
      [](int64_t count, int64_t rows, int64_t columns, int64_t depth, uintptr_t a,
         std::array<int64_t, 3> a_strides, uintptr_t b, std::array<int64_t, 3> b_strides,
         float alpha, bool accumulate, uintptr_t out, std::array<int64_t, 2> out_strides,
         bool is_bf16) {
        const auto of = [&](auto* x, auto* y) {
          using T = std::remove_pointer_t<decltype(x)>;
          const auto matrix = [](T* data, const std::array<int64_t, 3>& strides) {
            return medfast::Matrix<T>{data, strides[1], strides[2], strides[0]};
          };
          medfast::product(count, rows, columns, depth, matrix(x, a_strides), matrix(y, b_strides),
                           alpha, accumulate,
                           medfast::Result{at<float>(out), out_strides[1], out_strides[0]});
        };
        is_bf16 ? of(at<medfast::bf16>(a), at<medfast::bf16>(b)) : of(at<float>(a), at<float>(b));
      },
      py::arg("count"), py::arg("rows"), py::arg("columns"), py::arg("depth"), py::arg("a"),
      py::arg("a_strides"), py::arg("b"), py::arg("b_strides"), py::arg("alpha"),
      py::arg("accumulate"), py::arg("out"), py::arg("out_strides"), py::arg("is_bf16"),
      no_gil);
  m.def(
      "largest_norm",
      [](uintptr_t features, int64_t rows, int64_t width) {
        return medfast::largest_norm(at<medfast::bf16>(features), rows, width);
      },
      py::arg("features"), py::arg("rows"), py::arg("width"), no_gil);
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
      "clip_loss_sums_of_features",
      [](uintptr_t rows, uintptr_t columns, int64_t row_count, int64_t column_count, int64_t depth,
         float scale, int64_t offset, float shift, uintptr_t own, uintptr_t row_sums,
         uintptr_t column_sums, uintptr_t kept, int64_t kept_stride, float step, bool is_bf16) {
        const auto of = [&](auto* x, auto* y, auto* kept_to) {
          using T = std::remove_pointer_t<decltype(x)>;
          using Kept = std::remove_pointer_t<decltype(kept_to)>;
          medfast::clip_loss_sums_of_features(
              medfast::Matrix<T>{x, depth, 1, 0}, medfast::Matrix<T>{y, 1, depth, 0}, row_count,
              column_count, depth, scale, offset, shift, at<float>(own), at<float>(row_sums),
              at<float>(column_sums), medfast::KeptLogits<Kept>{kept_to, kept_stride, step});
        };
        if (is_bf16)
          return of(at<medfast::bf16>(rows), at<medfast::bf16>(columns), at<int16_t>(kept));
        of(at<float>(rows), at<float>(columns), at<float>(kept));
      },
      py::arg("rows"), py::arg("columns"), py::arg("row_count"), py::arg("column_count"),
      py::arg("depth"), py::arg("scale"), py::arg("offset"), py::arg("shift"), py::arg("own"),
      py::arg("row_sums"), py::arg("column_sums"), py::arg("kept") = 0,
      py::arg("kept_stride") = 0, py::arg("step") = 1.0f, py::kw_only(), py::arg("is_bf16"),
      no_gil);
  m.def(
      "clip_loss_gradient_of_features",
      [](uintptr_t kept, int64_t stride, float step, int64_t rows, int64_t columns, int64_t depth,
         float scale, int64_t offset, float shift, uintptr_t row_weights, uintptr_t column_weights,
         uintptr_t own, uintptr_t features, bool of_columns, uintptr_t gradient) {
        return medfast::clip_loss_gradient_of_features(
            {at<int16_t>(kept), stride, step}, rows, columns, depth, scale, offset, shift,
            at<float>(row_weights), at<float>(column_weights), at<float>(own),
            at<medfast::bf16>(features), of_columns, at<medfast::bf16>(gradient));
      },
      py::arg("kept"), py::arg("stride"), py::arg("step"), py::arg("rows"), py::arg("columns"),
      py::arg("depth"), py::arg("scale"), py::arg("offset"), py::arg("shift"),
      py::arg("row_weights"), py::arg("column_weights"), py::arg("own"), py::arg("features"),
      py::arg("of_columns"), py::arg("gradient"), no_gil);
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
  m.def(
      "local_alignment_attend",
      [](uintptr_t starts, int64_t captions, int64_t images, int64_t patches,
         uintptr_t similarity, uintptr_t patch_mask, float temperature, uintptr_t attention,
         uintptr_t dots) {
        medfast::local_alignment_attend(token_tile(starts, captions, images, patches),
                                        at<float>(similarity), at<float>(patch_mask), temperature,
                                        at<float>(attention), at<float>(dots));
      },
      py::arg("starts"), py::arg("captions"), py::arg("images"), py::arg("patches"),
      py::arg("similarity"), py::arg("patch_mask"), py::arg("temperature"), py::arg("attention"),
      py::arg("dots"), no_gil);
  m.def(
      "local_alignment_scores",
      [](uintptr_t starts, int64_t captions, int64_t images, int64_t patches, uintptr_t attention,
         uintptr_t mixed, uintptr_t dots, uintptr_t norms, float temperature, float min_norm,
         uintptr_t scores) {
        medfast::local_alignment_scores(token_tile(starts, captions, images, patches),
                                        at<float>(attention), at<float>(mixed), at<float>(dots),
                                        at<float>(norms), temperature, min_norm,
                                        at<float>(scores));
      },
      py::arg("starts"), py::arg("captions"), py::arg("images"), py::arg("patches"),
      py::arg("attention"), py::arg("mixed"), py::arg("dots"), py::arg("norms"),
      py::arg("temperature"), py::arg("min_norm"), py::arg("scores"), no_gil);
  m.def(
      "local_alignment_gradient",
      [](uintptr_t starts, int64_t captions, int64_t images, int64_t patches,
         uintptr_t similarity, uintptr_t patch_mask, uintptr_t mixed, uintptr_t norms,
         uintptr_t scores, uintptr_t d_scores, float temp_attention, float temp_words,
         float min_norm, uintptr_t attention, uintptr_t d_similarity, uintptr_t weighted,
         uintptr_t d_norms) {
        return as_tuple(medfast::local_alignment_gradient(
            token_tile(starts, captions, images, patches), at<float>(similarity),
            at<float>(patch_mask), at<float>(mixed), at<float>(norms), at<float>(scores),
            at<float>(d_scores), {temp_attention, temp_words}, min_norm, at<float>(attention),
            at<float>(d_similarity), at<float>(weighted), at<float>(d_norms)));
      },
      py::arg("starts"), py::arg("captions"), py::arg("images"), py::arg("patches"),
      py::arg("similarity"), py::arg("patch_mask"), py::arg("mixed"), py::arg("norms"),
      py::arg("scores"), py::arg("d_scores"), py::arg("temp_attention"), py::arg("temp_words"),
      py::arg("min_norm"), py::arg("attention"), py::arg("d_similarity"), py::arg("weighted"),
      py::arg("d_norms"), no_gil);
  py::class_<medfast::LocalAlignmentBatch>(m, "LocalAlignmentBatch")
      .def(py::init([](uintptr_t starts, int64_t captions, int64_t images, int64_t patches,
                       int64_t depth, uintptr_t words, uintptr_t features, uintptr_t patch_mask,
                       uintptr_t norms, float temp_attention, float temp_words, float min_norm) {
             return medfast::LocalAlignmentBatch{token_tile(starts, captions, images, patches),
                                                 depth,
                                                 at<medfast::bf16>(words),
                                                 at<medfast::bf16>(features),
                                                 at<float>(patch_mask),
                                                 at<float>(norms),
                                                 {temp_attention, temp_words},
                                                 min_norm};
           }),
           py::arg("starts"), py::arg("captions"), py::arg("images"), py::arg("patches"),
           py::arg("depth"), py::arg("words"), py::arg("features"), py::arg("patch_mask"),
           py::arg("norms"), py::arg("temp_attention"), py::arg("temp_words"),
           py::arg("min_norm"))
      .def(
          "scores",
          [](const medfast::LocalAlignmentBatch& batch, uintptr_t scores) {
            medfast::local_alignment_fused_scores(batch, at<float>(scores));
          },
          py::arg("scores"), no_gil)
      .def(
          "gradients",
          [](const medfast::LocalAlignmentBatch& batch, uintptr_t scores, uintptr_t d_scores,
             bool accumulate, uintptr_t d_similarity, uintptr_t d_words, uintptr_t d_patches,
             uintptr_t d_norms) {
            return as_tuple(medfast::local_alignment_fused_gradients(
                batch, at<float>(scores), at<float>(d_scores), accumulate,
                at<medfast::bf16>(d_similarity), at<float>(d_words),
                at<medfast::bf16>(d_patches), at<float>(d_norms)));
          },
          py::arg("scores"), py::arg("d_scores"), py::arg("accumulate"), py::arg("d_similarity"),
          py::arg("d_words"), py::arg("d_patches"), py::arg("d_norms"), no_gil);
  m.def(
      "filip_loss_maxima",
      [](uintptr_t starts, int64_t captions, int64_t images, int64_t patches,
         uintptr_t similarity, uintptr_t shares, uintptr_t ids, int64_t all_captions,
         int64_t all_images, int64_t first_image, int64_t all_words, uintptr_t image_to_text,
         uintptr_t text_to_image, uintptr_t best_patch, uintptr_t best_word, int index_bytes) {
        const medfast::FilipScores scores{at<int64_t>(ids),         all_captions, all_images,
                                          first_image,              all_words,
                                          at<float>(image_to_text), at<float>(text_to_image)};
        with_index(index_bytes, best_patch, best_word, [&](auto* of_words, auto* of_patches) {
          medfast::filip_loss_maxima(token_tile(starts, captions, images, patches),
                                     at<float>(similarity), at<float>(shares), scores, of_words,
                                     of_patches);
        });
      },
      py::arg("starts"), py::arg("captions"), py::arg("images"), py::arg("patches"),
      py::arg("similarity"), py::arg("shares"), py::arg("ids"), py::arg("all_captions"),
      py::arg("all_images"), py::arg("first_image"), py::arg("all_words"),
      py::arg("image_to_text"), py::arg("text_to_image"), py::arg("best_patch"),
      py::arg("best_word"), py::arg("index_bytes"), no_gil);
  m.def(
      "filip_loss_fused_maxima",
      [](uintptr_t starts, uintptr_t ids, int64_t captions, int64_t images, int64_t patches,
         int64_t all_words, int64_t width, uintptr_t word_features, uintptr_t patch_features,
         bool is_bf16, uintptr_t shares, uintptr_t image_to_text, uintptr_t text_to_image,
         uintptr_t best_patch, uintptr_t best_word, int index_bytes) {
        const medfast::FilipFeatures sizes =
            filip_features(starts, ids, captions, images, patches, all_words, width);
        with_index(index_bytes, best_patch, best_word, [&](auto* of_words, auto* of_patches) {
          const auto pass = [&](auto* words) {
            using Feature = std::remove_pointer_t<decltype(words)>;
            medfast::filip_loss_fused_maxima(sizes, words, at<Feature>(patch_features),
                                             at<float>(shares), at<float>(image_to_text),
                                             at<float>(text_to_image), of_words, of_patches);
          };
          is_bf16 ? pass(at<medfast::bf16>(word_features)) : pass(at<float>(word_features));
        });
      },
      py::arg("starts"), py::arg("ids"), py::arg("captions"), py::arg("images"),
      py::arg("patches"), py::arg("all_words"), py::arg("width"), py::arg("word_features"),
      py::arg("patch_features"), py::arg("is_bf16"), py::arg("shares"), py::arg("image_to_text"),
      py::arg("text_to_image"), py::arg("best_patch"), py::arg("best_word"),
      py::arg("index_bytes"), no_gil);
  m.def(
      "filip_loss_gradient",
      [](uintptr_t starts, uintptr_t ids, int64_t captions, int64_t images, int64_t patches,
         int64_t all_words, int64_t width, uintptr_t word_features, uintptr_t patch_features,
         bool is_bf16, uintptr_t shares, uintptr_t d_image_to_text, uintptr_t d_text_to_image,
         uintptr_t best_patch, uintptr_t best_word, int index_bytes, uintptr_t d_words,
         uintptr_t d_patches) {
        const medfast::FilipFeatures sizes =
            filip_features(starts, ids, captions, images, patches, all_words, width);
        with_index(index_bytes, best_patch, best_word, [&](auto* of_words, auto* of_patches) {
          const auto pass = [&](auto* words) {
            using Feature = std::remove_pointer_t<decltype(words)>;
            medfast::filip_loss_gradient(sizes, words, at<Feature>(patch_features),
                                         at<float>(shares), at<float>(d_image_to_text),
                                         at<float>(d_text_to_image), of_words, of_patches,
                                         at<Feature>(d_words), at<Feature>(d_patches));
          };
          is_bf16 ? pass(at<medfast::bf16>(word_features)) : pass(at<float>(word_features));
        });
      },
      py::arg("starts"), py::arg("ids"), py::arg("captions"), py::arg("images"),
      py::arg("patches"), py::arg("all_words"), py::arg("width"), py::arg("word_features"),
      py::arg("patch_features"), py::arg("is_bf16"), py::arg("shares"),
      py::arg("d_image_to_text"), py::arg("d_text_to_image"), py::arg("best_patch"),
      py::arg("best_word"), py::arg("index_bytes"), py::arg("d_words"), py::arg("d_patches"),
      no_gil);
  m.def(
      "sparc_loss_align",
      [](uintptr_t similarity, uintptr_t mask, int64_t words, int64_t patches, float least,
         float constant, uintptr_t weights) {
        medfast::sparc_loss_align(at<float>(similarity), at<float>(mask), words, patches, least,
                                  constant, at<float>(weights));
      },
      py::arg("similarity"), py::arg("mask"), py::arg("words"), py::arg("patches"),
      py::arg("least"), py::arg("constant"), py::arg("weights"), no_gil);
  m.def(
      "sparc_loss_align_gradient",
      [](uintptr_t similarity, uintptr_t mask, int64_t words, int64_t patches, float least,
         float constant, uintptr_t gradient) {
        medfast::sparc_loss_align_gradient(at<float>(similarity), at<float>(mask), words, patches,
                                           least, constant, at<float>(gradient));
      },
      py::arg("similarity"), py::arg("mask"), py::arg("words"), py::arg("patches"),
      py::arg("least"), py::arg("constant"), py::arg("gradient"), no_gil);
  m.def(
      "sparc_loss_contrast",
      [](uintptr_t contexts, uintptr_t words, int64_t pairs, int64_t count, int64_t width,
         float scale, float weight, float min_norm, uintptr_t products,
         uintptr_t through_contexts, uintptr_t through_words) {
        const medfast::SparcSums sums = medfast::sparc_loss_contrast(
            at<float>(contexts), at<float>(words), pairs, count, width, scale, weight, min_norm,
            at<float>(products), at<float>(through_contexts), at<float>(through_words));
        return std::tuple(sums.loss, sums.d_scale);
      },
      py::arg("contexts"), py::arg("words"), py::arg("pairs"), py::arg("count"), py::arg("width"),
      py::arg("scale"), py::arg("weight"), py::arg("min_norm"), py::arg("products"),
      py::arg("through_contexts"), py::arg("through_words"), no_gil);
  m.def(
      "sparc_loss_add_rows",
      [](uintptr_t rows, uintptr_t factors, int64_t count, int64_t width, uintptr_t out) {
        medfast::sparc_loss_add_rows(at<float>(rows), at<float>(factors), count, width,
                                     at<float>(out));
      },
      py::arg("rows"), py::arg("factors"), py::arg("count"), py::arg("width"), py::arg("out"),
      no_gil);
}
