#include <algorithm>
#include <string>

#include "common/binding.h"
#include "hadamard/bidirectional.h"
#include "hadamard/causal_backward.h"
#include "hadamard/causal_forward.h"

namespace nearfar {
namespace {

void accumulate(const HadamardBidirectionalAccumulate& call, const std::string& feature_map, cudaStream_t stream) {
    hadamard_bidirectional_features(call, feature_map, stream);
    hadamard_bidirectional_accumulate(call, stream);
}

}  // namespace

void bind_hadamard(py::module_& m) {
    m.attr("HADAMARD_BIDIRECTIONAL_WIDTH") = kBidirectionalWidth;
    m.attr("HADAMARD_BIDIRECTIONAL_CHUNK") = kBidirectionalChunk;
    m.def("hadamard_shared_bytes",
          [] { return std::max(hadamard_causal_forward_shared_bytes(), hadamard_causal_backward_shared_bytes()); },
          "Bytes of shared memory that a block of the hadamard_causal_ kernels takes, at most.");
    bind_kernel(m, "hadamard_causal_forward", &hadamard_causal_forward, "Causal Hadamard attention: fills o and inverse.");
    bind_kernel(m, "hadamard_causal_grad_queries", &hadamard_causal_grad_queries, "Fills dq1, dq2 and weights.");
    bind_kernel(m, "hadamard_causal_grad_keys", &hadamard_causal_grad_keys, "Fills dk1, dk2 and dv.");
    bind_kernel(m, "hadamard_bidirectional_accumulate", &accumulate,
                "Sums over the tokens of each piece: fills partials and partial_norms.");
    bind_kernel(m, "hadamard_bidirectional_read", &hadamard_bidirectional_read, "Fills out and, unless null, inverse.");
}

}  // namespace nearfar
