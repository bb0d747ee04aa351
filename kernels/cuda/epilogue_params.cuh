// What the epilogue kernels take, on a GPU (epilogue.cu) and on a CPU (cpu/epilogue.cpp).
#pragma once

#include "channel.cuh"

struct EpilogueParams {
    const Scalar* x;
    Scalar* y;
    Real* rgb;  // [N, pixels, RGB], rows only
    Operands operands;
    int64 images;
    int64 pixels;
    int channels;
    int tiles;   // blocks along the channels
    int chunks;  // blocks along the pixels of an image
    int pixels_per_block;
};

struct EpilogueBackwardParams {
    const Scalar* dy;
    const Scalar* ref;  // x; or y, where its sign suffices and a bias is all there is
    Scalar* dx;
    const Real* drgb;  // [N, pixels, RGB], rows only
    Operands operands;
    Sums sums;  // rows: [N, chunks, C] each, rgb_weight [N, chunks, RGB, C]; planes: [N, C, chunks]
    int64 images;
    int64 pixels;
    int channels;
    int tiles;
    int chunks;
    int pixels_per_block;
    int ref_is_output;
};
