// Runs CUDA kernels on the CPU, thread by thread, so that tests can check them where no GPU is.
//
// A kernel that meets at barriers runs each thread of a block on its own stack (ucontext); they take turns from barrier
// to barrier, in order. A thread that reads what another has yet to write before a missing barrier therefore reads a
// stale value and fails the comparison; threads that do not meet at the same barrier are reported. It cannot see data
// races between turns, alignment or speed.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

// Only kernels are visible from outside: units for other types are loaded beside this one, and share its names.
#pragma GCC visibility push(hidden)
#define EXPORTED extern "C" __attribute__((visibility("default")))

#define DEVICE inline
#define UNROLL
#define UNROLL_BY(times)

using std::copysign;
using std::exp;
using std::expm1;
using std::fabs;
using std::log1p;
using std::tanh;

struct ShimIndex { unsigned x, y, z; };
static thread_local ShimIndex gridDim, blockDim, blockIdx, threadIdx;
#ifdef __SANITIZE_ADDRESS__
#define SHARED static  // it sees the bounds of these only
#else
#define SHARED static thread_local
#endif
#define __syncthreads() shim::yield_to_scheduler()

namespace shim {

inline ShimIndex index_in(unsigned flat, const unsigned size[3]) {
    return {flat % size[0], flat / size[0] % size[1], flat / (size[0] * size[1])};
}

constexpr std::size_t STACK_BYTES = 64 * 1024;

template <typename Params> struct Block {
    void (*body)(const Params&);
    const Params* params;
    ucontext_t scheduler;
    ucontext_t* running;
    bool finished;
    int barriers;  // met so far by the running thread
};

static thread_local void* current_block = nullptr;
static thread_local void (*yield_to_scheduler)() = nullptr;

template <typename Params> void enter() {
    auto* block = static_cast<Block<Params>*>(current_block);
    block->body(*block->params);
    block->finished = true;
    swapcontext(block->running, &block->scheduler);
}

template <typename Params> void yield() {
    auto* block = static_cast<Block<Params>*>(current_block);
    block->barriers++;
    swapcontext(block->running, &block->scheduler);
}

// Run one block, all its threads from barrier to barrier.
template <typename Params>
void run_cooperative(void (*body)(const Params&), const Params& params, unsigned threads, const unsigned size[3]) {
    static thread_local std::vector<char> stacks;
    if (stacks.size() < threads * STACK_BYTES) stacks.resize(threads * STACK_BYTES);
    std::vector<ucontext_t> contexts(threads);
    std::vector<bool> alive(threads, true);
    Block<Params> block{body, &params, {}, nullptr, false, 0};
    current_block = &block;
    yield_to_scheduler = yield<Params>;
    for (unsigned i = 0; i < threads; i++) {
        getcontext(&contexts[i]);
        contexts[i].uc_stack.ss_sp = stacks.data() + i * STACK_BYTES;
        contexts[i].uc_stack.ss_size = STACK_BYTES;
        contexts[i].uc_link = nullptr;
        makecontext(&contexts[i], enter<Params>, 0);
    }
    for (unsigned left = threads; left > 0;) {
        unsigned met = 0, ended = 0;
        for (unsigned i = 0; i < threads; i++) {
            if (!alive[i]) continue;
            threadIdx = index_in(i, size);
            block.running = &contexts[i];
            block.finished = false;
            swapcontext(&block.scheduler, &contexts[i]);
            if (block.finished) {
                alive[i] = false;
                ended++;
            } else {
                met++;
            }
        }
        if (met > 0 && ended > 0) {
            std::fprintf(stderr, "host shim: %u threads of a block wait at a barrier that %u left\n", met, ended);
            std::abort();
        }
        left -= ended;
    }
}

template <typename Params>
void run(void (*body)(const Params&), const unsigned grid[3], const unsigned block[3], const Params& params, bool meet) {
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {block[0], block[1], block[2]};
    const unsigned threads = block[0] * block[1] * block[2];
    for (unsigned z = 0; z < grid[2]; z++)
        for (unsigned y = 0; y < grid[1]; y++)
            for (unsigned x = 0; x < grid[0]; x++) {
                blockIdx = {x, y, z};
                if (meet) {
                    run_cooperative(body, params, threads, block);
                    continue;
                }
                for (unsigned i = 0; i < threads; i++) {
                    threadIdx = index_in(i, block);
                    body(params);
                }
            }
}

inline std::uint32_t bits_of(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float float_of(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

}  // namespace shim

#define SHIM_KERNEL(name, Params, meet)                                                                       \
    static void name##_thread(const Params& p);                                                               \
    EXPORTED void name(const unsigned grid[3], const unsigned block[3], const void* params) {               \
        shim::run(name##_thread, grid, block, *static_cast<const Params*>(params), meet);                     \
    }                                                                                                         \
    EXPORTED unsigned name##_params_bytes() { return sizeof(Params); }                                      \
    static void name##_thread(const Params& p)
#define KERNEL(name, Params, max_threads) SHIM_KERNEL(name, Params, false)
#define COOPERATIVE_KERNEL(name, Params, max_threads) SHIM_KERNEL(name, Params, true)

// --- half precision, by its bits: the compilers' own types differ ---

namespace shim {

inline float float16_to_float(std::uint16_t bits) {
    const std::uint32_t sign = std::uint32_t(bits & 0x8000) << 16, exponent = (bits >> 10) & 31, mantissa = bits & 1023;
    if (exponent == 31) return float_of(sign | 0x7f800000 | mantissa << 13);
    if (exponent > 0) return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
    const float subnormal = std::ldexp(float(mantissa), -24);
    return sign ? -subnormal : subnormal;
}

// Round to nearest, ties to even.
inline std::uint16_t float_to_float16(float value) {
    const std::uint32_t bits = bits_of(value);
    const std::uint16_t sign = (bits >> 16) & 0x8000;
    const float magnitude = std::fabs(value);
    if (magnitude != magnitude) return sign | 0x7e00;
    if (magnitude >= 65520.0f) return sign | 0x7c00;
    if (magnitude < 6.103515625e-05f) return sign | std::uint16_t(std::nearbyint(std::ldexp(magnitude, 24)));
    const std::uint32_t rounded = (bits & 0x7fffffff) + 0xfff + ((bits >> 13) & 1);
    return sign | std::uint16_t((rounded >> 13) - (112 << 10));
}

inline std::uint16_t float_to_bfloat16(float value) {
    const std::uint32_t bits = bits_of(value);
    if (value != value) return 0x7fff;
    return std::uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

}  // namespace shim
