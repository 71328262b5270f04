// Checks the arguments of the steps and turns them into rows.
#include <algorithm>
#include <cmath>
#include <utility>

#include "plans.h"
#include "sharing.h"

namespace pyfeedback {

namespace {

double value_of(const std::vector<double>& values, size_t row) {
  return values[values.size() == 1 ? 0 : row];
}

void check_length(const std::vector<double>& values, size_t count) {
  STD_TORCH_CHECK(values.size() == count || values.size() == 1, "a coefficient has ", values.size(),
                  " values; expected 1 or ", count);
}

// Turns the arguments of a step into rows.
template <typename Row>
class StepPlanner {
 public:
  static constexpr size_t kOperands = Row::kOperands;

  // Rows have states if `has_states`. They are in row-major order if `row_major`, even where their operands share
  // another dense order.
  StepPlanner(const StepArguments<Row>& arguments, const char* names, bool has_states, bool row_major)
      : arguments_(arguments), names_(names), has_states_(has_states), row_major_(row_major) {
    const size_t count = arguments.lists[kStepped].size();
    for (size_t k = 0; k < kOperands; ++k) {
      const size_t size = arguments.lists[k].size();
      STD_TORCH_CHECK(size == 0 || size == count, "one of ", names, " has ", size, " tensors; expected 0 or ", count);
      spans_[k].reserve(count);
    }
    for (const std::vector<double>* values : {&arguments.decay, &arguments.self, &arguments.tie}) {
      check_length(*values, count);
    }
    plan_.rows.reserve(count);
    operands_.reserve(count);
    chain_.reserve(count);
  }

  // Adds tensor `index` of the lists, unless it is empty. `row` holds what only this step has.
  void add(Row row, size_t index) {
    const Views& previous = views_[current_];
    Views& views = views_[1 - current_] = Views{};
    row.decay = value_of(arguments_.decay, index);
    row.self = value_of(arguments_.self, index);
    row.tie = value_of(arguments_.tie, index);
    for (size_t k = 0; k < kOperands; ++k) {
      if ((k == kWeight && row.self == 0) || (k == kGrad && row.tie == 0) || (k >= kState && !has_states_)) continue;
      const TensorList& list = arguments_.lists[k];
      STD_TORCH_CHECK(list.size(), "one of ", names_, " is empty, but row ", index, " reads it");
      views[k] = Row::writes(k) ? write_view(list[index], names_) : read_view(list[index], names_);
      row.operand[k] = views[k].data;
    }
    const View& stepped = views[kStepped];
    const bool alike = check_alike(views, names_, index);
    if (stepped.shape.numel == 0) return;
    STD_TORCH_CHECK(plan_.rows.empty() || stepped.device == plan_.device, names_, "[", index,
                    "] are not on the device of the first row");
    plan_.device = stepped.device;
    current_ = 1 - current_;
    row.numel = stepped.shape.numel;
    row.index = static_cast<uint32_t>(index);
    row.dtype = stepped.dtype;
    row.layout = -1;
    if (!alike || (row_major_ && !stepped.shape.contiguous)) add_layout(row, views);
    row.with_previous = same_view(previous[kWeight], stepped) || same_view(previous[kWeight], views[kWeight]) ||
                        same_view(previous[kGrad], views[kGrad]);
    const uint32_t position = static_cast<uint32_t>(plan_.rows.size());
    chain_.push_back(row.with_previous ? chain_.back() : position);
    std::array<AtenTensorHandle, kOperands> operands;
    for (size_t k = 0; k < kOperands; ++k) {
      operands[k] = views[k].tensor;
      if (operands[k]) spans_[k].push_back(span_of(views[k], position, Row::writes(k), k == kStepped));
    }
    plan_.rows.push_back(row);
    operands_.push_back(operands);
  }

  // Adds memory that belongs to no row.
  void add_memory(const View& view, bool written) { spans_[kStepped].push_back(span_of(view, kNoRow, written, false)); }

  // Rows that share memory either all have a layout, and run in row-major order, or all have none.
  Plan<Row> finish() {
    for (size_t k = 1; k < kOperands; ++k) spans_[0].insert(spans_[0].end(), spans_[k].begin(), spans_[k].end());
    check_sharing(spans_[0], chain_);
    std::vector<Row>& rows = plan_.rows;
    for (size_t first = 0, last; first < rows.size(); first = last) {
      last = first + 1;
      while (last < rows.size() && rows[last].with_previous) ++last;
      const auto has_layout = [](const Row& row) { return row.layout >= 0; };
      if (std::none_of(rows.begin() + first, rows.begin() + last, has_layout)) continue;
      for (size_t i = first; i < last; ++i) {
        if (has_layout(rows[i])) continue;
        Views views;
        for (size_t k = 0; k < kOperands; ++k) {
          if (operands_[i][k]) views[k] = read_view(operands_[i][k], names_);
        }
        add_layout(rows[i], views);
      }
    }
    return std::move(plan_);
  }

 private:
  using Views = std::array<View, kOperands>;

  static Span span_of(const View& view, uint32_t row, bool written, bool stepped) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(view.data);
    return {begin, begin + static_cast<uintptr_t>(view.bytes), view.tensor, row, written, stepped};
  }

  void add_layout(Row& row, const Views& views) {
    for (size_t k = 0; k < kOperands; ++k) {
      STD_TORCH_CHECK(!Row::writes(k) || !views[k].tensor || !overlaps_itself(views[k].shape), names_, "[", row.index,
                      "] have more than one element at a memory location; expected one");
    }
    row.layout = static_cast<int32_t>(plan_.layouts.size());
    plan_.layouts.push_back(strided_layout(views, names_));
  }

  const StepArguments<Row>& arguments_;
  const char* names_;
  const bool has_states_, row_major_;
  Plan<Row> plan_;
  Views views_[2];                                                 // of the row added last and of the next one
  int current_ = 0;                                                // index of the row added last
  std::vector<std::array<AtenTensorHandle, kOperands>> operands_;  // of each row
  std::vector<uint32_t> chain_;  // for each row the first of those that share memory with it
  std::array<std::vector<Span>, kOperands> spans_;
};

}  // namespace

FeedbackPlan plan_feedback_step(const StepArguments<FeedbackRow>& arguments, const FeedbackOptions& options,
                                const std::optional<Tensor>& dynamic) {
  StepPlanner<FeedbackRow> planner(arguments, "feedback, weight, grad and momentum_buffer", options.momentum != 0,
                                   options.noise != 0);
  const TensorList& feedback = arguments.lists[kStepped];
  if (dynamic && feedback.size()) {
    const View view = read_view(dynamic->get(), "dynamic");
    STD_TORCH_CHECK(view.dtype == Dtype::kFloat64 && view.shape.numel == kDynamics && view.shape.contiguous &&
                        view.device == device_of(feedback[0]),
                    "dynamic must be ", int{kDynamics}, " contiguous float64 on the device of feedback");
    planner.add_memory(view, false);
  }
  for (size_t i = 0; i < feedback.size(); ++i) planner.add(FeedbackRow{}, i);
  return planner.finish();
}

AdamWPlan plan_adamw_step(const StepArguments<AdamWRow>& arguments, const AdamWOptions& options,
                          const TensorList& steps, const std::vector<double>& weight_decay) {
  StepPlanner<AdamWRow> planner(arguments, "param, weight, grad, exp_avg and exp_avg_sq", true, false);
  const size_t count = arguments.lists[kStepped].size();
  STD_TORCH_CHECK(steps.size() == count, "step has ", steps.size(), " tensors; expected ", count);
  check_length(weight_decay, count);
  AdamWPlan plan;
  plan.steps.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const View step = write_view(steps[i], "step");
    STD_TORCH_CHECK(
        step.shape.numel == 1 && step.dtype == Dtype::kFloat32 && step.device.type == aoti_torch_device_type_cpu(),
        "step must be float32 tensors with one element on the CPU");
    planner.add_memory(step, true);
    plan.steps.push_back(static_cast<float*>(step.data));
    const double step_count = *plan.steps.back() + 1.0;
    AdamWRow row{};
    row.kept = 1 - options.lr * value_of(weight_decay, i);
    row.step_size = options.lr / (1 - std::pow(options.beta1, step_count));
    row.root_scale = std::sqrt(1 - std::pow(options.beta2, step_count));
    planner.add(row, i);
  }
  static_cast<Plan<AdamWRow>&>(plan) = planner.finish();
  return plan;
}

}  // namespace pyfeedback
