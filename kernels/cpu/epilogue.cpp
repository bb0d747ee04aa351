// The epilogue of a layer on a CPU, channels_last: one pass over the activation, forward and backward, with the
// arithmetic of cuda/channel.cuh in loops that become vector instructions. It takes what the GPU's kernels take. A block
// holds all channels of its pixels; activations are straight.
#include <algorithm>
#include <vector>

#include "../cuda/epilogue_params.cuh"

namespace {

// Elements that one thread is done with before a second would be woken, as torch's own operations have it.
constexpr int64 FEW_ELEMENTS = 32768;

template <typename P> bool shared_out(const P& p) { return p.images * p.pixels * p.channels > FEW_ELEMENTS; }

struct Block {
    int64 image, first, last;

    template <typename P> Block(const P& p, int64 number) {
        image = number / p.chunks;
        first = number % p.chunks * p.pixels_per_block;
        last = std::min(first + p.pixels_per_block, p.pixels);
    }
};

// The operands of an image's channels; what is absent is filled in.
struct ImageOperands {
    std::vector<Real> filled[3];
    const Real *scale, *bias, *next_scale, *rgb_weight;

    ImageOperands(const Operands& of, int64 image, int channels) {
        const int64 at = image * channels;
        scale = of.scale ? of.scale + at : fill(filled[0], 1, channels);
        bias = of.bias ? of.bias : fill(filled[1], 0, channels);
        next_scale = of.next_scale ? of.next_scale + at : fill(filled[2], 1, channels);
        rgb_weight = of.rgb_weight ? of.rgb_weight + at * RGB : nullptr;
    }

    static const Real* fill(std::vector<Real>& values, Real value, int channels) {
        values.assign(channels, value);
        return values.data();
    }
};

template <bool WITH_RGB> void forward(const EpilogueParams& p, const ImageOperands& image_of, int64 image, int64 pixel) {
    const Operands of = p.operands;  // a copy: y might share its memory, for all a compiler knows
    const int channels = p.channels;
    const Real addend = strength_of(of) * noise_at(of, image, pixel);
    const Real *scale = image_of.scale, *bias = image_of.bias, *next = image_of.next_scale;
    const Real *red = image_of.rgb_weight, *green = WITH_RGB ? red + channels : red;
    const Real* blue = WITH_RGB ? green + channels : red;
    const int64 base = (image * p.pixels + pixel) * channels;
    const Scalar* x = p.x + base;
    Scalar* y = p.y + base;
    Real r = 0, g = 0, b = 0;
#pragma omp simd reduction(+ : r, g, b)
    for (int c = 0; c < channels; c++) {
        const Real v = straight_response(of, widen(x[c]) * scale[c] + (addend + bias[c]), false).v;
        if (WITH_RGB) {
            r += v * red[c];
            g += v * green[c];
            b += v * blue[c];
        }
        narrow(v * next[c], y[c]);
    }
    if (WITH_RGB) {
        Real* rgb = p.rgb + (image * p.pixels + pixel) * RGB;
        rgb[0] = r, rgb[1] = g, rgb[2] = b;
    }
}

template <bool WITH_RGB> void run_forward(const unsigned grid[3], const EpilogueParams& p) {
#pragma omp parallel for schedule(static) if (shared_out(p))
    for (int64 number = 0; number < int64(grid[0]); number++) {
        const Block at(p, number);
        const ImageOperands of(p.operands, at.image, p.channels);
        for (int64 pixel = at.first; pixel < at.last; pixel++) forward<WITH_RGB>(p, of, at.image, pixel);
    }
}

// A block's sums, one row of channels after another.
enum Row { SCALE, BIAS, NEXT_SCALE, NOISE_STRENGTH, RED, GREEN, BLUE, ROWS };

template <bool WITH_RGB>
void backward(const EpilogueBackwardParams& p, const ImageOperands& image_of, Real* sums, int64 image, int64 pixel) {
    const Operands of = p.operands;
    const int channels = p.channels;
    const Real noise = noise_at(of, image, pixel), strength = strength_of(of);
    const Real *scale = image_of.scale, *bias = image_of.bias, *next = image_of.next_scale;
    const Real *red = image_of.rgb_weight, *green = WITH_RGB ? red + channels : red;
    const Real* blue = WITH_RGB ? green + channels : red;
    Real *dscale = sums, *dbias = sums + BIAS * channels, *dnext = sums + NEXT_SCALE * channels;
    Real *dstrength = sums + NOISE_STRENGTH * channels;
    Real *dred = sums + RED * channels, *dgreen = dred + channels, *dblue = dgreen + channels;
    const int64 base = (image * p.pixels + pixel) * channels;
    const Scalar *x = p.ref + base, *dy = p.dy + base;
    Scalar* dx = p.dx + base;
    const Real* drgb = WITH_RGB ? p.drgb + (image * p.pixels + pixel) * RGB : nullptr;
    const Real r = WITH_RGB ? drgb[0] : 0, g = WITH_RGB ? drgb[1] : 0, b = WITH_RGB ? drgb[2] : 0;
#pragma omp simd
    for (int c = 0; c < channels; c++) {
        const Real value = widen(x[c]), gradient = widen(dy[c]);
        const Real u = value * scale[c] + (noise * strength + bias[c]);
        const Response at = straight_response(of, u, false);
        const Real beside = WITH_RGB ? r * red[c] + g * green[c] + b * blue[c] : 0;
        const Real du = at.slope == 0 ? 0 : (gradient * next[c] + beside) * at.slope;
        dscale[c] += du * value;
        dbias[c] += du;
        dnext[c] += gradient * at.v;
        dstrength[c] += du * noise;
        if (WITH_RGB) {
            dred[c] += r * at.v;
            dgreen[c] += g * at.v;
            dblue[c] += b * at.v;
        }
        narrow(du * scale[c], dx[c]);
    }
}

// From y, for at most a bias.
void backward_by_output(const EpilogueBackwardParams& p, Real* dbias, int64 image, int64 pixel) {
    const Operands of = p.operands;
    const int64 base = (image * p.pixels + pixel) * p.channels;
    const Scalar *y = p.ref + base, *dy = p.dy + base;
    Scalar* dx = p.dx + base;
#pragma omp simd
    for (int c = 0; c < p.channels; c++) {
        const Real slope = straight_response(of, widen(y[c]), true).slope;
        const Real du = slope == 0 ? 0 : widen(dy[c]) * slope;
        dbias[c] += du;
        narrow(du, dx[c]);
    }
}

template <bool WITH_RGB> void run_backward(const unsigned grid[3], const EpilogueBackwardParams& p) {
    const int channels = p.channels;
#pragma omp parallel for schedule(static) if (shared_out(p))
    for (int64 number = 0; number < int64(grid[0]); number++) {
        const Block at(p, number);
        const ImageOperands of(p.operands, at.image, channels);
        std::vector<Real> sums(ROWS * channels);
        for (int64 pixel = at.first; pixel < at.last; pixel++) {
            if (p.ref_is_output)
                backward_by_output(p, &sums[BIAS * channels], at.image, pixel);
            else
                backward<WITH_RGB>(p, of, sums.data(), at.image, pixel);
        }
        const auto keep = [&](Real* to, Row row, int rows) {
            if (to) std::copy_n(&sums[row * channels], rows * channels, to + number * rows * channels);
        };
        keep(p.sums.scale, SCALE, 1);
        keep(p.sums.bias, BIAS, 1);
        keep(p.sums.next_scale, NEXT_SCALE, 1);
        keep(p.sums.noise_strength, NOISE_STRENGTH, 1);
        keep(p.sums.rgb_weight, RED, RGB);
    }
}

}  // namespace

#define CPU_KERNEL(name, Params, run)                                                       \
    EXPORTED void name(const unsigned grid[3], const unsigned*, const void* params) {       \
        run(grid, *static_cast<const Params*>(params));                                     \
    }                                                                                       \
    EXPORTED unsigned name##_params_bytes() { return sizeof(Params); }

CPU_KERNEL(epilogue_rows_vector, EpilogueParams, run_forward<false>)
CPU_KERNEL(epilogue_rgb_rows_vector, EpilogueParams, run_forward<true>)
CPU_KERNEL(epilogue_backward_rows_vector, EpilogueBackwardParams, run_backward<false>)
CPU_KERNEL(epilogue_backward_rgb_rows_vector, EpilogueBackwardParams, run_backward<true>)
