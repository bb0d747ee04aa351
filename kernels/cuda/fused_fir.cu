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
    const Operands& operands;
    Channels<NARROW> operand_of;
    Real strength;
    int64 image;

    DEVICE FirEpilogueStage(const FusedFirParams& p, const FirPlace& at)
        : PlainStage<NARROW>(p.fir, at), operands(p.operands), strength(strength_of(p.operands)), image(at.image) {
        operand_of.load(operands, at.image, p.fir.channels, at.channel);
    }

    DEVICE void emit(int row, int column, Real (&out)[NARROW]) const {
        const Real addend = strength * noise_at(operands, image, int64(row) * out_w + column);
        forward<false, NARROW>(operands, operand_of, out, addend);
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
struct FirEpilogueBackwardStage : PlainStage<NARROW> {
    const Operands& operands;
    const Scalar* dy;
    Channels<NARROW> operand_of;
    ChannelSums<NARROW> sums;
    Real strength;
    int64 image;

    DEVICE FirEpilogueBackwardStage(const FusedFirParams& p, const FirPlace& at)
        : PlainStage<NARROW>(p.fir, at), operands(p.operands),
          dy(p.dy + pixel_offset(at.image, 0, 0, p.fir.out_h, p.fir.out_w, p.fir.channels) + at.channel),
          strength(strength_of(p.operands)), image(at.image) {
        if (at.active) operand_of.load(operands, at.image, p.fir.channels, at.channel);
    }

    DEVICE void emit(int row, int column, Real (&out)[NARROW]) {
        const int64 pixel = int64(row) * out_w + column;
        const Real noise = noise_at(operands, image, pixel);
        Real gradient[NARROW], v[NARROW] = {};
        widen<NARROW>(fetch<NARROW>(dy + pixel * channels), gradient);
        backward<false, NARROW>(operands, operand_of, out, gradient, noise, strength, v, false, sums);
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
    Real bias[NARROW];

    DEVICE ActFirStage(const FusedFirParams& params, const FirPlace& place)
        : PlainStage<NARROW>(params.fir, place), p(params), at(place) {
        UNROLL for (int i = 0; i < NARROW; i++) bias[i] = p.operands.bias ? p.operands.bias[at.channel + i] : Real(0);
    }

    DEVICE void enter(int row, int column, bool inside, Real (&x)[NARROW]) const {
        unsigned codes = 0;
        UNROLL for (int i = 0; i < NARROW; i++) {
            const Real u = x[i] + bias[i];
            const Real a = p.operands.gain * activate<false>(p.operands.act, u, p.operands.alpha);
            const bool clamped = a >= p.operands.clamp || a <= -p.operands.clamp;
            x[i] = inside ? limit(a, p.operands.clamp) : Real(0);
            codes |= unsigned(clamped ? CLAMPED : (u > 0 ? POSITIVE : NEGATIVE)) << 2 * i;
        }
        if (!inside || column >> 1 != at.pair || row < at.line || row >= at.line_end) return;
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
    const FusedFirParams& p;
    const FirPlace& at;
    ChannelSums<NARROW> sums;

    DEVICE ActFirBackwardStage(const FusedFirParams& params, const FirPlace& place)
        : PlainStage<NARROW>(params.fir, place), p(params), at(place) {}

    DEVICE void emit(int row, int column, Real (&out)[NARROW]) {
        const unsigned codes = p.codes[code_offset(p.fir, at.image, row, column, at.channel, p.fir.out_h, p.fir.out_w)];
        UNROLL for (int i = 0; i < NARROW; i++) {
            const unsigned code = codes >> 2 * i & 3;
            out[i] *= code == CLAMPED ? Real(0) : p.operands.gain * (code == POSITIVE ? Real(1) : p.operands.alpha);
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
