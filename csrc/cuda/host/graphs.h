// Models what graphs.cu asks CUDA for: graphs of nodes that run one after the other, on the CPU.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <list>
#include <memory>
#include <vector>

#define CUDART_VERSION 13000
#define __global__

enum cudaError_t : int { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum { cudaGraphCondAssignDefault = 1, cudaGraphCondTypeIf = 0 };
enum cudaGraphNodeType {
  cudaGraphNodeTypeKernel,
  cudaGraphNodeTypeGraph,
  cudaGraphNodeTypeConditional
};

struct HostGraph {
  std::vector<std::function<void()>> nodes;
  std::list<unsigned> conditions;
  std::list<HostGraph> bodies;
};
struct HostNode {};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using cudaGraph_t = HostGraph*;
using cudaGraphExec_t = HostGraph*;
using cudaGraphNode_t = HostNode*;
using cudaStream_t = void*;
using cudaGraphConditionalHandle = unsigned long long;

struct cudaGraphNodeParams {
  cudaGraphNodeType type;
  struct {
    cudaGraph_t graph;
  } graph;
  struct {
    void* func;
    dim3 gridDim, blockDim;
    void** kernelParams;
  } kernel;
  struct {
    cudaGraphConditionalHandle handle;
    int type;
    unsigned size;
    cudaGraph_t* phGraph_out;
  } conditional;
};

extern "C" {
// What the model is like, and how many graphs there are.
__attribute__((visibility("default"))) inline int multiexit_host_driver = 13000;
__attribute__((visibility("default"))) inline int multiexit_host_graphs = 0;

// A captured graph of one node, that appends a digit to a number; without a digit it has none.
__attribute__((visibility("default"), used)) inline uint64_t multiexit_host_graph(int* sum,
                                                                                  int digit) {
  auto graph = new HostGraph;
  if (digit) graph->nodes.push_back([=] { *sum = *sum * 10 + digit; });
  return reinterpret_cast<uint64_t>(graph);
}
}

inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = multiexit_host_driver;
  return cudaSuccess;
}

inline cudaError_t cudaGraphCreate(cudaGraph_t* graph, unsigned) {
  *graph = new HostGraph;
  ++multiexit_host_graphs;
  return cudaSuccess;
}

inline cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) {
  if (!graph) return cudaErrorInvalidValue;
  *count = graph->nodes.size();
  return cudaSuccess;
}

inline cudaError_t cudaGraphConditionalHandleCreate(cudaGraphConditionalHandle* handle,
                                                    cudaGraph_t graph, unsigned value, unsigned) {
  graph->conditions.push_back(value);
  *handle = reinterpret_cast<cudaGraphConditionalHandle>(&graph->conditions.back());
  return cudaSuccess;
}

inline void cudaGraphSetConditional(cudaGraphConditionalHandle handle, unsigned value) {
  *reinterpret_cast<unsigned*>(handle) = value;
}

inline void run(const HostGraph& graph) {
  for (const auto& node : graph.nodes) node();
}

// Every node must follow the one before, which a stand-in for its address tells.
inline cudaError_t cudaGraphAddNode(cudaGraphNode_t* node, cudaGraph_t graph,
                                    const cudaGraphNode_t* before, const void*, size_t num_before,
                                    cudaGraphNodeParams* params) {
  const auto place = [](size_t count) { return reinterpret_cast<cudaGraphNode_t>(count); };
  const size_t count = graph->nodes.size();
  if (num_before != (count > 0) || (count && *before != place(count))) return cudaErrorInvalidValue;
  if (params->type == cudaGraphNodeTypeGraph) {
    graph->nodes.push_back([copy = *params->graph.graph] { run(copy); });
  } else if (params->type == cudaGraphNodeTypeKernel) {
    using Kernel = void (*)(cudaGraphConditionalHandle, const int*, const int*);
    void** given = params->kernel.kernelParams;
    graph->nodes.push_back([kernel = reinterpret_cast<Kernel>(params->kernel.func),
                            handle = *static_cast<cudaGraphConditionalHandle*>(given[0]),
                            first = *static_cast<const int**>(given[1]),
                            second = *static_cast<const int**>(given[2])] {
      kernel(handle, first, second);
    });
  } else {
    static thread_local cudaGraph_t body;
    body = &graph->bodies.emplace_back();
    params->conditional.phGraph_out = &body;
    graph->nodes.push_back([condition = reinterpret_cast<unsigned*>(params->conditional.handle),
                            own = body] {
      if (*condition) run(*own);
    });
  }
  *node = place(count + 1);
  return cudaSuccess;
}

// The nodes know their graph's own conditions and bodies, so it lives on in what is launched.
inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t* made, cudaGraph_t graph, unsigned) {
  *made = new HostGraph;
  (*made)->nodes.swap(graph->nodes);
  (*made)->conditions.swap(graph->conditions);
  (*made)->bodies.swap(graph->bodies);
  ++multiexit_host_graphs;
  return cudaSuccess;
}

inline cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  --multiexit_host_graphs;
  return cudaSuccess;
}

inline cudaError_t cudaGraphLaunch(cudaGraphExec_t made, cudaStream_t) {
  for (auto& condition : made->conditions) condition = 0;
  run(*made);
  return cudaSuccess;
}

inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t made) { return cudaGraphDestroy(made); }

inline const char* cudaGetErrorString(cudaError_t) { return "invalid argument"; }
