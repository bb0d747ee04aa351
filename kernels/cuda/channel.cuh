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

// v, of which y is a multiple. `addend` is noise * noise_strength.
template <bool CURVED> DEVICE Real output_of(const Operands& of, Real x, Real scale, Real addend) {
    return limit(of.gain * activate<CURVED>(of.act, x * scale + addend, of.alpha), of.clamp);
}

// dv/du, zero where v is clamped; `a` is v before the clamp.
template <bool CURVED> DEVICE Real slope_of(const Operands& of, Real u, Real a) {
    const Real slope = of.gain * activation_slope<CURVED>(of.act, u, of.alpha);
    return a >= of.clamp || a <= -of.clamp ? Real(0) : slope;
}

// Turn dy into dx, and add to the sums over pixels. `dv` is what reaches v besides, through rgb; it becomes v. With
// `by_output`, x is y instead, of a straight activation and at most a bias: its sign tells that of u.
template <bool CURVED, int V>
DEVICE void backward(const Operands& of, const Channels<V>& channels, const Real (&x)[V], Real (&dy)[V], Real noise,
                     Real strength, Real (&dv)[V], bool by_output, ChannelSums<V>& sums) {
    UNROLL for (int i = 0; i < V; i++) {
        const Real u = x[i] * channels.scale[i] + (noise * strength + channels.bias[i]);
        const Real a = by_output ? u : of.gain * activate<CURVED>(of.act, u, of.alpha);
        const Real v = limit(a, of.clamp);
        const Real du = (dy[i] * channels.next_scale[i] + dv[i]) * slope_of<CURVED>(of, u, a);
        sums.scale[i] += du * x[i];
        sums.bias[i] += du;
        sums.next_scale[i] += dy[i] * v;
        sums.noise_strength[i] += du * noise;
        dy[i] = du * channels.scale[i];
        dv[i] = v;
    }
}

// Turn x into v.
template <bool CURVED, int V>
DEVICE void forward(const Operands& of, const Channels<V>& channels, Real (&x)[V], Real addend) {
    UNROLL for (int i = 0; i < V; i++)
        x[i] = output_of<CURVED>(of, x[i], channels.scale[i], addend + channels.bias[i]);
}

template <int V> DEVICE void multiply(Real (&x)[V], const Real (&by)[V]) {
    UNROLL for (int i = 0; i < V; i++) x[i] *= by[i];
}
