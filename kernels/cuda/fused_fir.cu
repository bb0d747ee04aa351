// FIR filters joined with the epilogue of a layer (channel.cuh), so that no activation makes a trip of its own. All in
// the rows layout, without resampling, 4 taps.
//
// Up-convolution of the generator: y = epilogue(FIR(x)); its gradient filters x again instead of having kept FIR(x).
// Down-convolution of the discriminator: y = FIR(clamp(gain * act(x + bias))); it keeps two bits per activation, from
// which the transposed filter's output becomes dx.
#include "fir_rows.cuh"

constexpr int TAPS = 4;

// What the gradient needs of an activation, in two bits. A byte holds those of a thread's channels.
enum Code { NEGATIVE, POSITIVE, CLAMPED };

struct FusedFirParams {
    FirParams fir;
    Operands operands;
    Sums sums;            // [N, blocks, C] each
    const Scalar* dy;     // of the gradients
    unsigned char* codes; // [N, H, W, C / NARROW], of the activations
};

// --- FIR, then epilogue ---

struct FirEpilogueStage : PlainStage<NARROW> {
    struct Beside { Real noise; };

    const Operands& operands;
    Channels<NARROW> operand_of;
    Real strength;
    int64 image;

    DEVICE FirEpilogueStage(const FusedFirParams& p, const FirPlace& at)
        : PlainStage<NARROW>(p.fir, at), operands(p.operands), strength(strength_of(p.operands)), image(at.image) {
        if (at.active) operand_of.load(operands, at.image, p.fir.channels, at.channel);
    }

    DEVICE Beside prepare(int row, int column) const {
        return {noise_at(operands, image, int64(row) * out_w + column)};
    }

    DEVICE void emit(int row, int column, Beside beside, Real (&out)[NARROW]) const {
        forward<false, NARROW>(operands, operand_of, out, strength * beside.noise);
        multiply<NARROW>(out, operand_of.next_scale);
        store<NARROW>(output(row, column), out);
    }
};

KERNEL(fir_epilogue, FusedFirParams, THREADS) {
    const FirPlace at(p.fir, NARROW);
    if (!at.active) return;
    FirEpilogueStage stage(p, at);
    fir_rows<NARROW, 1, 1, TAPS>(p.fir, at, stage);
}

// Writes the gradient by FIR(x), which the transposed filter takes on to x.
struct FirEpilogueBackwardStage : FirEpilogueStage {
    struct Beside {
        Real noise;
        Vec<Scalar, NARROW> dy;
    };

    const Scalar* dy;
    ChannelSums<NARROW> sums;

    DEVICE FirEpilogueBackwardStage(const FusedFirParams& p, const FirPlace& at)
        : FirEpilogueStage(p, at),
          dy(p.dy + pixel_offset(at.image, 0, 0, p.fir.out_h, p.fir.out_w, p.fir.channels) + at.channel) {}

    DEVICE Beside prepare(int row, int column) const {
        const int64 pixel = int64(row) * out_w + column;
        return {noise_at(operands, image, pixel), fetch<NARROW>(dy + pixel * channels)};
    }

    DEVICE void emit(int row, int column, const Beside& beside, const Real (&out)[NARROW]) {
        Real gradient[NARROW], v[NARROW] = {};
        widen<NARROW>(beside.dy, gradient);
        backward<false, NARROW>(operands, operand_of, out, gradient, beside.noise, strength, v, false, sums);
        store<NARROW>(output(row, column), gradient);
    }
};

COOPERATIVE_KERNEL(fir_epilogue_backward, FusedFirParams, THREADS) {
    SHARED Real scratch[THREADS * NARROW];
    const FirPlace at(p.fir, NARROW);
    FirEpilogueBackwardStage stage(p, at);
    if (at.active) fir_rows<NARROW, 1, 1, TAPS>(p.fir, at, stage);
    write_column_sums<NARROW>(p.sums, stage.sums, scratch, at.block * p.fir.channels + at.channel, at.active);
}

// --- activation, then FIR ---

DEVICE int64 code_offset(const FirParams& p, int64 image, int row, int column, int channel, int h, int w) {
    return (pixel_offset(image, row, column, h, w, p.channels) + channel) / NARROW;
}

// A block reads inputs beyond its own rows and columns; the codes of each are written where it is the thread's own.
struct ActFirStage : PlainStage<NARROW> {
    const FusedFirParams& p;
    const FirPlace& at;
    Channels<NARROW> operand_of;

    DEVICE ActFirStage(const FusedFirParams& params, const FirPlace& place)
        : PlainStage<NARROW>(params.fir, place), p(params), at(place) {
        operand_of.load(p.operands, at.image, p.fir.channels, at.channel);
    }

    DEVICE void enter(int row, int column, bool inside, Real (&x)[NARROW]) const {
        const bool own = inside && column >> 1 == at.pair && row >= at.line && row < at.line_end;
        unsigned codes = 0;
        UNROLL for (int i = 0; i < NARROW; i++) {
            const Real u = x[i] + operand_of.bias[i];
            const Response response = straight_response(p.operands, u, false);
            codes |= unsigned(response.clamped ? CLAMPED : (u > 0 ? POSITIVE : NEGATIVE)) << 2 * i;
            x[i] = inside ? response.v : Real(0);
        }
        if (own)
            p.codes[code_offset(p.fir, at.image, row, column, at.channel, p.fir.in_h, p.fir.in_w)] =
                static_cast<unsigned char>(codes);
    }
};

KERNEL(act_fir, FusedFirParams, THREADS) {
    const FirPlace at(p.fir, NARROW);
    if (!at.active) return;
    ActFirStage stage(p, at);
    fir_rows<NARROW, 1, 1, TAPS>(p.fir, at, stage);
}

// fir.x is dy here and fir.y dx: the transposed filter, then the activation's slope.
struct ActFirBackwardStage : PlainStage<NARROW> {
    struct Beside { unsigned char codes; };

    const FusedFirParams& p;
    const FirPlace& at;
    ChannelSums<NARROW> sums;

    DEVICE ActFirBackwardStage(const FusedFirParams& params, const FirPlace& place)
        : PlainStage<NARROW>(params.fir, place), p(params), at(place) {}

    DEVICE Beside prepare(int row, int column) const {
        return {load_once<unsigned char>(
            p.codes + code_offset(p.fir, at.image, row, column, at.channel, p.fir.out_h, p.fir.out_w))};
    }

    DEVICE void emit(int row, int column, Beside beside, Real (&out)[NARROW]) {
        UNROLL for (int i = 0; i < NARROW; i++) {
            const int code = beside.codes >> 2 * i & 3;
            const Real slope = code == POSITIVE ? p.operands.gain : p.operands.gain * p.operands.alpha;
            out[i] = code == CLAMPED || slope == 0 ? Real(0) : out[i] * slope;
            sums.bias[i] += out[i];
        }
        store<NARROW>(output(row, column), out);
    }
};

COOPERATIVE_KERNEL(act_fir_backward, FusedFirParams, THREADS) {
    SHARED Real scratch[THREADS * NARROW];
    const FirPlace at(p.fir, NARROW);
    ActFirBackwardStage stage(p, at);
    if (at.active) fir_rows<NARROW, 1, 1, TAPS>(p.fir, at, stage);
    write_column_sums<NARROW>(p.sums, stage.sums, scratch, at.block * p.fir.channels + at.channel, at.active);
}
