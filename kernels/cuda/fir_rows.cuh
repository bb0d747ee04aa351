// Separable upfirdn2d in the rows layout (channels_last), one pass: out = gain * FIR(zero-inserted, padded x).
//
// A thread owns V channels of two neighbouring output columns and walks down a strip of rows. Each input row is filtered
// horizontally in registers and added to the output rows that it reaches; a finished output row is handed to the stage.
// So an input is read from memory once, and from the first-level cache a few times more.
//
// Along one axis, with taps f in the order of a correlation and padding p in front,
//     out[o] = sum over k of f[k] * up[o * DOWN + k - p],   up[j] = x[j / UP] where UP divides j, else 0.
// With UP = 2 outputs go in pairs m: 2m - 1 + p takes the odd taps of x[m], x[m + 1], ... and 2m + p the even ones.
#pragma once

#include "sums.cuh"

struct FirParams {
    const Scalar* x;
    Scalar* y;
    const Real* f;  // [taps], both axes
    Real gain;
    int channels;
    int in_h, in_w, out_h, out_w;
    int taps, flip_filter;  // 0: a convolution, so the taps are read backwards
    int pad_x, pad_y;       // in front
    int first_pair_x, first_pair_y;  // with UP = 2, the pair m that holds output 0
    int lines, lines_per_strip;      // output rows, or pairs of them
    int tiles;                       // blocks along the channels
};

template <int TAPS> DEVICE void load_taps(const FirParams& p, Real (&f)[TAPS]) {
    UNROLL for (int k = 0; k < TAPS; k++) f[k] = k < p.taps ? p.f[p.flip_filter ? k : p.taps - 1 - k] : Real(0);
}

// A thread's place: channels [channel, channel + V), column pair `pair`, lines [line, line_end) of `image`.
struct FirPlace {
    int64 image, block;  // `block` numbers the blocks that share their channels
    int channel, pair, line, line_end;
    bool active;

    DEVICE FirPlace(const FirParams& p, int V) {
        image = blockIdx.z;
        const int group = blockIdx.x / p.tiles, tile = blockIdx.x % p.tiles;
        channel = (tile * blockDim.x + threadIdx.x) * V;
        pair = group * blockDim.y + threadIdx.y;
        line = blockIdx.y * p.lines_per_strip;
        line_end = smaller(line + p.lines_per_strip, p.lines);
        block = (image * gridDim.y + blockIdx.y) * (gridDim.x / p.tiles) + group;
        active = channel < p.channels;
    }
};

// Offset of channel 0 of pixel (row, column) of an image in a tensor of height h and width w.
DEVICE int64 pixel_offset(int64 image, int row, int column, int h, int w, int channels) {
    return ((image * h + row) * w + column) * channels;
}

// Which tap meets which sample; -1 for none.
template <int UP, int DOWN, int TAPS> struct Factors {
    static_assert(UP * DOWN <= 2, "general factors have a kernel of their own");
    static constexpr int DEPTH = TAPS / (UP * DOWN);               // lines that one input row reaches
    static constexpr int SPAN = UP == 2 ? TAPS / 2 : TAPS + DOWN;  // input columns that two output columns read

    // Of input column j of the span, for output column e of the pair.
    static DEVICE constexpr int across(int j, int e) {
        return UP == 2 ? 2 * j + 1 - e : (j >= e * DOWN && j - e * DOWN < TAPS ? j - e * DOWN : -1);
    }

    // Of the step's input row r, for row u of the t-th pending line, the oldest first.
    static DEVICE constexpr int down(int r, int t, int u) {
        return UP == 2 ? 2 * (DEPTH - 1 - t) + 1 - u : (DEPTH - 1 - t) * DOWN + r;
    }
};

// Filter one input row across: out[e] of two output columns, from the span of input columns that begins at `column`.
template <int V, class F, class Stage, int TAPS>
DEVICE void filter_across(const FirParams& p, Stage& stage, const Real (&f)[TAPS], int row, int column, Real (&out)[2][V]) {
    const Scalar* from = stage.input(row, column);
    Vec<Scalar, V> raw[F::SPAN] = {};
    UNROLL for (int j = 0; j < F::SPAN; j++) {
        if (column + j >= 0 && column + j < p.in_w) raw[j] = fetch<V>(from + j * p.channels);
    }
    UNROLL for (int j = 0; j < F::SPAN; j++) {
        Real x[V];
        widen<V>(raw[j], x);
        stage.enter(row, column + j, column + j >= 0 && column + j < p.in_w, x);
        UNROLL for (int e = 0; e < 2; e++) {
            if (F::across(j, e) < 0) continue;
            UNROLL for (int i = 0; i < V; i++) out[e][i] += f[F::across(j, e)] * x[i];
        }
    }
}

// `Stage` says where an input lies, input(row, column), and what becomes of it, enter(row, column, inside, x[V]). It
// takes outputs, emit(row, column, beside, out[V]); what it reads for one, prepare(row, column), is fetched first.
template <int V, int UP, int DOWN, int TAPS, class Stage>
DEVICE void fir_rows(const FirParams& p, const FirPlace& at, Stage& stage) {
    using F = Factors<UP, DOWN, TAPS>;
    Real f[TAPS];
    load_taps<TAPS>(p, f);
    const int column = UP == 2 ? at.pair + p.first_pair_x : 2 * at.pair * DOWN - p.pad_x;
    const int row = UP == 2 ? at.line + p.first_pair_y : at.line * DOWN - p.pad_y;
    const int out_column = UP == 2 ? 2 * column - 1 + p.pad_x : 2 * at.pair;
    Real pending[F::DEPTH][UP][2][V] = {};
    UNROLL_BY((F::DEPTH <= 4 ? F::DEPTH : 1))
    for (int step = 0; step < at.line_end - at.line + F::DEPTH - 1; step++) {
        const int line = step - (F::DEPTH - 1);  // which is finished after this step
        const int out_row = UP == 2 ? 2 * (row + line) - 1 + p.pad_y : at.line + line;
        bool wanted[UP][2];
        typename Stage::Beside beside[UP][2];
        UNROLL for (int u = 0; u < UP; u++)
            UNROLL for (int e = 0; e < 2; e++) {
                wanted[u][e] = line >= 0 && out_row + u >= 0 && out_row + u < p.out_h && out_column + e >= 0 &&
                               out_column + e < p.out_w;
                if (wanted[u][e]) beside[u][e] = stage.prepare(out_row + u, out_column + e);
            }
        UNROLL for (int r = 0; r < DOWN; r++) {
            const int in_row = row + step * DOWN + r;
            if (in_row < 0 || in_row >= p.in_h) continue;
            Real filtered[2][V] = {};
            filter_across<V, F>(p, stage, f, in_row, column, filtered);
            UNROLL for (int t = 0; t < F::DEPTH; t++)
                UNROLL for (int u = 0; u < UP; u++)
                    UNROLL for (int e = 0; e < 2; e++)
                        UNROLL for (int i = 0; i < V; i++) pending[t][u][e][i] += f[F::down(r, t, u)] * filtered[e][i];
        }
        UNROLL for (int u = 0; u < UP; u++)
            UNROLL for (int e = 0; e < 2; e++) {
                UNROLL for (int i = 0; i < V; i++) pending[0][u][e][i] *= p.gain;
                if (wanted[u][e]) stage.emit(out_row + u, out_column + e, beside[u][e], pending[0][u][e]);
                UNROLL for (int i = 0; i < V; i++) {
                    UNROLL for (int t = 0; t < F::DEPTH - 1; t++) pending[t][u][e][i] = pending[t + 1][u][e][i];
                    pending[F::DEPTH - 1][u][e][i] = 0;
                }
            }
    }
}

// Reads x and writes y, as they are.
template <int V> struct PlainStage {
    struct Beside {};

    const Scalar* x;
    Scalar* y;
    int in_w, out_w, channels;

    DEVICE PlainStage(const FirParams& p, const FirPlace& at)
        : x(p.x + pixel_offset(at.image, 0, 0, p.in_h, p.in_w, p.channels) + at.channel),
          y(p.y + pixel_offset(at.image, 0, 0, p.out_h, p.out_w, p.channels) + at.channel),
          in_w(p.in_w), out_w(p.out_w), channels(p.channels) {}

    DEVICE const Scalar* input(int row, int column) const { return x + (int64(row) * in_w + column) * channels; }
    DEVICE Scalar* output(int row, int column) const { return y + (int64(row) * out_w + column) * channels; }
    DEVICE void enter(int, int, bool, Real (&)[V]) const {}
    DEVICE Beside prepare(int, int) const { return {}; }
    DEVICE void emit(int row, int column, Beside, const Real (&out)[V]) const { store<V>(output(row, column), out); }
};
