#include "kernels.h"
#include "ops.h"
#include "stretches.h"

namespace pyfeedback::cpu {

void adamw_step_(StableListHandle param, StableListHandle weight, StableListHandle grad, StableListHandle exp_avg,
                 StableListHandle exp_avg_sq, StableListHandle step, const std::vector<double>& decay,
                 const std::vector<double>& self, const std::vector<double>& tie,
                 const std::vector<double>& weight_decay, double lr, double beta1, double beta2, double eps) {
  const AdamWArguments arguments{TensorList(param),
                                 TensorList(weight),
                                 TensorList(grad),
                                 TensorList(exp_avg),
                                 TensorList(exp_avg_sq),
                                 TensorList(step),
                                 decay,
                                 self,
                                 tie,
                                 weight_decay,
                                 AdamWOptions{lr, beta1, beta2, eps}};
  const AdamWPlan plan = plan_adamw(arguments);
  for (size_t i = 0; i < arguments.step.size(); ++i) ++*static_cast<float*>(step_count(arguments.step[i]).data);
  const Kernels& kernel = kernels();
  for_each_stretch(plan, [&](const AdamWTensor& tensor, const AdamWLayout* layout, int64_t begin, int64_t end) {
    kernel.adamw_step(tensor, layout, arguments.options, begin, end);
  });
}

}  // namespace pyfeedback::cpu
