"""The parameter level of many models in lock-step and its derivative, for meta-training, in four Triton kernels.

What they compute is defined by `advance_flat` of lopt/backends/reference.py; the derivative, of first order, is that of
csrc/hrnn_adjoint.h, whose letters and order these are. lopt/backends/triton_flat.py packs, cuts and launches.

    share         per row and tensor: what its parameters share, in one place
    forward       per parameter: features, GRU, read-outs; sums over groups of GROUP parameters
    backward      per parameter: the same again, then its derivative; sums over groups, and per program by the weights
    add_groups    per row and tensor: sums over its groups

How the work is cut: R rows are models of n parameters in T tensors, most of them small. The lanes of a row are its
parameters with each tensor filled up to whole groups and the row to whole tiles of BLOCK; `slots` and `owners` say
which parameter a lane is, of which tensor. A program serves some tiles, one after the other. Within a tile every
quantity is a [BLOCK] vector; what has to be summed over lanes is written to scratch memory, a row for each, and read
back as a matrix: the gradients by the weights are products of two such matrices, of inputs and of cotangents of what
they feed. There are no atomics: two runs are bitwise equal.

What moves through memory, in bytes per parameter in float32: `forward` 168 (old state 84, gradient 4, new state 76,
update 4), `backward` 252 (88, cotangents 80, derivatives 84); sums over groups 32 more, there and back. Scratch memory,
100 and 336 written and read, is the same for all tiles of a program and stays in the cache.

In Triton's interpreter they take float64 too. Tests: tests/kernels/test_hrnn_meta.py. Registers and instructions:
`python -m lopt.bench.sass`. Time: `lopt bench meta --device cuda`.
"""

# Loops over units are unrolled at compile time; vectors of different units are members of tuples.

import triton
import triton.language as tl

from lopt.backends import flat
from lopt.kernels.hrnn import (
    HIDDEN,
    INTERPRETED,
    LARGEST,
    TIMESCALES,
    any_but,
    asinh,
    exp2,
    inlined,
    load_four,
    log2,
    moving_averages,
    reciprocal,
    rsqrt,
)

INPUTS = tl.constexpr(12)  # features in the order of config.features: 4 scaled, 3 products, 4 log ms, relative log lr
PRODUCTS_AT = tl.constexpr(4)
LOG_MS = tl.constexpr(7)
GATES = tl.constexpr(flat.GATE_COLUMNS)
MATRIX_ROW = tl.constexpr(32)  # see lopt.backends.flat.Kernels
READ_OUT = tl.constexpr(22 * 32)  # in the weights: direction 10, shortcut 4, attention 10, shortcut 4, log lr 10
READ_OUTS = tl.constexpr(44)
ATTENTION_AT = tl.constexpr(14)
LOG_LR_AT = tl.constexpr(28)
SCALARS_AT = tl.constexpr(38)  # log lr bias, momentum, offset

GROUP = tl.constexpr(8)  # parameters of a tensor that are summed in a tile
COLUMNS = tl.constexpr(32)  # of the sums over groups
# Summands of the sums: hidden state 10, features 12, direction^2, log lr, attention direction^2.
SQUARE_AT = tl.constexpr(22)
SUMMANDS = tl.constexpr(25)

# What the parameters of a tensor share.
RELATIVE_TO = tl.constexpr(30)  # behind the biases
LOWEST = tl.constexpr(31)
KEEP = tl.constexpr(32)  # [TIMESCALES] 0: the mean squares have no past
HIGHEST = tl.constexpr(36)  # and three of padding
SUMS = tl.constexpr(40)  # [28] cotangents of the sums, for `backward`
SHARED = tl.constexpr(68)

# Gradients by the weights that a program stores: [32, 32] rows features 12, hidden 10, reset gate * hidden 10, columns
# cotangents of the gates' inputs; then [16, 16] rows new hidden 10, scaled averages 4, 1, what momentum is taken of;
# columns cotangents of direction, attention direction, log step, log lr, offset.
OUTER = tl.constexpr(32 * 32 + 16 * 16)
KEPT = tl.constexpr(84)  # their factors: vectors that a program of `backward` writes down, to read them as matrices

POINTERS = [
    "begins",
    "injected",
    "relative_to",
    "lowest",
    "highest",
    "ms",
    "d_sums",
    "shared",
    "slots",
    "owners",
    "weights",
    "grad",
    "hidden",
    "accum",
    "grad_decay",
    "scale_decay",
    "log_lr",
    "new_hidden",
    "new_accum",
    "new_ms",
    "new_log_lr",
    "update",
    "attention_update",
    "groups",
    "firsts",
    "sums",
    "d_new_hidden",
    "d_new_accum",
    "d_new_ms",
    "d_new_log_lr",
    "d_update",
    "d_attention_update",
    "d_hidden",
    "d_accum",
    "d_ms",
    "d_grad_decay",
    "d_scale_decay",
    "d_log_lr",
    "outer",
    "scratch",
]
SIZES = ["n", "tensors", "tiles", "total", "per_program", "weight_stride"]


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=POINTERS)
def share(
    begins,
    injected,
    relative_to,
    lowest,
    highest,
    ms,
    d_sums,
    shared,
    n,
    tensors,
    PRODUCTS: tl.constexpr,
    ATTENTION: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """A program per row and tensor: a row of `shared`.

    begins: int64 [T + 1] where each tensor begins. injected: [R, T, 30]. relative_to, lowest, highest: [R, T].
    ms: [R, 4, n].
    d_sums: [R, T, columns], read with BACKWARD. shared: [R, T, SHARED], written.
    """
    program = tl.program_id(0).to(tl.int64)
    row, tensor = program // tensors, program % tensors
    out = shared + program * SHARED
    j = tl.arange(0, 32)
    value = tl.load(injected + program * GATES + j, mask=j < GATES, other=0.0)
    value = tl.where(j == RELATIVE_TO, tl.load(relative_to + program), value)
    tl.store(out + j, tl.where(j == LOWEST, tl.load(lowest + program), value))
    tl.store(out + HIGHEST, tl.load(highest + program))
    begin, end = tl.load(begins + tensor), tl.load(begins + tensor + 1)
    for s in tl.static_range(TIMESCALES):
        past = any_but(ms + (row * TIMESCALES + s) * n, begin, end, 0.0)
        tl.store(out + KEEP + s, past.to(ms.dtype.element_ty))
    if BACKWARD:
        column = j
        there = j < SUMMANDS - 1 + ATTENTION
        if not PRODUCTS:
            column = tl.where(j < HIDDEN + LOG_MS, j, j - 3)
            there = there & ((j < HIDDEN + PRODUCTS_AT) | (j >= HIDDEN + LOG_MS))
        columns = SUMMANDS - 1 + ATTENTION - (0 if PRODUCTS else 3)
        value = tl.load(d_sums + program * columns + column, mask=there, other=0.0)
        tl.store(out + SUMS + j, value, mask=j < SHARED - SUMS)


@inlined
def get(address, mask, other):
    """`tl.load` of float32 in one word of assembly.

    The compiler looks for the best layout of each load and store by following what depends on what, which takes minutes
    in a kernel as long as these, where everything depends on everything. Of words of assembly it knows nothing.
    """
    if INTERPRETED:
        return tl.load(address, mask=mask, other=other)
    return tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; mov.f32 $0, $3; @p ld.global.f32 $0, [$1]; }",
        "=f,l,r,f",
        [address.to(tl.int64), mask.to(tl.int32), tl.full([], other, tl.float32)],
        tl.float32,
        is_pure=False,
        pack=1,
    )


@inlined
def get_index(address):
    """`tl.load` of int32 likewise."""
    if INTERPRETED:
        return tl.load(address)
    return tl.inline_asm_elementwise(
        "ld.global.s32 $0, [$1];", "=r,l", [address.to(tl.int64)], tl.int32, is_pure=False, pack=1
    )


@inlined
def put(address, value, mask):
    """`tl.store` likewise."""
    if INTERPRETED:
        tl.store(address, value, mask=mask)
    else:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $3, 0; mov.b32 $0, 0; @p st.global.f32 [$1], $2; }",
            "=r,l,f,r",
            [address.to(tl.int64), value, mask.to(tl.int32)],
            tl.int32,
            is_pure=False,
            pack=1,
        )


@inlined
def sigmoid(x):
    return reciprocal(exp2(tl.minimum(x * -1.4426950408889634, LARGEST)) + 1.0)


@inlined
def tile_of(slots, owners, shared, row, tile, tensors, BLOCK: tl.constexpr):
    """Index in the row of each lane's parameter, whether there is one, and where what it shares is."""
    lane = tile * BLOCK + tl.arange(0, BLOCK)
    slot, owner = get_index(slots + lane), get_index(owners + lane)
    return slot, slot >= 0, shared + row * tensors * SHARED + owner * SHARED


@inlined
def averages_of(
    grad, accum, ms, grad_decay, scale_decay, row, n, slot, mask, shared, MS_EPS: tl.constexpr, RMS_EPS: tl.constexpr
):
    """Gradient, old accum and ms of a tile's parameters and their `moving_averages`."""
    g = get(grad + row * n + slot, mask, 0.0)
    old_accum = load_rows(accum, row * TIMESCALES, n, slot, mask, 0.0, TIMESCALES)
    old_ms = load_rows(ms, row * TIMESCALES, n, slot, mask, 1.0, TIMESCALES)
    decays = get(grad_decay + row * n + slot, mask, 0.0), get(scale_decay + row * n + slot, mask, 0.0)
    keeps = load_four(shared, KEEP)
    return g, old_accum, old_ms, moving_averages(g, old_accum, old_ms, decays[0], decays[1], keeps, MS_EPS, RMS_EPS)


@inlined
def load_rows(values, at, n, slot, mask, other, COUNT: tl.constexpr):
    """COUNT features of a row's parameters, of which `values + at * n` is the first."""
    result = ()
    for i in tl.static_range(COUNT):
        result = result + (get(values + (at + i) * n + slot, mask, other),)
    return result


@inlined
def store_rows(address, at, n, slot, mask, values, COUNT: tl.constexpr):
    for i in tl.static_range(COUNT):
        put(address + (at + i) * n + slot, values[i], mask)


@inlined
def add_inputs(sums, inputs, weights, row: tl.constexpr, quad: tl.constexpr, QUADS: tl.constexpr, COUNT: tl.constexpr):
    """sums [4 * QUADS] + inputs [COUNT] @ matrix, its rows from `row` on, its columns from 4 * quad on."""
    for i in tl.static_range(COUNT):
        added = ()
        for q in tl.static_range(QUADS):
            a, b, c, d = load_four(weights, (row + i) * MATRIX_ROW + 4 * (quad + q))
            x = inputs[i]
            added = added + (
                x * a + sums[4 * q],
                x * b + sums[4 * q + 1],
                x * c + sums[4 * q + 2],
                x * d + sums[4 * q + 3],
            )
        sums = added
    return sums


@inlined
def add_outputs(total, slopes, weights, row: tl.constexpr, quad: tl.constexpr, QUADS: tl.constexpr):
    """total + slopes [4 * QUADS] @ one row of the matrix, its columns from 4 * quad on."""
    for q in tl.static_range(QUADS):
        a, b, c, d = load_four(weights, row * MATRIX_ROW + 4 * (quad + q))
        total = slopes[4 * q] * a + total
        total = slopes[4 * q + 1] * b + total
        total = slopes[4 * q + 2] * c + total
        total = slopes[4 * q + 3] * d + total
    return total


@inlined
def biases(shared, quad: tl.constexpr, QUADS: tl.constexpr):
    result = ()
    for q in tl.static_range(QUADS):
        result = result + load_four(shared, 4 * (quad + q))
    return result


@inlined
def read_out(hidden, weights, at: tl.constexpr):
    """hidden [10] . weights from READ_OUT + at on."""
    total = hidden[0] * tl.load(weights + READ_OUT + at)
    for i in tl.static_range(1, HIDDEN):
        total = hidden[i] * tl.load(weights + READ_OUT + at + i) + total
    return total


@inlined
def read_direction(hidden, scaled, weights, at: tl.constexpr):
    """The direction whose weights, then those of its shortcut, are at READ_OUT + at."""
    total = read_out(hidden, weights, at)
    for s in tl.static_range(TIMESCALES):
        total = scaled[s] * tl.load(weights + READ_OUT + at + HIDDEN + s) + total
    return total


@inlined
def features_of(averages, log_lr, shared, PRODUCTS: tl.constexpr):
    """The GRU's inputs [INPUTS], of `moving_averages` and the log lr."""
    accum, _, _, _, roots = averages
    scaled, products, logs = (), (), ()
    mean = log_lr * 0.0
    for s in tl.static_range(TIMESCALES):
        scaled = scaled + (asinh(accum[s] * roots[s]),)
        logs = logs + (log2(roots[s]) * -1.3862943611198906,)  # log ms = -2 log root
        mean = logs[s] * 0.25 + mean
    for s in tl.static_range(TIMESCALES - 1):
        if PRODUCTS:
            products = products + (scaled[s] * scaled[s + 1],)
        else:
            products = products + (log_lr * 0.0,)
    relative = ()
    for s in tl.static_range(TIMESCALES):
        relative = relative + (logs[s] - mean,)
    _, _, relative_to, _ = load_four(shared, RELATIVE_TO - 2)
    return scaled + products + relative + (log_lr - relative_to,)


@inlined
def gates_of(inputs, hidden, shared, weights):
    """Reset gates, update gates, reset gate * hidden state, candidates: [10] each."""
    sums = biases(shared, 0, 5)
    sums = add_inputs(sums, inputs, weights, 0, 0, 5, INPUTS)
    sums = add_inputs(sums, hidden, weights, INPUTS, 0, 5, HIDDEN)
    reset, update_gate, reset_hidden, candidate = (), (), (), ()
    for i in tl.static_range(HIDDEN):
        reset = reset + (sigmoid(sums[i]),)
        update_gate = update_gate + (sigmoid(sums[HIDDEN + i]),)
        reset_hidden = reset_hidden + (reset[i] * hidden[i],)
    sums = biases(shared, 5, 3)
    sums = add_inputs(sums, inputs, weights, 0, 5, 3, INPUTS)
    sums = add_inputs(sums, reset_hidden, weights, INPUTS, 5, 3, HIDDEN)
    for i in tl.static_range(HIDDEN):
        candidate = candidate + (2.0 * sigmoid(2.0 * sums[i]) - 1.0,)
    return reset, update_gate, reset_hidden, candidate


@inlined
def new_units(hidden, update_gate, candidate):
    """New hidden state u h + (1 - u) c."""
    result = ()
    for i in tl.static_range(HIDDEN):
        result = result + (update_gate[i] * (hidden[i] - candidate[i]) + candidate[i],)
    return result


@inlined
def log_step_of(new_hidden, log_lr, shared, weights):
    """Natural log of the step length, clipped, and the new log lr."""
    log_step = log_lr + tl.load(weights + READ_OUT + SCALARS_AT) + read_out(new_hidden, weights, LOG_LR_AT)
    _, _, _, lowest = load_four(shared, LOWEST - 3)
    highest, _, _, _ = load_four(shared, HIGHEST)
    log_step = tl.minimum(tl.maximum(log_step, lowest), highest)
    return log_step, tl.load(weights + READ_OUT + SCALARS_AT + 1) * (log_lr - log_step) + log_step


@inlined
def keep(scratch, at, values, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Write COUNT vectors [BLOCK] into rows of `scratch` from `at` on."""
    lane = tl.arange(0, BLOCK)
    for i in tl.static_range(COUNT):
        put(scratch + (at + i) * BLOCK + lane, values[i], lane >= 0)


@inlined
def kept(scratch, at, COUNT: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr):
    """The first LANES of COUNT rows of `scratch` from `at` on, and zeros behind them: [ROWS, LANES]."""
    i, lane = tl.arange(0, ROWS), tl.arange(0, LANES)
    return get(scratch + (at + i)[:, None] * BLOCK + lane[None, :], (i[:, None] < COUNT) & (lane[None, :] >= 0), 0.0)


@inlined
def store_groups(groups, row, lane, lanes, values, LANES: tl.constexpr):
    """Sums of values [COLUMNS, LANES], from lane `lane` of a row of `lanes` on, over groups of lanes."""
    sums = tl.sum(tl.reshape(values, [COLUMNS, LANES // GROUP, GROUP]), 2)
    i, j = tl.arange(0, COLUMNS), tl.arange(0, LANES // GROUP)
    at = (row * COLUMNS + i)[:, None] * (lanes // GROUP) + (lane // GROUP + j)[None, :]
    put(groups + at, sums, at >= 0)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=POINTERS)
def forward(
    slots,
    owners,
    weights,
    weight_stride,
    shared,
    grad,
    hidden,
    accum,
    ms,
    grad_decay,
    scale_decay,
    log_lr,
    new_hidden,
    new_accum,
    new_ms,
    new_log_lr,
    update,
    attention_update,
    groups,
    scratch,
    n,
    tensors,
    tiles,
    total,
    per_program,
    PRODUCTS: tl.constexpr,
    ATTENTION: tl.constexpr,
    MS_EPS: tl.constexpr,
    RMS_EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program per `per_program` of the `total` = R * tiles tiles.

    slots, owners: int32 [tiles * BLOCK], the parameter of a lane or -1, and its tensor. weights: see
    lopt.backends.flat.Kernels, those of the next row are weight_stride further. shared: [R, T, SHARED] of `share`.
    The state before and after, and the updates: as in lopt.backends.flat, [R, .., n].
    groups: [R, COLUMNS, tiles * BLOCK / GROUP], written. scratch: [programs, SUMMANDS, BLOCK].
    """
    program = tl.program_id(0).to(tl.int64)
    scratch += program * (SUMMANDS * BLOCK)
    for index in range(program * per_program, tl.minimum((program + 1) * per_program, total)):
        row, tile = index // tiles, (index % tiles).to(tl.int32)
        slot, mask, own = tile_of(slots, owners, shared, row, tile, tensors, BLOCK)
        of_row = weights + row * weight_stride
        h = load_rows(hidden, row * HIDDEN, n, slot, mask, 0.0, HIDDEN)
        lr = get(log_lr + row * n + slot, mask, 0.0)
        _, _, _, averages = averages_of(
            grad, accum, ms, grad_decay, scale_decay, row, n, slot, mask, own, MS_EPS, RMS_EPS
        )
        store_rows(new_accum, row * TIMESCALES, n, slot, mask, averages[0], TIMESCALES)
        store_rows(new_ms, row * TIMESCALES, n, slot, mask, averages[1], TIMESCALES)
        inputs = features_of(averages, lr, own, PRODUCTS)
        _, update_gate, _, candidate = gates_of(inputs, h, own, of_row)
        new = new_units(h, update_gate, candidate)
        store_rows(new_hidden, row * HIDDEN, n, slot, mask, new, HIDDEN)
        log_step, lr = log_step_of(new, lr, own, of_row)
        put(new_log_lr + row * n + slot, lr, mask)
        direction, rate = read_direction(new, inputs, of_row, 0), exp2(log_step * 1.4426950408889634)
        step_factor = tl.exp(tl.load(of_row + READ_OUT + SCALARS_AT + 2))
        put(update + row * n + slot, rate * step_factor * direction, mask)
        attention = lr * 0.0
        if ATTENTION:
            attention = read_direction(new, inputs, of_row, ATTENTION_AT)
            put(attention_update + row * n + slot, rate * attention, mask)
        summands = new + inputs + (direction * direction, lr, attention * attention)
        existing = ()
        for i in tl.static_range(SUMMANDS):
            existing = existing + (tl.where(mask, summands[i], 0.0),)
        keep(scratch, 0, existing, SUMMANDS, BLOCK)
        tl.debug_barrier()
        summed = kept(scratch, 0, SUMMANDS, COLUMNS, BLOCK, BLOCK)
        store_groups(groups, row, tile * BLOCK, tiles * BLOCK, summed, BLOCK)
        tl.debug_barrier()


@inlined
def d_features(
    d_inputs,
    inputs,
    averages,
    accum,
    ms,
    grad,
    keeps,
    d_accum,
    d_ms,
    PRODUCTS: tl.constexpr,
    MS_EPS: tl.constexpr,
):
    """Cotangents of the old accum, ms and decays from those of the features and of the new accum and ms."""
    new_accum, _, decays, ms_decays, roots = averages
    d_scaled = ()
    for s in tl.static_range(TIMESCALES):
        slope = d_inputs[s]
        if PRODUCTS:
            if s + 1 < TIMESCALES:
                slope = d_inputs[PRODUCTS_AT + s] * inputs[s + 1] + slope
            if s > 0:
                slope = d_inputs[PRODUCTS_AT + s - 1] * inputs[s - 1] + slope
        d_scaled = d_scaled + (slope,)
    d_mean = (d_inputs[LOG_MS] + d_inputs[LOG_MS + 1] + d_inputs[LOG_MS + 2] + d_inputs[LOG_MS + 3]) * 0.25
    d_old_accum, d_old_ms = (), ()
    d_decay, d_keep = d_mean * 0.0, d_mean * 0.0
    for s in tl.static_range(TIMESCALES - 1, -1, -1):
        ratio = new_accum[s] * roots[s]
        d_ratio = d_scaled[s] * rsqrt(tl.minimum(ratio * ratio, 1e30) + 1.0)
        d_log = d_ratio * ratio * -0.5 + (d_inputs[LOG_MS + s] - d_mean)
        slope = d_log * (roots[s] * roots[s]) + d_ms[s]
        average = new_accum[s]
        d_average = d_ratio * roots[s] + d_accum[s]
        d_average = slope * (1.0 - ms_decays[s]) * (average + average) + d_average
        d_old_ms = (slope * ms_decays[s],) + d_old_ms
        d_keep = slope * keeps[s] * (ms[s] - (average * average + MS_EPS)) + d_keep
        d_old_accum = (d_average * decays[s],) + d_old_accum
        d_decay = d_average * (accum[s] - grad) + d_decay
        if s > 0:
            # A decay is the root of the one before, at least 2^-60 where it is not 0.
            d_decay = tl.where(decays[s] == 0, 0.0, d_decay * 0.5 * reciprocal(tl.maximum(decays[s], 1e-30)))
    return d_old_accum, d_old_ms, d_decay, d_keep


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=POINTERS)
def backward(
    slots,
    owners,
    weights,
    shared,
    grad,
    hidden,
    accum,
    ms,
    grad_decay,
    scale_decay,
    log_lr,
    d_new_hidden,
    d_new_accum,
    d_new_ms,
    d_new_log_lr,
    d_update,
    d_attention_update,
    d_hidden,
    d_accum,
    d_ms,
    d_grad_decay,
    d_scale_decay,
    d_log_lr,
    groups,
    outer,
    scratch,
    n,
    tensors,
    tiles,
    total,
    per_program,
    PRODUCTS: tl.constexpr,
    ATTENTION: tl.constexpr,
    MS_EPS: tl.constexpr,
    RMS_EPS: tl.constexpr,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program per `per_program` of the `total` = R * tiles tiles.

    Arguments as in `forward`; d_new_*, d_update, d_attention_update: cotangents; the other d_*: written.
    groups: [R, COLUMNS, tiles * BLOCK / GROUP], written: cotangents of the gates' inputs 30, of the mean log lr.
    outer: [programs, OUTER], written. scratch: [programs, KEPT, BLOCK].
    PART: lanes of which the matrices are multiplied at a time.
    """
    dtype: tl.constexpr = grad.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    scratch += program * (KEPT * BLOCK)
    by_matrix, by_read_outs = tl.zeros([32, 32], dtype), tl.zeros([16, 16], dtype)
    for index in range(program * per_program, tl.minimum((program + 1) * per_program, total)):
        row, tile = index // tiles, (index % tiles).to(tl.int32)
        slot, mask, own = tile_of(slots, owners, shared, row, tile, tensors, BLOCK)
        h = load_rows(hidden, row * HIDDEN, n, slot, mask, 0.0, HIDDEN)
        lr = get(log_lr + row * n + slot, mask, 0.0)
        g, _, _, averages = averages_of(
            grad, accum, ms, grad_decay, scale_decay, row, n, slot, mask, own, MS_EPS, RMS_EPS
        )
        inputs = features_of(averages, lr, own, PRODUCTS)
        zero = g * 0.0
        reset, update_gate, reset_hidden, candidate = gates_of(inputs, h, own, weights)
        new = new_units(h, update_gate, candidate)
        log_step, _ = log_step_of(new, lr, own, weights)
        direction, rate = read_direction(new, inputs, weights, 0), exp2(log_step * 1.4426950408889634)
        step = rate * tl.exp(tl.load(weights + READ_OUT + SCALARS_AT + 2))

        d_sums = own + SUMS  # cotangents of the sums, one for each summand
        momentum = tl.load(weights + READ_OUT + SCALARS_AT + 1)
        d_lr = get(d_new_log_lr + row * n + slot, mask, 0.0) + get(d_sums + SQUARE_AT + 1, mask, 0.0)
        d_moved = get(d_update + row * n + slot, mask, 0.0)
        d_direction = d_moved * step + 2.0 * direction * get(d_sums + SQUARE_AT, mask, 0.0)
        d_offset = d_moved * step * direction
        d_log_step = (1.0 - momentum) * d_lr + d_offset
        d_attention = zero
        if ATTENTION:
            attention = read_direction(new, inputs, weights, ATTENTION_AT)
            d_attended = get(d_attention_update + row * n + slot, mask, 0.0)
            d_attention = d_attended * rate + 2.0 * attention * get(d_sums + SQUARE_AT + 2, mask, 0.0)
            d_log_step = d_attended * rate * attention + d_log_step
        keep(scratch, 0, inputs + h + reset_hidden, 32, BLOCK)
        keep(scratch, 32, new + (inputs[0], inputs[1], inputs[2], inputs[3], zero + 1.0, lr - log_step), 16, BLOCK)
        keep(scratch, 48, (d_direction, d_attention, d_log_step, d_lr, d_offset), 5, BLOCK)

        # GRU: h' = u h + (1 - u) c
        d_update_gate, d_candidate, d_h = (), (), ()
        for i in tl.static_range(HIDDEN):
            slope = get(d_new_hidden + (row * HIDDEN + i) * n + slot, mask, 0.0) + get(d_sums + i, mask, 0.0)
            slope = d_direction * tl.load(weights + READ_OUT + i) + slope
            slope = d_log_step * tl.load(weights + READ_OUT + LOG_LR_AT + i) + slope
            if ATTENTION:
                slope = d_attention * tl.load(weights + READ_OUT + ATTENTION_AT + i) + slope
            u, c = update_gate[i], candidate[i]
            d_update_gate = d_update_gate + (slope * (h[i] - c) * u * (1.0 - u),)
            d_candidate = d_candidate + (slope * (1.0 - u) * (1.0 - c * c),)
            d_h = d_h + (slope * u,)
        d_reset, d_hidden_direct = (), ()
        for i in tl.static_range(HIDDEN):
            slope = add_outputs(zero, d_candidate + (zero, zero), weights, INPUTS + i, 5, 3)
            d_reset = d_reset + (slope * h[i] * reset[i] * (1.0 - reset[i]),)
            d_hidden_direct = d_hidden_direct + (slope * reset[i] + d_h[i],)
        dz = d_reset + d_update_gate + d_candidate + (zero, zero)
        for i in tl.static_range(HIDDEN):
            slope = add_outputs(d_hidden_direct[i], dz, weights, INPUTS + i, 0, 5)
            put(d_hidden + (row * HIDDEN + i) * n + slot, slope, mask)
        d_inputs = ()
        for i in tl.static_range(INPUTS):
            slope = get(d_sums + HIDDEN + i, mask, 0.0)
            if i < TIMESCALES:
                slope = d_direction * tl.load(weights + READ_OUT + HIDDEN + i) + slope
                if ATTENTION:
                    slope = d_attention * tl.load(weights + READ_OUT + ATTENTION_AT + HIDDEN + i) + slope
            d_inputs = d_inputs + (add_outputs(slope, dz, weights, i, 0, 8),)

        d_relative = d_inputs[INPUTS - 1]
        put(d_log_lr + row * n + slot, momentum * d_lr + (d_log_step + d_relative), mask)
        # Again, for registers to be free in between.
        g, old_accum, old_ms, averages = averages_of(
            grad, accum, ms, grad_decay, scale_decay, row, n, slot, mask, own, MS_EPS, RMS_EPS
        )
        d_old_accum, d_old_ms, d_decay, d_keep = d_features(
            d_inputs,
            inputs,
            averages,
            old_accum,
            old_ms,
            g,
            load_four(own, KEEP),
            load_rows(d_new_accum, row * TIMESCALES, n, slot, mask, 0.0, TIMESCALES),
            load_rows(d_new_ms, row * TIMESCALES, n, slot, mask, 0.0, TIMESCALES),
            PRODUCTS,
            MS_EPS,
        )
        store_rows(d_accum, row * TIMESCALES, n, slot, mask, d_old_accum, TIMESCALES)
        store_rows(d_ms, row * TIMESCALES, n, slot, mask, d_old_ms, TIMESCALES)
        put(d_grad_decay + row * n + slot, d_decay, mask)
        put(d_scale_decay + row * n + slot, d_keep, mask)
        keep(scratch, 53, d_reset + d_update_gate + d_candidate + (0.0 - d_relative,), 31, BLOCK)
        tl.debug_barrier()
        for lane in range(0, BLOCK, PART):
            slopes = kept(scratch + lane, 53, 31, 32, PART, BLOCK)
            by_matrix = tl.dot(
                kept(scratch + lane, 0, 32, 32, PART, BLOCK),
                tl.trans(slopes),
                by_matrix,
                input_precision="ieee",
                out_dtype=dtype,
            )
            by_read_outs = tl.dot(
                kept(scratch + lane, 32, 16, 16, PART, BLOCK),
                tl.trans(kept(scratch + lane, 48, 5, 16, PART, BLOCK)),
                by_read_outs,
                input_precision="ieee",
                out_dtype=dtype,
            )
            store_groups(groups, row, tile * BLOCK + lane, tiles * BLOCK, slopes, PART)
        tl.debug_barrier()
    out = outer + program * OUTER
    i, j = tl.arange(0, 32), tl.arange(0, 16)
    at = i[:, None] * 32 + i[None, :]
    put(out + at, by_matrix, at >= 0)
    at = j[:, None] * 16 + j[None, :]
    put(out + 1024 + at, by_read_outs, at >= 0)


@triton.jit(do_not_specialize=[*SIZES, "columns"], do_not_specialize_on_alignment=POINTERS)
def add_groups(groups, firsts, sums, tensors, total, columns, SKIPPED: tl.constexpr):
    """A program per row and tensor: sum of its groups, in an order that depends on nothing but their number.

    groups: [R, COLUMNS, total]. firsts: int64 [T + 1], the first group of each tensor.
    sums: [R, T, columns], written: the first ones, without the SKIPPED from the features that are products on.
    """
    program = tl.program_id(0).to(tl.int64)
    row, tensor = program // tensors, program % tensors
    begin, end = tl.load(firsts + tensor), tl.load(firsts + tensor + 1)
    i, j = tl.arange(0, 32), tl.arange(0, COLUMNS)
    groups += row * COLUMNS * total
    added = tl.zeros([COLUMNS, 32], groups.dtype.element_ty)
    for start in range(begin, end, 32):
        group = start + i
        added += tl.load(groups + j[:, None] * total + group[None, :], mask=(group < end)[None, :], other=0.0)
    out = tl.where(j < HIDDEN + PRODUCTS_AT, j, j - SKIPPED)
    there = (out < columns) & ((j < HIDDEN + PRODUCTS_AT) | (j >= HIDDEN + PRODUCTS_AT + SKIPPED))
    tl.store(sums + program * columns + out, tl.sum(added, 1), mask=there)
