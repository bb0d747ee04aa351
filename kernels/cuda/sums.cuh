// Sums over pixels, made per block in a fixed order and added up by the caller: the same input gives the same bits.
#pragma once

#include "channel.cuh"

constexpr int THREADS = 256;

// A backward pass keeps sums beside the operands: narrower vectors leave it enough registers for full occupancy.
constexpr int NARROW = VECTOR < 4 ? VECTOR : 4;

// Add up `value` over the rows of a block and write the V sums of each column.
template <int V> DEVICE void write_column_sums(Real* to, const Real (&value)[V], Real* scratch, bool active) {
    if (!to) return;
    const int pitch = blockDim.x * V, column = threadIdx.x * V;
    UNROLL for (int i = 0; i < V; i++) scratch[threadIdx.y * pitch + column + i] = value[i];
    __syncthreads();
    for (int i = threadIdx.y; i < V; i += blockDim.y) {
        Real sum = 0;
        for (unsigned row = 0; row < blockDim.y; row++) sum += scratch[row * pitch + column + i];
        if (active) to[i] = sum;
    }
    __syncthreads();
}

template <int V>
DEVICE void write_column_sums(const Sums& to, const ChannelSums<V>& sums, Real* scratch, int64 index, bool active) {
    write_column_sums<V>(to.scale ? to.scale + index : nullptr, sums.scale, scratch, active);
    write_column_sums<V>(to.bias ? to.bias + index : nullptr, sums.bias, scratch, active);
    write_column_sums<V>(to.next_scale ? to.next_scale + index : nullptr, sums.next_scale, scratch, active);
    write_column_sums<V>(to.noise_strength ? to.noise_strength + index : nullptr, sums.noise_strength, scratch, active);
}
