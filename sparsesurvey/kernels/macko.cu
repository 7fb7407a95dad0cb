// MACKO's kernel for one token behind a C function that ctypes can call. Its source (vlejd/macko_spmv, MIT) is no part of
// this project: see macko.py for how to build this file with it.

#include <cuda_fp16.h>

#include "kernels.cuh"

extern "C" int macko_product(int out, int in, const void* values, const void* deltas, const void* rows, const void* x,
                             void* y, void* stream) {
    macko_spmv<false><<<(out + BLOCK_SIZE - 1) / BLOCK_SIZE, dim3(WARP_SIZE, BLOCK_SIZE), 0, (cudaStream_t)stream>>>(
        (const __half*)values, (const unsigned char*)deltas, (const int*)rows, (const __half*)x, out, in, 1.0f, 0.0f,
        (__half*)y);
    return cudaGetLastError();
}
