// What the library says of itself, and of errors.
#include "cuda/calls.h"

#include "cuda/head_call.h"

namespace {

// Raised with every change of head_call.h, graph_call.h and layers_call.h.
constexpr int kInterface = 4;

}  // namespace

int multiexit_cuda_interface() { return kInterface; }

const char* multiexit_cuda_error(int code) {
  using namespace multiexit::cuda;
  switch (code) {
    case kRows: return "rows must be 1 to 4";
    case kShape: return "the vocabulary must be 1 to 2^30 tokens, the width a multiple of 8";
    case kNumbers: return "numbers must be bfloat16 or float16";
    case kAddress: return "an address is missing or not a multiple of 16, or a contrast has a bias";
    case kTooWide: return "the hidden states do not fit the shared memory of this device";
    case kOld: return "the device must be of compute capability 8.0 or later";
    case kLayerShape:
      return "widths must be multiples of 8, heads of at most 256 numbers, layers at most 512";
    default: return cuda_error_text(code);
  }
}
