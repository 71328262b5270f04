// Checks the arguments of extension_probe_gradients, turns them into operands and allocates the results.
#include <algorithm>

#include <torch/csrc/stable/ops.h>

#include "plans.h"

namespace pyfeedback {

namespace {

View checked_view(const Tensor& tensor, const char* name, const View& like, int64_t dims) {
  const View view = read_view(tensor.get(), name);
  STD_TORCH_CHECK(view.shape.dims == dims && view.shape.contiguous, name, " has ", view.shape.dims,
                  " dimensions; expected ", dims, ", contiguous");
  STD_TORCH_CHECK(view.dtype == like.dtype && view.device == like.device, name,
                  " has another dtype or device than weight");
  return view;
}

// The elements of a contiguous vector of int64 that are at least 0 and less than `limit`.
const int64_t* checked_rows(const Tensor& rows, int64_t limit, const Device& device) {
  const Shape shape = shape_of(rows.get());
  int32_t code;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(rows.get(), &code));
  STD_TORCH_CHECK(
      code == aoti_torch_dtype_int64() && shape.dims == 1 && shape.contiguous && device_of(rows.get()) == device,
      "rows is not a contiguous vector of int64 on the device of weight");
  const int64_t* data = static_cast<const int64_t*>(rows.const_data_ptr());
  for (int64_t i = 0; i < shape.numel; ++i) {
    STD_TORCH_CHECK(data[i] >= 0 && data[i] < limit, "rows[", i, "] is ", data[i], "; expected 0 to ", limit - 1);
  }
  return data;
}

}  // namespace

ProbePlan plan_probes(const ProbeArguments& arguments) {
  const auto& [weight, feedback, signs, rows, paley, coefficients, need_response] = arguments;
  const View w = read_view(weight.get(), "weight");
  STD_TORCH_CHECK(w.dtype == Dtype::kFloat64 || w.dtype == Dtype::kFloat32, "weight has 16 bits; expected 32 or 64");
  const View views[] = {checked_view(weight, "weight", w, 2), checked_view(feedback, "feedback", w, 2),
                        checked_view(signs, "signs", w, 1), checked_view(paley, "paley", w, 2)};
  const Shape &b = views[1].shape, &matrix = views[3].shape;
  STD_TORCH_CHECK(std::equal(b.size, b.size + 2, w.shape.size), "feedback has another shape than weight");
  STD_TORCH_CHECK(coefficients.size() == 5, "coefficients has ", coefficients.size(), " values; expected 5");
  ProbePlan plan{};
  ProbeOperands& operands = plan.operands;
  operands.weight = w.data, operands.feedback = views[1].data;
  operands.signs = views[2].data, operands.paley = views[3].data;
  operands.outputs = w.shape.size[0], operands.inputs = w.shape.size[1];
  operands.size = views[2].shape.numel, operands.order = matrix.size[0];
  STD_TORCH_CHECK(matrix.size[1] == operands.order && (operands.order == 1 || operands.order % 4 == 0),
                  "paley has the wrong shape; expected a square of order 1 or a multiple of 4");
  const int64_t block = operands.order ? operands.size / operands.order : 0;
  const int64_t least = operands.order == 1 ? kLeastBasis : kLeastBlock;
  STD_TORCH_CHECK(block >= least && (block & (block - 1)) == 0 && block * operands.order == operands.size &&
                      operands.size >= operands.inputs,
                  "signs has ", operands.size, " elements; expected the order of paley times a power of two, at least ",
                  operands.inputs);
  operands.rows = checked_rows(rows, operands.size, w.device);
  operands.probes = shape_of(rows.get()).numel;
  operands.dtype = w.dtype;
  operands.decay = coefficients[0], operands.self = coefficients[1];
  operands.of_feedback = coefficients[2], operands.of_weight = coefficients[3], operands.scale = coefficients[4];
  plan.gradient = torch::stable::empty_like(weight);
  plan.response = torch::stable::new_empty(weight, {operands.outputs, need_response ? operands.probes : 0});
  operands.gradient = plan.gradient.mutable_data_ptr();
  if (need_response) operands.response = plan.response.mutable_data_ptr();
  return plan;
}

}  // namespace pyfeedback
