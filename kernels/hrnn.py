"""One step of the hierarchical-RNN optimizer in four Triton kernels, each for all tensors of a model at once.

What they compute is defined by lopt/backends/reference.py; order, letters and the liberties taken with the arithmetic
are those of csrc/hrnn_step.h. lopt/backends/triton.py packs the meta-parameters, keeps the tables and launches.

    prepare     looks for non-finite gradients; per tensor: injected bias and what else the parameters of a tensor share
    advance     per parameter: features, GRU, read-outs; the last chunk of a tensor to finish adds up the tensor's sums
    summarise   per tensor: GRU over the means; the last tensor to finish runs the global GRU
    apply       per parameter: move, decay the weights

How the work is cut: a tensor into chunks of a few tiles of BLOCK parameters, a program per chunk (per tensor in
`summarise`). Within a tile every quantity is a [BLOCK] vector; meta-parameters are scalars, read four at a time.
Tensors are reached through a table of addresses, int64 [columns, tensors]: their number does not change the number
of launches. Sums over a tensor are of partial sums per chunk, in the order of the chunks: two runs are bitwise equal.

What moves through memory, in bytes per parameter with a float32 gradient and parameter: prepare 4 (the gradient),
advance 160 (gradient 4, state in and out 2 * 76, update 4) or with a compact state (lopt/compact.py) 88, apply 12.

Tests: tests/kernels/test_hrnn.py. Registers and instructions: `python -m lopt.bench.sass`. Time: `lopt bench step`.
"""

# Loops over units are unrolled at compile time; vectors of different units are members of tuples.

import triton
import triton.language as tl

from lopt import compact, state
from lopt.backends.gpu import AdvanceColumn, ApplyColumn, SummaryColumn

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def inlined(function):
    """A function that kernels call. Triton's interpreter runs it as it is: faster than as a kernel within a kernel."""
    return function if triton.knobs.runtime.interpret else triton.jit(function)


HIDDEN = tl.constexpr(10)
TIMESCALES = tl.constexpr(4)
PAIRS = tl.constexpr(5)  # of hidden units
ROWS = tl.constexpr(21)  # inputs of a gate: hidden state, then features; the optional products are last
ROWS_WITHOUT_PRODUCTS = tl.constexpr(18)
# Features: scaled averages 4 | binary log of root mean squares 3 | relative log lr | products 3.

# Meta-parameters of the parameter level, float32 [WEIGHTS]. Weights into a sigmoid carry a factor -log2(e), into the
# tanh -2 log2(e); those of the log mean squares -2 ln(2), as the feature is log2(rms_4 / rms_s).
RESET = tl.constexpr(0)  # [PAIRS, ROWS + 1, 2] reset gates of two units; the last row is padding
UPDATE = tl.constexpr(220)  # [PAIRS, ROWS, 4] update gates of two units, candidates of two units
READOUT = tl.constexpr(640)  # [HIDDEN, 4] direction, log lr, attention, padding
DECAYS = tl.constexpr(680)  # [HIDDEN, 2] grad decay, scale decay
SHORTCUT = tl.constexpr(700)  # [2, TIMESCALES] direction, attention
# Biases of grad decay, scale decay, log lr; momentum; log2 of the step's offset, attention factor, ms eps, rms eps;
# log lr min, log lr max; of the compact format what a step of the hidden state is, and how many steps 1 is.
SCALARS = tl.constexpr(708)
SEEN = tl.constexpr(1e30)  # one over the least scaled average that counts as a gradient
WEIGHTS = tl.constexpr(720)

# What the parameters of a tensor share, float32 [tensors, SHARED], written by `prepare`.
BIAS = tl.constexpr(0)  # [32] of the reset gates 10, padding 2, then like UPDATE [PAIRS, 4]: bias plus injected bias
BIAS_UPDATE = tl.constexpr(12)
BIASES = tl.constexpr(32)
RELATIVE_TO = tl.constexpr(32)  # mean log lr
STARTED = tl.constexpr(33)  # 0 in the first step, whose decays are 0
RISING_MOMENTUM = tl.constexpr(34)  # of the smoothed log lr where it rises: more after gradients that were small
LOWEST = tl.constexpr(35)  # bounds of the log lr
KEEP = tl.constexpr(36)  # [TIMESCALES] 0 where the mean squares are zero throughout: no past to average with
HIGHEST = tl.constexpr(40)
SHARED = tl.constexpr(44)

# Columns of the tables, see lopt/backends/gpu.py.
GRAD = tl.constexpr(AdvanceColumn.GRAD.value)
GRAD_KIND = tl.constexpr(AdvanceColumn.GRAD_DTYPE.value)
SIGN = tl.constexpr(AdvanceColumn.SIGN.value)
HIDDEN_STATE = tl.constexpr(AdvanceColumn.HIDDEN.value)
ACCUM = tl.constexpr(AdvanceColumn.ACCUM.value)
MS = tl.constexpr(AdvanceColumn.MS.value)
LOG_LR = tl.constexpr(AdvanceColumn.LOG_LR.value)
STEP = tl.constexpr(AdvanceColumn.STEP.value)
TENSOR_HIDDEN = tl.constexpr(AdvanceColumn.TENSOR_HIDDEN.value)
LOG_LR_MEAN = tl.constexpr(AdvanceColumn.LOG_LR_MEAN.value)
DAMPING_STATE = tl.constexpr(AdvanceColumn.DAMPING.value)
DISTANCE_STATE = tl.constexpr(AdvanceColumn.DISTANCE.value)
SIZE = tl.constexpr(AdvanceColumn.SIZE.value)
NUMEL = tl.constexpr(AdvanceColumn.NUMEL.value)
OFFSET = tl.constexpr(AdvanceColumn.OFFSET.value)
CHUNK_FIRST = tl.constexpr(AdvanceColumn.CHUNK_FIRST.value)
CHUNK_COUNT = tl.constexpr(AdvanceColumn.CHUNK_COUNT.value)
CHUNK_SIZE = tl.constexpr(AdvanceColumn.CHUNK_SIZE.value)
SUMMARY_TENSOR_HIDDEN = tl.constexpr(SummaryColumn.TENSOR_HIDDEN.value)
SUMMARY_LOG_LR_MEAN = tl.constexpr(SummaryColumn.LOG_LR_MEAN.value)
SUMMARY_DAMPING = tl.constexpr(SummaryColumn.DAMPING.value)
SUMMARY_DISTANCE = tl.constexpr(SummaryColumn.DISTANCE.value)
SUMMARY_STEP = tl.constexpr(SummaryColumn.STEP.value)
SUMMARY_NUMEL = tl.constexpr(SummaryColumn.NUMEL.value)
SUMMARY_LR = tl.constexpr(SummaryColumn.LR.value)
SUMMARY_LR_KIND = tl.constexpr(SummaryColumn.LR_DTYPE.value)
PARAM = tl.constexpr(ApplyColumn.PARAM.value)
PARAM_KIND = tl.constexpr(ApplyColumn.PARAM_DTYPE.value)
TRUE_PARAM = tl.constexpr(ApplyColumn.TRUE_PARAM.value)
PARAM_LOG_LR_MEAN = tl.constexpr(ApplyColumn.LOG_LR_MEAN.value)
PARAM_SIZE = tl.constexpr(ApplyColumn.SIZE.value)
PARAM_OFFSET = tl.constexpr(ApplyColumn.OFFSET.value)
PARAM_CHUNK_FIRST = tl.constexpr(ApplyColumn.CHUNK_FIRST.value)
PARAM_CHUNK_SIZE = tl.constexpr(ApplyColumn.CHUNK_SIZE.value)
LR = tl.constexpr(ApplyColumn.LR.value)
LR_KIND = tl.constexpr(ApplyColumn.LR_DTYPE.value)
WEIGHT_DECAY = tl.constexpr(ApplyColumn.WEIGHT_DECAY.value)

# Kinds of floating numbers.
FLOAT32 = tl.constexpr(0)
FLOAT64 = tl.constexpr(1)
BFLOAT16 = tl.constexpr(2)
FLOAT16 = tl.constexpr(3)
MIXED = tl.constexpr(4)  # for compile-time kinds: look into the table

# The compact state.
HIDDEN_STEPS = tl.constexpr(float(compact.HIDDEN_STEPS))
MS_STEPS = tl.constexpr(compact.MS_STEPS)
MS_ZERO = tl.constexpr(compact.MS_ZERO)
SAMPLES = tl.constexpr(state.SAMPLES)
TINY = tl.constexpr(1e-37)  # instead of 0 in a logarithm
LARGEST_RATIO = tl.constexpr(65504.0)  # of float16
SMALLEST_MS = tl.constexpr(2.0**-compact.MS_OCTAVES)
LARGEST_MS = tl.constexpr(2.0**compact.MS_OCTAVES)

PARTIALS = tl.constexpr(32)  # row length of the partial sums, at least their number
LARGEST = tl.constexpr(60.0)  # bound of binary exponents: products of two powers are finite, 2^-60 is 0 beside 1

# One compiled kernel serves all numbers of tensors and all alignments.
POINTERS = [
    "table",
    "chunks",
    "shared",
    "bias",
    "from_tensor",
    "from_global",
    "global_hidden",
    "places",
    "skip",
    "grad_scale",
    "weights",
    "update",
    "attention_update",
    "partials",
    "tickets",
    "sums",
    "levels",
    "scale",
    "scratch",
    "ticket",
]


@inlined
def exp2(x):
    if INTERPRETED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@inlined
def log2(x):
    if INTERPRETED:
        return tl.log2(x)
    return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@inlined
def reciprocal(x):
    if INTERPRETED:
        return 1.0 / x
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@inlined
def rsqrt(x):
    if INTERPRETED:
        return tl.rsqrt(x)
    return tl.inline_asm_elementwise("rsqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@inlined
def sqrt(x):
    if INTERPRETED:
        return tl.sqrt(x)
    return tl.inline_asm_elementwise("sqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@inlined
def asinh(x):
    """Odd, and in float32 accurate near 0: a polynomial below 0.5, log(|x| + sqrt(x^2 + 1)) above."""
    magnitude = tl.minimum(tl.abs(x), 1e18)
    square = magnitude * magnitude
    large = 0.6931471805599453 * log2(magnitude + sqrt(square + 1.0))
    if x.dtype == tl.float64:
        return tl.where(x < 0, -large, large)
    p = square * -0.013248102739453316 + 0.028175560757517815
    p = square * p - 0.044385865330696106
    p = square * p + 0.07498663663864136
    p = square * p - 0.1666664332151413
    small = (p * square) * magnitude + magnitude
    result = tl.where(magnitude < 0.5, small, large)
    return tl.where(x < 0, -result, result)


@inlined
def load_four(address, index: tl.constexpr):
    """Four consecutive float32 scalars; `index` is a multiple of 4."""
    if INTERPRETED:
        return (
            tl.load(address + index),
            tl.load(address + index + 1),
            tl.load(address + index + 2),
            tl.load(address + index + 3),
        )
    return tl.inline_asm_elementwise(
        "ld.global.v4.f32 {$0, $1, $2, $3}, [$4];",
        "=f,=f,=f,=f,l",
        [address.to(tl.int64) + index * 4],
        (tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=False,
        pack=1,
    )


@inlined
def column(table, index, tensors, tensor):
    """One entry of a table, an int64."""
    return tl.load(table + index * tensors + tensor)


@inlined
def floats(address):
    """An int64 address as a pointer to float32."""
    return address.to(tl.pointer_type(tl.float32))


@inlined
def codes(address):
    """An int64 address as a pointer to int16."""
    return address.to(tl.pointer_type(tl.int16))


@inlined
def load_as(address, offset, mask, DTYPE: tl.constexpr):
    return tl.load(address.to(tl.pointer_type(DTYPE)) + offset, mask=mask, other=0.0).to(tl.float32)


@inlined
def load_kind(address, kind, offset, mask, KIND: tl.constexpr):
    """Numbers of a kind known at compile time, or of `kind` if that is MIXED, as float32."""
    if KIND == MIXED:
        if kind == FLOAT32:
            value = load_as(address, offset, mask, tl.float32)
        elif kind == BFLOAT16:
            value = load_as(address, offset, mask, tl.bfloat16)
        elif kind == FLOAT16:
            value = load_as(address, offset, mask, tl.float16)
        else:
            value = load_as(address, offset, mask, tl.float64)
    elif KIND == FLOAT32:
        value = load_as(address, offset, mask, tl.float32)
    elif KIND == BFLOAT16:
        value = load_as(address, offset, mask, tl.bfloat16)
    elif KIND == FLOAT16:
        value = load_as(address, offset, mask, tl.float16)
    else:
        value = load_as(address, offset, mask, tl.float64)
    return value


@inlined
def store_as(address, offset, value, mask, DTYPE: tl.constexpr):
    tl.store(address.to(tl.pointer_type(DTYPE)) + offset, value.to(DTYPE), mask=mask)


@inlined
def store_kind(address, kind, offset, value, mask, KIND: tl.constexpr):
    """The inverse of `load_kind`, rounding to nearest even."""
    if KIND == MIXED:
        if kind == FLOAT32:
            store_as(address, offset, value, mask, tl.float32)
        elif kind == BFLOAT16:
            store_as(address, offset, value, mask, tl.bfloat16)
        elif kind == FLOAT16:
            store_as(address, offset, value, mask, tl.float16)
        else:
            store_as(address, offset, value, mask, tl.float64)
    elif KIND == FLOAT32:
        store_as(address, offset, value, mask, tl.float32)
    elif KIND == BFLOAT16:
        store_as(address, offset, value, mask, tl.bfloat16)
    elif KIND == FLOAT16:
        store_as(address, offset, value, mask, tl.float16)
    else:
        store_as(address, offset, value, mask, tl.float64)


@inlined
def gradient_factor(grad_scale, sign):
    """What gradients are multiplied with."""
    return sign.to(tl.float32) * (1.0 / tl.load(grad_scale))


@inlined
def add_product(out, x, rows, weight, stride, j, keep):
    """out [WIDTH] + x [rows] @ weight [rows, .], row length `stride`, at the columns j [WIDTH] where keep [WIDTH]."""
    for begin in range(0, rows, 16):
        i = begin + tl.arange(0, 16)
        value = tl.load(x + i, mask=i < rows, other=0.0, cache_modifier=".cg")
        entry = tl.load(weight + i[:, None] * stride + j[None, :], mask=(i < rows)[:, None] & keep[None, :], other=0.0)
        out += tl.sum(value[:, None] * entry, 0)
    return out


@inlined
def last_to_finish(ticket, count):
    """Whether all other of `count` programs have drawn a ticket; what they stored before is then visible."""
    tl.debug_barrier()
    last = tl.atomic_add(ticket, 1, sem="acq_rel") == count - 1
    tl.debug_barrier()
    return last


@triton.jit(do_not_specialize=["tensors"], do_not_specialize_on_alignment=POINTERS)
def prepare(
    table,
    tensors,
    chunks,
    shared,
    weights,
    bias,
    from_tensor,
    from_global,
    global_hidden,
    skip,
    grad_scale,
    LIMIT: tl.constexpr,
    TENSOR_SIZE: tl.constexpr,
    GLOBAL_SIZE: tl.constexpr,
    PROBLEM: tl.constexpr,
    DAMPED: tl.constexpr,
    LOG_LR_MIN_STEPS: tl.constexpr,
    LOG_LR_MIN_DISTANCE: tl.constexpr,
    LOG_LR_MIN_DISTANCE_LIMIT: tl.constexpr,
    LOG_LR_MAX_RATIO: tl.constexpr,
    COMPACT: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Programs below `tensors` each serve a tensor; the others each look at the gradients of a chunk.

    table: int64 [columns, tensors]. chunks: int32 [chunks], each one's tensor.
    shared: [tensors, SHARED], written.
    weights: [WEIGHTS]. DAMPED: log lrs rise slower after small gradients.
    LOG_LR_MIN_STEPS to LOG_LR_MAX_RATIO: as in the configuration.
    bias: [BIASES]; from_tensor: [TENSOR_SIZE, BIASES]; from_global: [GLOBAL_SIZE, BIASES]: the injection.
    global_hidden: [GLOBAL_SIZE]. grad_scale: [] what the gradients were multiplied with.
    skip: [], becomes 1 at a gradient beyond LIMIT.
    PROBLEM: the log lr is taken relative to the mean over all tensors, otherwise over its own.
    COMPACT: the format of the state.
    """
    program = tl.program_id(0)
    if program < tensors:
        share(
            table,
            tensors,
            program,
            shared,
            weights,
            bias,
            from_tensor,
            from_global,
            global_hidden,
            TENSOR_SIZE,
            GLOBAL_SIZE,
            PROBLEM,
            DAMPED,
            LOG_LR_MIN_STEPS,
            LOG_LR_MIN_DISTANCE,
            LOG_LR_MIN_DISTANCE_LIMIT,
            LOG_LR_MAX_RATIO,
            COMPACT,
        )
    else:
        chunk = program - tensors
        tensor = tl.load(chunks + chunk)
        size = column(table, CHUNK_SIZE, tensors, tensor)
        begin = (chunk - column(table, CHUNK_FIRST, tensors, tensor)) * size
        end = tl.minimum(begin + size, column(table, SIZE, tensors, tensor))
        grad, kind = column(table, GRAD, tensors, tensor), column(table, GRAD_KIND, tensors, tensor)
        factor = gradient_factor(grad_scale, column(table, SIGN, tensors, tensor))
        beyond = tl.zeros([BLOCK], tl.int32)
        for start in range(begin, end, BLOCK):
            offset = start + tl.arange(0, BLOCK)
            value = load_kind(grad, kind, offset, offset < end, KIND) * factor
            beyond |= tl.where(tl.abs(value) <= LIMIT, 0, 1)  # 1 for NaN
        if tl.max(beyond, 0) != 0:
            tl.store(skip, 1.0)  # by several programs, all of which store the same


@inlined
def share(
    table,
    tensors,
    tensor,
    shared,
    weights,
    bias,
    from_tensor,
    from_global,
    global_hidden,
    TENSOR_SIZE: tl.constexpr,
    GLOBAL_SIZE: tl.constexpr,
    PROBLEM: tl.constexpr,
    DAMPED: tl.constexpr,
    LOG_LR_MIN_STEPS: tl.constexpr,
    LOG_LR_MIN_DISTANCE: tl.constexpr,
    LOG_LR_MIN_DISTANCE_LIMIT: tl.constexpr,
    LOG_LR_MAX_RATIO: tl.constexpr,
    COMPACT: tl.constexpr,
):
    """Write a tensor's row of `shared` from the tensor and global states before the step."""
    row = shared + tensor.to(tl.int64) * SHARED
    j = tl.arange(0, BIASES)
    everywhere = j >= 0
    value = tl.load(bias + j)
    if TENSOR_SIZE > 0:
        value = add_product(
            value,
            floats(column(table, TENSOR_HIDDEN, tensors, tensor)),
            TENSOR_SIZE,
            from_tensor,
            BIASES,
            j,
            everywhere,
        )
    if GLOBAL_SIZE > 0:
        value = add_product(value, global_hidden, GLOBAL_SIZE, from_global, BIASES, j, everywhere)
    tl.store(row + BIAS + j, value)

    if PROBLEM:
        weighted = tl.zeros([128], tl.float64)
        numel = tl.zeros([128], tl.float64)
        for begin in range(0, tensors, 128):
            i = begin + tl.arange(0, 128)
            count = tl.load(table + NUMEL * tensors + i, mask=i < tensors, other=0).to(tl.float64)
            address = tl.load(table + LOG_LR_MEAN * tensors + i, mask=i < tensors, other=0)
            weighted += count * tl.load(floats(address), mask=i < tensors, other=0.0).to(tl.float64)
            numel += count
        relative_to = (tl.sum(weighted, 0) / tl.sum(numel, 0)).to(tl.float32)
    else:
        relative_to = tl.load(floats(column(table, LOG_LR_MEAN, tensors, tensor)))
    tl.store(row + RELATIVE_TO, relative_to)
    momentum = tl.load(weights + SCALARS + 3)
    if DAMPED:
        factor = tl.load(floats(column(table, DAMPING_STATE, tensors, tensor)) + 2)
        momentum += (1.0 - factor) * (1.0 - momentum)
    tl.store(row + RISING_MOMENTUM, momentum)

    step = tl.load(floats(column(table, STEP, tensors, tensor)))
    lowest = tl.load(weights + SCALARS + 8)
    if LOG_LR_MIN_STEPS > 0:
        lowest -= 0.5 * tl.log(1.0 + step / LOG_LR_MIN_STEPS)
    if LOG_LR_MIN_DISTANCE > 0:
        distance = tl.load(floats(column(table, DISTANCE_STATE, tensors, tensor)))
        if LOG_LR_MIN_DISTANCE_LIMIT > 0:
            distance = tl.minimum(distance, LOG_LR_MIN_DISTANCE_LIMIT)
        distance = LOG_LR_MIN_DISTANCE * distance
        lowest = tl.maximum(lowest, tl.log(tl.maximum(distance, TINY)) - 0.5 * tl.log(1.0 + step))
    tl.store(row + LOWEST, lowest)
    highest = tl.load(weights + SCALARS + 9)
    if LOG_LR_MAX_RATIO > 0:
        mean = tl.load(floats(column(table, LOG_LR_MEAN, tensors, tensor)))
        above = mean + tl.log(tl.full([], LOG_LR_MAX_RATIO, tl.float32))
        highest = tl.minimum(tl.maximum(above, lowest), highest)
    tl.store(row + HIGHEST, highest)
    started = step > 0
    if DAMPED:  # and there was a gradient but 0
        started = started & (tl.load(floats(column(table, DAMPING_STATE, tensors, tensor))) > 0)
    tl.store(row + STARTED, started.to(tl.float32))
    size = column(table, SIZE, tensors, tensor)
    ms = column(table, MS, tensors, tensor)
    end = tl.where(started, size, 0)
    for s in tl.static_range(TIMESCALES):
        if COMPACT:
            past = any_but(codes(ms) + s * size, size * 0, end, MS_ZERO)
        else:
            past = any_but(floats(ms) + s * size, size * 0, end, 0.0)
        tl.store(row + KEEP + s, past.to(tl.float32))


@inlined
def any_but(values, begin, end, ZERO: tl.constexpr):
    """Whether one of values [begin:end] is not ZERO: 1 or 0. As a rule the first one is not."""
    found = tl.min(tl.zeros([1], tl.int32), 0)
    while (found == 0) & (begin < end):
        offset = begin + tl.arange(0, 256)
        found = tl.max(tl.where(tl.load(values + offset, mask=offset < end, other=ZERO) != ZERO, 1, 0), 0)
        begin += 256
    return found


@inlined
def moving_averages(grad, accum, ms, grad_decay, scale_decay, keeps, ms_eps, rms_eps):
    """Averages of the gradient, of their squares, decays of either, 1 / root mean square: [TIMESCALES] each."""
    new_accum, new_ms, decays, ms_decays, roots = (), (), (), (), ()
    decay = grad_decay
    for s in tl.static_range(TIMESCALES):
        average = decay * accum[s] + (1.0 - decay) * grad
        keep = scale_decay * keeps[s]
        square = keep * ms[s] + (1.0 - keep) * (average * average + ms_eps)
        new_accum, new_ms, roots = new_accum + (average,), new_ms + (square,), roots + (rsqrt(square + rms_eps),)
        decays, ms_decays = decays + (decay,), ms_decays + (keep,)
        if s + 1 < TIMESCALES:
            decay = sqrt(decay)  # each timescale is twice the one before
    return new_accum, new_ms, decays, ms_decays, roots


@inlined
def scaled_averages(grad, accum, ms, grad_decay, scale_decay, shared, weights):
    """Moving averages of the gradient and of their squares, and the features made of them alone, in order."""
    _, _, ms_eps, rms_eps = load_four(weights, SCALARS + 4)
    keeps = load_four(shared, KEEP)
    accum, ms, _, _, roots = moving_averages(grad, accum, ms, grad_decay, scale_decay, keeps, ms_eps, rms_eps)
    features = ()
    for s in tl.static_range(TIMESCALES):
        features = features + (asinh(accum[s] * roots[s]),)
    rms = (ms[TIMESCALES - 1] + rms_eps) * roots[TIMESCALES - 1]
    for s in tl.static_range(TIMESCALES - 1):
        features = features + (log2(roots[s] * rms),)
    return accum, ms, features


@inlined
def read_decays(hidden, shared, weights):
    """Both decays, read out of the hidden state that the last step left."""
    grad_bias, scale_bias, _, _ = load_four(weights, SCALARS)
    grad, scale = hidden[0] * 0.0 + grad_bias, hidden[0] * 0.0 + scale_bias
    for i in tl.static_range(PAIRS):
        g0, s0, g1, s1 = load_four(weights, DECAYS + 4 * i)
        grad = hidden[2 * i + 1] * g1 + (hidden[2 * i] * g0 + grad)
        scale = hidden[2 * i + 1] * s1 + (hidden[2 * i] * s0 + scale)
    started = tl.load(shared + STARTED)
    return started * reciprocal(exp2(grad) + 1.0), started * reciprocal(exp2(scale) + 1.0)


@inlined
def reset_hidden(inputs, shared, weights, COUNT: tl.constexpr):
    """Reset gate * hidden state of every unit."""
    result = ()
    for pair in tl.static_range(PAIRS):
        z0 = inputs[0] * 0.0 + tl.load(shared + BIAS + 2 * pair)
        z1 = inputs[0] * 0.0 + tl.load(shared + BIAS + 2 * pair + 1)
        for row in tl.static_range(0, COUNT, 2):
            a0, a1, b0, b1 = load_four(weights, RESET + (pair * (ROWS + 1) + row) * 2)
            z0 = inputs[row] * a0 + z0
            z1 = inputs[row] * a1 + z1
            if row + 1 < COUNT:
                z0 = inputs[row + 1] * b0 + z0
                z1 = inputs[row + 1] * b1 + z1
        result = result + (
            inputs[2 * pair] * reciprocal(exp2(z0) + 1.0),
            inputs[2 * pair + 1] * reciprocal(exp2(z1) + 1.0),
        )
    return result


@inlined
def new_unit(h, update, candidate):
    """u h + (1-u) tanh(c) with one division, from update = -z log2(e) and candidate = -2 c log2(e)."""
    e = exp2(tl.minimum(update, LARGEST))
    c = exp2(tl.minimum(candidate, LARGEST))
    above = e + 1.0
    return (c * (h - e) + (h + e)) * reciprocal(c * above + above)


@inlined
def advance_pair(inputs, reset, shared, weights, pair: tl.constexpr, COUNT: tl.constexpr):
    """New hidden state of units 2 * pair and 2 * pair + 1."""
    zero = inputs[0] * 0.0
    b0, b1, b2, b3 = load_four(shared, BIAS + BIAS_UPDATE + 4 * pair)
    u0, u1, c0, c1 = zero + b0, zero + b1, zero + b2, zero + b3
    for row in tl.static_range(COUNT):
        w0, w1, w2, w3 = load_four(weights, UPDATE + (pair * ROWS + row) * 4)
        u0 = inputs[row] * w0 + u0
        u1 = inputs[row] * w1 + u1
        if row < HIDDEN:
            c0 = reset[row] * w2 + c0
            c1 = reset[row] * w3 + c1
        else:
            c0 = inputs[row] * w2 + c0
            c1 = inputs[row] * w3 + c1
    return new_unit(inputs[2 * pair], u0, c0), new_unit(inputs[2 * pair + 1], u1, c1)


@inlined
def accumulate(total, value, exists, THREADS: tl.constexpr):
    """Add a [BLOCK] vector, where it exists, to a [THREADS] one: the parameters of a thread are added first."""
    if value.shape[0] == THREADS:
        return total + value * exists
    return total + tl.sum(tl.reshape(value * exists, [value.shape[0] // THREADS, THREADS]), 0)


@inlined
def nearest(x):
    """To the nearest whole number, ties to even, where |x| < 2^22."""
    return (x + 12582912.0) - 12582912.0


@inlined
def load_hidden(address, offset, mask, weights, COMPACT: tl.constexpr):
    if COMPACT:
        _, _, step, _ = load_four(weights, SCALARS + 8)
        return tl.load(codes(address) + offset, mask=mask, other=0).to(tl.float32) * step
    return tl.load(floats(address) + offset, mask=mask, other=0.0)


@inlined
def store_hidden(address, offset, value, mask, weights, COMPACT: tl.constexpr):
    if COMPACT:
        _, _, _, steps = load_four(weights, SCALARS + 8)
        code = nearest(tl.minimum(tl.maximum(value * steps, -HIDDEN_STEPS), HIDDEN_STEPS))
        tl.store(codes(address) + offset, code.to(tl.int16), mask=mask)
    else:
        tl.store(floats(address) + offset, value, mask=mask)


@inlined
def load_averages(accum, ms, offset, mask, COMPACT: tl.constexpr):
    """Average and mean square of a timescale."""
    if COMPACT:
        code = tl.load(codes(ms) + offset, mask=mask, other=MS_ZERO).to(tl.float32)
        ratio = tl.load(accum.to(tl.pointer_type(tl.float16)) + offset, mask=mask, other=0.0).to(tl.float32)
        root = tl.where(code != MS_ZERO, exp2(code * (0.5 / MS_STEPS)), 0.0)
        return ratio * root, root * root
    return tl.load(floats(accum) + offset, mask=mask, other=0.0), tl.load(floats(ms) + offset, mask=mask, other=0.0)


@inlined
def store_averages(accum, ms, offset, average, square, mask, COMPACT: tl.constexpr):
    if COMPACT:
        code = nearest(log2(tl.minimum(tl.maximum(square, SMALLEST_MS), LARGEST_MS)) * MS_STEPS)
        code = tl.where(square > 0, code, MS_ZERO)
        ratio = average * exp2(code * (-0.5 / MS_STEPS))
        ratio = tl.minimum(tl.maximum(ratio, -LARGEST_RATIO), LARGEST_RATIO)
        tl.store(codes(ms) + offset, code.to(tl.int16), mask=mask)
        tl.store(accum.to(tl.pointer_type(tl.float16)) + offset, ratio.to(tl.float16), mask=mask)
    else:
        tl.store(floats(accum) + offset, average, mask=mask)
        tl.store(floats(ms) + offset, square, mask=mask)


@inlined
def advance_tile(
    totals,
    tensor,
    n,
    start,
    count,
    factor,
    weights,
    shared,
    update,
    attention_update,
    KIND: tl.constexpr,
    ATTENTION: tl.constexpr,
    DAMPED: tl.constexpr,
    GRADIENT_SHORTCUT: tl.constexpr,
    COUNT: tl.constexpr,
    COMPACT: tl.constexpr,
    BLOCK: tl.constexpr,
    THREADS: tl.constexpr,
):
    """Advance `count` <= BLOCK parameters from `start` on; returns `totals` with them added.

    totals: [THREADS] vectors: hidden state, features, direction^2, log lr; with ATTENTION its direction^2; if DAMPED
    gradient^2.
    tensor: addresses of grad (and its kind), hidden, accum, ms, log_lr, the last a pointer; each row has n numbers.
    """
    offset = tl.arange(0, BLOCK)
    mask = offset < count
    exists = mask.to(tl.float32)
    grad = load_kind(tensor[0], tensor[1], start + offset, mask, KIND) * factor
    hidden, accum, ms = (), (), ()
    for i in tl.static_range(HIDDEN):
        hidden = hidden + (load_hidden(tensor[2], (i * n + start) + offset, mask, weights, COMPACT),)
    for s in tl.static_range(TIMESCALES):
        average, square = load_averages(tensor[3], tensor[4], (s * n + start) + offset, mask, COMPACT)
        accum, ms = accum + (average,), ms + (square,)
    log_lr = tl.load(tensor[5] + start + offset, mask=mask, other=0.0)

    grad_decay, scale_decay = read_decays(hidden, shared, weights)
    accum, ms, features = scaled_averages(grad, accum, ms, grad_decay, scale_decay, shared, weights)
    for s in tl.static_range(TIMESCALES):
        store_averages(tensor[3], tensor[4], (s * n + start) + offset, accum[s], ms[s], mask, COMPACT)
    features = features + (log_lr - tl.load(shared + RELATIVE_TO),)
    if COUNT == ROWS:
        for s in tl.static_range(TIMESCALES - 1):
            features = features + (features[s] * features[s + 1],)
    inputs = hidden + features
    new_totals = ()
    reset = reset_hidden(inputs, shared, weights, COUNT)

    _, _, log_lr_bias, momentum = load_four(weights, SCALARS)
    direction, attention, log_step = grad * 0.0, grad * 0.0, log_lr + log_lr_bias
    for pair in tl.static_range(PAIRS):
        units = advance_pair(inputs, reset, shared, weights, pair, COUNT)
        for odd in tl.static_range(2):
            h = units[odd]
            store_hidden(tensor[2], ((2 * pair + odd) * n + start) + offset, h, mask, weights, COMPACT)
            to_direction, to_log_lr, to_attention, _ = load_four(weights, READOUT + (2 * pair + odd) * 4)
            direction = h * to_direction + direction
            log_step = h * to_log_lr + log_step
            if ATTENTION:
                attention = h * to_attention + attention
            new_totals = new_totals + (accumulate(totals[2 * pair + odd], h, exists, THREADS),)
    if GRADIENT_SHORTCUT:
        to_direction = load_four(weights, SHORTCUT)
        to_attention = load_four(weights, SHORTCUT + TIMESCALES)
        for s in tl.static_range(TIMESCALES):
            direction = features[s] * to_direction[s] + direction
            if ATTENTION:
                attention = features[s] * to_attention[s] + attention
    offset2, attention_factor, _, _ = load_four(weights, SCALARS + 4)
    log_step = tl.minimum(tl.maximum(log_step, tl.load(shared + LOWEST)), tl.load(shared + HIGHEST))
    fall = log_lr - log_step
    log_lr = tl.minimum(momentum * fall + log_step, tl.load(shared + RISING_MOMENTUM) * fall + log_step)
    tl.store(tensor[5] + start + offset, log_lr, mask=mask)
    step = exp2(log_step * 1.4426950408889634 + offset2)
    if DAMPED:  # what has had no gradient up to now stays
        largest = tl.abs(features[0])
        for s in tl.static_range(1, TIMESCALES):
            largest = tl.maximum(largest, tl.abs(features[s]))
        step = step * tl.minimum(largest * SEEN, 1.0)
    tl.store(update + start + offset, step * direction, mask=mask)

    for i in tl.static_range(COUNT - HIDDEN):
        new_totals = new_totals + (accumulate(totals[HIDDEN + i], features[i], exists, THREADS),)
    new_totals = new_totals + (accumulate(totals[COUNT], direction * direction, exists, THREADS),)
    new_totals = new_totals + (accumulate(totals[COUNT + 1], log_lr, exists, THREADS),)
    if ATTENTION:
        tl.store(attention_update + start + offset, (step * attention_factor) * attention, mask=mask)
        new_totals = new_totals + (accumulate(totals[COUNT + 2], attention * attention, exists, THREADS),)
    if DAMPED:
        new_totals = new_totals + (accumulate(totals[COUNT + 2 + ATTENTION], grad * grad, exists, THREADS),)
    return new_totals


@inlined
def store_partials(partials, totals, OTHERS: tl.constexpr, COUNT: tl.constexpr):
    """Sums over a chunk in the order of the sums table: hidden, features, then OTHERS as in `totals`.

    The kernel's features are in another order, and their logs relative to the last timescale's instead of to the mean.
    """
    for i in tl.static_range(HIDDEN + TIMESCALES):
        tl.store(partials + i, tl.sum(totals[i], 0))
    at = HIDDEN + TIMESCALES
    if COUNT == ROWS:
        for s in tl.static_range(TIMESCALES - 1):
            tl.store(partials + at + s, tl.sum(totals[HIDDEN + 8 + s], 0))
        at = at + TIMESCALES - 1
    log_ms = ()
    mean = 0.0
    for s in tl.static_range(TIMESCALES - 1):
        log_ms = log_ms + (tl.sum(totals[HIDDEN + TIMESCALES + s], 0) * -1.3862943611198906,)
        mean = mean + log_ms[s] * 0.25
    for s in tl.static_range(TIMESCALES - 1):
        tl.store(partials + at + s, log_ms[s] - mean)
    tl.store(partials + at + 3, -mean)
    tl.store(partials + at + 4, tl.sum(totals[HIDDEN + 7], 0))
    for i in tl.static_range(OTHERS):
        tl.store(partials + at + 5 + i, tl.sum(totals[COUNT + i], 0))


@inlined
def add_partials(partials, count, out, columns):
    """Sum of `count` rows of partial sums, in an order that depends on nothing but their number."""
    j = tl.arange(0, PARTIALS)
    total = tl.zeros([64, PARTIALS], tl.float32)
    for begin in range(0, count, 64):
        i = begin + tl.arange(0, 64)
        total += tl.load(
            partials + i[:, None] * PARTIALS + j[None, :],
            mask=(i < count)[:, None] & (j < columns)[None, :],
            other=0.0,
            cache_modifier=".cg",
        )
    tl.store(out + j, tl.sum(total, 0), mask=j < columns)


@triton.jit(do_not_specialize=["tensors"], do_not_specialize_on_alignment=POINTERS)
def advance(
    table,
    tensors,
    chunks,
    weights,
    shared,
    skip,
    grad_scale,
    update,
    attention_update,
    partials,
    tickets,
    sums,
    KIND: tl.constexpr,
    ATTENTION: tl.constexpr,
    DAMPED: tl.constexpr,
    GRADIENT_SHORTCUT: tl.constexpr,
    COUNT: tl.constexpr,
    COMPACT: tl.constexpr,
    BLOCK: tl.constexpr,
    THREADS: tl.constexpr,
):
    """A program per chunk.

    table: int64 [columns, tensors]. chunks: int32 [chunks], each one's tensor.
    weights: [WEIGHTS]. shared: [tensors, SHARED] of `prepare`. skip: [] other than 0: nothing is changed.
    update, attention_update: [n] of all tensors, written. partials: [chunks, PARTIALS], tickets: int32 [tensors], zero
    before and after. sums: [tensors, columns], written. COMPACT: the format of the state.
    """
    if tl.load(skip) != 0:
        return
    chunk = tl.program_id(0)
    tensor = tl.load(chunks + chunk)
    n = column(table, SIZE, tensors, tensor)
    size = column(table, CHUNK_SIZE, tensors, tensor)
    first = column(table, CHUNK_FIRST, tensors, tensor)
    begin = (chunk - first) * size
    end = tl.minimum(begin + size, n)
    factor = gradient_factor(grad_scale, column(table, SIGN, tensors, tensor))
    addresses = (
        column(table, GRAD, tensors, tensor),
        column(table, GRAD_KIND, tensors, tensor),
        column(table, HIDDEN_STATE, tensors, tensor),
        column(table, ACCUM, tensors, tensor),
        column(table, MS, tensors, tensor),
        floats(column(table, LOG_LR, tensors, tensor)),
    )
    shift = column(table, OFFSET, tensors, tensor)
    if ATTENTION:
        attention_update += shift
    totals = ()
    for _ in tl.static_range(COUNT + 2 + ATTENTION + DAMPED):
        totals = totals + (tl.zeros([THREADS], tl.float32),)
    for start in range(begin, end, BLOCK):
        totals = advance_tile(
            totals,
            addresses,
            n,
            start,
            (end - start).to(tl.int32),
            factor,
            weights,
            shared + tensor * SHARED,
            update + shift,
            attention_update,
            KIND,
            ATTENTION,
            DAMPED,
            GRADIENT_SHORTCUT,
            COUNT,
            COMPACT,
            BLOCK,
            THREADS,
        )
    store_partials(partials + chunk.to(tl.int64) * PARTIALS, totals, 2 + ATTENTION + DAMPED, COUNT)
    count = column(table, CHUNK_COUNT, tensors, tensor)
    if last_to_finish(tickets + tensor, count):
        columns = COUNT + 3 + ATTENTION + DAMPED
        add_partials(partials + first * PARTIALS, count.to(tl.int32), sums + tensor.to(tl.int64) * columns, columns)
        tl.store(tickets + tensor, 0)


@inlined
def gru(
    x,
    h,
    scratch,
    weights,
    from_above,
    INPUTS: tl.constexpr,
    UNITS: tl.constexpr,
    ABOVE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """New state [WIDTH] of a GRU whose reset gate multiplies the state before the matrix product.

    x: [INPUTS]. h: [UNITS], not written. scratch: [WIDTH].
    weights: gates [INPUTS + UNITS, 2 * UNITS] and bias, candidate [INPUTS + UNITS, UNITS] and bias and, with ABOVE > 0,
    injection [ABOVE, 3 * UNITS] and bias, one behind the other. from_above: [ABOVE], the state that is injected.
    """
    j = tl.arange(0, WIDTH)
    keep = j < UNITS
    gates_bias = weights + (INPUTS + UNITS) * 2 * UNITS
    candidate_weight = gates_bias + 2 * UNITS
    candidate_bias = candidate_weight + (INPUTS + UNITS) * UNITS
    reset = tl.load(gates_bias + j, mask=keep, other=0.0)
    update = tl.load(gates_bias + UNITS + j, mask=keep, other=0.0)
    candidate = tl.load(candidate_bias + j, mask=keep, other=0.0)
    if ABOVE > 0:
        injection = candidate_bias + UNITS
        injection_bias = injection + ABOVE * 3 * UNITS
        reset += tl.load(injection_bias + j, mask=keep, other=0.0)
        update += tl.load(injection_bias + UNITS + j, mask=keep, other=0.0)
        candidate += tl.load(injection_bias + 2 * UNITS + j, mask=keep, other=0.0)
        reset = add_product(reset, from_above, ABOVE, injection, 3 * UNITS, j, keep)
        update = add_product(update, from_above, ABOVE, injection + UNITS, 3 * UNITS, j, keep)
        candidate = add_product(candidate, from_above, ABOVE, injection + 2 * UNITS, 3 * UNITS, j, keep)
    reset = add_product(reset, x, INPUTS, weights, 2 * UNITS, j, keep)
    update = add_product(update, x, INPUTS, weights + UNITS, 2 * UNITS, j, keep)
    candidate = add_product(candidate, x, INPUTS, candidate_weight, UNITS, j, keep)
    hidden_rows = weights + INPUTS * 2 * UNITS
    reset = add_product(reset, h, UNITS, hidden_rows, 2 * UNITS, j, keep)
    update = add_product(update, h, UNITS, hidden_rows + UNITS, 2 * UNITS, j, keep)
    old = tl.load(h + j, mask=keep, other=0.0)
    tl.store(scratch + j, old * tl.sigmoid(reset), mask=keep)
    tl.debug_barrier()  # every thread reads all of it
    candidate = add_product(candidate, scratch, UNITS, candidate_weight + INPUTS * UNITS, UNITS, j, keep)
    update = tl.sigmoid(update)
    return update * old + (1.0 - update) * (2.0 * tl.sigmoid(2.0 * candidate) - 1.0)


@inlined
def damp(damping, square, taken, DAMPING: tl.constexpr, DECAY: tl.constexpr, LIMIT: tl.constexpr):
    """Factor of a tensor's steps from the mean square of its gradient and those before.

    damping: [3] moving sum of mean squares, moving sum of their weights, factor of rises; updated.
    taken: share of the step.
    """
    square = tl.minimum(square, LIMIT * LIMIT)
    total = DECAY * tl.load(damping) + (1.0 - DECAY) * square
    weight = DECAY * tl.load(damping + 1) + (1.0 - DECAY)
    tl.debug_barrier()  # every thread has read them
    ratio = tl.where(total > 0, square / total * weight, 0.0)
    factor = tl.minimum(tl.sqrt(ratio) / DAMPING, 1.0)
    tl.store(damping, total)
    tl.store(damping + 1, weight)
    tl.store(damping + 2, factor * taken)
    return factor


@inlined
def travel(distance, scale, update, places):
    """Take note of how far a tensor has come after its sampled parameters have moved.

    distance: [1 + SAMPLES] the largest so far, root mean square; how far each is; updated.
    update: [n] of all tensors. places: [SAMPLES] where in it they stand.
    """
    s = tl.arange(0, SAMPLES)
    away = tl.load(distance + 1 + s) + scale * tl.load(update + tl.load(places + s))
    largest = tl.maximum(tl.load(distance), tl.sqrt(tl.sum(away * away, 0) / SAMPLES))
    tl.debug_barrier()  # every thread has read them
    tl.store(distance + 1 + s, away)
    tl.store(distance, largest)


@inlined
def learning_rate(bits, kind):
    """Of two columns of a table: a number, or one in device memory."""
    if kind < 0:
        lr = bits.to(tl.float64, bitcast=True).to(tl.float32)
    elif kind == FLOAT32:
        lr = tl.load(floats(bits))
    elif kind == BFLOAT16:
        lr = tl.load(bits.to(tl.pointer_type(tl.bfloat16))).to(tl.float32)
    elif kind == FLOAT16:
        lr = tl.load(bits.to(tl.pointer_type(tl.float16))).to(tl.float32)
    else:
        lr = tl.load(bits.to(tl.pointer_type(tl.float64))).to(tl.float32)
    return lr


@triton.jit(do_not_specialize=["tensors"], do_not_specialize_on_alignment=POINTERS)
def summarise(
    table,
    tensors,
    sums,
    levels,
    global_hidden,
    update,
    places,
    skip,
    scale,
    scratch,
    ticket,
    EPS: tl.constexpr,
    DAMPING: tl.constexpr,
    DAMPING_DECAY: tl.constexpr,
    DISTANCE: tl.constexpr,
    LIMIT: tl.constexpr,
    INPUTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SQUARES: tl.constexpr,
    ATTENTION: tl.constexpr,
    TENSOR_SIZE: tl.constexpr,
    GLOBAL_SIZE: tl.constexpr,
    LAST: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A program per tensor.

    table: int64 [columns, tensors]. sums: [tensors, COLUMNS], SQUARES of which is the direction's.
    levels: weights of the tensor GRU, then of the global one. skip: [] other than 0: nothing is changed.
    scale: [tensors, 1 + ATTENTION], written. scratch: [tensors, 2, WIDTH]. ticket: int32 [], zero before and after.
    LAST: the global GRU reads the last tensor's state instead of the mean over the tensors.
    update: [n] of all tensors. places: [tensors, SAMPLES] where in it sampled parameters stand. DISTANCE: they count.
    DAMPING, DAMPING_DECAY: of the configuration. LIMIT: of gradients.
    """
    if tl.load(skip) != 0:
        return
    tensor = tl.program_id(0)
    row = sums + tensor.to(tl.int64) * COLUMNS
    own = scratch + tensor.to(tl.int64) * (2 * WIDTH)
    numel = column(table, SUMMARY_NUMEL, tensors, tensor).to(tl.float32)
    lr = learning_rate(column(table, SUMMARY_LR, tensors, tensor), column(table, SUMMARY_LR_KIND, tensors, tensor))
    taken = tl.minimum(tl.maximum(2.0 * lr, 0.0), 1.0)  # `share_taken` of the reference
    factor = 1.0
    if DAMPING > 0:
        damping = floats(column(table, SUMMARY_DAMPING, tensors, tensor))
        factor = damp(damping, tl.load(row + COLUMNS - 1) / numel, taken, DAMPING, DAMPING_DECAY, LIMIT)
    for i in tl.static_range(1 + ATTENTION):
        mean = tl.load(row + SQUARES + 2 * i) / numel
        tl.store(scale + tensor * (1 + ATTENTION) + i, factor / tl.sqrt(mean + EPS))
    if DISTANCE:
        distance = floats(column(table, SUMMARY_DISTANCE, tensors, tensor))
        move = taken * factor / tl.sqrt(tl.load(row + SQUARES) / numel + EPS)
        travel(distance, move, update, places + tensor.to(tl.int64) * SAMPLES)
    tl.store(floats(column(table, SUMMARY_LOG_LR_MEAN, tensors, tensor)), tl.load(row + SQUARES + 1) / numel)
    step = floats(column(table, SUMMARY_STEP, tensors, tensor))
    before = tl.load(step)
    tl.debug_barrier()  # every thread has read it
    tl.store(step, before + 1.0)
    if TENSOR_SIZE > 0:
        j = tl.arange(0, WIDTH)
        means = own + WIDTH
        tl.store(means + j, tl.load(row + j, mask=j < INPUTS, other=0.0) / numel, mask=j < INPUTS)
        tl.debug_barrier()
        h = floats(column(table, SUMMARY_TENSOR_HIDDEN, tensors, tensor))
        new = gru(means, h, own, levels, global_hidden, INPUTS, TENSOR_SIZE, GLOBAL_SIZE, WIDTH)
        tl.debug_barrier()
        tl.store(h + j, new, mask=j < TENSOR_SIZE)
        if GLOBAL_SIZE > 0:
            if last_to_finish(ticket, tensors):
                advance_global(
                    table, tensors, levels, global_hidden, scratch, INPUTS, TENSOR_SIZE, GLOBAL_SIZE, LAST, WIDTH
                )
                tl.store(ticket, 0)


@inlined
def advance_global(
    table,
    tensors,
    levels,
    global_hidden,
    scratch,
    INPUTS: tl.constexpr,
    TENSOR_SIZE: tl.constexpr,
    GLOBAL_SIZE: tl.constexpr,
    LAST: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The global GRU, from the new states of the tensors."""
    j = tl.arange(0, WIDTH)
    keep = j < TENSOR_SIZE
    states = table + SUMMARY_TENSOR_HIDDEN * tensors
    if LAST:
        x = tl.load(floats(tl.load(states + tensors - 1)) + j, mask=keep, other=0.0, cache_modifier=".cg")
    else:
        total = tl.zeros([16, WIDTH], tl.float32)
        for begin in range(0, tensors, 16):
            i = begin + tl.arange(0, 16)
            address = tl.load(states + i, mask=i < tensors, other=0)
            total += tl.load(
                floats(address)[:, None] + j[None, :],
                mask=(i < tensors)[:, None] & keep[None, :],
                other=0.0,
                cache_modifier=".cg",
            )
        x = tl.sum(total, 0) / tensors
    tl.store(scratch + WIDTH + j, x, mask=keep)
    tl.debug_barrier()
    level2 = levels + (INPUTS + TENSOR_SIZE + 1 + GLOBAL_SIZE + 1) * 3 * TENSOR_SIZE
    new = gru(scratch + WIDTH, global_hidden, scratch, level2, global_hidden, TENSOR_SIZE, GLOBAL_SIZE, 0, WIDTH)
    tl.debug_barrier()
    tl.store(global_hidden + j, new, mask=j < GLOBAL_SIZE)


@triton.jit(do_not_specialize=["tensors"], do_not_specialize_on_alignment=POINTERS)
def apply(
    table,
    tensors,
    chunks,
    update,
    attention_update,
    scale,
    skip,
    KIND: tl.constexpr,
    ATTENTION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program per chunk: p - min(1, lr * weight_decay * mean learned rate) * p - lr * scale * update.

    table: int64 [columns, tensors]. chunks: int32 [chunks], each one's tensor.
    update, attention_update, scale: of the kernels before. skip: [] other than 0: nothing is changed.
    With ATTENTION that is done to true_param, and the parameter becomes the point at which to take the next gradient.
    """
    if tl.load(skip) != 0:
        return
    chunk = tl.program_id(0)
    tensor = tl.load(chunks + chunk)
    size = column(table, PARAM_CHUNK_SIZE, tensors, tensor)
    begin = (chunk - column(table, PARAM_CHUNK_FIRST, tensors, tensor)) * size
    end = tl.minimum(begin + size, column(table, PARAM_SIZE, tensors, tensor))
    param, kind = column(table, PARAM, tensors, tensor), column(table, PARAM_KIND, tensors, tensor)
    lr = learning_rate(column(table, LR, tensors, tensor), column(table, LR_KIND, tensors, tensor))
    weight_decay = column(table, WEIGHT_DECAY, tensors, tensor).to(tl.float64, bitcast=True).to(tl.float32)
    learned = tl.exp(tl.load(floats(column(table, PARAM_LOG_LR_MEAN, tensors, tensor))))
    decay = tl.where(weight_decay > 0, tl.minimum(lr * weight_decay * learned, 1.0), 0.0)
    shift = column(table, PARAM_OFFSET, tensors, tensor)
    step = lr * tl.load(scale + tensor * (1 + ATTENTION))
    if ATTENTION:
        attention_step = lr * tl.load(scale + tensor * 2 + 1)
        true_param = floats(column(table, TRUE_PARAM, tensors, tensor))
    for start in range(begin, end, BLOCK):
        offset = start + tl.arange(0, BLOCK)
        mask = offset < end
        moved = tl.load(update + shift + offset, mask=mask, other=0.0) * step
        if ATTENTION:
            old = tl.load(true_param + offset, mask=mask, other=0.0)
            kept = decayed(old, decay)
            attended = kept - tl.load(attention_update + shift + offset, mask=mask, other=0.0) * attention_step
            tl.store(true_param + offset, kept - moved, mask=mask)
            store_kind(param, kind, offset, attended, mask, KIND)
        elif KIND == FLOAT64:
            move_float64(param, offset, moved, decay, mask)
        elif KIND == MIXED:
            if kind == FLOAT64:
                move_float64(param, offset, moved, decay, mask)
            else:
                old = load_kind(param, kind, offset, mask, KIND)
                store_kind(param, kind, offset, decayed(old, decay) - moved, mask, KIND)
        else:
            old = load_kind(param, kind, offset, mask, KIND)
            store_kind(param, kind, offset, decayed(old, decay) - moved, mask, KIND)


@inlined
def decayed(old, decay):
    """Infinite parameters stay so where nothing decays."""
    return tl.where(decay > 0, old - old * decay, old)


@inlined
def move_float64(param, offset, moved, decay, mask):
    address = param.to(tl.pointer_type(tl.float64)) + offset
    old = tl.load(address, mask=mask, other=0.0)
    tl.store(address, decayed(old, decay.to(tl.float64)) - moved.to(tl.float64), mask=mask)
