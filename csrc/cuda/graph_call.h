// The C interface of joined graphs; see head_call.h. multiexit_engine/_cuda/graphs.py repeats it.
#pragma once
#include "cuda/head_call.h"

extern "C" {

// A captured graph (cudaGraph_t), run after those before it. Where there are counts (addresses of
// int32 on the device), it is passed over if all of them are 0 by then.
struct MultiexitGraphPart {
  uint64_t graph;
  uint64_t counts[2];  // 0: none
};

// 0 where this build and the driver know conditional nodes (CUDA 12.4 and later). Like all of
// these, gives 0 or a number that multiexit_graph_error explains.
MULTIEXIT_EXPORT int multiexit_graph_check();

// Copies the parts into one graph that can be launched; they may change afterwards.
MULTIEXIT_EXPORT int multiexit_graph_join(const MultiexitGraphPart* parts, int64_t num_parts,
                                          uint64_t* joined);
MULTIEXIT_EXPORT int multiexit_graph_launch(uint64_t joined, uint64_t stream);
MULTIEXIT_EXPORT int multiexit_graph_free(uint64_t joined);
MULTIEXIT_EXPORT const char* multiexit_graph_error(int code);

}
