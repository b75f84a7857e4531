"""Linear attention with its state on chip: the factored skeleton for one narrow factor.

A program walks the chunks of a piece with the state S (D, Dv) and its norm z (D,) in registers, so that inputs are read and
outputs written once. Causal: S starts as the sum before the piece and grows by each chunk; the pairs inside a chunk are
computed directly. Bidirectional: S is that of the whole sequence and stays.

    walk_read            o from the keys
    walk_grad_queries    dq from the keys; dO . o of each row
    walk_grad_keys       dk and dv from the queries, last chunk first

Names and formulas are those of linear_tiles.py.
"""

import triton
import triton.language as tl

from .linear_tiles import load_features, piece_span
from .tiles import at, load_tile, load_vector, store_tile


@triton.jit
def walk_coordinates(num_pieces, num_heads):
    program = tl.program_id(0)
    piece, program = program % num_pieces, program // num_pieces
    return piece, program % num_heads, program // num_heads


@triton.jit
def load_state(
    states, norms, piece, pieces, batch, head, num_heads, num_pieces, num_states, CAUSAL: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):
    """S and z at the start of a piece; zero without states."""
    if states is None:
        return tl.zeros((BLOCK_D, BLOCK_DV), tl.float32), tl.zeros((BLOCK_D,), tl.float32)
    else:
        if CAUSAL:
            index = piece
        elif pieces is None:
            index = 0
        else:
            index = tl.load(pieces + 2 * num_pieces + piece)
        state = (batch.to(tl.int64) * num_heads + head) * num_states + index
        row = tl.arange(0, BLOCK_D)
        tile = load_tile(states + state * D * DV, row, DV, D, DV, BLOCK_DV)
        return tile, load_vector(norms + state * D, row, D, 0.0)


@triton.jit
def walk_read(
    q, k, v, states, norms, o, inverse, pieces,
    q_strides, k_strides, v_strides, o_strides,
    num_tokens, num_heads, group, num_pieces, num_states, piece_length, eps,
    FEATURE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, CAUSAL: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):
    piece, head, batch = walk_coordinates(num_pieces, num_heads)
    begin, end = piece_span(piece, pieces, num_pieces, num_tokens, piece_length)
    if begin >= end:
        return
    state, norm_state = load_state(
        states, norms, piece, pieces, batch, head // group, num_heads // group, num_pieces, num_states, CAUSAL,
        D, DV, BLOCK_D, BLOCK_DV,
    )
    q, k = at(q, q_strides, batch, head), at(k, k_strides, batch, head // group)
    v, o = at(v, v_strides, batch, head // group), at(o, o_strides, batch, head)
    local = tl.arange(0, BLOCK_M)
    for first in range(begin, end, BLOCK_M):
        rows = first + local
        q_tile = load_features(q, rows, q_strides[2], end, FEATURE, D, BLOCK_D)
        norm = tl.sum(q_tile * norm_state[None, :], 1)
        q_tile = OPERAND(q_tile)
        acc = tl.dot(q_tile, OPERAND(state), input_precision=PRECISION)
        if CAUSAL:
            k_tile = load_features(k, rows, k_strides[2], end, FEATURE, D, BLOCK_D)
            v_tile = OPERAND(load_tile(v, rows, v_strides[2], end, DV, BLOCK_DV))
            norm_state += tl.sum(k_tile, 0)
            k_tile = OPERAND(k_tile)
            weight = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
            weight = tl.where(local[None, :] <= local[:, None], weight, 0.0)
            norm += tl.sum(weight, 1)
            acc = tl.dot(OPERAND(weight), v_tile, acc, input_precision=PRECISION)
            state = tl.dot(tl.trans(k_tile), v_tile, state, input_precision=PRECISION)
        if inverse is not None:
            norm += eps
            reciprocal = tl.where(norm == 0.0, 0.0, tl.div_rn(1.0, norm))
            acc *= reciprocal[:, None]
            row_offset = (batch.to(tl.int64) * num_heads + head) * num_tokens
            tl.store(inverse + row_offset + rows, reciprocal, mask=rows < end)
        store_tile(o, rows, o_strides[2], end, acc, DV, BLOCK_DV)


@triton.jit
def walk_grad_queries(
    q, k, v, do, inverse, states, norms, dq, weights, pieces,
    q_strides, k_strides, v_strides, do_strides, dq_strides,
    num_tokens, num_heads, group, num_pieces, num_states, piece_length,
    FEATURE: tl.constexpr, FEATURE_GRAD: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, CAUSAL: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):
    piece, head, batch = walk_coordinates(num_pieces, num_heads)
    begin, end = piece_span(piece, pieces, num_pieces, num_tokens, piece_length)
    if begin >= end:
        return
    state, norm_state = load_state(
        states, norms, piece, pieces, batch, head // group, num_heads // group, num_pieces, num_states, CAUSAL,
        D, DV, BLOCK_D, BLOCK_DV,
    )
    q, k = at(q, q_strides, batch, head), at(k, k_strides, batch, head // group)
    v, do = at(v, v_strides, batch, head // group), at(do, do_strides, batch, head)
    dq = at(dq, dq_strides, batch, head)
    row_offset = (batch.to(tl.int64) * num_heads + head) * num_tokens
    local = tl.arange(0, BLOCK_M)
    visible = local[None, :] <= local[:, None]
    for first in range(begin, end, BLOCK_M):
        rows = first + local
        do_tile = OPERAND(load_tile(do, rows, do_strides[2], end, DV, BLOCK_DV))
        acc = tl.dot(do_tile, tl.trans(OPERAND(state)), input_precision=PRECISION)
        if CAUSAL:
            k_tile = load_features(k, rows, k_strides[2], end, FEATURE, D, BLOCK_D)
            v_tile = OPERAND(load_tile(v, rows, v_strides[2], end, DV, BLOCK_DV))
            before, norm_state = norm_state, norm_state + tl.sum(k_tile, 0)
            k_tile = OPERAND(k_tile)
            slope = tl.dot(do_tile, tl.trans(v_tile), input_precision=PRECISION)
        else:
            before = norm_state
        weight = tl.zeros((BLOCK_M,), tl.float32)
        if inverse is not None:
            # Sum dO . o from the same terms that it is subtracted from: o was rounded, and for a single pair the result is 0.
            q_tile = load_features(q, rows, q_strides[2], end, FEATURE, D, BLOCK_D)
            factor = load_vector(inverse + row_offset, rows, end, 0.0)
            delta = tl.sum(q_tile * acc, 1)
            if CAUSAL:
                pairs = tl.dot(OPERAND(q_tile), tl.trans(k_tile), input_precision=PRECISION)
                delta += tl.sum(tl.where(visible, pairs * slope, 0.0), 1)
                slope *= factor[:, None]
            acc *= factor[:, None]
            weight = -delta * factor * factor
        tl.store(weights + row_offset + rows, weight, mask=rows < end)
        acc += weight[:, None] * before[None, :]
        if CAUSAL:
            slope = tl.where(visible, slope + weight[:, None], 0.0)
            acc = tl.dot(OPERAND(slope), k_tile, acc, input_precision=PRECISION)
            state = tl.dot(tl.trans(k_tile), v_tile, state, input_precision=PRECISION)
        raw = load_tile(q, rows, q_strides[2], end, D, BLOCK_D).to(tl.float32)
        store_tile(dq, rows, dq_strides[2], end, acc * FEATURE_GRAD(raw), D, BLOCK_D)


@triton.jit
def walk_grad_keys(
    k, v, q, do, inverse, weights, states, norms, dk, dv, pieces,
    k_strides, v_strides, q_strides, do_strides, dk_strides, dv_strides,
    num_tokens, num_heads, group, num_pieces, num_states, piece_length,
    FEATURE: tl.constexpr, FEATURE_GRAD: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, CAUSAL: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):
    piece, head, batch = walk_coordinates(num_pieces, num_heads)
    begin, end = piece_span(piece, pieces, num_pieces, num_tokens, piece_length)
    if begin >= end:
        return
    state, norm_state = load_state(
        states, norms, piece, pieces, batch, head, num_heads, num_pieces, num_states, CAUSAL, D, DV, BLOCK_D, BLOCK_DV
    )
    k, v = at(k, k_strides, batch, head), at(v, v_strides, batch, head)
    dk, dv = at(dk, dk_strides, batch, head), at(dv, dv_strides, batch, head)
    local = tl.arange(0, BLOCK_M)
    num_chunks = tl.cdiv(end - begin, BLOCK_M)
    for chunk in range(num_chunks):
        rows = begin + (num_chunks - 1 - chunk) * BLOCK_M + local
        k_tile = OPERAND(load_features(k, rows, k_strides[2], end, FEATURE, D, BLOCK_D))
        v_tile = OPERAND(load_tile(v, rows, v_strides[2], end, DV, BLOCK_DV))
        state_operand = OPERAND(state)
        dk_tile = tl.dot(v_tile, tl.trans(state_operand), input_precision=PRECISION) + norm_state[None, :]
        dv_tile = tl.dot(k_tile, state_operand, input_precision=PRECISION)
        if CAUSAL:
            later = local[None, :] >= local[:, None]
            for member in range(group):
                query_head = head * group + member
                row_offset = (batch.to(tl.int64) * num_heads * group + query_head) * num_tokens
                q_head, do_head = at(q, q_strides, batch, query_head), at(do, do_strides, batch, query_head)
                q_tile = load_features(q_head, rows, q_strides[2], end, FEATURE, D, BLOCK_D)
                do_tile = OPERAND(load_tile(do_head, rows, do_strides[2], end, DV, BLOCK_DV))
                weight = load_vector(weights + row_offset, rows, end, 0.0)
                norm_state += tl.sum(q_tile * weight[:, None], 0)
                if inverse is None:
                    scaled = q_tile
                else:  # dO enters products unscaled, so that it is not rounded again
                    factor = load_vector(inverse + row_offset, rows, end, 0.0)
                    scaled = q_tile * factor[:, None]
                state = tl.dot(tl.trans(OPERAND(scaled)), do_tile, state, input_precision=PRECISION)
                q_tile = OPERAND(q_tile)
                slope = tl.dot(v_tile, tl.trans(do_tile), input_precision=PRECISION)
                if inverse is not None:
                    slope *= factor[None, :]
                slope = OPERAND(tl.where(later, slope + weight[None, :], 0.0))
                dk_tile = tl.dot(slope, q_tile, dk_tile, input_precision=PRECISION)
                pairs = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
                if inverse is not None:
                    pairs *= factor[None, :]
                pairs = OPERAND(tl.where(later, pairs, 0.0))
                dv_tile = tl.dot(pairs, do_tile, dv_tile, input_precision=PRECISION)
        raw = load_tile(k, rows, k_strides[2], end, D, BLOCK_D).to(tl.float32)
        store_tile(dk, rows, dk_strides[2], end, dk_tile * FEATURE_GRAD(raw), D, BLOCK_D)
        store_tile(dv, rows, dv_strides[2], end, dv_tile, DV, BLOCK_DV)
