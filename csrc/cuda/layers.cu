// The C interface of the persistent decode kernel: checks a call, plans it, launches it.
#include "cuda/layers_call.h"

#include <algorithm>

#include "cuda/layers.cuh"
#include "cuda/pieces.h"

namespace multiexit::cuda {
namespace {

// Parts of rows that a matrix should have at least, so that no warp of a large GPU is idle, but
// not so many that a part is shorter than a kilobyte.
constexpr int64_t kWantedParts = 2048, kLeastPart = 1024, kMostSplits = 16;
constexpr int64_t kMostLayers = 512;

Matrix matrix_of(int64_t rows, int64_t columns, int64_t half) {
  Matrix matrix = {};
  matrix.rows = static_cast<int>(rows);
  matrix.row_bytes = static_cast<int>(2 * columns);
  matrix.half = static_cast<int>(half);
  const int64_t groups = rows / kGroup, bytes = 2 * columns;
  const int64_t wanted = std::min((kWantedParts + groups - 1) / groups, kMostSplits);
  const int64_t splits = std::max<int64_t>(1, std::min(wanted, bytes / kLeastPart));
  const int64_t part = splits == 1 ? bytes : rounded_up((bytes + splits - 1) / splits, kLeastPiece);
  matrix.split_bytes = static_cast<int>(part);
  matrix.splits = static_cast<int>((bytes + part - 1) / part);
  return matrix;
}

// Everything but addresses.
LayersTask shaped(const MultiexitLayersCall& call) {
  LayersTask task = {};
  const int64_t query_width = call.heads * call.head_dim;
  const int64_t qkv_rows = query_width + 2 * call.kv_heads * call.head_dim;
  const int64_t up_rows = call.inner * (call.is_gated ? 2 : 1);
  task.matrices[kQkv] = matrix_of(qkv_rows, call.width, call.cos ? call.head_dim / 2 : 0);
  task.matrices[kAttended] = matrix_of(call.width, query_width, 0);
  task.matrices[kUp] = matrix_of(up_rows, call.width, call.is_gated ? call.inner : 0);
  task.matrices[kDown] = matrix_of(call.width, call.inner, 0);
  task.num_layers = static_cast<int>(call.num_layers);
  task.rows = static_cast<int>(call.rows);
  task.width = static_cast<int>(call.width);
  task.heads = static_cast<int>(call.heads);
  task.kv_heads = static_cast<int>(call.kv_heads);
  task.head_dim = static_cast<int>(call.head_dim);
  task.block_size = static_cast<int>(call.block_size);
  task.table_stride = static_cast<int>(call.table_stride);
  task.activation = static_cast<int>(call.activation);
  task.is_gated = call.is_gated;
  task.has_shift = call.has_shift;
  return task;
}

void place_memory(LayersTask& task, int64_t blocks, int64_t slot_bytes) {
  const int rows = kernel_rows(task.rows);
  int64_t state_bytes = norm_bytes(rows, task.width);
  int64_t room_bytes = kWarps * (task.head_dim + 2) * sizeof(float);
  for (Matrix& matrix : task.matrices) {
    matrix.piece = static_cast<int>(piece_of(matrix.split_bytes, slot_bytes / kGroup));
    state_bytes = std::max<int64_t>(state_bytes, rows * matrix.row_bytes);
    const int64_t units = (matrix.groups() + blocks - 1) / blocks * matrix.splits;
    room_bytes = std::max<int64_t>(room_bytes, units * kGroup * rows * sizeof(float));
  }
  const int64_t layers = task.num_layers * sizeof(MultiexitLayer);
  const int64_t states = rounded_up(kLayersSharedBytes + layers, 16);
  const int64_t room = rounded_up(states + state_bytes, 16);
  const int64_t rings = rounded_up(room + room_bytes, 128);
  task.slot_bytes = static_cast<int>(slot_bytes);
  task.memory = {static_cast<int>(states), static_cast<int>(room), static_cast<int>(rings),
                 static_cast<int>(rings + kWarps * kSlots * slot_bytes)};
}

int64_t most_split_bytes(const LayersTask& task) {
  int64_t most = 0;
  for (const Matrix& matrix : task.matrices) most = std::max<int64_t>(most, matrix.split_bytes);
  return most;
}

bool has_sound_shape(const MultiexitLayersCall& call) {
  const int64_t numbers[] = {call.width,  call.heads,        call.kv_heads,   call.head_dim,
                             call.inner,  call.num_layers,   call.block_size, call.table_stride};
  for (const int64_t number : numbers)
    if (number < 1 || number > (1 << 20)) return false;
  return call.width % 8 == 0 && call.inner % 8 == 0 && call.head_dim % 8 == 0 &&
         call.head_dim <= kThreads && call.heads % call.kv_heads == 0 &&
         call.num_layers <= kMostLayers && call.activation >= kGelu && call.activation <= kSilu;
}

int plan_call(const MultiexitLayersCall& call, MultiexitLayersPlan& plan) {
  if (call.rows < 1 || call.rows > kMostRows) return kRows;
  if (!has_sound_shape(call)) return kLayerShape;
  if (call.number_type != 1 && call.number_type != 2) return kNumbers;
  Device device;
  if (const int error = find_device(device)) return error;
  if (device.capability < 80) return kOld;
  plan.blocks = device.multiprocessors;
  LayersTask task = shaped(call);
  for (int64_t most = kMostPiece; most >= kLeastPiece; most -= kLeastPiece) {
    plan.slot_bytes = kGroup * std::min(most, most_split_bytes(task));
    place_memory(task, plan.blocks, plan.slot_bytes);
    plan.shared_bytes = task.memory.end;
    if (plan.shared_bytes <= device.shared_bytes) break;
  }
  if (plan.shared_bytes > device.shared_bytes) return kTooWide;
  const int64_t parts = call.rows * call.heads * kMostParts;
  plan.scratch_bytes = parts * (call.head_dim * sizeof(float) + sizeof(float2)) +
                       call.rows * 2 * (call.heads * call.head_dim + call.inner);
  return 0;
}

bool has_addresses(const MultiexitLayersCall& call) {
  const uint64_t needed[] = {call.layers,   call.hidden,       call.output, call.slots,
                             call.contexts, call.block_tables, call.kept,   call.scratch};
  for (const uint64_t address : needed)
    if (!address) return false;
  if (call.cos && !(call.sin && call.positions)) return false;
  if (call.then && (call.then_bytes < 0 || call.then_bytes >> 30)) return false;
  return (call.then | call.hidden | call.output | call.scratch) % 16 == 0;
}

LayersTask task_of(const MultiexitLayersCall& call, const MultiexitLayersPlan& plan) {
  LayersTask task = shaped(call);
  place_memory(task, plan.blocks, plan.slot_bytes);
  task.layers = at<const MultiexitLayer>(call.layers);
  task.hidden = at<const float>(call.hidden);
  task.output = at<float>(call.output);
  task.slots = at<const int64_t>(call.slots);
  task.positions = at<const int64_t>(call.positions);
  task.contexts = at<const int>(call.contexts);
  task.block_tables = at<const int>(call.block_tables);
  task.cos = at<const void>(call.cos);
  task.sin = at<const void>(call.sin);
  task.counters = at<GridCounters>(call.kept);
  task.then = at<const char>(call.then);
  task.then_bytes = call.then ? call.then_bytes : 0;
  const int64_t parts = call.rows * call.heads * kMostParts;
  task.attended = at<float>(call.scratch);
  task.attention = reinterpret_cast<float2*>(task.attended + parts * call.head_dim);
  task.query = reinterpret_cast<uint16_t*>(task.attention + parts);
  task.inner = task.query + call.rows * call.heads * call.head_dim;
  return task;
}

template <class Number>
auto kernel_for(int rows) {
  if (rows == 1) return decoder_layers_kernel<Number, 1>;
  if (rows == 2) return decoder_layers_kernel<Number, 2>;
  return decoder_layers_kernel<Number, kMostRows>;
}

}  // namespace
}  // namespace multiexit::cuda

using namespace multiexit::cuda;

int multiexit_layers_kept_bytes() { return sizeof(GridCounters); }

int multiexit_layers_plan(const MultiexitLayersCall* call, MultiexitLayersPlan* plan) {
  return plan_call(*call, *plan);
}

int multiexit_layers_run(const MultiexitLayersCall* call, const MultiexitLayersPlan* plan,
                         uint64_t stream) {
  if (call->rows < 1 || call->rows > kMostRows) return kRows;
  if (!has_addresses(*call)) return kAddress;
  Device device;
  if (const int error = find_device(device)) return error;
  const int rows = kernel_rows(call->rows);
  const auto kernel =
      call->number_type == 1 ? kernel_for<BFloat16>(rows) : kernel_for<Float16>(rows);
  return launch_together(kernel, device, plan->blocks, kThreads, plan->shared_bytes, stream,
                         task_of(*call, *plan));
}
