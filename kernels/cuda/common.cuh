// What every kernel shares: scalar types and their conversions, vectors of 16 bytes, activations.
//
// The sources include no header of CUDA, torch or the standard library, so that NVRTC compiles them with nothing but
// itself. A unit is one .cu file compiled for one scalar type, -DSCALAR=float16|bfloat16|float32|float64. With
// -DSTYLEPIPE_HOST a C++ compiler builds the same code for the CPU (host_shim.h), for tests.
//
// Shapes: N images, C channels, `pixels` = H * W. In the "rows" layout (channels_last) a row is one pixel's channels;
// in the "planes" layout (contiguous) a plane is one channel's pixels.
#pragma once

#ifdef STYLEPIPE_HOST
#include "host_shim.h"
#else
#define DEVICE __device__ __forceinline__
#define SHARED __shared__
#define UNROLL _Pragma("unroll")
#define UNROLL_BY(times) _Pragma(STRING(unroll(times)))
#define STRING(text) #text
// KERNEL for kernels whose threads work alone, COOPERATIVE_KERNEL for those that meet at barriers.
// Two blocks fit on a multiprocessor; one of float64, whose registers count twice.
#define KERNEL(name, Params, max_threads)                                            \
    extern "C" __global__ void __launch_bounds__(max_threads, sizeof(Scalar) == 8 ? 1 : 2) \
        name(const __grid_constant__ Params p)
#define COOPERATIVE_KERNEL KERNEL
#endif

using int64 = long long;

// --- scalar types ---

struct float16 { unsigned short bits; };
struct bfloat16 { unsigned short bits; };
using float32 = float;
using float64 = double;

// Arithmetic, sums and all small operands (scales, biases, noise) are in Real: float32, or float64 for float64.
template <typename T> struct RealOf { using type = float; };
template <> struct RealOf<double> { using type = double; };

using Scalar = SCALAR;
using Real = RealOf<Scalar>::type;

#ifdef STYLEPIPE_HOST
DEVICE float widen(float16 value) { return shim::float16_to_float(value.bits); }
DEVICE void narrow(float value, float16& to) { to.bits = shim::float_to_float16(value); }
DEVICE float widen(bfloat16 value) { return shim::float_of(std::uint32_t(value.bits) << 16); }
DEVICE void narrow(float value, bfloat16& to) { to.bits = shim::float_to_bfloat16(value); }
#else
DEVICE float widen(float16 value) {
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
    return wide;
}

DEVICE void narrow(float value, float16& to) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(value)); }

DEVICE float widen(bfloat16 value) { return __uint_as_float(static_cast<unsigned>(value.bits) << 16); }

DEVICE void narrow(float value, bfloat16& to) {
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(value));
#else
    const unsigned bits = __float_as_uint(value);
    // Round to nearest even; a NaN must not round to infinity.
    to.bits = (value != value) ? 0x7fff : static_cast<unsigned short>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
#endif
}
#endif

DEVICE float widen(float value) { return value; }
DEVICE double widen(double value) { return value; }
DEVICE void narrow(float value, float& to) { to = value; }
DEVICE void narrow(double value, double& to) { to = value; }

// --- vectors ---

constexpr int VECTOR_BYTES = 16;
constexpr int VECTOR = VECTOR_BYTES / sizeof(Scalar);

template <typename T, int V>
struct alignas(sizeof(T) * V) Vec {
    T at[V];
};

#ifdef STYLEPIPE_HOST
// Copied as bytes: a C++ compiler may assume that vectors and scalars never share memory.
template <typename T> DEVICE T load_once(const void* from) {
    T value;
    std::memcpy(&value, __builtin_assume_aligned(from, alignof(T)), sizeof value);
    return value;
}
template <typename T> DEVICE void store_once(void* to, const T& value) {
    std::memcpy(__builtin_assume_aligned(to, alignof(T)), &value, sizeof value);
}
#else
// One instruction per vector, through the read-only path. Volatile, so that it stays where it is written: a compiler
// would rather fetch each vector just before its use, one after the other.
DEVICE void fetch_word(const void* from, unsigned char& word) {
    unsigned wide;
    asm volatile("ld.global.nc.u8 %0, [%1];" : "=r"(wide) : "l"(from));
    word = static_cast<unsigned char>(wide);
}
DEVICE void fetch_word(const void* from, unsigned short& word) {
    asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(word) : "l"(from));
}
DEVICE void fetch_word(const void* from, unsigned& word) {
    asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(word) : "l"(from));
}
DEVICE void fetch_word(const void* from, uint2& word) {
    asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(word.x), "=r"(word.y) : "l"(from));
}
DEVICE void fetch_word(const void* from, uint4& word) {
    asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)
                 : "l"(from));
}

template <int bytes> struct Word;
template <> struct Word<1> { using type = unsigned char; };
template <> struct Word<2> { using type = unsigned short; };
template <> struct Word<4> { using type = unsigned; };
template <> struct Word<8> { using type = uint2; };
template <> struct Word<16> { using type = uint4; };

template <typename T> DEVICE T load_once(const void* from) {
    union { typename Word<sizeof(T)>::type word; T value; } both;
    fetch_word(from, both.word);
    return both.value;
}
template <typename T> DEVICE void store_once(void* to, const T& value) { *static_cast<T*>(to) = value; }
#endif

// V neighbours as they lie in memory, aligned to the vector. Kernels fetch several before they widen the first: what
// converts a value waits for it, and nothing behind that is fetched meanwhile.
template <int V> DEVICE Vec<Scalar, V> fetch(const Scalar* from) { return load_once<Vec<Scalar, V>>(from); }

template <int V> DEVICE void widen(const Vec<Scalar, V>& raw, Real (&to)[V]) {
    UNROLL for (int i = 0; i < V; i++) to[i] = widen(raw.at[i]);
}

template <int V> DEVICE void store(Scalar* to, const Real (&from)[V]) {
    Vec<Scalar, V> raw;
    UNROLL for (int i = 0; i < V; i++) narrow(from[i], raw.at[i]);
    store_once(to, raw);
}

DEVICE int64 smaller(int64 a, int64 b) { return a < b ? a : b; }
DEVICE int smaller(int a, int b) { return a < b ? a : b; }
DEVICE int larger(int a, int b) { return a > b ? a : b; }

// --- activations ---

// In the order of the table in kernels/bias_act.py.
enum Activation { LINEAR, RELU, LRELU, TANH, SIGMOID, ELU, SELU, SOFTPLUS, SWISH };

constexpr double SELU_SCALE = 1.0507009873554804934193349852946;
constexpr double SELU_ALPHA = 1.6732632423543772848170429916717;
constexpr double SOFTPLUS_LINEAR = 20;  // from here on log(1 + exp(u)) is u in every type, as in torch

DEVICE Real logistic(Real u) { return Real(1) / (Real(1) + exp(-u)); }

// LINEAR (alpha 1), RELU (alpha 0) and LRELU are straight on both sides of 0; all others are curved.

// act(u)
DEVICE Real activate_curved(int act, Real u) {
    switch (act) {
        case TANH: return tanh(u);
        case SIGMOID: return logistic(u);
        case ELU: return u > 0 ? u : expm1(u);
        case SELU: return Real(SELU_SCALE) * (u > 0 ? u : Real(SELU_ALPHA) * expm1(u));
        case SOFTPLUS: return u > Real(SOFTPLUS_LINEAR) ? u : log1p(exp(u));
        default: return u * logistic(u);  // SWISH
    }
}

// act'(u)
DEVICE Real slope_curved(int act, Real u) {
    switch (act) {
        case TANH: { const Real t = tanh(u); return 1 - t * t; }
        case SIGMOID: { const Real s = logistic(u); return s * (1 - s); }
        case ELU: return u > 0 ? Real(1) : exp(u);
        case SELU: return Real(SELU_SCALE) * (u > 0 ? Real(1) : Real(SELU_ALPHA) * exp(u));
        case SOFTPLUS: return logistic(u);
        default: { const Real s = logistic(u); return s * (1 + u * (1 - s)); }  // SWISH
    }
}
