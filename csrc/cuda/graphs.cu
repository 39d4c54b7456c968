// Joins captured graphs to one, parts of which the device passes over: conditional graph nodes.
//
// The body of a conditional node is a child graph, captured like any other. Nothing is captured
// into the body itself, so who allocates memory for captures need not know of it.
#include "cuda/graph_call.h"
#ifdef MULTIEXIT_ON_HOST
#include "cuda/host/graphs.h"
#else
#include <cuda_runtime.h>
#endif

namespace {

constexpr int kOldBuild = -1, kOldDriver = -2, kLeastVersion = 12040;

#if CUDART_VERSION >= 12040

__global__ void ask_counts(cudaGraphConditionalHandle handle, const int* first, const int* second) {
  cudaGraphSetConditional(handle, *first > 0 || (second && *second > 0));
}

// A graph whose nodes run one after the other.
struct Chain {
  cudaGraph_t graph;
  cudaGraphNode_t last = nullptr;

  cudaError_t add(cudaGraphNodeParams& params) {
    cudaGraphNode_t node;
#if CUDART_VERSION >= 13000
    const cudaError_t error =
        cudaGraphAddNode(&node, graph, last ? &last : nullptr, nullptr, last != nullptr, &params);
#else
    const cudaError_t error =
        cudaGraphAddNode(&node, graph, last ? &last : nullptr, last != nullptr, &params);
#endif
    if (!error) last = node;
    return error;
  }

  cudaError_t add_child(cudaGraph_t child) {
    size_t num_nodes = 0;
    if (const cudaError_t error = cudaGraphGetNodes(child, nullptr, &num_nodes)) return error;
    if (!num_nodes) return cudaSuccess;
    cudaGraphNodeParams params = {};
    params.type = cudaGraphNodeTypeGraph;
    params.graph.graph = child;
    return add(params);
  }

  // A child that runs if one of the counts is not 0 when its turn has come.
  cudaError_t add_child_if(cudaGraph_t child, const uint64_t counts[2]) {
    cudaGraphConditionalHandle handle;
    cudaError_t error =
        cudaGraphConditionalHandleCreate(&handle, graph, 0, cudaGraphCondAssignDefault);
    if (error) return error;
    auto first = reinterpret_cast<const int*>(counts[0]);
    auto second = reinterpret_cast<const int*>(counts[1]);
    void* arguments[] = {&handle, &first, &second};
    cudaGraphNodeParams asking = {};
    asking.type = cudaGraphNodeTypeKernel;
    asking.kernel.func = reinterpret_cast<void*>(ask_counts);
    asking.kernel.gridDim = asking.kernel.blockDim = dim3(1, 1, 1);
    asking.kernel.kernelParams = arguments;
    if ((error = add(asking))) return error;
    cudaGraphNodeParams choice = {};
    choice.type = cudaGraphNodeTypeConditional;
    choice.conditional.handle = handle;
    choice.conditional.type = cudaGraphCondTypeIf;
    choice.conditional.size = 1;
    if ((error = add(choice))) return error;
    return Chain{choice.conditional.phGraph_out[0]}.add_child(child);
  }
};

cudaError_t join(const MultiexitGraphPart* parts, int64_t num_parts, cudaGraphExec_t& joined) {
  Chain chain = {};
  cudaError_t error = cudaGraphCreate(&chain.graph, 0);
  if (error) return error;
  for (int64_t i = 0; i < num_parts && !error; ++i) {
    const auto graph = reinterpret_cast<cudaGraph_t>(parts[i].graph);
    error = parts[i].counts[0] ? chain.add_child_if(graph, parts[i].counts)
                               : chain.add_child(graph);
  }
  if (!error) error = cudaGraphInstantiate(&joined, chain.graph, 0);
  const cudaError_t after = cudaGraphDestroy(chain.graph);
  return error ? error : after;
}

#endif

}  // namespace

int multiexit_graph_check() {
#if CUDART_VERSION >= 12040
  int version = 0;
  if (const cudaError_t error = cudaDriverGetVersion(&version)) return error;
  return version >= kLeastVersion ? 0 : kOldDriver;
#else
  return kOldBuild;
#endif
}

int multiexit_graph_join(const MultiexitGraphPart* parts, int64_t num_parts, uint64_t* joined) {
#if CUDART_VERSION >= 12040
  cudaGraphExec_t made = nullptr;
  const cudaError_t error = join(parts, num_parts, made);
  *joined = reinterpret_cast<uint64_t>(made);
  return error;
#else
  return kOldBuild;
#endif
}

int multiexit_graph_launch(uint64_t joined, uint64_t stream) {
  return cudaGraphLaunch(reinterpret_cast<cudaGraphExec_t>(joined),
                         reinterpret_cast<cudaStream_t>(stream));
}

int multiexit_graph_free(uint64_t joined) {
  return cudaGraphExecDestroy(reinterpret_cast<cudaGraphExec_t>(joined));
}

const char* multiexit_graph_error(int code) {
  if (code == kOldBuild) return "built with a CUDA toolkit before 12.4";
  if (code == kOldDriver) return "there is no driver, or one of a CUDA before 12.4";
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}
