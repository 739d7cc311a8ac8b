// What the kernels of csrc/cuda take from nvcc, for g++: a launch runs every thread of every block,
// one after the other.
#pragma once

struct alignas(16) uint4 {
    unsigned int x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned int x, y;
};
struct Place {
    unsigned int x;
};
static thread_local Place blockIdx, threadIdx;

#define __global__
#define __launch_bounds__(threads)
