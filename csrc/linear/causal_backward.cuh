// Arguments of the gradient kernels of causal linear attention, on Hopper and elsewhere.
#pragma once

#include "common/tensor.cuh"
#include "common/walk.cuh"
#include "linear/causal_backward.h"

namespace nearfar {

struct QueryArguments {
    Tensor<const Number> q, k, v, grad_o;
    Tensor<Number> dq;
    const float *inverse, *states, *norms;
    float* weights;
    const int32_t* pieces;
    int heads, group, num_tokens, num_pieces, piece_length;
    float eps;
};

struct KeyArguments {
    Tensor<const Number> k, v, q, grad_o;
    Tensor<Number> dk, dv;
    const float *inverse, *weights, *states, *norms;
    const int32_t* pieces;
    int heads, group, num_tokens, num_pieces, piece_length;  // heads: of keys
};

inline QueryArguments query_arguments(const LinearCausalGradQueries& call) {
    const auto input = input_tensor<Number>;
    return {
        input(call.q, call.q_strides), input(call.k, call.k_strides), input(call.v, call.v_strides),
        input(call.grad_o, call.grad_o_strides), output_tensor<Number>(call.dq, call.dq_strides),
        call.inverse, call.states, call.norms, call.weights, call.pieces,
        static_cast<int>(call.heads), static_cast<int>(call.heads / call.kv_heads), static_cast<int>(call.num_tokens),
        static_cast<int>(call.num_pieces), static_cast<int>(call.piece_length), static_cast<float>(call.eps)};
}

inline KeyArguments key_arguments(const LinearCausalGradKeys& call) {
    const auto input = input_tensor<Number>;
    const auto output = output_tensor<Number>;
    return {
        input(call.k, call.k_strides), input(call.v, call.v_strides), input(call.q, call.q_strides),
        input(call.grad_o, call.grad_o_strides), output(call.dk, call.dk_strides), output(call.dv, call.dv_strides),
        call.inverse, call.weights, call.states, call.norms, call.pieces,
        static_cast<int>(call.kv_heads), static_cast<int>(call.heads / call.kv_heads), static_cast<int>(call.num_tokens),
        static_cast<int>(call.num_pieces), static_cast<int>(call.piece_length)};
}

}  // namespace nearfar
