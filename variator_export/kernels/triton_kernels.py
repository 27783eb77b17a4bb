"""The compression plugin as two kernels in Triton: one in front of the feed-forward network, one behind it.

As exported, a plugin takes eight kernels in each layer. Each costs two to three microseconds, and reads and
writes all hidden vectors. These two read them as often as they must: `compress` once from memory (and once
more from the cache), `decompress` once.

Sizes: W windows of the whole batch, k ratio, d hidden size, m bottleneck size. All arrays are contiguous.
Products are added in float32. Of what is in between, `projected` and the tanh are rounded to the type of the
arrays, for memory and for tensor cores.

The order of the arguments (inputs, sizes, outputs) is that of TensorRT's plugins.
"""

import triton
import triton.language as tl


@triton.jit
def _rows(num_windows, RATIO: tl.constexpr, PADDED_RATIO: tl.constexpr, WINDOWS: tl.constexpr):
    """Rows of a program: PADDED_RATIO for each of its windows. Gives tokens, windows and what is there."""
    row = tl.arange(0, WINDOWS * PADDED_RATIO)
    window = tl.program_id(0) * WINDOWS + row // PADDED_RATIO
    position = row % PADDED_RATIO
    there = (window < num_windows) & (position < RATIO)
    window = window.to(tl.int64)  # offsets may exceed 32 bits
    return window * RATIO + position, window, there


@triton.jit
def _product(left, right, added, PRECISION: tl.constexpr):
    """`added + left @ right` in float32. `wide` is for Triton's interpreter: it has no bfloat16 products."""
    if PRECISION == "wide":
        return tl.dot(left.to(tl.float32), right.to(tl.float32), added, input_precision="ieee")
    return tl.dot(left, right, added, input_precision=PRECISION)


@triton.jit
def compress_kernel(
    x,  # (W, k, d)
    keep,  # (W, k), not 0 for vectors that are included; not read without MASKED
    weight,  # (k, k * d)
    bias,  # (k,)
    down,  # (m, 2 * d), of which the second half of the columns is read
    num_windows,
    compressed,  # (W, d)
    projected,  # (W, k, m)
    HIDDEN: tl.constexpr,
    RATIO: tl.constexpr,
    BOTTLENECK: tl.constexpr,
    MASKED: tl.constexpr,
    PADDED_RATIO: tl.constexpr,
    PADDED_BOTTLENECK: tl.constexpr,
    WINDOWS: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Weigh the vectors of each window by a softmax, add them, and multiply all of them by half of `down`."""
    token, window, there = _rows(num_windows, RATIO, PADDED_RATIO, WINDOWS)
    ROWS: tl.constexpr = WINDOWS * PADDED_RATIO
    # A row is multiplied by the weights of all positions, and its own are selected after that: rows of one
    # window at different positions are then one product.
    SCORES: tl.constexpr = max(PADDED_RATIO * PADDED_RATIO, 16)
    column = tl.arange(0, SCORES)
    of_position, score = column // PADDED_RATIO, column % PADDED_RATIO
    scored = (of_position < RATIO) & (score < RATIO)
    unit = tl.arange(0, PADDED_BOTTLENECK)
    scores = tl.zeros((ROWS, SCORES), tl.float32)
    products = tl.zeros((ROWS, PADDED_BOTTLENECK), tl.float32)
    for start in range(0, HIDDEN, CHUNK):
        feature = start + tl.arange(0, CHUNK)
        inside = feature < HIDDEN
        vectors = tl.load(
            x + token[:, None] * HIDDEN + feature[None, :], mask=there[:, None] & inside[None, :], other=0.0
        )
        weights = tl.load(
            weight + (score * RATIO + of_position)[None, :] * HIDDEN + feature[:, None],
            mask=scored[None, :] & inside[:, None],
            other=0.0,
        )
        half = tl.load(
            down + unit[None, :] * (2 * HIDDEN) + HIDDEN + feature[:, None],
            mask=(unit < BOTTLENECK)[None, :] & inside[:, None],
            other=0.0,
        )
        scores = _product(vectors, weights, scores, PRECISION)
        products = _product(vectors, half, products, PRECISION)
    tl.store(
        projected + token[:, None] * BOTTLENECK + unit[None, :],
        products.to(projected.dtype.element_ty),
        mask=there[:, None] & (unit < BOTTLENECK)[None, :],
    )

    included = there
    if MASKED:
        included = there & (tl.load(keep + token, mask=there, other=0) != 0)
    own = (of_position[None, :] == (tl.arange(0, ROWS) % PADDED_RATIO)[:, None]) & included[:, None]
    own_scores = tl.sum(
        tl.reshape(tl.where(own, scores, 0.0), (WINDOWS, PADDED_RATIO, SCORES // PADDED_RATIO, PADDED_RATIO)),
        axis=2,
    )  # (WINDOWS, position that is read, score)
    position = tl.arange(0, PADDED_RATIO)
    sums = tl.sum(own_scores, axis=1) + tl.load(bias + position, mask=position < RATIO, other=0.0)[None, :]
    included = tl.reshape(included.to(tl.int32), (WINDOWS, PADDED_RATIO)) != 0
    sums = tl.where(included, sums, -float("inf"))
    # A window without any vector becomes zeros.
    highest = tl.max(sums, axis=1)
    highest = tl.where(highest == -float("inf"), 0.0, highest)
    shares = tl.exp(sums - highest[:, None])
    total = tl.sum(shares, axis=1)
    shares = shares / tl.where(total == 0.0, 1.0, total)[:, None]

    first = (tl.program_id(0) * WINDOWS + tl.arange(0, WINDOWS)).to(tl.int64)
    tokens = first[:, None] * RATIO + position[None, :]
    for start in range(0, HIDDEN, CHUNK):
        feature = start + tl.arange(0, CHUNK)
        inside = feature < HIDDEN
        vectors = tl.load(
            x + tokens[:, :, None] * HIDDEN + feature[None, None, :],
            mask=included[:, :, None] & inside[None, None, :],
            other=0.0,
        )
        added = tl.sum(vectors.to(tl.float32) * shares[:, :, None], axis=1)
        tl.store(
            compressed + first[:, None] * HIDDEN + feature[None, :],
            added.to(compressed.dtype.element_ty),
            mask=(first < num_windows)[:, None] & inside[None, :],
        )


@triton.jit
def _adapted(
    tanh,
    y,
    x,
    up,
    up_bias,
    token,
    window,
    there,
    start,
    HIDDEN: tl.constexpr,
    BOTTLENECK: tl.constexpr,
    PADDED_BOTTLENECK: tl.constexpr,
    RESIDUAL: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Some features of `y + up(tanh)`, and of x added to it: float32 (rows, CHUNK)."""
    feature = start + tl.arange(0, CHUNK)
    inside = feature < HIDDEN
    unit = tl.arange(0, PADDED_BOTTLENECK)
    weights = tl.load(
        up + feature[None, :] * BOTTLENECK + unit[:, None],
        mask=inside[None, :] & (unit < BOTTLENECK)[:, None],
        other=0.0,
    )
    mask = there[:, None] & inside[None, :]
    result = tl.zeros((tanh.shape[0], CHUNK), tl.float32)
    result = _product(tanh, weights, result, PRECISION)
    result += tl.load(up_bias + feature, mask=inside, other=0.0).to(tl.float32)[None, :]
    result += tl.load(y + window[:, None] * HIDDEN + feature[None, :], mask=mask, other=0.0).to(tl.float32)
    if RESIDUAL:
        result += tl.load(x + token[:, None] * HIDDEN + feature[None, :], mask=mask, other=0.0).to(tl.float32)
    return result


@triton.jit
def decompress_kernel(
    y,  # (W, d)
    x,  # (W, k, d); not read without RESIDUAL
    projected,  # (W, k, m)
    down,  # (m, 2 * d), of which the first half of the columns is read
    down_bias,  # (m,)
    up,  # (d, m)
    up_bias,  # (d,)
    norm_weight,  # (d,); not read without NORM
    norm_bias,  # (d,); not read without NORM
    num_windows,
    result,  # (W, k, d)
    HIDDEN: tl.constexpr,
    RATIO: tl.constexpr,
    BOTTLENECK: tl.constexpr,
    RESIDUAL: tl.constexpr,
    NORM: tl.constexpr,
    EPSILON: tl.constexpr,
    PADDED_RATIO: tl.constexpr,
    PADDED_BOTTLENECK: tl.constexpr,
    WINDOWS: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adapt a copy of y to each token; add x (RESIDUAL), and normalize the sum (NORM, a layer norm)."""
    token, window, there = _rows(num_windows, RATIO, PADDED_RATIO, WINDOWS)
    ROWS: tl.constexpr = WINDOWS * PADDED_RATIO
    unit = tl.arange(0, PADDED_BOTTLENECK)
    of_unit = there[:, None] & (unit < BOTTLENECK)[None, :]
    inner = tl.load(projected + token[:, None] * BOTTLENECK + unit[None, :], mask=of_unit, other=0.0)
    inner = inner.to(tl.float32) + tl.load(down_bias + unit, mask=unit < BOTTLENECK, other=0.0)[None, :]
    for start in range(0, HIDDEN, CHUNK):
        feature = start + tl.arange(0, CHUNK)
        inside = feature < HIDDEN
        copies = tl.load(
            y + window[:, None] * HIDDEN + feature[None, :], mask=there[:, None] & inside[None, :], other=0.0
        )
        half = tl.load(
            down + unit[None, :] * (2 * HIDDEN) + feature[:, None],
            mask=(unit < BOTTLENECK)[None, :] & inside[:, None],
            other=0.0,
        )
        inner = _product(copies, half, inner, PRECISION)
    # tanh by the sigmoid: exact where it is rounded to 16 bits, and to 1e-7 in float32.
    tanh = (2.0 * tl.sigmoid(2.0 * inner) - 1.0).to(up.dtype.element_ty)

    if NORM:
        # Chan's update of mean and sum of squares (Welford's by chunks): a difference of large sums would
        # lose digits.
        mean = tl.zeros((ROWS,), tl.float32)
        squares = tl.zeros((ROWS,), tl.float32)
        for start in range(0, HIDDEN, CHUNK):
            values = _adapted(
                tanh, y, x, up, up_bias, token, window, there, start,
                HIDDEN, BOTTLENECK, PADDED_BOTTLENECK, RESIDUAL, CHUNK, PRECISION,
            )  # fmt: skip
            inside = (start + tl.arange(0, CHUNK)) < HIDDEN
            count = tl.minimum(HIDDEN - start, CHUNK).to(tl.float32)
            of_chunk = tl.sum(tl.where(inside[None, :], values, 0.0), axis=1) / count
            away = tl.where(inside[None, :], values - of_chunk[:, None], 0.0)
            delta = of_chunk - mean
            together = start + count
            squares += tl.sum(away * away, axis=1) + delta * delta * (start * count / together)
            mean += delta * (count / together)
        scale = 1.0 / tl.sqrt(squares / HIDDEN + EPSILON)

    for start in range(0, HIDDEN, CHUNK):
        values = _adapted(
            tanh, y, x, up, up_bias, token, window, there, start,
            HIDDEN, BOTTLENECK, PADDED_BOTTLENECK, RESIDUAL, CHUNK, PRECISION,
        )  # fmt: skip
        feature = start + tl.arange(0, CHUNK)
        inside = feature < HIDDEN
        if NORM:
            factor = tl.load(norm_weight + feature, mask=inside, other=0.0).to(tl.float32)
            shift = tl.load(norm_bias + feature, mask=inside, other=0.0).to(tl.float32)
            values = (values - mean[:, None]) * scale[:, None] * factor[None, :] + shift[None, :]
        tl.store(
            result + token[:, None] * HIDDEN + feature[None, :],
            values.to(result.dtype.element_ty),
            mask=there[:, None] & inside[None, :],
        )
