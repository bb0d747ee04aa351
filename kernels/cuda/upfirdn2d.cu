// upfirdn2d: insert zeros, pad, filter, keep every down-th sample.
//
// Separable filters of up to 12 taps with up 1 or 2 and down 1 or 2 (not both 2) have tiled kernels, one per layout;
// `upfirdn2d_general` does everything else, one output per thread.
#include "fir_rows.cuh"

// --- rows (channels_last) ---

template <int V, int UP, int DOWN, int TAPS> DEVICE void upfirdn2d_rows(const FirParams& p) {
    const FirPlace at(p, V);
    if (!at.active) return;
    PlainStage<V> stage(p, at);
    fir_rows<V, UP, DOWN, TAPS>(p, at, stage);
}

KERNEL(upfirdn2d_rows_vector_1_1_4, FirParams, THREADS) { upfirdn2d_rows<VECTOR, 1, 1, 4>(p); }
KERNEL(upfirdn2d_rows_vector_2_1_4, FirParams, THREADS) { upfirdn2d_rows<VECTOR, 2, 1, 4>(p); }
KERNEL(upfirdn2d_rows_vector_1_2_4, FirParams, THREADS) { upfirdn2d_rows<VECTOR, 1, 2, 4>(p); }
KERNEL(upfirdn2d_rows_single_1_1_4, FirParams, THREADS) { upfirdn2d_rows<1, 1, 1, 4>(p); }
KERNEL(upfirdn2d_rows_single_2_1_4, FirParams, THREADS) { upfirdn2d_rows<1, 2, 1, 4>(p); }
KERNEL(upfirdn2d_rows_single_1_2_4, FirParams, THREADS) { upfirdn2d_rows<1, 1, 2, 4>(p); }
KERNEL(upfirdn2d_rows_single_1_1_12, FirParams, THREADS) { upfirdn2d_rows<1, 1, 1, 12>(p); }
KERNEL(upfirdn2d_rows_single_2_1_12, FirParams, THREADS) { upfirdn2d_rows<1, 2, 1, 12>(p); }
KERNEL(upfirdn2d_rows_single_1_2_12, FirParams, THREADS) { upfirdn2d_rows<1, 1, 2, 12>(p); }

// --- planes (contiguous): a tile goes through shared memory, filtered along rows, then along columns ---

struct FirPlanesParams {
    const Scalar* x;
    Scalar* y;
    const Real* f;
    Real gain;
    int in_h, in_w, out_h, out_w;
    int taps, flip_filter;
    int pad_x, pad_y;
    int tiles_x, tiles_y;
    int aligned;  // rows of x begin at multiples of 16 bytes
};

constexpr int TILE_W = sizeof(Real) == 8 ? 32 : 64;
constexpr int TILE_H = 16;

// The first input that output `o` reads, and the tap that meets it.
template <int UP, int DOWN> DEVICE int first_input(int o, int pad) {
    return UP == 2 ? (o - pad + 1) >> 1 : o * DOWN - pad;  // >> rounds down, below zero too
}
template <int UP> DEVICE int first_tap(int o, int pad) { return UP == 2 ? (o - pad) & 1 : 0; }

// Inputs under a row of `outputs`.
DEVICE constexpr int extent(int outputs, int up, int down, int taps) {
    return up == 2 ? (outputs + taps) / 2 + 1 : (outputs - 1) * down + taps;
}

template <int V, int WIDTH, int HEIGHT>
DEVICE void load_tile(const FirPlanesParams& p, const Scalar* plane, Real (&tile)[HEIGHT][WIDTH], int row, int column) {
    constexpr int SLOTS = WIDTH / V;
    for (int i = threadIdx.x; i < SLOTS * HEIGHT; i += THREADS) {
        const int y = i / SLOTS, x = i % SLOTS * V;
        Real values[V] = {};
        // A vector begins at a multiple of V, as the row's end does: it lies inside or outside as a whole.
        if (row + y >= 0 && row + y < p.in_h && column + x >= 0 && column + x < p.in_w)
            widen<V>(fetch<V>(plane + int64(row + y) * p.in_w + column + x), values);
        UNROLL for (int k = 0; k < V; k++) tile[y][x + k] = values[k];
    }
}

template <int UP, int DOWN, int TAPS> DEVICE void upfirdn2d_planes(const FirPlanesParams& p) {
    constexpr int COUNT = TAPS / UP;
    constexpr int HEIGHT = extent(TILE_H, UP, DOWN, TAPS);
    constexpr int WIDTH = (extent(TILE_W, UP, DOWN, TAPS) + 2 * VECTOR - 2) / VECTOR * VECTOR;
    SHARED Real f[TAPS];
    SHARED Real tile[HEIGHT][WIDTH];
    SHARED Real filtered[HEIGHT][TILE_W];

    const int tile_x = blockIdx.x % p.tiles_x, tile_y = blockIdx.x / p.tiles_x % p.tiles_y;
    const int64 plane = blockIdx.x / (p.tiles_x * p.tiles_y);
    const int out_x = tile_x * TILE_W, out_y = tile_y * TILE_H;
    const int in_y = first_input<UP, DOWN>(out_y, p.pad_y);
    const int start_x = first_input<UP, DOWN>(out_x, p.pad_x);
    const int in_x = p.aligned ? start_x & -VECTOR : start_x;  // rounds down to a multiple, below zero too

    for (int k = threadIdx.x; k < TAPS; k += THREADS)
        f[k] = k < p.taps ? p.f[p.flip_filter ? k : p.taps - 1 - k] : Real(0);
    const Scalar* x = p.x + plane * p.in_h * p.in_w;
    if (p.aligned)
        load_tile<VECTOR>(p, x, tile, in_y, in_x);
    else
        load_tile<1>(p, x, tile, in_y, in_x);
    __syncthreads();

    for (int i = threadIdx.x; i < HEIGHT * TILE_W; i += THREADS) {
        const int y = i / TILE_W, o = i % TILE_W;
        const int from = first_input<UP, DOWN>(out_x + o, p.pad_x) - in_x;
        const int tap = first_tap<UP>(out_x + o, p.pad_x);
        Real sum = 0;
        UNROLL for (int k = 0; k < COUNT; k++) sum += f[tap + k * UP] * tile[y][from + k];
        filtered[y][o] = sum;
    }
    __syncthreads();

    for (int i = threadIdx.x; i < TILE_H * TILE_W; i += THREADS) {
        const int o = i / TILE_W, column = i % TILE_W;
        if (out_y + o >= p.out_h || out_x + column >= p.out_w) continue;
        const int from = first_input<UP, DOWN>(out_y + o, p.pad_y) - in_y;
        const int tap = first_tap<UP>(out_y + o, p.pad_y);
        Real sum = 0;
        UNROLL for (int k = 0; k < COUNT; k++) sum += f[tap + k * UP] * filtered[from + k][column];
        narrow(sum * p.gain, p.y[(plane * p.out_h + out_y + o) * p.out_w + out_x + column]);
    }
}

COOPERATIVE_KERNEL(upfirdn2d_planes_1_1_4, FirPlanesParams, THREADS) { upfirdn2d_planes<1, 1, 4>(p); }
COOPERATIVE_KERNEL(upfirdn2d_planes_2_1_4, FirPlanesParams, THREADS) { upfirdn2d_planes<2, 1, 4>(p); }
COOPERATIVE_KERNEL(upfirdn2d_planes_1_2_4, FirPlanesParams, THREADS) { upfirdn2d_planes<1, 2, 4>(p); }
COOPERATIVE_KERNEL(upfirdn2d_planes_1_1_12, FirPlanesParams, THREADS) { upfirdn2d_planes<1, 1, 12>(p); }
COOPERATIVE_KERNEL(upfirdn2d_planes_2_1_12, FirPlanesParams, THREADS) { upfirdn2d_planes<2, 1, 12>(p); }
COOPERATIVE_KERNEL(upfirdn2d_planes_1_2_12, FirPlanesParams, THREADS) { upfirdn2d_planes<1, 2, 12>(p); }

// --- everything else ---

struct FirGeneralParams {
    const Scalar* x;
    Scalar* y;
    const Real* f;  // [fh, fw], or [fw] for the outer product of f with itself
    Real gain;
    int64 outputs;
    int channels;
    int in_h, in_w, out_h, out_w;
    int fh, fw, separable, flip_filter;
    int up_x, up_y, down_x, down_y, pad_x, pad_y;
    int channels_last;
};

DEVICE int divide_up(int a, int b) { return a >= 0 ? (a + b - 1) / b : -(-a / b); }

KERNEL(upfirdn2d_general, FirGeneralParams, THREADS) {
    for (int64 i = int64(blockIdx.x) * THREADS + threadIdx.x; i < p.outputs; i += int64(gridDim.x) * THREADS) {
        int64 rest = i;
        int channel = 0;
        if (p.channels_last) {
            channel = int(rest % p.channels);
            rest /= p.channels;
        }
        const int column = int(rest % p.out_w);
        rest /= p.out_w;
        const int row = int(rest % p.out_h);
        const int64 plane = rest / p.out_h;  // an image, or one channel of it
        const int first_x = column * p.down_x - p.pad_x, first_y = row * p.down_y - p.pad_y;
        const int from_x = larger(divide_up(first_x, p.up_x), 0), from_y = larger(divide_up(first_y, p.up_y), 0);
        Real sum = 0;
        for (int y = from_y; y < p.in_h && y * p.up_y - first_y < p.fh; y++) {
            for (int x = from_x; x < p.in_w && x * p.up_x - first_x < p.fw; x++) {
                int ky = y * p.up_y - first_y, kx = x * p.up_x - first_x;
                if (!p.flip_filter) {
                    ky = p.fh - 1 - ky;
                    kx = p.fw - 1 - kx;
                }
                const Real f = p.separable ? p.f[ky] * p.f[kx] : p.f[ky * p.fw + kx];
                const int64 pixel = (plane * p.in_h + y) * p.in_w + x;
                sum += f * widen(p.x[p.channels_last ? pixel * p.channels + channel : pixel]);
            }
        }
        narrow(sum * p.gain, p.y[i]);
    }
}
