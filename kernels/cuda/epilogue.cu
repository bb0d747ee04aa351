// The epilogue of a layer in one pass over the activation, forward and backward (channel.cuh says what it is). bias_act
// is the case of a bias alone.
//
// A thread keeps a channel's operands in registers and walks along its pixels. Sums over pixels are made per block in a
// fixed order and added up by the caller, so that the same input always gives the same bits.
#include "epilogue_params.cuh"
#include "sums.cuh"

constexpr int IN_FLIGHT = 4;  // vectors that a thread fetches before it uses the first
constexpr int PAIRS_IN_FLIGHT = 2;

// --- rows: x [N, pixels, C]; a block is blockDim.x vectors of V channels by blockDim.y pixels ---

struct RowsPlace {
    int64 image, first, last;  // pixels [first, last) of the image, of which this thread takes every blockDim.y-th
    int chunk, channel;
    bool active;

    template <typename P> DEVICE RowsPlace(const P& p, int V) {
        const int block = blockIdx.x / p.tiles;
        image = block / p.chunks;
        chunk = block % p.chunks;
        const int64 start = int64(chunk) * p.pixels_per_block;
        first = start + threadIdx.y;
        last = smaller(start + p.pixels_per_block, p.pixels);
        channel = (blockIdx.x % p.tiles * blockDim.x + threadIdx.x) * V;
        active = channel < p.channels;
    }
};

template <bool CURVED, int V> DEVICE void epilogue_rows(const EpilogueParams& p) {
    const RowsPlace at(p, V);
    if (!at.active) return;
    Channels<V> channels;
    channels.load(p.operands, at.image, p.channels, at.channel);
    const Real strength = strength_of(p.operands);
    const int64 base = at.image * p.pixels * p.channels + at.channel;
    for (int64 pixel = at.first; pixel < at.last; pixel += IN_FLIGHT * blockDim.y) {
        Vec<Scalar, V> raw[IN_FLIGHT];
        Real noise[IN_FLIGHT];
        UNROLL for (int k = 0; k < IN_FLIGHT; k++) {
            const int64 row = smaller(pixel + k * blockDim.y, at.last - 1);  // the last again, rather than a branch
            raw[k] = fetch<V>(p.x + base + row * p.channels);
            noise[k] = noise_at(p.operands, at.image, row);
        }
        UNROLL for (int k = 0; k < IN_FLIGHT; k++) {
            const int64 row = pixel + k * blockDim.y;
            Real x[V];
            widen<V>(raw[k], x);
            forward<CURVED, V>(p.operands, channels, x, strength * noise[k]);
            multiply<V>(x, channels.next_scale);
            if (row < at.last) store<V>(p.y + base + row * p.channels, x);
        }
    }
}

KERNEL(epilogue_rows_vector, EpilogueParams, THREADS) { epilogue_rows<false, VECTOR>(p); }
KERNEL(epilogue_rows_single, EpilogueParams, THREADS) { epilogue_rows<false, 1>(p); }
KERNEL(epilogue_curved_rows_vector, EpilogueParams, THREADS) { epilogue_rows<true, VECTOR>(p); }
KERNEL(epilogue_curved_rows_single, EpilogueParams, THREADS) { epilogue_rows<true, 1>(p); }

template <int V, class P> DEVICE void load_rgb_weight(const P& p, const RowsPlace& at, Real (&weight)[RGB][V]) {
    UNROLL for (int k = 0; k < RGB; k++) {
        const Real* from = p.operands.rgb_weight + (at.image * RGB + k) * p.channels + at.channel;
        UNROLL for (int i = 0; i < V; i++) weight[k][i] = from[i];
    }
}

// With rgb beside it, for straight activations: one block holds all channels of its pixels, and adds up their shares in shared memory.
COOPERATIVE_KERNEL(epilogue_rgb_rows_vector, EpilogueParams, THREADS) {
    SHARED Real shares[IN_FLIGHT * RGB * (THREADS + THREADS / 2)];  // a row of blockDim.x + 1, against bank conflicts
    const RowsPlace at(p, VECTOR);
    Channels<VECTOR> channels;
    channels.load(p.operands, at.image, p.channels, at.channel);
    Real weight[RGB][VECTOR];
    load_rgb_weight<VECTOR>(p, at, weight);
    const Real strength = strength_of(p.operands);
    const int64 base = at.image * p.pixels * p.channels + at.channel;
    const int lanes = blockDim.x, pitch = lanes + 1, rows = blockDim.y;
    for (int64 start = at.first - threadIdx.y; start < at.last; start += IN_FLIGHT * rows) {
        Vec<Scalar, VECTOR> raw[IN_FLIGHT];
        Real noise[IN_FLIGHT];
        UNROLL for (int k = 0; k < IN_FLIGHT; k++) {
            const int64 row = smaller(start + threadIdx.y + k * rows, at.last - 1);
            raw[k] = fetch<VECTOR>(p.x + base + row * p.channels);
            noise[k] = noise_at(p.operands, at.image, row);
        }
        UNROLL for (int k = 0; k < IN_FLIGHT; k++) {
            const int64 row = start + threadIdx.y + k * rows;
            Real x[VECTOR];
            widen<VECTOR>(raw[k], x);
            forward<false, VECTOR>(p.operands, channels, x, strength * noise[k]);
            UNROLL for (int j = 0; j < RGB; j++) {
                Real share = 0;
                UNROLL for (int i = 0; i < VECTOR; i++) share += x[i] * weight[j][i];
                shares[((k * rows + threadIdx.y) * RGB + j) * pitch + threadIdx.x] = share;
            }
            multiply<VECTOR>(x, channels.next_scale);
            if (row < at.last) store<VECTOR>(p.y + base + row * p.channels, x);
        }
        __syncthreads();
        // Shares lie in the order of the image's pixels: the sums are consecutive in rgb.
        const int sums = int(smaller(at.last - start, int64(IN_FLIGHT) * rows)) * RGB;
        for (int i = threadIdx.y * lanes + threadIdx.x; i < sums; i += lanes * rows) {
            Real sum = 0;
            for (int lane = 0; lane < lanes; lane++) sum += shares[i * pitch + lane];
            p.rgb[(at.image * p.pixels + start) * RGB + i] = sum;
        }
        __syncthreads();
    }
}

template <bool CURVED, int V, bool WITH_RGB> DEVICE void epilogue_backward_rows(const EpilogueBackwardParams& p) {
    SHARED Real scratch[THREADS * V];
    const RowsPlace at(p, V);
    Channels<V> channels;
    ChannelSums<V> sums;
    Real weight[RGB][V] = {}, rgb_sums[RGB][V] = {};
    if (at.active) {
        channels.load(p.operands, at.image, p.channels, at.channel);
        if (WITH_RGB) load_rgb_weight<V>(p, at, weight);
        const Real strength = strength_of(p.operands);
        const int64 base = at.image * p.pixels * p.channels + at.channel;
        for (int64 pixel = at.first; pixel < at.last; pixel += PAIRS_IN_FLIGHT * blockDim.y) {
            Vec<Scalar, V> raw_x[PAIRS_IN_FLIGHT], raw_dy[PAIRS_IN_FLIGHT];
            Real noise[PAIRS_IN_FLIGHT], drgb[PAIRS_IN_FLIGHT][RGB] = {};
            UNROLL for (int k = 0; k < PAIRS_IN_FLIGHT; k++) {
                const int64 row = smaller(pixel + k * blockDim.y, at.last - 1);
                raw_x[k] = fetch<V>(p.ref + base + row * p.channels);
                raw_dy[k] = fetch<V>(p.dy + base + row * p.channels);
                noise[k] = noise_at(p.operands, at.image, row);
                if (WITH_RGB) {
                    UNROLL for (int j = 0; j < RGB; j++) drgb[k][j] = p.drgb[(at.image * p.pixels + row) * RGB + j];
                }
            }
            UNROLL for (int k = 0; k < PAIRS_IN_FLIGHT; k++) {
                const int64 row = pixel + k * blockDim.y;
                const bool again = row >= at.last;  // then nothing may be added to the sums
                Real x[V], dy[V], dv[V] = {};
                widen<V>(raw_x[k], x);
                widen<V>(raw_dy[k], dy);
                UNROLL for (int i = 0; i < V; i++) dy[i] = again ? Real(0) : dy[i];
                if (WITH_RGB) {
                    UNROLL for (int j = 0; j < RGB; j++) {
                        drgb[k][j] = again ? Real(0) : drgb[k][j];
                        UNROLL for (int i = 0; i < V; i++) dv[i] += drgb[k][j] * weight[j][i];
                    }
                }
                backward<CURVED, V>(p.operands, channels, x, dy, noise[k], strength, dv, p.ref_is_output, sums);
                if (WITH_RGB) {
                    UNROLL for (int j = 0; j < RGB; j++)
                        UNROLL for (int i = 0; i < V; i++) rgb_sums[j][i] += drgb[k][j] * dv[i];
                }
                if (!again) store<V>(p.dx + base + row * p.channels, dy);
            }
        }
    }
    const int64 block = at.image * p.chunks + at.chunk;
    write_column_sums<V>(p.sums, sums, scratch, block * p.channels + at.channel, at.active);
    if (WITH_RGB && p.sums.rgb_weight) {
        UNROLL for (int k = 0; k < RGB; k++)
            write_column_sums<V>(p.sums.rgb_weight + (block * RGB + k) * p.channels + at.channel, rgb_sums[k], scratch,
                                 at.active);
    }
}

COOPERATIVE_KERNEL(epilogue_backward_rows_vector, EpilogueBackwardParams, THREADS) {
    epilogue_backward_rows<false, NARROW, false>(p);
}
COOPERATIVE_KERNEL(epilogue_backward_rows_single, EpilogueBackwardParams, THREADS) {
    epilogue_backward_rows<false, 1, false>(p);
}
COOPERATIVE_KERNEL(epilogue_backward_curved_rows_vector, EpilogueBackwardParams, THREADS) {
    epilogue_backward_rows<true, NARROW, false>(p);
}
COOPERATIVE_KERNEL(epilogue_backward_curved_rows_single, EpilogueBackwardParams, THREADS) {
    epilogue_backward_rows<true, 1, false>(p);
}
COOPERATIVE_KERNEL(epilogue_backward_rgb_rows_vector, EpilogueBackwardParams, THREADS) {
    epilogue_backward_rows<false, NARROW, true>(p);
}

// --- planes: x [N, C, pixels]; a block is blockDim.x vectors of V pixels by blockDim.y planes ---

struct PlanesPlace {
    int64 plane, image, first, last;  // pixels [first, last) of the plane; this thread's vectors are blockDim.x apart
    int chunk, channel;
    bool active;

    template <typename P> DEVICE PlanesPlace(const P& p, int V) {
        chunk = blockIdx.x % p.chunks;
        plane = int64(blockIdx.x / p.chunks) * blockDim.y + threadIdx.y;
        active = plane < p.images * p.channels;
        image = plane / p.channels;
        channel = int(plane - image * p.channels);
        const int64 start = int64(chunk) * p.pixels_per_block;
        first = start + threadIdx.x * V;
        last = smaller(start + p.pixels_per_block, p.pixels);
    }
};

template <bool CURVED, int V> DEVICE void epilogue_planes(const EpilogueParams& p) {
    const PlanesPlace at(p, V);
    if (!at.active) return;
    Channels<1> channel;
    channel.load(p.operands, at.image, p.channels, at.channel);
    const Real strength = strength_of(p.operands);
    const int64 base = at.plane * p.pixels;
    const int step = blockDim.x * V;
    for (int64 start = at.first; start < at.last; start += IN_FLIGHT * step) {
        Vec<Scalar, V> raw[IN_FLIGHT];
        UNROLL for (int k = 0; k < IN_FLIGHT; k++)
            raw[k] = fetch<V>(p.x + base + smaller(start + k * step, at.last - V));
        UNROLL for (int k = 0; k < IN_FLIGHT; k++) {
            const int64 pixel = start + k * step, within = smaller(pixel, at.last - V);
            Real x[V];
            widen<V>(raw[k], x);
            UNROLL for (int i = 0; i < V; i++) {
                const Real addend = strength * noise_at(p.operands, at.image, within + i) + channel.bias[0];
                x[i] = response_of<CURVED>(p.operands, x[i] * channel.scale[0] + addend).v * channel.next_scale[0];
            }
            if (pixel < at.last) store<V>(p.y + base + pixel, x);
        }
    }
}

KERNEL(epilogue_planes_vector, EpilogueParams, THREADS) { epilogue_planes<false, VECTOR>(p); }
KERNEL(epilogue_planes_single, EpilogueParams, THREADS) { epilogue_planes<false, 1>(p); }
KERNEL(epilogue_curved_planes_vector, EpilogueParams, THREADS) { epilogue_planes<true, VECTOR>(p); }
KERNEL(epilogue_curved_planes_single, EpilogueParams, THREADS) { epilogue_planes<true, 1>(p); }

// Add up `value` over a block's columns, a power of two, and let the first of them write each row's sum.
DEVICE void write_row_sum(Real* to, Real value, Real* scratch, bool active) {
    if (!to) return;
    Real* row = scratch + threadIdx.y * blockDim.x;
    row[threadIdx.x] = value;
    __syncthreads();
    for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) row[threadIdx.x] += row[threadIdx.x + half];
        __syncthreads();
    }
    if (active && threadIdx.x == 0) *to = row[0];  // which no other thread touches, so the next sum may follow at once
}

template <bool CURVED, int V> DEVICE void epilogue_backward_planes(const EpilogueBackwardParams& p) {
    SHARED Real scratch[THREADS];
    const PlanesPlace at(p, V);
    ChannelSums<1> sums;
    if (at.active) {
        Channels<1> channel;
        channel.load(p.operands, at.image, p.channels, at.channel);
        const Real strength = strength_of(p.operands);
        const int64 base = at.plane * p.pixels;
        const int step = blockDim.x * V;
        for (int64 start = at.first; start < at.last; start += PAIRS_IN_FLIGHT * step) {
            Vec<Scalar, V> raw_x[PAIRS_IN_FLIGHT], raw_dy[PAIRS_IN_FLIGHT];
            UNROLL for (int k = 0; k < PAIRS_IN_FLIGHT; k++) {
                const int64 pixel = smaller(start + k * step, at.last - V);
                raw_x[k] = fetch<V>(p.ref + base + pixel);
                raw_dy[k] = fetch<V>(p.dy + base + pixel);
            }
            UNROLL for (int k = 0; k < PAIRS_IN_FLIGHT; k++) {
                const int64 pixel = start + k * step, within = smaller(pixel, at.last - V);
                const bool again = pixel >= at.last;
                Real dx[V];
                UNROLL for (int i = 0; i < V; i++) {
                    const Real x[1] = {widen(raw_x[k].at[i])}, noise = noise_at(p.operands, at.image, within + i);
                    Real dy[1] = {again ? Real(0) : widen(raw_dy[k].at[i])}, dv[1] = {};
                    backward<CURVED, 1>(p.operands, channel, x, dy, noise, strength, dv, p.ref_is_output, sums);
                    dx[i] = dy[0];
                }
                if (!again) store<V>(p.dx + base + pixel, dx);
            }
        }
    }
    const int64 index = at.plane * p.chunks + at.chunk;
    write_row_sum(p.sums.scale ? p.sums.scale + index : nullptr, sums.scale[0], scratch, at.active);
    write_row_sum(p.sums.bias ? p.sums.bias + index : nullptr, sums.bias[0], scratch, at.active);
    write_row_sum(p.sums.next_scale ? p.sums.next_scale + index : nullptr, sums.next_scale[0], scratch, at.active);
    write_row_sum(p.sums.noise_strength ? p.sums.noise_strength + index : nullptr, sums.noise_strength[0], scratch,
                  at.active);
}

COOPERATIVE_KERNEL(epilogue_backward_planes_vector, EpilogueBackwardParams, THREADS) {
    epilogue_backward_planes<false, VECTOR>(p);
}
COOPERATIVE_KERNEL(epilogue_backward_planes_single, EpilogueBackwardParams, THREADS) {
    epilogue_backward_planes<false, 1>(p);
}
COOPERATIVE_KERNEL(epilogue_backward_curved_planes_vector, EpilogueBackwardParams, THREADS) {
    epilogue_backward_planes<true, VECTOR>(p);
}
COOPERATIVE_KERNEL(epilogue_backward_curved_planes_single, EpilogueBackwardParams, THREADS) {
    epilogue_backward_planes<true, 1>(p);
}
