// The C interface of the head kernels: checks a call, plans it, launches it.
#include "cuda/head_call.h"

#include "cuda/heads.cuh"
#include "cuda/pieces.h"

namespace multiexit::cuda {
namespace {

int plan_call(const MultiexitHeadCall& call, MultiexitHeadPlan& plan) {
  if (call.rows < 1 || call.rows > kMostRows) return kRows;
  if (call.vocab < 1 || call.vocab > (1 << 30) || call.width < 1) return kShape;
  if (call.number_type != 1 && call.number_type != 2) return kNumbers;
  const int64_t row_bytes = 2 * call.width;
  if (row_bytes % 16) return kShape;
  Device device;
  if (const int error = find_device(device)) return error;
  if (device.capability < 80) return kOld;
  plan.blocks = device.multiprocessors;
  const int rows = kernel_rows(call.rows);
  for (int64_t most = kMostPiece; most >= kLeastPiece; most -= kLeastPiece) {
    plan.piece_bytes = piece_of(row_bytes, most);
    plan.shared_bytes = shared_bytes(rows, static_cast<int>(row_bytes), plan.piece_bytes);
    if (plan.shared_bytes <= device.shared_bytes) break;
  }
  if (plan.shared_bytes > device.shared_bytes) return kTooWide;
  const int64_t lists = call.lower_hidden ? sizeof(Candidate) + sizeof(Scored) : 0;
  plan.scratch_bytes = call.rows * (plan.blocks * sizeof(Partial) + call.vocab * lists);
  return 0;
}

bool has_addresses(const MultiexitHeadCall& call) {
  const uint64_t needed[] = {call.hidden,    call.weight, call.temperature, call.seeds,
                             call.positions, call.tokens, call.log_probs,   call.kept,
                             call.scratch};
  for (const uint64_t address : needed)
    if (!address) return false;
  if (call.lower_hidden && !(call.lower_weight && call.alpha && !call.bias)) return false;
  return (call.hidden | call.weight | call.lower_hidden | call.lower_weight) % 16 == 0;
}

HeadTask task_of(const MultiexitHeadCall& call, const MultiexitHeadPlan& plan) {
  HeadTask task = {};
  task.weight = {at<const char>(call.weight), static_cast<int>(call.vocab),
                 static_cast<int>(2 * call.width)};
  task.hidden = at<const char>(call.hidden);
  task.bias = at<const void>(call.bias);
  task.lower_weight = at<const char>(call.lower_weight);
  task.lower_hidden = at<const char>(call.lower_hidden);
  task.alpha = at<const float>(call.alpha);
  task.temperature = at<const float>(call.temperature);
  task.seeds = at<const int64_t>(call.seeds);
  task.positions = at<const int64_t>(call.positions);
  task.tokens = at<int64_t>(call.tokens);
  task.log_probs = at<float>(call.log_probs);
  task.num_candidates = at<int>(call.num_candidates);
  task.kept = at<Kept>(call.kept);
  task.partials = at<Partial>(call.scratch);
  task.candidates = reinterpret_cast<Candidate*>(task.partials + call.rows * plan.blocks);
  task.scored = reinterpret_cast<Scored*>(task.candidates + call.rows * call.vocab);
  task.rows = static_cast<int>(call.rows);
  task.piece = static_cast<int>(plan.piece_bytes);
  return task;
}

template <class Number, bool CONTRAST>
auto kernel_for(int rows) {
  if (rows == 1) return head_tokens_kernel<Number, 1, CONTRAST>;
  if (rows == 2) return head_tokens_kernel<Number, 2, CONTRAST>;
  return head_tokens_kernel<Number, kMostRows, CONTRAST>;
}

auto kernel_for(const MultiexitHeadCall& call) {
  const int rows = kernel_rows(call.rows);
  const bool contrast = call.lower_hidden;
  if (call.number_type == 1)
    return contrast ? kernel_for<BFloat16, true>(rows) : kernel_for<BFloat16, false>(rows);
  return contrast ? kernel_for<Float16, true>(rows) : kernel_for<Float16, false>(rows);
}

}  // namespace
}  // namespace multiexit::cuda

using namespace multiexit::cuda;

int multiexit_head_kept_bytes() { return sizeof(Kept); }

int multiexit_head_plan(const MultiexitHeadCall* call, MultiexitHeadPlan* plan) {
  return plan_call(*call, *plan);
}

int multiexit_head_tokens(const MultiexitHeadCall* call, const MultiexitHeadPlan* plan,
                          uint64_t stream) {
  if (call->rows < 1 || call->rows > kMostRows) return kRows;
  if (!has_addresses(*call)) return kAddress;
  Device device;
  if (const int error = find_device(device)) return error;
  return launch(kernel_for(*call), device, plan->blocks, kThreads, plan->shared_bytes, stream,
                task_of(*call, *plan));
}
