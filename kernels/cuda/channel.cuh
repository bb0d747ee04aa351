// The epilogue of a layer at one element, and its gradient:
//
//     u = x * scale + noise_strength * noise + bias,   v = clamp(gain * act(u)),   y = v * next_scale,
//     rgb = sum over the channels of v * rgb_weight
//
// with scale, next_scale [N, C], bias [C], noise [N or 1, pixels], noise_strength [], rgb_weight [N, RGB, C]. A null
// pointer stands for an operand that is absent: a factor of 1, an addend of 0.
#pragma once

#include "common.cuh"

constexpr int RGB = 3;

struct Operands {
    const Real* scale;
    const Real* bias;
    const Real* next_scale;
    const Real* noise;
    const Real* noise_strength;
    const Real* rgb_weight;
    int64 noise_stride;  // from image to image, 0 where all share one
    Real alpha;          // the slope below 0 of a straight activation
    Real gain;
    Real clamp;  // NaN for none: no comparison with it holds
    int act;
};

// Where a block puts its share of each sum over pixels; null where it is not wanted.
struct Sums {
    Real* scale;
    Real* bias;
    Real* next_scale;
    Real* noise_strength;
    Real* rgb_weight;
};

// The operands of V channels of one image.
template <int V> struct Channels {
    Real scale[V], bias[V], next_scale[V];

    DEVICE void load(const Operands& of, int64 image, int channels, int channel) {
        const int64 index = image * channels + channel;
        UNROLL for (int i = 0; i < V; i++) {
            scale[i] = of.scale ? of.scale[index + i] : Real(1);
            bias[i] = of.bias ? of.bias[channel + i] : Real(0);
            next_scale[i] = of.next_scale ? of.next_scale[index + i] : Real(1);
        }
    }
};

// What has been added up of the gradients of V channels' operands.
template <int V> struct ChannelSums {
    Real scale[V] = {}, bias[V] = {}, next_scale[V] = {}, noise_strength[V] = {};
};

DEVICE Real noise_at(const Operands& of, int64 image, int64 pixel) {
    return of.noise ? of.noise[image * of.noise_stride + pixel] : Real(0);
}

DEVICE Real strength_of(const Operands& of) { return of.noise_strength ? *of.noise_strength : Real(0); }

// v and dv/du at u. The slope is 0 where v is clamped.
struct Response {
    Real v, slope;
    bool clamped;
};

DEVICE Response respond(Real a, Real slope, Real clamp) {
    const bool clamped = fabs(a) >= clamp;
    return {clamped ? copysign(clamp, a) : a, clamped ? Real(0) : slope, clamped};
}

// A straight activation is a factor on either side of 0. NaN passes, and relu(-inf) is 0. With `by_output`, u is v, whose
// sign is the same.
DEVICE Response straight_response(const Operands& of, Real u, bool by_output) {
    const Real factor = u <= 0 ? of.gain * of.alpha : of.gain;
    const Real a = by_output ? u : (factor == 0 ? Real(0) : u * factor);
    return respond(a, factor, of.clamp);
}

template <bool CURVED> DEVICE Response response_of(const Operands& of, Real u, bool by_output = false) {
    if (!CURVED) return straight_response(of, u, by_output);
    return respond(of.gain * activate_curved(of.act, u), of.gain * slope_curved(of.act, u), of.clamp);
}

// Turn x into v. `addend` is noise * noise_strength.
template <bool CURVED, int V>
DEVICE void forward(const Operands& of, const Channels<V>& channels, Real (&x)[V], Real addend) {
    UNROLL for (int i = 0; i < V; i++)
        x[i] = response_of<CURVED>(of, x[i] * channels.scale[i] + (addend + channels.bias[i])).v;
}

// Turn dy into dx, and add to the sums over pixels. `dv` is what reaches v besides, through rgb; it becomes v. With
// `by_output`, x is y instead, of a straight activation and at most a bias.
template <bool CURVED, int V>
DEVICE void backward(const Operands& of, const Channels<V>& channels, const Real (&x)[V], Real (&dy)[V], Real noise,
                     Real strength, Real (&dv)[V], bool by_output, ChannelSums<V>& sums) {
    UNROLL for (int i = 0; i < V; i++) {
        const Real u = x[i] * channels.scale[i] + (noise * strength + channels.bias[i]);
        const Response at = response_of<CURVED>(of, u, by_output);
        // Selected rather than multiplied: nothing passes a slope of 0, not even infinity.
        const Real du = at.slope == 0 ? Real(0) : (dy[i] * channels.next_scale[i] + dv[i]) * at.slope;
        sums.scale[i] += du * x[i];
        sums.bias[i] += du;
        sums.next_scale[i] += dy[i] * at.v;
        sums.noise_strength[i] += du * noise;
        dy[i] = du * channels.scale[i];
        dv[i] = at.v;
    }
}

template <int V> DEVICE void multiply(Real (&x)[V], const Real (&by)[V]) {
    UNROLL for (int i = 0; i < V; i++) x[i] *= by[i];
}
